"""What the commands that apply a model have in common: which models they refuse, and what they say of sequences."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from labelled import finetune
from safetensors.torch import load_file, save_file

import pretrain
from pretrain.cli import main
from pretrain.downstream.contact_regression import write_regression
from pretrain.downstream.load import checkpoint_of
from pretrain.errors import UserError
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder

LONG = "ACDEFGHIKLMNPQRSTVWY" * 6


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a command that applies a model to one sequence and writes into ``out``."""

    def arguments(name: str, model: Path, sequence: str = "MKTALVE") -> list[str]:
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (tmp_path / "my.fasta").write_text(f">one\n{sequence}\n")
        (tmp_path / "assay.csv").write_text("mutant\n" + f"{sequence[3]}4G\n{sequence[4]}5W\n")
        if not (tmp_path / "six.safetensors").exists():
            write_regression(ContactRegression(torch.ones(6), torch.tensor(0.0)), tmp_path / "six.safetensors", {})
        fasta, regression = str(tmp_path / "my.fasta"), str(tmp_path / "six.safetensors")
        suffix, *given = {
            "embed": [".npz", fasta],
            "contacts": [".npz", fasta, "--regression", regression],
            "fill": [".csv", f"<mask>{sequence[1:]}"],
            "score": [".csv", str(tmp_path / "assay.csv"), "--sequence", sequence],
            "validate": [".json", fasta],
        }[name]
        return [name, str(model), *given, "--out", str(out / f"x{suffix}")]

    return arguments


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert main(arguments) == 2
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("pretrain: error"))
    return line


@pytest.mark.parametrize("name", ["embed", "contacts", "fill", "score", "validate"])
def test_a_model_that_went_astray_gives_no_figures(
    name: str, protein_model: Path, command: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    astray = tmp_path / "astray"
    shutil.copytree(protein_model, astray)
    tensors = load_file(astray / "model.safetensors")
    tensors["esm.encoder.layer.0.attention.self.query.bias"][0] = float("nan")
    save_file(tensors, astray / "model.safetensors")
    line = refusal(command(name, astray), capfd)
    assert line.endswith("the model's outputs are not finite; take an earlier checkpoint")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_fine_tuned_model_is_the_best_of_its_run_and_is_asked_about_no_masks(
    pretrained: Path,
    config: Callable[..., Path],
    command: Callable[..., list[str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    # A learning rate of next to nothing: no validation is better than the first by more than rounding.
    settings = {"early_stopping": 1, "validate_every_n_steps": 2, "model__learning_rate": 1e-30}
    assert finetune("-c", config(trainer__max_steps=40, **settings), "--from", pretrained, "--run", run) == 0
    result = json.loads((run / "result.json").read_text())
    assert checkpoint_of(run)["global_step"] == result["best_step"] < result["steps"]
    for model in (run, run / "checkpoints" / "last.ckpt"):
        for name in ("fill", "score", "validate"):
            line = refusal(command(name, model), capfd)
            assert f"{model}: was fine-tuned: its masked-LM head no longer fits" in line
            assert line.endswith(f"give the pre-trained model ({pretrained})")
    assert list((tmp_path / "out").iterdir()) == []
    assert main(command("embed", run)) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    with pytest.raises(UserError, match="is EsmForSequenceClassification without masked-LM head; give the run"):
        pretrain.load(tmp_path / "exported")


@pytest.mark.parametrize("name", ["embed", "contacts", "fill", "score"])
def test_sequences_longer_than_those_of_training_are_taken_whole_and_counted(
    name: str, protein_model: Path, command: Callable[..., list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(command(name, protein_model)) == 0
    assert "longer than" not in capfd.readouterr().out
    shutil.rmtree(tmp_path / "out")
    assert main(command(name, protein_model, LONG)) == 0
    count = 2 if name == "score" else 1  # variants of one sequence
    said = f"  {count} longer than 100 tokens: taken whole, though the model was trained on no longer ones"
    assert said in capfd.readouterr().out.splitlines()


def test_an_argument_that_is_no_utf8_is_one_line(
    protein_model: Path, text_model: Path, command: Callable[..., list[str]], capfd: pytest.CaptureFixture[str]
) -> None:
    bad = "MK\udcffALV"  # as Python reads the byte 0xff in an argument
    score = command("score", protein_model)
    score[score.index("--sequence") + 1] = bad
    assert "the wild type has" in refusal(score, capfd)
    assert "text 1 has" in refusal(["fill", str(protein_model), f"<mask>{bad}"], capfd)
    assert "text 1 has" in refusal(["fill", str(text_model), f"<mask>{bad}"], capfd)
    for model in (protein_model, text_model):
        with pytest.raises(UserError, match="sequence 0 has"):
            pretrain.load(model).embed([bad])


@pytest.mark.parametrize("name", ["embed", "contacts", "fill", "score", "validate"])
def test_a_sequence_too_long_for_the_memory_is_one_line(
    name: str,
    protein_model: Path,
    command: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def ask_for_too_much(*given: object) -> None:
        torch.empty(2**58)

    def ask_a_gpu_for_too_much(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(Encoder, "_embed", ask_for_too_much)
    line = refusal(command(name, protein_model), capfd)
    assert "this machine has too little memory for the model and the longest sequence; give shorter ones" in line
    assert ("(--max_length N" in line) == (name in ("embed", "validate"))
    monkeypatch.setattr(Encoder, "_embed", ask_a_gpu_for_too_much)
    line = refusal(command(name, protein_model), capfd)
    assert "the GPU has too little memory" in line
    assert line.endswith("or leave it out, or give --device cpu")
    assert list((tmp_path / "out").iterdir()) == []


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    protein_model: Path, command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Encoder, "_embed", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(command("embed", protein_model))

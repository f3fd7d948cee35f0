"""The callback that watches structures and variants in pre-training: right figures, and training does not notice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from folds import hairpin, write
from test_resume import equal, events, figures, final_state, kill

import pretrain
from pretrain.cli import main
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.downstream.biology import Biology, sharing_weights
from pretrain.downstream.contact_regression import write_regression
from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder

CONFIGS = Path(__file__).parents[2] / "configs"
BIOLOGY = "pretrain.downstream.biology.Biology"
SEQUENCES = [
    "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQ",
    "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEG",
    "ACDEFGHIKLMNPQRSTVWYACDEFGHIKLMN",
]
ASSAY = (
    "mutant,mutated_sequence,DMS_score\nA4G,MKTGYIAK,0.5\nK2R:A7E,MRTAYIEK,-1.2\nI6L,MKTAYLAK,0.9\nY5W,MKTAWIAK,0.1\n"
)


@pytest.fixture
def watched(tmp_path: Path) -> dict[str, object]:
    """What is evaluated: a hairpin, after a fit on two others, and a table of variants."""
    for name, sequence in zip(("evaluated", "first", "second"), SEQUENCES, strict=True):
        (tmp_path / name).mkdir()
        write(hairpin(sequence), tmp_path / name / f"{name}.pdb")
    (tmp_path / "assay.csv").write_text(ASSAY)
    return {
        "structures": str(tmp_path / "evaluated"),
        "fit_on": [str(tmp_path / "first"), str(tmp_path / "second/second.pdb")],
        "variants": str(tmp_path / "assay.csv"),
    }


@pytest.fixture
def overlay(tmp_path: Path, watched: dict[str, object]) -> Path:
    """Every fourth step."""
    callback = {"class_path": BIOLOGY, "init_args": {"every_n_steps": 4, **watched}}
    (tmp_path / "biology.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return tmp_path / "biology.yaml"


def biology(run: Path) -> dict[tuple[int, str], float]:
    return {key: value for key, value in figures(run).items() if key[1].startswith("biology/")}


def test_training_does_not_notice_and_figures_stand_at_their_steps_in_every_logger(
    tiny: Callable[..., Path], fit: Callable[..., int], overlay: Path, tmp_path: Path
) -> None:
    config, plain, watching = tiny(), tmp_path / "plain", tmp_path / "watching"
    assert fit("-c", config, "--run", plain) == 0
    assert fit("-c", config, "-c", overlay, "--run", watching) == 0
    assert equal(final_state(plain), final_state(watching))
    found = biology(watching)
    assert {key: value for key, value in figures(watching).items() if key not in found} == figures(plain)
    tops = [f"biology/{top}/{span}" for top in ("p_at_l", "p_at_l2", "p_at_l5", "chance") for span in ("short", "long")]
    names = {*tops, "biology/spearman", "biology/spearman/assay"}
    for step in (3, 7, 9):  # every fourth, and the last
        assert names <= {name for at, name in found if at == step}
    assert {step for step, _ in found} == {3, 7, 9}
    logged = events(watching, "biology/spearman")
    assert logged == [(step, pytest.approx(found[step, "biology/spearman"])) for step in (3, 7, 9)]


def test_the_last_figures_are_those_of_the_commands(
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    overlay: Path,
    watched: dict[str, object],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(), "-c", overlay, "--run", run) == 0
    capfd.readouterr()
    found = {name: value for (step, name), value in biology(run).items() if step == 9}
    given = ["--structures", str(watched["structures"]), "--fit", *watched["fit_on"]]  # type: ignore[misc]
    assert main(["contacts", str(run), *given]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith(("  short", "  long"))]
    for span, *_, at_l, at_l2, at_l5, chance in lines:
        expected = [f"{found[f'biology/{top}/{span[:-1]}']:.3f}" for top in ("p_at_l", "p_at_l2", "p_at_l5", "chance")]
        assert [at_l, at_l2, at_l5, chance] == expected
    assert main(["score", str(run), str(watched["variants"]), "--out", str(tmp_path / "scored.csv")]) == 0
    assert f"Spearman {found['biology/spearman']:.3f} with DMS_score" in capfd.readouterr().out
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported/README.md").read_text()
    assert f"| Contacts, short range | P@L {found['biology/p_at_l/short']:.3f}, " in card
    assert f"| Variants of `assay` | Spearman {found['biology/spearman/assay']:.3f}, zero-shot |" in card
    assert "Not evaluated" not in card


def test_a_killed_and_continued_run_has_the_same_figures(
    tiny: Callable[..., Path], fit: Callable[..., int], overlay: Path, tmp_path: Path
) -> None:
    config, whole, killed = tiny(), tmp_path / "whole", tmp_path / "killed"
    assert fit("-c", config, "-c", overlay, "--run", whole) == 0
    assert fit("-c", config, "-c", overlay, "--run", killed, *kill("batch_end", 17)) != 0
    assert fit("-c", config, "-c", overlay, "--run", killed) == 0
    assert equal(final_state(whole), final_state(killed))
    assert figures(whole) == figures(killed)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_log_the_figures_of_their_weights_once(
    strategy: str, tiny: Callable[..., Path], fit: Callable[..., int], overlay: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    two = ("-c", CONFIGS / f"{strategy}.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", 2)
    assert fit("-c", tiny(), "-c", overlay, "--run", run, *two, processes=2) == 0
    found = {name: value for (step, name), value in biology(run).items() if step == 9}
    (callback,) = yaml.safe_load(overlay.read_text())["trainer"]["callbacks"]
    expected = Biology(**callback["init_args"]).evaluate(pretrain.load(run))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_second_encoder_shares_the_first_ones_memory_and_takes_no_random_number() -> None:
    encoder = Encoder(EncoderConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)).train()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    view = sharing_weights(encoder, ProteinTokenizer())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    for (name, ours), (other, theirs) in zip(encoder.named_parameters(), view.named_parameters(), strict=True):
        assert name == other
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.requires_grad
        assert not theirs.requires_grad
    assert encoder.training
    assert not view.training
    view.embed(["MKT"])


def test_a_model_that_went_astray_has_no_figures(watched: dict[str, object], tmp_path: Path) -> None:
    encoder = Encoder(EncoderConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    encoder.blocks[1].qkv.weight.data.fill_(float("nan"))
    callback = Biology(**watched)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not finite"):
        callback.evaluate(sharing_weights(encoder, ProteinTokenizer()))
    kept = tmp_path / "regression.safetensors"
    write_regression(ContactRegression(torch.ones(4), torch.zeros(())), kept, {})
    callback = Biology(structures=str(watched["structures"]), regression=str(kept))
    with pytest.raises(UserError, match="not finite"):
        callback.evaluate(sharing_weights(encoder, ProteinTokenizer()))
    encoder.reset_parameters()
    assert set(callback.evaluate(sharing_weights(encoder, ProteinTokenizer()))) == {
        f"biology/{top}/{span}"
        for top in ("p_at_l", "p_at_l2", "p_at_l5", "chance")
        for span in ("short", "medium", "long")
    }


def test_mistakes_end_the_run_before_it_begins(
    tiny: Callable[..., Path], watched: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    structures, fit_on = str(watched["structures"]), str(tmp_path / "first")
    (tmp_path / "unmeasured.csv").write_text("mutant,mutated_sequence\nA4G,MKTGYIAK\n")
    (tmp_path / "wrong.csv").write_text("mutant,mutated_sequence,DMS_score\nA4G,MKTGYIAK,1\nW1G,GKTAYIAK,1\n")
    cases = {
        "nothing to evaluate": [],
        "give either fit_on or regression": ["structures", structures],
        "holds no PDB or mmCIF files": ["structures", str(tmp_path), "fit_on", fit_on],
        "has no measured effects (column DMS_score)": ["variants", str(tmp_path / "unmeasured.csv")],
        "wrong.csv:3: ": ["variants", str(tmp_path / "wrong.csv")],
        "give one of masked-marginals": ["variants", str(watched["variants"]), "method", "guess"],
        "every_n_steps is 0": ["variants", str(watched["variants"]), "every_n_steps", "0"],
        "two tables of variants have the same name": ["variants", f"[{watched['variants']}, {watched['variants']}]"],
    }
    for reason, options in cases.items():
        pairs = zip(options[::2], options[1::2], strict=True)
        given = [f"--trainer.callbacks.{name}={value}" for name, value in pairs]
        run = tmp_path / "run"
        code = main(["fit", "-c", str(tiny()), "--run", str(run), f"--trainer.callbacks+={BIOLOGY}", *given])
        error = capfd.readouterr().err
        assert code == 2, error
        assert reason in error.splitlines()[-1], error
        assert not run.exists()


def test_a_run_of_text_is_refused(
    tiny: Callable[..., Path],
    text_model: Path,
    watched: dict[str, object],
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    (tmp_path / "text.txt").write_text("The state of the union is strong.\n" * 50)
    text = {"data__train": str(tmp_path / "text.txt"), "data__tokenizer": str(text_model / "tokenizer.json")}
    given = [f"--trainer.callbacks+={BIOLOGY}", f"--trainer.callbacks.variants={watched['variants']}"]
    arguments = ["-c", str(tiny(data__validation=None, **text)), "--run", str(tmp_path / "run"), *given]
    assert main(["fit", *arguments]) == 2
    assert "this is one of text" in capfd.readouterr().err

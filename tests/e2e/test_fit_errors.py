"""A mistake ends in one line that says what was found and what to do, with exit code 2 and nothing half-written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml

from pretrain.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("pretrain: error: ")]
    assert len(errors) == 1
    assert errors[0] == lines[-1], "something follows the error"
    return errors[0].removeprefix("pretrain: error: ")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def write(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


CASES = {
    "no such config": (lambda tiny: ["-c", "missing.yaml"], ["missing.yaml"]),
    "no such recipe": (
        lambda tiny: ["-c", "quikstart"],
        ["quikstart: no such file, and no recipe of that name; did you mean quickstart? `pretrain recipes` lists"],
    ),
    "unknown key": (
        lambda tiny: ["-c", tiny(model__lerning_rate=1.0)],
        ["lerning_rate", "did you mean model.learning_rate?"],
    ),
    "option of the trainer": (lambda tiny: ["-c", tiny(), "--max_steps", "5"], ["did you mean --trainer.max_steps?"]),
    "option with a hyphen": (lambda tiny: ["-c", tiny(), "--allow-change"], ["did you mean --allow_change?"]),
    "Lightning's optimizer": (lambda tiny: ["-c", tiny(), "--optimizer", "SGD"], ["did you mean --model.optimizer?"]),
    "Lightning's schedule": (
        lambda tiny: ["-c", tiny(), "--lr_scheduler", "StepLR"],
        ["did you mean --model.schedule?"],
    ),
    "wrong type": (lambda tiny: ["-c", tiny(data__max_length="long")], ["data.max_length", "long"]),
    "missing source": (lambda tiny: ["-c", tiny(data__train="no.fasta")], ["no.fasta: no such file", "give"]),
    "empty source": (
        lambda tiny: ["-c", tiny(data__train=write("empty.fasta", b""))],
        ["empty.fasta: is empty; at least one sequence is needed"],
    ),
    "no FASTA": (
        lambda tiny: ["-c", tiny(data__train=write("a.fasta", b"MKV\n"))],
        ["a.fasta:1: not FASTA: a header line that begins with '>' is expected, found 'MKV'"],
    ),
    "unknown residue": (
        lambda tiny: ["-c", tiny(data__train=write("b.fasta", b">x\nMK\n>y\nMK1V\n"))],
        ["b.fasta:3: record 'y' has '1' at position 3; allowed: the letters A-Z, '-' and '.'"],
    ),
    "step too small": (
        lambda tiny: ["-c", tiny(trainer__accumulate_grad_batches=16)],
        ["data.global_batch_tokens is 512", "1 processes x 16 micro-batches", "at least 1024, or at most 8 packs"],
    ),
    "no steps": (lambda tiny: ["-c", tiny(trainer__max_steps=-1)], ["trainer.max_steps is -1"]),
    "nothing to keep": (
        lambda tiny: ["-c", tiny(checkpoint__keep_best=0)],
        ["checkpoint.keep_best is 0; give a positive number, or null for none"],
    ),
    "interval of Lightning's": (
        lambda tiny: ["-c", tiny(trainer__val_check_interval=7)],
        ["trainer.val_check_interval is 7, which a run cannot have; give --validate_every_n_steps instead"],
    ),
    "directory of Lightning's": (
        lambda tiny: ["-c", tiny(trainer__default_root_dir="here")],
        ["trainer.default_root_dir is here, which a run cannot have; give --run instead"],
    ),
    "epochs": (
        lambda tiny: ["-c", tiny(), "--trainer.max_epochs", "2"],
        ["trainer.max_epochs is 2, which a run cannot have; give --trainer.max_steps instead"],
    ),
    "precision that Lightning would change": (
        lambda tiny: ["-c", tiny(), "--trainer.precision", "16-mixed"],
        ["trainer.precision is 16-mixed; weights are kept in float32: give bf16-mixed, or 32-true (CPU)"],
    ),
    "abbreviated option": (
        lambda tiny: ["-c", tiny(), "--trainer.max_step", "4"],
        ["did you mean --trainer.max_steps?"],
    ),
    "misspelt key in a file": (
        lambda tiny: ["-c", tiny(modle__learning_rate=1.0)],
        ["Option 'modle.learning_rate' is not accepted; did you mean model.learning_rate?"],
    ),
    "part of an epoch": (
        lambda tiny: ["-c", tiny(trainer__limit_train_batches=5)],
        ["trainer.limit_train_batches is 5, which a run cannot have; give --trainer.max_steps instead"],
    ),
    "trial of Lightning's": (
        lambda tiny: ["-c", tiny(trainer__fast_dev_run=True)],
        ["trainer.fast_dev_run is True", "give --trainer.max_steps and another --run instead"],
    ),
    "time": (
        lambda tiny: ["-c", tiny(), "--trainer.max_time", "00:01:00:00"],
        ["trainer.max_time is 00:01:00:00", "`timeout -s USR1 1h pretrain fit ...`"],
    ),
    "processes that Python starts": (
        lambda tiny: ["-c", tiny(), "--trainer.devices", "2", "--trainer.strategy", "ddp_fork"],
        ["trainer.strategy is DDPStrategy, with processes that Python starts", "add -c configs/ddp.yaml"],
    ),
    "empty packs": (
        lambda tiny: ["-c", tiny(data__validation_pack_tokens=0)],
        ["data.validation_pack_tokens is 0; give a positive number of tokens"],
    ),
    "fewer than no workers": (lambda tiny: ["-c", tiny(data__num_workers=-1)], ["data.num_workers is -1; give 0"]),
    "going back after no spike": (
        lambda tiny: ["-c", tiny(spikes={"threshold": None, "rewind": True})],
        ["spikes.rewind goes back after a spike, and spikes.threshold is null; give one, such as 10"],
    ),
    "no patience": (lambda tiny: ["-c", tiny(max_sick_steps_in_a_row=0)], ["max_sick_steps_in_a_row is 0; give 1"]),
    "head size": (
        lambda tiny: ["-c", tiny(model__encoder={"hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 4})],
        ["hidden_size 30", "give a multiple of 8"],
    ),
    "no tokenizer": (lambda tiny: ["-c", tiny(data__tokenizer="none.json")], ["tokenizer 'none.json' not found"]),
    "no config at all": (lambda tiny: [], ["give -c CONFIG"]),
    "strategy without its accelerator": (
        lambda tiny: ["-c", tiny(trainer__strategy="fsdp")],
        ["the trainer's settings do not work here: The strategy `fsdp` requires a GPU", "change them"],
    ),
    "strategy of another kind": (
        lambda tiny: [
            "-c",
            tiny(trainer__strategy={"class_path": "pytorch_lightning.strategies.ModelParallelStrategy"}),
        ],
        ["trainer.strategy is ModelParallelStrategy", "add -c configs/ddp.yaml or -c configs/fsdp.yaml"],
    ),
    "another precision": (
        lambda tiny: ["-c", tiny(), "--trainer.precision", "64"],
        ["trainer.precision is 64-true; weights are kept in float32: give bf16-mixed, or 32-true (CPU)"],
    ),
    "run is a file": (lambda tiny: ["-c", tiny(), "--run", write("run", b"")], ["run: is a file"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(
    case: str, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    build, expected = CASES[case]
    arguments = build(tiny)
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    message = error_of(capsys, "fit", *arguments)
    assert all(part in message for part in expected), message
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    assert not any(path.is_dir() for path in Path().iterdir())


def test_more_processes_than_gpus_and_other_ones_than_were_started_are_told_in_one_line(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as one_gpu:
        for place in ("pytorch_lightning.accelerators.cuda", "lightning_fabric.accelerators.cuda"):
            one_gpu.setattr(f"{place}.num_cuda_devices", lambda: 1, raising=False)
        message = error_of(capsys, "fit", "-c", tiny(trainer__accelerator="gpu", trainer__devices=2))
    assert "You requested gpu: [0, 1] But your machine only has: [0]" in message
    started = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**started, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, value)
    for overlay in ("ddp", "fsdp"):
        message = error_of(capsys, "fit", "-c", tiny(), "-c", CONFIGS / f"{overlay}.yaml", "--trainer.devices", 1)
        assert "`devices=1` and `num_nodes=1`" in message
        assert "does not match the world size (2)" in message
    assert not list(Path().iterdir())


def test_another_config_in_the_same_run_is_refused_by_class_of_setting(
    tiny: Callable[..., Path], fit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("-c", tiny(), "--run", Path("run").absolute()) == 0
    kept = Path("run/config.yaml").read_bytes()
    continued = ("--run", "run", "--trainer.max_steps", 12)
    # identity: never
    assert "model.encoder.hidden_size 16, this config has 32" in error_of(
        capsys, "fit", "-c", tiny(), *continued, "--model.encoder.hidden_size", 32, "--allow_change", "true"
    )
    assert "data.long_sequences 'crop', this config has 'split'" in error_of(
        capsys, "fit", "-c", tiny(), *continued, "--data.long_sequences", "split", "--allow_change", "true"
    )
    assert "seed_everything 7" in error_of(capsys, "fit", "-c", tiny(seed_everything=8), *continued)
    # history: only when allowed
    message = error_of(capsys, "fit", "-c", tiny(), *continued, "--model.learning_rate", 0.5)
    assert "model.learning_rate: 0.01 -> 0.5; trainer.max_steps: 10 -> 12" in message
    assert "add --allow_change to continue" in message
    masking = ("--data.mlm_probability", "[0.1,0.3]", "--data.mask_unit", "span", "--data.mean_span_length", 5)
    message = error_of(capsys, "fit", "-c", tiny(), *continued, *masking)
    for change in (
        "mlm_probability: 0.15 -> [0.1, 0.3]",
        "mask_unit: 'token' -> 'span'",
        "mean_span_length: None -> 5.0",
    ):
        assert f"data.{change}" in message
    assert Path("run/config.yaml").read_bytes() == kept
    # free: always
    assert fit("-c", tiny(), "--run", Path("run").absolute(), "--trainer.accumulate_grad_batches", 1) == 0


def test_a_run_of_a_version_that_knew_fewer_settings_continues(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(), "--run", run) == 0
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for part, name in (
        ("data", "long_sequences"),
        ("data", "mask_unit"),
        ("model", "optimizer"),
    ):
        del settings[part][name]
    del settings["spikes"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert fit("-c", tiny(), "--run", run, "--trainer.accumulate_grad_batches", 1) == 0
    other = ("--data.long_sequences", "split", "--trainer.max_steps", 12, "--allow_change")
    assert "long_sequences 'crop', this config has 'split'" in error_of(
        capsys, "fit", "-c", tiny(), "--run", run, *other
    )


def test_an_allowed_change_of_history_takes_effect_and_is_recorded(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    from pretrain.train.checkpoint import read_checkpoint

    run = tmp_path / "run"
    assert fit("-c", tiny(), "--run", run) == 0
    changed = ("--model.learning_rate", 0.5, "--trainer.max_steps", 12, "--allow_change", "true")
    assert fit("-c", tiny(), "--run", run, *changed) == 0
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 12
    rate = 0.5 * (3 / 12) ** 0.5
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(rate)
    start = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    assert {"name": "model.learning_rate", "was": 0.01, "now": 0.5} in start["changes"]


def test_a_checkpoint_of_other_data_is_refused(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", tiny()
    assert fit("-c", config, "--run", run) == 0
    other = write("other.fasta", b">a\nMKVL\n>b\nMKVV\n")
    message = error_of(capsys, "fit", "-c", tiny(data__train=other), "--run", run, "--trainer.max_steps", 12,
                       "--allow_change", "true")  # fmt: skip
    assert "the checkpoint was made with corpus" in message


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(), "--run", run) == 0
    newest = (run / "checkpoints" / "last.ckpt").resolve()
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert main(["fit", "-c", str(tiny()), "--run", str(run)]) == 0
    output = capsys.readouterr().out
    assert f"passed over: {newest}: not a complete checkpoint" in output
    assert "continues after step 9 of 10" in output


def test_a_finished_run_says_so_and_changes_nothing(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(), "--run", run) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["fit", "-c", str(tiny()), "--run", str(run)]) == 0
    assert "finished already (step 10 of 10)" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_result_of_an_earlier_end_does_not_finish_a_run(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(trainer__max_steps=4), "--run", run) == 0
    earlier = (run / "result.json").read_text()
    assert fit("-c", tiny(), "--run", run, "--allow_change") == 0
    (run / "result.json").write_text(earlier)  # as where another machine went on, and ended before its result
    assert main(["fit", "-c", str(tiny()), "--run", str(run)]) == 0
    assert "finished already" not in capsys.readouterr().out
    assert json.loads((run / "result.json").read_text())["steps"] == 10


def test_too_little_memory_is_told_in_one_line(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(pl.Trainer, "fit", refuse)
    assert main(["fit", "-c", str(tiny()), "--run", str(tmp_path / "run")]) == 2
    assert "run: this machine has too little memory for a pack of this model; give more" in capsys.readouterr().err


def test_debug_shows_the_traceback_and_without_it_there_is_none(tmp_path: Path) -> None:
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pretrain", *options, "prepare", "missing.fasta", "--out", "out"]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ)

    plain, debug = run(), run("--debug")
    assert (plain.returncode, plain.stderr) == (2, plain.stderr.splitlines(keepends=True)[-1])
    assert plain.stderr.startswith("pretrain: error: missing.fasta: no such file")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


def test_a_run_beyond_max_steps_says_so(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(trainer__max_steps=4), "--run", run) == 0
    message = error_of(capsys, "fit", "-c", tiny(trainer__max_steps=3), "--run", run, "--allow_change", "true")
    assert "stands at step 4, beyond trainer.max_steps 3; give at least 4" in message


@pytest.mark.parametrize("steps", [4, 6])
def test_other_sequences_are_refused_and_leave_the_run_as_it_was(
    steps: int,
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    proteins: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where the run is finished, and there would be nothing left to train."""
    run = tmp_path / "run"
    assert fit("-c", tiny(trainer__max_steps=4), "--run", run) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other = tmp_path / "other.fasta"
    other.write_text("".join(proteins.read_text().splitlines(keepends=True)[2:]))
    config = tiny(trainer__max_steps=steps, data__train=str(other))
    assert "was made with corpus" in error_of(capsys, "fit", "-c", config, "--run", run, "--allow_change", "true")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_killed_between_its_last_checkpoint_and_its_result_gets_its_result(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run, config = tmp_path / "run", tiny(trainer__max_steps=4)
    assert fit("-c", config, "--run", run) == 0
    result, logged = (run / "result.json").read_text(), (run / "metrics.csv").read_text()
    (run / "result.json").unlink()
    assert fit("-c", config, "--run", run) == 0
    assert (run / "result.json").read_text() == result
    assert (run / "metrics.csv").read_text() == logged


def test_a_finished_run_whose_settings_change_is_validated_anew(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(data__validation=None), "--run", run) == 0
    assert (
        main(["fit", "-c", str(tiny(data__validation=None)), "--run", str(run), "--trainer.precision", "32-true"]) == 0
    )
    assert "val/loss" not in json.loads((run / "result.json").read_text())
    assert fit("-c", tiny(), "--run", run, "--allow_change", "true") == 0
    assert "val/loss" in json.loads((run / "result.json").read_text())
    assert ",val/loss," in (run / "metrics.csv").read_text()
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["changes"][0]["name"] == "data.validation"

"""`pretrain finetune`: the pre-training path with labels; what is trained, resume, and what a run leaves."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from labelled import finetune, read_csv
from test_resume import equal, figures, kill

from pretrain import load
from pretrain.cli import main
from pretrain.downstream.finetune import predict
from pretrain.train.checkpoint import read_checkpoint

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "task", ["regression", pytest.param("binary", marks=SLOW), pytest.param("multilabel", marks=SLOW), "token"]
)
def test_a_run_learns_tells_of_its_test_split_predicts_and_is_inspected(
    task: str, pretrained: Path, config: Callable[..., Path], tables: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    steps = {"trainer__max_steps": 30, "checkpoint__every_n_steps": 10, "validate_every_n_steps": 10}
    path = config(task, **steps)
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    result = json.loads((run / "result.json").read_text())
    metric = {"regression": "spearman", "multilabel": "auroc"}.get(task, "mcc")
    figure = result["test"][metric]
    assert figure["value"] > 0.6
    low, high = figure["interval"]
    assert low <= figure["value"] <= high
    assert (run / "test.png").stat().st_size > 1000
    told = capsys.readouterr().out
    assert f"{metric:10}" in told

    for suffix in ("csv", "parquet"):
        out = tmp_path / f"predictions.{suffix}"
        assert main(["predict", str(run), str(tables / f"{task}.csv"), "--out", str(out), "--pack_tokens", "300"]) == 0
    (tmp_path / "unnamed").write_bytes((tables / f"{task}.csv").read_bytes())
    given = [str(run), str(tmp_path / "unnamed"), "--kind", "csv", "--pack_tokens", "300"]
    assert main(["predict", *given, "--out", str(tmp_path / "same.csv")]) == 0
    assert (tmp_path / "same.csv").read_bytes() == (tmp_path / "predictions.csv").read_bytes()
    rows = read_csv(tmp_path / "predictions.csv")
    truth = read_csv(tables / f"{task}.csv")
    assert [row["id"] for row in rows] == [row["id"] for row in truth]
    assert pq.read_table(tmp_path / "predictions.parquet").column_names == list(rows[0])
    held_out = [i for i, row in enumerate(truth) if row["split"] == "test"]
    if task == "binary":
        right = np.mean([rows[i]["prediction"] == truth[i]["label"] for i in held_out])
        assert right == pytest.approx(result["test"]["accuracy"]["value"])
    if task == "token":
        assert [len(row["prediction"]) for row in rows] == [len(row["sequence"]) for row in truth]
        pairs = [
            p == t for i in held_out for p, t in zip(rows[i]["prediction"], truth[i]["label"], strict=True) if t != "?"
        ]
        assert np.mean(pairs) == pytest.approx(result["test"]["accuracy"]["value"])
    if task == "regression":
        errors = [float(rows[i]["prediction"]) - float(truth[i]["label"]) for i in held_out]
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(result["test"]["rmse"]["value"], rel=1e-4)

    capsys.readouterr()
    assert main(["inspect", str(run), "--picture", str(tmp_path / "curves.png")]) == 0
    assert metric in capsys.readouterr().out
    assert main(["inspect", str(run), "--audit"]) == 0
    assert "consumed exactly once" in capsys.readouterr().out
    assert load(run).config == load(pretrained).config
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    assert "finished already" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_killed_and_continued_run_has_the_bits_of_an_uninterrupted_one(
    pretrained: Path, config: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    given = ("-c", config("token", model__tune="lora", trainer__accumulate_grad_batches=2), "--from", source, "--run")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert fit(*given, straight, command="finetune") == 0
    assert fit(*given, broken, *kill("batch_end", 9), command="finetune") == -9
    shutil.rmtree(source)  # the run holds all that it needs
    assert fit(*given, broken, command="finetune") == 0
    one, other = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (straight, broken))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "FineTuneDataModule"):
        assert equal(one[name], other[name]), name
    assert figures(straight) == figures(broken)
    assert json.loads((straight / "result.json").read_text()) == json.loads((broken / "result.json").read_text())


def test_losses_and_metrics_do_not_depend_on_processes_and_micro_batches(
    pretrained: Path, config: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    given = ("-c", config("binary", model__pooling="attention"), "--from", pretrained, "--run")
    assert fit(*given, tmp_path / "one", command="finetune") == 0
    accumulated = (tmp_path / "four", "--trainer.accumulate_grad_batches", 4)
    assert fit(*given, *accumulated, command="finetune") == 0
    two = (tmp_path / "two", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert fit(*given, *two, processes=2, command="finetune") == 0
    one = {key: value for key, value in figures(tmp_path / "one").items() if key[1].startswith(("train/loss", "val/"))}
    for other in ("four", "two"):
        theirs = figures(tmp_path / other)
        assert {key: theirs[key] for key in one} == pytest.approx(one, rel=2e-4, abs=1e-5)


def test_early_stopping_keeps_the_best_checkpoint_and_ends_a_run_which_is_then_finished(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # A learning rate of next to nothing: no validation is better than the first by more than rounding.
    settings = {"early_stopping": 1, "validate_every_n_steps": 2, "checkpoint__keep_best": None}
    path = config(trainer__max_steps=40, model__learning_rate=1e-30, **settings)
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["stopped_early"]
    assert result["best_step"] < result["steps"] < 40
    assert f"{run}: finished\n" in capsys.readouterr().out
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_run_that_was_killed_after_it_had_been_told_to_stop_takes_no_further_step(
    pretrained: Path, config: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"early_stopping": 1, "validate_every_n_steps": 2, "checkpoint__every_n_steps": None}
    path = config(trainer__max_steps=40, model__learning_rate=1e-30, **settings)
    given = ("-c", path, "--from", pretrained, "--run", run)
    assert fit(*given, *kill("saved", 2), command="finetune") == -9  # the first is the best, the second that of the end
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert not (run / "result.json").exists()
    assert fit(*given, command="finetune") == 0
    result = json.loads((run / "result.json").read_text())
    assert result["stopped_early"]
    assert result["steps"] == 4


def test_the_test_split_is_looked_at_once(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, longer = tmp_path / "run", ("--trainer.max_steps", 12, "--allow_change", "true")
    assert finetune("-c", config(), "--from", pretrained, "--run", run) == 0
    other = ("--model.learning_rate", 0.5, "--allow_change", "true")
    for change in (longer, other):
        assert finetune("-c", config(), "--from", pretrained, "--run", run, *change) == 2
        assert "the test split was looked at after step 8" in capsys.readouterr().err


def test_predictions_do_not_depend_on_how_many_sequences_are_in_memory(
    pretrained: Path, config: Callable[..., Path], tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, source = tmp_path / "run", str(tables / "binary.csv")
    assert finetune("-c", config(trainer__max_steps=4), "--from", pretrained, "--run", run) == 0
    whole, cut, table = (tmp_path / name for name in ("whole.csv", "cut.csv", "cut.parquet"))
    assert main(["predict", str(run), source, "--out", str(whole)]) == 0
    monkeypatch.setattr(predict, "_WINDOW", 7)
    for out in (cut, table):
        assert main(["predict", str(run), source, "--out", str(out)]) == 0
    expected = read_csv(whole)
    for rows in (read_csv(cut), pq.read_table(table).to_pylist()):
        for name in ("id", "prediction"):
            assert [row[name] for row in rows] == [row[name] for row in expected]
        shares = [float(row["p(in)"]) for row in rows]
        assert shares == pytest.approx([float(row["p(in)"]) for row in expected], rel=1e-4)


def test_a_record_that_cannot_be_predicted_for_is_named_with_its_file(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.csv"
    assert finetune("-c", config(trainer__max_steps=4), "--from", pretrained, "--run", run) == 0
    for name, sequence in (("one", "MK"), ("two", "M1")):
        (tmp_path / f"{name}.fasta").write_text(f">a\nMK\n>b\n{sequence}\n")
    assert main(["predict", str(run), str(tmp_path / "*.fasta"), "--out", str(out)]) == 2
    assert f"{tmp_path}/two.fasta:3: record 'b' has '1' at position 2" in capsys.readouterr().err
    assert not out.exists()


def test_a_model_whose_outputs_are_not_finite_has_no_result_and_no_predictions(
    pretrained: Path, config: Callable[..., Path], tables: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pretrain.downstream.finetune import model

    outputs, run, out = model.head_outputs, tmp_path / "run", tmp_path / "out.csv"
    monkeypatch.setattr(model, "head_outputs", lambda *given: outputs(*given) * torch.nan)
    for command in (
        ["finetune", "-c", str(config(trainer__max_steps=4)), "--from", str(pretrained), "--run", str(run)],
        ["predict", str(run), str(tables / "binary.csv"), "--out", str(out)],
    ):
        assert main(command) == 2
        assert "outputs are not finite (after step 4)" in capsys.readouterr().err
    assert not out.exists()
    assert not (run / "result.json").exists()


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({"tune": "full"}, ("embedding", "blocks.0", "blocks.1", "norm")),
        ({"tune": "frozen"}, ()),
        ({"tune": "last", "last_layers": 1}, ("blocks.1", "norm")),
        ({"tune": "lora"}, ("blocks.0", "blocks.1")),
    ],
)
def test_what_is_tuned_moves_and_nothing_else(
    settings: dict[str, Any], moves: tuple[str, ...], pretrained: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = config(**{f"model__{name}": value for name, value in settings.items()})
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    before, after = load(pretrained).state_dict(), load(run).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {move for move in moves if any(name.startswith(f"{move}.") for name in moved)} == set(moves)
    assert all(name.startswith(tuple(f"{move}." for move in moves)) for name in moved)


def test_from_scratch_takes_the_shape_alone(pretrained: Path, config: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = config(model__from_scratch=True, model__tune="frozen")
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    before, after = load(pretrained), load(run)
    assert before.config == after.config
    assert not torch.equal(before.embedding.weight, after.embedding.weight)


def test_the_recipe_that_ships_builds_a_run_on_the_data_that_ship(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.downstream.finetune.command import build

    root = Path(__file__).parents[3]
    monkeypatch.chdir(root)
    cli = build(["-c", "configs/finetune_localisation.yaml", "--from", str(pretrained), "--run", str(tmp_path / "run")])
    cli.data.setup("fit")
    assert {split: len(part.corpus) for split, part in cli.data.splits.items()} == {
        "train": 1932, "validation": 359, "test": 780
    }  # fmt: skip
    assert len(cli.data.spec.classes) == 6
    assert not (tmp_path / "run").exists()


def test_a_run_of_the_other_kind_is_told_with_the_command_that_continues_it(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before settings that only one of the two kinds has are found missing or unknown."""
    tuned = tmp_path / "tuned"
    assert finetune("-c", config(trainer__max_steps=4), "--from", pretrained, "--run", tuned) == 0
    assert "labels    binary (positive: out), 2 classes: in, out" in capsys.readouterr().out
    for run, kind, wrong, right in (
        (pretrained, "pre-training", "finetune", "fit"),
        (tuned, "fine-tuning", "fit", "finetune"),
    ):
        for given in (["--run", f"{run}"], [f"--run={run}"], ["-c", f"{run}/config.yaml", "--run", f"{run}"]):
            assert main([wrong, *given]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{run}: is a run of {kind}, which `pretrain {right} -c {run}/config.yaml --run {run}`" in line
        assert main([right, "-c", f"{run}/config.yaml", "--run", f"{run}"]) == 0
        assert "finished already" in capsys.readouterr().out


def test_a_run_whose_config_has_the_defaults_of_another_way_of_tuning_is_refused_in_one_line(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of an earlier version have."""
    run, path = tmp_path / "run", config(trainer__max_steps=4)
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["model"] |= {"last_layers": 1, "lora_rank": 8, "lora_alpha": 16.0}
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    capsys.readouterr()
    for again in (path, run / "config.yaml"):
        assert finetune("-c", again, "--from", pretrained, "--run", run) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "model.last_layers" in line

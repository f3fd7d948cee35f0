"""What a run writes down is complete, exact and under the names that the design promises."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain import EncoderConfig, MLMDataModule, MLMModule
from pretrain.cli import main
from pretrain.train import logging
from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.logging import read_metrics
from pretrain.train.validation import RESIDUE_CLASSES

NAMES = {
    "train/loss",
    "train/perplexity",
    "train/grad_norm",
    "train/sick_steps",
    "val/loss",
    "val/perplexity",
    "val/accuracy",
    *(f"val/accuracy/{name}" for name in RESIDUE_CLASSES),
    "throughput/tokens_per_second",
    "throughput/mfu",
    "throughput/data_wait",
    "data/epoch",
    "data/tokens_seen",
}


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def inverse_sqrt(step: int, peak: float, warmup: int, start: float = 0.0) -> float:
    return start + (peak - start) * step / warmup if step < warmup else peak * math.sqrt(warmup / step)


@pytest.mark.parametrize(("name", "tag"), [(None, "lr-AdamW"), ("learning_rate", "learning_rate")])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_learning_rate_event_an_optimizer_step_with_the_value_of_the_formula(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, name: str | None, tag: str, accumulate: int
) -> None:
    config = tiny(model__scheduler_name=name, model__warmup_init_lr=1e-3, trainer__accumulate_grad_batches=accumulate)
    assert fit("-c", config, "--run", tmp_path / "run") == 0
    logged = scalars(tmp_path / "run")[tag]
    assert [step for step, _ in logged] == list(range(10))
    for step, value in logged:
        assert value == pytest.approx(inverse_sqrt(step, peak=1e-2, warmup=3, start=1e-3), rel=1e-6)


def test_a_run_logs_the_promised_names_once_a_step_to_tensorboard_and_csv(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    assert fit("-c", tiny(), "--run", tmp_path / "run") == 0
    logged = scalars(tmp_path / "run")
    assert set(logged) == NAMES | {"lr-AdamW"}
    for name, points in logged.items():
        expected = [3, 7, 9] if name.startswith("val/") else list(range(10))
        assert [step for step, _ in points] == expected, name
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert {(step, name) for step, name, _ in rows} == {(s, name) for name, points in logged.items() for s, _ in points}
    figures = {(step, name): value for step, name, value in rows}
    assert figures[9, "train/perplexity"] == pytest.approx(math.exp(figures[9, "train/loss"]), rel=1e-5)
    assert 0 < figures[9, "throughput/mfu"] < 1
    assert 0 <= figures[9, "throughput/data_wait"] < 1
    tokens = [figures[step, "data/tokens_seen"] for step in range(10)]
    assert all(0 < b - a <= 512 for a, b in zip([0, *tokens], tokens, strict=False))


def test_the_bar_counts_optimizer_steps_and_shows_what_is_logged(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = tiny(trainer__enable_progress_bar=True, trainer__accumulate_grad_batches=2, validate_every_n_steps=5)
    assert main(["fit", "-c", str(config), "--run", str(run)]) == 0
    figures = {(step, name): value for step, name, value in read_metrics(run / "metrics.csv")}
    shown = capsys.readouterr()
    last = re.split(r"[\r\n]+", shown.err.strip())[-1]
    assert re.match(r"100%.* step 10/10 \[", last), last
    # What was logged of the step before, since the bar moves on before this one's is.
    assert f"loss {figures[8, 'train/loss']:.3f}, lr {inverse_sqrt(10, peak=1e-2, warmup=3):.2e}, " in last
    assert f"{figures[8, 'throughput/tokens_per_second'] / 1000:.1f}k tokens/s" in last
    for step in (5, 10):
        perplexity, accuracy = (figures[step - 1, f"val/{name}"] for name in ("perplexity", "accuracy"))
        line = f"validation after step {step}: perplexity {perplexity:.3f}, accuracy {accuracy:.3f}"
        assert shown.out.count(line) == 1


@pytest.mark.parametrize("accumulate", [2, 5])
def test_what_is_logged_does_not_depend_on_the_micro_batches(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, accumulate: int
) -> None:
    for count in (1, accumulate):
        assert fit("-c", tiny(trainer__accumulate_grad_batches=count), "--run", tmp_path / str(count)) == 0
    whole, split = (scalars(tmp_path / str(count)) for count in (1, accumulate))
    for name in ("train/loss", "train/grad_norm", "val/loss", "data/epoch"):
        assert [s for s, _ in whole[name]] == [s for s, _ in split[name]]
        assert [v for _, v in whole[name]] == pytest.approx([v for _, v in split[name]], rel=1e-4), name


def modules(proteins: Path) -> tuple[MLMModule, MLMDataModule]:
    encoder = EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    data = MLMDataModule(str(proteins), str(proteins), max_length=64, global_batch_tokens=512)
    return MLMModule(encoder, learning_rate=1e-2, warmup_steps=3), data


def test_the_modules_train_in_a_plain_trainer_with_lightnings_own_monitor(proteins: Path, tmp_path: Path) -> None:
    module, data = modules(proteins)
    trainer = pl.Trainer(
        max_steps=6,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[LearningRateMonitor(logging_interval="step")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert scalars(tmp_path)["lr-AdamW"] == [
        (step, pytest.approx(inverse_sqrt(step, peak=1e-2, warmup=3))) for step in range(6)
    ]


def test_a_plain_trainer_without_logger_trains_and_continues_from_its_own_checkpoint(
    proteins: Path, tmp_path: Path
) -> None:
    def train(steps: int, accumulate: int, checkpoint: Path | None) -> MLMModule:
        pl.seed_everything(0, verbose=False)
        module, data = modules(proteins)
        trainer = pl.Trainer(
            max_steps=steps,
            accumulate_grad_batches=accumulate,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.global_step == steps
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    straight = train(6, 1, None)
    train(4, 1, None)
    continued = train(6, 2, tmp_path / "4.ckpt")  # under another accumulation: the same steps, rounded differently
    for ours, theirs in zip(straight.parameters(), continued.parameters(), strict=True):
        assert ours.allclose(theirs, atol=1e-4)


def test_lightnings_own_load_from_checkpoint_gives_the_trained_module_with_its_settings(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    config = tiny(model__betas=[0.9, 0.95], model__decay="matrices", model__activation_checkpointing=True)
    assert fit("-c", config, "--run", tmp_path / "run") == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    module = MLMModule.load_from_checkpoint(path, weights_only=True)
    assert (module.learning_rate, module.warmup_steps) == (1e-2, 3)
    assert (module.betas, module.decay) == ((0.9, 0.95), "matrices")
    assert not module.encoder.activation_checkpointing, "how it is computed is for each machine to say"
    saved = read_checkpoint(path)["state_dict"]
    assert module.state_dict().keys() == saved.keys()
    assert all(tensor.equal(saved[name]) for name, tensor in module.state_dict().items())
    assert MLMModule.load_from_checkpoint(path, weights_only=True, learning_rate=1e-5).learning_rate == 1e-5


def test_a_run_without_logger_trains_without_monitor(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    assert fit("-c", tiny(), "--run", tmp_path / "run", "--trainer.logger", "false") == 0
    assert not list((tmp_path / "run").glob("events.*"))


def test_another_of_lightnings_loggers_has_the_same_figures_beside_the_runs_own(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    csv = {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path / "csv")}}
    assert fit("-c", tiny(trainer__logger=csv), "--run", tmp_path / "run") == 0
    (path,) = (tmp_path / "csv").rglob("metrics.csv")
    head, *rows = path.read_text().splitlines()
    assert {"lr-AdamW", "train/loss", "val/loss"} <= set(head.split(","))
    place = head.split(",").index("train/loss")
    theirs = [float(row.split(",")[place]) for row in rows if row.split(",")[place]]
    assert theirs == pytest.approx([value for _, value in scalars(tmp_path / "run")["train/loss"]], rel=1e-5)


def test_the_monitor_of_learning_rates_remembers_no_more_than_the_last(proteins: Path, tmp_path: Path) -> None:
    monitor = logging.LearningRateMonitor()
    data = MLMDataModule(str(proteins), max_length=64, global_batch_tokens=512)
    module = MLMModule(EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(tmp_path),
        callbacks=[monitor],
        max_steps=6,
        log_every_n_steps=1,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    assert {name: len(past) for name, past in monitor.lrs.items()} == {"lr-AdamW": 1}

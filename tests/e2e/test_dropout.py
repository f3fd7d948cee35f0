"""Dropout: a killed and continued run drops what an uninterrupted one drops; how much is a setting of history."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from test_resume import equal, figures, final_state, kill

from pretrain import EncoderConfig
from pretrain.cli import main
from pretrain.downstream.load import load
from pretrain.errors import UserError
from pretrain.train.checkpoint import AtomicCheckpointIO, read_checkpoint
from pretrain.train.fit import build
from pretrain.train.fit import fit as fit_here

DROPOUT = {"model__encoder__hidden_dropout_prob": 0.2, "model__encoder__attention_probs_dropout_prob": 0.1}


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_a_killed_and_continued_run_drops_what_an_uninterrupted_one_drops(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, activation_checkpointing: bool
) -> None:
    straight, broken, without = tmp_path / "straight", tmp_path / "broken", tmp_path / "without"
    assert fit("-c", tiny(), "--run", without) == 0
    config = tiny(**DROPOUT, model__activation_checkpointing=activation_checkpointing)
    assert fit("-c", config, "--run", straight) == 0
    for place in (("batch_start", 9), ("validation", 1), ("batch_end", 16)):
        assert fit("-c", config, "--run", broken, *kill(*place)) == -9
    assert fit("-c", config, "--run", broken) == 0
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    assert not equal(final_state(straight)["state_dict"], final_state(without)["state_dict"])


def test_each_seed_step_process_and_micro_batch_drops_something_else(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = build(["-c", str(tiny(**DROPOUT)), "--run", "nowhere"])
    module, trainer = cli.model, cli.trainer
    trainer.strategy.connect(module)
    trainer.datamodule = cli.datamodule  # type: ignore[attr-defined]
    module.trainer = trainer
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    drawn = set()
    for seed, rank, step, micro_batch in product((7, 8), (0, 1), (0, 1, 2), (0, 1)):
        cli.datamodule.seed, progress.completed = seed, step
        monkeypatch.setattr(type(trainer), "global_rank", rank)
        module._seed_dropout(2 * step + micro_batch)
        first = float(torch.rand(()))
        module._seed_dropout(2 * step + micro_batch)
        assert float(torch.rand(())) == first
        drawn.add(first)
    assert len(drawn) == 24


def test_how_much_is_dropped_may_change_on_purpose(tiny: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", str(tiny(**DROPOUT)), "--run", str(run), "--trainer.max_steps", "4"]) == 0
    assert load(run).config.hidden_dropout_prob == 0.2
    command = ["-c", str(tiny()), "--run", str(run), "--trainer.max_steps", "4"]
    with pytest.raises(UserError, match=r"hidden_dropout_prob: 0\.2 -> 0\.0.*add --allow_change"):
        fit_here(command)
    assert main(["fit", *command[:-1], "6", "--allow_change"]) == 0
    assert load(run).config.hidden_dropout_prob == 0.0


def test_a_checkpoint_from_before_dropout_continues(tiny: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", str(tiny()), "--run", str(run), "--trainer.max_steps", "4"]) == 0
    path = run / "checkpoints" / "step-000000004.ckpt"
    checkpoint = read_checkpoint(path, mapped=False)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        del checkpoint["hyper_parameters"]["encoder"][name]
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert main(["fit", "-c", str(tiny()), "--run", str(run), "--trainer.max_steps", "6", "--allow_change"]) == 0


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_cannot_be_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=rf"hidden_dropout_prob is {share}; give a share"):
        EncoderConfig(hidden_dropout_prob=share)

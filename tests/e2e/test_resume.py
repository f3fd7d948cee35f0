"""A run that was killed and continued ends with the same bits as one that never stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.logging import read_metrics

STEPS = 10


def final_state(run: Path) -> dict[str, object]:
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == STEPS
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "MLMDataModule")}


def figures(run: Path) -> dict[tuple[int, str], float]:
    """Every logged figure by (step, name), but for those that measure time; fails on a repeated one."""
    rows = [row for row in read_metrics(run / "metrics.csv") if not row[1].startswith("throughput/")]
    by_key = {(step, name): value for step, name, value in rows}
    assert len(by_key) == len(rows), "a figure was logged twice for one step"
    return by_key


def events(run: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def kill(moment: str, number: int) -> list[str]:
    return [
        "--trainer.callbacks+=kill.Kill",
        f"--trainer.callbacks.moment={moment}",
        f"--trainer.callbacks.number={number}",
    ]


# Micro-batches count from the run's first; two make a step, a checkpoint is written after every third step.
KILLS = {
    "inside_an_accumulation_window": [("batch_start", 9)],
    "twice_in_a_row": [("batch_end", 11), ("batch_end", 14)],
    "before_the_first_checkpoint": [("batch_start", 3)],
    "during_a_validation": [("validation", 2)],
}
SLOW = [(2, "before_the_first_checkpoint"), (2, "during_a_validation")]


@pytest.mark.parametrize(
    ("workers", "kills"),
    [
        pytest.param(workers, kills, id=f"{name}-{workers}", marks=[pytest.mark.slow] * ((workers, name) in SLOW))
        for workers in (0, 2)
        for name, kills in KILLS.items()
    ],
)
def test_a_killed_and_continued_run_has_the_bits_of_an_uninterrupted_one(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, workers: int, kills: list[tuple[str, int]]
) -> None:
    # Of packs of 600 rows the project's own kernels compute the products, where they run and are not declined.
    kernels = "torch" if workers else "auto"
    config = tiny(data__num_workers=workers, data__global_batch_tokens=1200, model__cpu_kernels=kernels)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert fit("-c", config, "--run", straight) == 0
    for moment, number in kills:
        assert fit("-c", config, "--run", broken, *kill(moment, number)) == -9
    assert fit("-c", config, "--run", broken) == 0
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    for tag in ("lr-AdamW", "train/loss", "val/loss"):
        assert events(straight, tag) == events(broken, tag)
    assert [step for step, _ in events(broken, "lr-AdamW")] == list(range(STEPS))
    assert [step for step, _ in events(broken, "val/loss")] == [3, 7, 9]

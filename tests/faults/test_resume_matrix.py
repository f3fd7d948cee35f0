"""The resume matrix: however a run is killed, and however often, it ends with the bits of one that never stopped.

The short form is part of every test run; `make faults` runs the whole product of the parameters. ``FAULTS_SEED`` draws
other places to kill at.
"""

import os
import random
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from test_resume import STEPS, equal, figures, final_state, kill

from pretrain.train.ledger import audit

MOMENTS = ("between_steps", "inside_a_window", "during_validation", "during_a_save", "during_prepare")
SHORT = {
    (1, 0, 4, 3, "between_steps"),
    (1, 0, 1, 1, "inside_a_window"),
    (1, 0, 4, 3, "during_a_save"),
    (1, 0, 1, 1, "during_prepare"),
}


def cases() -> Iterator[object]:
    """The whole product; every other case with dropout, so that each value of each axis is met with and without."""
    axes = ((1, 2), (0, 2, 4), (1, 4), (1, 3), MOMENTS)
    for case in product(*axes):
        dropout = 0.2 * (sum(axis.index(value) for axis, value in zip(axes, case, strict=True)) % 2)
        name = "{}ranks-{}workers-{}microbatches-{}kills-{}".format(*case) + "-dropout" * bool(dropout)
        marks = [] if case in SHORT else pytest.mark.slow
        yield pytest.param(*case, dropout, id=name, marks=marks)


def places(moment: str, kills: int, accumulate: int, draw: random.Random) -> list[tuple[str, int]]:
    """Where each of the killed processes dies; see `kill.Kill`."""
    if moment == "between_steps":
        return [("batch_end", step * accumulate - 1) for step in sorted(draw.sample(range(1, STEPS), kills))]
    if moment == "inside_a_window":  # after its first micro-batches, where there are several
        micro_batches = [n for n in range(STEPS * accumulate) if accumulate == 1 or (n + 1) % accumulate]
        end = "batch_start" if accumulate == 1 else "batch_end"
        return [(end, number) for number in sorted(draw.sample(micro_batches, kills))]
    if moment == "during_a_save":
        return [("save", draw.randint(1, 2)) for _ in range(kills)]
    return [({"during_validation": "validation", "during_prepare": "prepare"}[moment], 1)] * kills


@pytest.fixture(scope="session")
def straight_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run that never stopped, once for each setting that changes bits; workers do not."""
    runs: dict[tuple[object, ...], Path] = {}

    def run(fit: Callable[..., int], config: Path, processes: int, *settings: object) -> Path:
        key = (processes, *settings)
        if key not in runs:
            directory = tmp_path_factory.mktemp("straight") / "run"
            arguments = ("-c", config, "--run", directory, "--data.num_workers", 0, *in_processes(processes))
            assert fit(*arguments, processes=processes) == 0
            runs[key] = directory
        return runs[key]

    return run


def in_processes(number: int) -> list[str]:
    return ["--trainer.devices", str(number), "--trainer.strategy", "ddp"] if number > 1 else []


@pytest.mark.parametrize(("processes", "workers", "accumulate", "kills", "moment", "dropout"), list(cases()))
def test_a_run_that_was_killed_ends_with_the_bits_of_one_that_never_stopped(
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    straight_runs: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    workers: int,
    accumulate: int,
    kills: int,
    moment: str,
    dropout: float,
) -> None:
    seed = os.environ.get("FAULTS_SEED", "0")
    draw = random.Random(f"{seed} {processes} {workers} {accumulate} {kills} {moment}")
    config = tiny(
        data__num_workers=workers,
        trainer__accumulate_grad_batches=accumulate,
        model__encoder__hidden_dropout_prob=dropout,
        model__encoder__attention_probs_dropout_prob=dropout / 2,
    )
    straight, broken = straight_runs(fit, config, processes, accumulate, dropout), tmp_path / "broken"
    if moment == "during_prepare":  # so that there is something to prepare
        monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    command = ("-c", config, "--run", broken, *in_processes(processes))
    for place in places(moment, kills, accumulate, draw):
        assert fit(*command, *kill(*place), processes=processes) == -9, f"not killed at {place}"
    assert fit(*command, processes=processes) == 0
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    assert (straight / "ledger.csv").read_bytes() == (broken / "ledger.csv").read_bytes()
    assert "each epoch's sequences consumed exactly once" in audit(broken)

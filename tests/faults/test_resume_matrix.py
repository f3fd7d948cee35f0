"""The resume matrix: however a run is killed, and however often, it ends with the bits of one that never stopped.

The short form is part of every test run; `make faults` runs the whole product of the parameters. ``FAULTS_SEED`` draws
other places to kill at.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
from test_resume import STEPS, equal, figures, final_state, kill

from pretrain.train.ledger import audit

ROOT = Path(__file__).parents[2]
MOMENTS = ("between_steps", "inside_a_window", "during_validation", "during_a_save", "during_prepare")
SHORT = {
    (1, 0, 4, 3, "between_steps"),
    (1, 0, 1, 1, "inside_a_window"),
    (1, 0, 4, 3, "during_a_save"),
    (1, 0, 1, 1, "during_prepare"),
}


def cases() -> Iterator[object]:
    for case in product((1, 2), (0, 2, 4), (1, 4), (1, 3), MOMENTS):
        name = "{}ranks-{}workers-{}microbatches-{}kills-{}".format(*case)
        yield pytest.param(*case, id=name, marks=[] if case in SHORT else pytest.mark.slow)


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


def train(fit: Callable[..., int], processes: int, *arguments: object) -> int:
    """Exit code of ``pretrain fit``; -9 when the first process was killed, and then the others are gone, too."""
    if processes == 1:
        return fit(*arguments)
    settings = ("--trainer.devices", processes, "--trainer.strategy", "ddp")
    command = [sys.executable, "-m", "pretrain", "fit", *map(str, (*arguments, *settings))]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "e2e")])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        return process.wait(200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def straight_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run that never stopped, once for each number of processes and micro-batches: workers change no bit."""
    runs: dict[tuple[int, int], Path] = {}

    def run(fit: Callable[..., int], config: Path, processes: int, accumulate: int) -> Path:
        key = (processes, accumulate)
        if key not in runs:
            directory = tmp_path_factory.mktemp("straight") / "run"
            settings = ("--data.num_workers", 0)
            assert train(fit, processes, "-c", config, "--run", directory, *settings) == 0
            runs[key] = directory
        return runs[key]

    return run


@pytest.mark.parametrize(("processes", "workers", "accumulate", "kills", "moment"), list(cases()))
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
) -> None:
    seed = os.environ.get("FAULTS_SEED", "0")
    draw = random.Random(f"{seed} {processes} {workers} {accumulate} {kills} {moment}")
    config = tiny(data__num_workers=workers, trainer__accumulate_grad_batches=accumulate)
    straight, broken = straight_runs(fit, config, processes, accumulate), tmp_path / "broken"
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))  # so that there is something to prepare
    for place in places(moment, kills, accumulate, draw):
        assert train(fit, processes, "-c", config, "--run", broken, *kill(*place)) == -9, f"not killed at {place}"
    assert train(fit, processes, "-c", config, "--run", broken) == 0
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    assert (straight / "ledger.csv").read_bytes() == (broken / "ledger.csv").read_bytes()
    assert "each epoch's sequences consumed exactly once" in audit(broken)

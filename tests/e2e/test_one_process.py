"""One process trains in a run directory; a second one is refused, and a killed one leaves nothing behind."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.train.run import Run


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, paused, codes = tmp_path / "run", tmp_path / "paused", []
    config = tiny(data__num_workers=1)  # workers outlive a killed parent by seconds
    pause = ["poison.Pause", "--trainer.callbacks.number=9", f"--trainer.callbacks.file={paused}"]
    first = ["-c", config, "--run", run, f"--trainer.callbacks+={pause[0]}", *pause[1:]]
    thread = threading.Thread(target=lambda: codes.append(fit(*first)))
    thread.start()
    while not paused.exists():
        assert thread.is_alive()
        time.sleep(0.05)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert main(["fit", "-c", str(config), "--run", str(run)]) == 2
    owner = (run / ".lock").read_text().strip()
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors == [
        f"pretrain: error: {run}: {owner} trains in this directory; stop it first, or choose another with --run"
    ]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    os.kill(int(owner.split()[1]), signal.SIGKILL)
    thread.join()
    assert codes == [-9]
    with Run(run).locked():  # at once, while the workers live
        pass
    assert fit("-c", config, "--run", run) == 0

"""One process trains in a run directory; a second one is refused, and a killed one leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.lock import locked
from pretrain.train.run import Run


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, paused, codes = tmp_path / "run", tmp_path / "paused", []
    config = tiny(data__num_workers=1)  # workers outlive a killed parent by seconds
    pause = ["poison.Pause", "--trainer.callbacks.number=9", f"--trainer.callbacks.file={paused}"]
    # Nothing is being written when the second one looks.
    first = [
        "-c",
        config,
        "--run",
        run,
        "--checkpoint.in_background",
        "false",
        f"--trainer.callbacks+={pause[0]}",
        *pause[1:],
    ]
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


def test_a_killed_process_takes_its_loader_workers_with_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    paused, config = tmp_path / "paused", tiny(data__num_workers=2, data__global_batch_tokens=65536)
    pause = ["--trainer.callbacks+=poison.Pause", "--trainer.callbacks.number=1", f"--trainer.callbacks.file={paused}"]
    command = [sys.executable, "-m", "pretrain", "fit", "-c", config, "--run", tmp_path / "run", *pause]
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": here}, start_new_session=True)
    try:
        wait_until(lambda: paused.exists() or process.poll() is not None, "the run did not begin")
        wait_until(lambda: len(members(process.pid)) == 3, "there are not two workers")
        time.sleep(2)  # most likely the workers now wait for somebody to take what they have made
        process.kill()
        process.wait()
        wait_until(lambda: not members(process.pid), "a worker has outlived its parent")
    finally:
        for member in members(process.pid):
            os.kill(member, signal.SIGKILL)


def wait_until(is_so: Callable[[], object], otherwise: str) -> None:
    """Look again and again, long enough for a machine that has much else to do."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


def members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has ended meanwhile
            continue
        if int(of) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


TRY = """
import sys
from pathlib import Path
from pretrain.lock import locked
try:
    with locked(Path(sys.argv[1])):
        print("free")
except BlockingIOError as error:
    print(error.strerror)
"""


def seen_by_another_process(path: Path) -> str:
    command = [sys.executable, "-c", TRY, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_reading_the_lock_file_does_not_lose_the_lock(tmp_path: Path) -> None:
    """A POSIX lock is lost when its process closes any descriptor of the file."""
    path = tmp_path / ".lock"
    with locked(path):
        owner = path.read_text().strip()
        assert owner.startswith(f"process {os.getpid()} on ")
        assert seen_by_another_process(path) == owner
    assert seen_by_another_process(path) == "free"


def test_a_forked_process_that_lives_on_does_not_keep_the_lock(tmp_path: Path) -> None:
    """As a loader worker of a killed process does; a bare flock is shared with it."""
    path = tmp_path / ".lock"
    read, write = os.pipe()
    with locked(path):
        worker = os.fork()
        if worker == 0:
            os.write(write, b"x")
            signal.pause()
        os.read(read, 1)  # by now it runs Python
    try:
        assert seen_by_another_process(path) == "free"
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_two_locks_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock"), pytest.raises(BlockingIOError), locked(tmp_path / ".lock"):
        pass


def test_a_lock_whose_file_was_removed_or_replaced_is_no_longer_in_place(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path) as lock:
        assert lock.in_place()
        path.unlink()
        assert not lock.in_place()
        path.touch()
        assert not lock.in_place()

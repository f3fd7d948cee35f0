"""A run whose checkpoints are copied to an address continues from there when its disk is gone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from test_ledger import audit
from test_resume import STEPS, equal, figures, final_state, kill

from pretrain.cli import main
from pretrain.corpus import remote_files
from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.mirror import Mirror


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between attempts, which the tests do not wait."""
    seconds = list[float]()
    monkeypatch.setattr(remote_files, "_wait", seconds.append)
    return seconds


def names(directory: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in (directory / "checkpoints").glob("step-*.ckpt"))


def test_a_run_whose_disk_is_gone_continues_from_afar_with_the_same_bits(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken, afar = tmp_path / "straight", tmp_path / "broken", tmp_path / "afar"
    config = tiny(checkpoint__every_n_steps=1)
    remote = ("--checkpoint.remote", f"file://{afar}")
    assert fit("-c", config, "--run", straight) == 0
    for place in (("copied", 9), ("validation", 2)):
        assert fit("-c", config, "--run", broken, *remote, *kill(*place)) == -9
        shutil.rmtree(broken)
    newest = names(afar)[-1]
    assert newest >= 4
    assert fit("-c", config, "--run", broken, *remote) == 0
    assert json.loads((broken / "starts.jsonl").read_text().splitlines()[-1])["step"] == newest
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    assert (straight / "ledger.csv").read_bytes() == (broken / "ledger.csv").read_bytes()
    assert audit(broken, capsys)[0] == 0
    # What is there in the end is the run.
    assert names(afar) == names(broken) == [STEPS - 1, STEPS]
    for name in ("config.yaml", "ledger.csv", "metrics.csv", "starts.jsonl", "result.json"):
        assert (afar / name).read_bytes() == (broken / name).read_bytes()
    assert read_checkpoint(afar / "checkpoints" / f"step-{STEPS:09d}.ckpt")["global_step"] == STEPS
    # And finished there is finished here, until the run goes on.
    shutil.rmtree(broken)
    assert fit("-c", config, "--run", broken, *remote) == 0
    assert len((broken / "starts.jsonl").read_text().splitlines()) == 3
    longer = ("--trainer.max_steps", STEPS + 2, "--allow_change", *kill("batch_end", 2 * STEPS + 1))
    assert fit("-c", config, "--run", broken, *remote, *longer) == -9
    assert not (afar / "result.json").exists()


def test_two_processes_fetch_the_newest_one_once_and_continue(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    straight, broken, afar = tmp_path / "straight", tmp_path / "broken", tmp_path / "afar"
    command = ("-c", tiny(checkpoint__every_n_steps=1), "--trainer.devices", 2, "--trainer.strategy", "ddp", "--run")
    remote = ("--checkpoint.remote", f"file://{afar}")
    assert fit(*command, straight, processes=2) == 0
    assert fit(*command, broken, *remote, *kill("copied", 9), processes=2) == -9
    shutil.rmtree(broken)
    assert fit(*command, broken, *remote, processes=2) == 0
    assert [json.loads(line)["step"] for line in (broken / "starts.jsonl").read_text().splitlines()] == [0, 4]
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    assert names(afar) == [STEPS - 1, STEPS]


@pytest.mark.parametrize("damage", ["half", "flipped"])
def test_one_that_was_copied_by_half_is_passed_over_for_the_one_before(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run, afar = tmp_path / "run", tmp_path / "afar"
    command = ["fit", "-c", str(tiny()), "--run", str(run), "--checkpoint.remote", f"file://{afar}"]
    assert main([*command, "--trainer.max_steps", "6"]) == 0
    newest = afar / "checkpoints" / "step-000000006.ckpt"
    content = newest.read_bytes()
    middle = len(content) // 2
    damaged = content[:middle] + (bytes([content[middle] ^ 1]) + content[middle + 1 :] if damage == "flipped" else b"")
    newest.write_bytes(damaged)
    shutil.rmtree(run)
    assert main([*command, "--trainer.max_steps", "8", "--allow_change"]) == 0
    assert f"passed over: {run}/checkpoints/step-000000006.ckpt: not a complete" in capsys.readouterr().out
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["step"] == 3
    assert audit(run, capsys)[0] == 0


def test_a_damaged_one_here_is_replaced_by_the_one_from_afar(tiny: Callable[..., Path], tmp_path: Path) -> None:
    run, afar = tmp_path / "run", tmp_path / "afar"
    command = ["fit", "-c", str(tiny()), "--run", str(run), "--checkpoint.remote", f"file://{afar}"]
    assert main([*command, "--trainer.max_steps", "6"]) == 0
    newest = run / "checkpoints" / "step-000000006.ckpt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:1000])
    assert main([*command, "--trainer.max_steps", "7", "--allow_change"]) == 0
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["step"] == 6
    assert newest.read_bytes() == whole


def test_permanent_and_best_ones_stay_afar_when_the_disk_is_gone(tiny: Callable[..., Path], tmp_path: Path) -> None:
    run, afar = tmp_path / "run", tmp_path / "afar"
    keep = {"every_n_steps": 1, "keep_last": 1, "keep_every_n_steps": 4, "keep_best": 1}
    # Nothing is learnt, so that the first validation counts as the best.
    config = tiny(checkpoint=keep, validate_every_n_steps=3, model__learning_rate=0.0)
    command = ["fit", "-c", str(config), "--run", str(run), "--checkpoint.remote", f"file://{afar}"]
    assert main([*command, "--trainer.max_steps", "5"]) == 0
    assert names(run) == names(afar) == [3, 4, 5]
    shutil.rmtree(run)
    assert main([*command, "--trainer.max_steps", "9", "--allow_change"]) == 0
    assert names(afar) == [3, 4, 8, 9]


def test_what_the_network_refuses_is_tried_again_and_does_not_stop_the_run(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type(fsspec.filesystem("memory"))
    put, refusals = memory.put_file, {"step-000000003.ckpt": 2, "step-000000004.ckpt": 1000}

    def put_file(self: object, local: str, remote: str, **options: object) -> None:
        name = remote.rpartition("/")[2]
        if refusals.get(name, 0) > 0:
            refusals[name] -= 1
            raise ConnectionError("connection reset by peer")
        put(self, local, remote, **options)

    monkeypatch.setattr(memory, "put_file", put_file)
    url = f"memory://bucket{tmp_path}"
    mirror = Mirror(url, tmp_path / "run")
    command = ["fit", "-c", str(tiny()), "--run", str(tmp_path / "run"), "--checkpoint.remote", url]
    assert main([*command, "--trainer.max_steps", "3"]) == 0
    assert capsys.readouterr().err.count("step-000000003.ckpt: connection reset by peer; again in ") == 2
    assert mirror.checkpoints() == ["step-000000003.ckpt"]

    last = [*command, "--trainer.max_steps", "4", "--allow_change"]
    for _ in range(2):  # nothing is lost here, but the run is not safe there
        assert main(last) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "step-000000004.ckpt: cannot be written (connection reset by peer) in 9 attempts" in error
        assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4
    refusals.clear()
    assert main(last) == 0
    assert mirror.checkpoints()[-1] == "step-000000004.ckpt"


def test_a_run_starts_again_from_its_disk_while_the_address_cannot_be_reached(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run = f"memory://bucket{tmp_path}", tmp_path / "run"
    command = ["fit", "-c", str(tiny()), "--run", str(run), "--checkpoint.remote", url]
    assert main([*command, "--trainer.max_steps", "3"]) == 0

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    with monkeypatch.context() as broken:
        for method in ("ls", "put_file", "get_file"):
            broken.setattr(type(fsspec.filesystem("memory")), method, fail)
        assert main([*command, "--trainer.max_steps", "4", "--allow_change"]) == 2  # trained, but not copied
        error = capsys.readouterr().err
        assert error.count("the run goes on from what is here") == 1
        assert error.count("; the run goes on, and tries again with its next checkpoint") == 1
        assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
        assert main([*command[:-3], str(tmp_path / "new"), *command[-2:]]) == 2  # there may be a run to continue
        assert not (tmp_path / "new" / "checkpoints").exists()
    assert main([*command, "--trainer.max_steps", "4", "--allow_change"]) == 0
    assert Mirror(url, run).checkpoints() == ["step-000000003.ckpt", "step-000000004.ckpt"]


def test_what_is_no_address_or_cannot_be_written_is_told_before_the_first_step(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "-c", str(tiny()), "--run", str(tmp_path / "run"), "--checkpoint.remote"]
    assert main([*command, "bucket/run"]) == 2
    assert "checkpoint.remote is 'bucket/run'; give an address such as s3://" in capsys.readouterr().err
    assert main([*command, "file:///proc/nowhere"]) == 2
    assert "; check the address and your rights there" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_a_run_goes_on_from_an_s3_bucket_and_a_missing_one_is_told(
    tiny: Callable[..., Path], tmp_path: Path, s3: Any
) -> None:
    s3.mkdir("runs-of-somebody")
    bucket = "s3://runs-of-somebody"
    run = tmp_path / "run"
    root = Path(__file__).parents[2]

    def train(url: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pretrain", "fit", "-c", str(tiny()), "--run", str(run), "--checkpoint.remote"]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.run([*command, url, *more], capture_output=True, text=True, env=environment)

    done = train(f"{bucket}-missing/runs/a")
    assert done.returncode == 2
    assert "check the address and your rights there" in done.stderr.splitlines()[-1]
    shutil.rmtree(run)
    done = train(f"{bucket}/runs/a", "--trainer.max_steps", "4")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run)
    done = train(f"{bucket}/runs/a", "--trainer.max_steps", "6", "--allow_change")
    assert done.returncode == 0, done.stderr
    assert f"{run}: continues after step 4 of 6" in done.stdout
    assert Mirror(f"{bucket}/runs/a", run).checkpoints() == ["step-000000004.ckpt", "step-000000006.ckpt"]


def test_what_cannot_be_removed_at_once_does_not_stop_a_run_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, memory = tmp_path / "run", fsspec.filesystem("memory")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "step-000000003.ckpt").touch()
    result = f"/bucket{tmp_path}/result.json"
    memory.pipe_file(result, b"{}")
    remove, refusals = memory.rm_file, [ConnectionError("503 slow down")]

    def rm_file(path: str) -> None:
        if refusals:
            raise refusals.pop()
        remove(path)

    monkeypatch.setattr(type(memory), "rm_file", staticmethod(rm_file))
    mirror = Mirror(f"memory://bucket{tmp_path}", run)
    mirror.begin()
    assert not memory.exists(result)
    memory.pipe_file(result, b"{}")
    refusals += [ConnectionError("503 slow down")] * 100
    mirror.begin()
    assert "result.json: cannot be removed (503 slow down) in 3 attempts" in capsys.readouterr().err.splitlines()[-1]


def test_what_was_taken_back_goes_from_afar_too(tmp_path: Path) -> None:
    run, afar = tmp_path / "run", tmp_path / "afar"
    for directory, steps in ((run, (650,)), (afar, (650, 990))):
        (directory / "checkpoints").mkdir(parents=True)
        for step in steps:
            (directory / "checkpoints" / f"step-{step:09d}.ckpt").touch()
    (run / "skips.jsonl").write_text('{"step": 650, "first": 1, "end": 2}\n')
    (afar / "checkpoints" / "step-000000990.part-0").touch()
    mirror = Mirror(f"file://{afar}", run)
    mirror.begin()
    assert [path.name for path in (afar / "checkpoints").iterdir()] == ["step-000000650.ckpt"]
    (run / "ledger.csv").write_text("after step 700")
    mirror.bring_files()
    assert (run / "ledger.csv").read_text() == "after step 700"


def test_of_two_histories_that_with_more_skips_is_the_later_one(tmp_path: Path) -> None:
    run, afar = tmp_path / "run", tmp_path / "afar"
    for directory, newest in ((run, 3), (afar, 9)):
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "checkpoints" / f"step-{newest:09d}.ckpt").touch()
        (directory / "ledger.csv").write_text(directory.name)
    (run / "skips.jsonl").write_text('{"step": 3, "first": 1, "end": 2}\n')
    mirror = Mirror(f"file://{afar}", run)
    mirror.bring_files()
    assert (run / "ledger.csv").read_text() == "run"
    (afar / "skips.jsonl").write_text((run / "skips.jsonl").read_text())
    mirror.bring_files()
    assert (run / "ledger.csv").read_text() == "afar"

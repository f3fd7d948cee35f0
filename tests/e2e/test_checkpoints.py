"""Checkpoints: damage is noticed wherever it is, the right ones are kept, and a full disk ends no run."""

import errno
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_ledger import audit
from test_resume import STEPS, equal, figures, final_state, kill

from pretrain.cli import main
from pretrain.errors import UserError
from pretrain.train.checkpoint import AtomicCheckpointIO, newest_checkpoint, read_checkpoint
from pretrain.train.ledger import Ledger
from pretrain.train.logging import read_metrics
from pretrain.train.saving import StepCheckpoint


def save(directory: Path, step: int) -> Path:
    weights = torch.arange(4096.0).view(64, 64) + step
    moments = {"exp_avg": -weights, "step": torch.tensor(float(step))}
    checkpoint = {"state_dict": {"weight": weights}, "global_step": step, "optimizer_states": [{"state": {0: moments}}]}
    path = directory / f"step-{step:09d}.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    return path


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = path.read_bytes()
    read_checkpoint(path)
    places = [*range(0, len(content), 31), *range(600), *range(len(content) - 1500, len(content))]
    tensor = content.index((torch.arange(4096.0) + 1).numpy().tobytes())
    assert sum(tensor <= place < tensor + 4096 * 4 for place in places) > 500
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a complete checkpoint"):
            read_checkpoint(path)


@pytest.mark.parametrize("mapped", [False, True])
def test_what_is_loaded_is_the_same_in_memory_and_in_the_file(mapped: bool, tmp_path: Path) -> None:
    checkpoint_io, path = AtomicCheckpointIO(), tmp_path / "step-000000001.ckpt"
    weights = torch.arange(100_000.0)
    checkpoint_io.save_checkpoint({"state_dict": {"weights": weights}, "global_step": 1}, path)
    checkpoint_io.mapped = mapped
    loaded = checkpoint_io.load_checkpoint(path)
    assert (str(path) in Path("/proc/self/maps").read_text()) == mapped
    path.unlink()  # as one that is surplus
    assert loaded["state_dict"]["weights"].equal(weights)


def test_a_checkpoint_is_readable_without_this_project_and_one_of_a_plain_trainer_is_readable_here(
    tmp_path: Path,
) -> None:
    ours = save(tmp_path, 1)
    for mapped in (False, True):
        assert equal(torch.load(ours, weights_only=True, mmap=mapped), read_checkpoint(ours))
    assert zipfile.ZipFile(ours).testzip() is None
    theirs = tmp_path / "theirs.ckpt"
    torch.save(read_checkpoint(ours), theirs)
    assert equal(read_checkpoint(theirs), read_checkpoint(ours))


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "half-written"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    content = newer.read_bytes()
    middle = len(content) // 2
    newer.write_bytes(
        {
            "truncated": content[:-1],
            "flipped": content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :],
            "empty": b"",
            "half-written": content[:middle] + bytes(len(content) - middle),
        }[damage]
    )
    path, checkpoint, problems = newest_checkpoint(tmp_path) or pytest.fail("none is left")
    assert (path, checkpoint["global_step"]) == (older, 1)
    assert len(problems) == 1
    assert problems[0].startswith(f"{newer}: not a complete checkpoint")


def test_the_last_the_best_and_the_permanent_checkpoints_are_kept_also_over_a_kill(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # Nothing is learnt, so all validations are equally good, and the first ones count as the best.
    keep = {"every_n_steps": 1, "keep_last": 2, "keep_every_n_steps": 4, "keep_best": 2}
    config = tiny(checkpoint=keep, validate_every_n_steps=3, model__learning_rate=0.0)
    assert fit("-c", config, "--run", run, *kill("batch_end", 15)) == -9
    assert fit("-c", config, "--run", run) == 0
    losses = sorted((value, step + 1) for step, name, value in read_metrics(run / "metrics.csv") if name == "val/loss")
    assert [step for _, step in sorted(losses, key=lambda pair: pair[1])] == [3, 6, 9, 10]
    best = [step for _, step in losses[:2]]
    assert best == [3, 6]
    kept = {int(path.stem.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*.ckpt")}
    assert kept == {4, 8} | {9, 10} | set(best)
    assert (run / "checkpoints" / "best.ckpt").readlink() == Path(f"step-{best[0]:09d}.ckpt")
    assert (run / "checkpoints" / "last.ckpt").readlink() == Path("step-000000010.ckpt")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield directory
    subprocess.run(["umount", "--lazy", directory], check=True)


def fill(disk: Path, first: int, last: int) -> list[str]:
    """Settings that fill the disk before micro-batch ``first`` and make room before ``last``."""
    values = {"file": disk / "filling", "first": first, "last": last}
    return ["--trainer.callbacks+=poison.Fill", *(f"--trainer.callbacks.{k}={v}" for k, v in values.items())]


def test_a_full_disk_costs_checkpoints_but_neither_the_run_nor_a_figure(
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    tmp_path: Path,
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Written while training waits, so that the disk is full as long as the checkpoint is written.
    config = tiny(checkpoint={"every_n_steps": 2, "in_background": False})
    straight, run = tmp_path / "straight", small_disk / "run"
    assert fit("-c", config, "--run", straight) == 0
    # Full from step 3 on; the checkpoints after steps 4 and 6 fail, that after step 8 finds room again.
    command = [sys.executable, "-m", "pretrain", "fit", "-c", config, "--run", run, *fill(small_disk, 6, 15)]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("pretrain: warning: ")]
    assert len(warnings) == 2
    assert all("No space left on device" in line and "that after step 2" in line for line in warnings)
    assert equal(final_state(straight), final_state(run))
    assert figures(straight) == figures(run)
    kept = sorted(path.name for path in (run / "checkpoints").glob("step-*.ckpt"))
    assert kept == ["step-000000008.ckpt", "step-000000010.ckpt"]
    assert audit(run, capsys)[0] == 0


def test_a_checkpoint_for_which_the_room_that_is_left_does_not_do(small_disk: Path) -> None:
    (small_disk / "filling").write_bytes(bytes(2**21))
    with pytest.raises(OSError, match="No space left on device") as refused:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(2**20)}, small_disk / "step-000000002.ckpt")
    assert refused.value.errno == errno.ENOSPC
    assert refused.value.filename == str(small_disk / "step-000000002.ckpt")
    assert [file.name for file in small_disk.iterdir()] == ["filling"]


def test_while_the_disk_is_full_the_checkpoint_before_stays_and_continues(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, small_disk: Path
) -> None:
    straight, run, config = tmp_path / "straight", small_disk / "run", tiny(checkpoint__every_n_steps=2)
    assert fit("-c", config, "--run", straight) == 0
    assert fit("-c", config, "--run", run, *fill(small_disk, 6, 99)) == 2  # the last one failed too
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 2
    (small_disk / "filling").unlink()
    assert fit("-c", config, "--run", run) == 0
    assert equal(final_state(straight), final_state(run))


def test_what_is_written_in_the_background_is_the_state_at_its_step(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, background = tmp_path / "waiting", tmp_path / "background"
    checkpoints = {"every_n_steps": 3, "keep_last": 9}
    command = ["fit", "-c", str(tiny(checkpoint=checkpoints)), "--run"]
    assert main([*command, str(waiting), "--checkpoint.in_background", "false"]) == 0

    micro_batches, write = threading.Condition(), AtomicCheckpointIO.save_checkpoint
    done = [0]

    def count(*_: object) -> None:
        with micro_batches:
            done[0] += 1
            micro_batches.notify_all()

    def late(
        self: AtomicCheckpointIO, checkpoint: dict[str, object], path: Path, storage_options: object = None
    ) -> None:
        with micro_batches:  # two steps later, if there are so many
            enough = min(2 * (int(path.stem[5:]) + 2), 2 * STEPS)
            assert micro_batches.wait_for(lambda: done[0] >= enough, 60)
        write(self, checkpoint, path)

    monkeypatch.setattr(Ledger, "on_train_batch_start", count, raising=False)
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", late)
    assert main([*command, str(background)]) == 0
    written = sorted(path.name for path in (waiting / "checkpoints").glob("step-*.ckpt"))
    assert written == [f"step-{step:09d}.ckpt" for step in (3, 6, 9, 10)]
    for name in written:
        ours, theirs = (read_checkpoint(run / "checkpoints" / name) for run in (background, waiting))
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "MLMDataModule", "loops", "global_step"):
            assert equal(ours[part], theirs[part]), (name, part)
    assert (background / "checkpoints" / "last.ckpt").readlink() == Path(written[-1])


def test_a_checkpoint_is_due_after_so_many_minutes_whatever_the_steps(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    run, keep = tmp_path / "run", {"keep_last": 99, "every_minutes": 1e-9}
    command = ["fit", "-c", str(tiny(checkpoint=keep)), "--run", str(run)]
    assert main([*command, "--trainer.max_steps", "4"]) == 0
    assert len(list((run / "checkpoints").glob("step-*.ckpt"))) == 4
    assert main([*command, "--checkpoint.every_minutes", "60", "--trainer.max_steps", "9", "--allow_change"]) == 0
    assert len(list((run / "checkpoints").glob("step-*.ckpt"))) == 5  # and the last one


def test_processes_that_found_different_checkpoints_do_not_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = 9
    monkeypatch.setattr(
        "pretrain.train.saving.largest", lambda trainer, value: max(value, others if value > 0 else -others)
    )
    trainer: Any = SimpleNamespace(global_step=4, world_size=1, strategy=None)
    with pytest.raises(UserError, match=r"the processes continue from different steps, 4 to 9; put the run where"):
        StepCheckpoint(tmp_path).on_train_start(trainer, pl.LightningModule())
    trainer.global_step = others
    saving = StepCheckpoint(tmp_path)
    saving.on_train_start(trainer, pl.LightningModule())
    saving.teardown(trainer, pl.LightningModule(), "fit")


def test_what_a_killed_process_left_half_written_does_not_stay(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run, command = tmp_path / "run", ("-c", tiny(), "--run", tmp_path / "run")
    assert fit(*command, *kill("save", 2)) == -9
    (left,) = (run / "checkpoints").glob(".step-*")
    # The next process saves at other steps, as it does where minutes decide.
    assert fit(*command, "--checkpoint.every_n_steps", 4) == 0
    assert not left.exists()


def test_what_fails_in_the_background_ends_the_run_and_leaves_the_checkpoint_before(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, write = tmp_path / "run", AtomicCheckpointIO.save_checkpoint

    def fail(
        self: AtomicCheckpointIO, checkpoint: dict[str, object], path: Path, storage_options: object = None
    ) -> None:
        if "6" in path.name:
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        write(self, checkpoint, path)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fail)
    command = ["fit", "-c", str(tiny()), "--run", str(run)]
    assert main(command) == 2
    assert "step-000000006.ckpt: Permission denied" in capsys.readouterr().err.splitlines()[-1]
    assert (run / "checkpoints" / "last.ckpt").readlink() == Path("step-000000003.ckpt")
    monkeypatch.undo()
    assert main(command) == 0

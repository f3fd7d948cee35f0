"""Bad environments: each ends in one line and the right exit code, hangs nowhere, and loses nothing.

What was lost would show: the run is then continued in a good environment, and ends with the bits of one that never
stopped.
"""

import ctypes
import functools
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from outcome import outcome
from test_resume import equal, figures, final_state, kill

from pretrain.train.checkpoint import AtomicCheckpointIO, read_checkpoint
from pretrain.train.ledger import audit

root = pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")


@pytest.fixture(scope="module")
def straight(
    write_tiny: Callable[..., Path], fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run that nothing happened to."""
    directory = tmp_path_factory.mktemp("straight")
    assert fit("-c", write_tiny(directory), "--run", directory / "run") == 0
    return directory / "run"


@pytest.fixture
def stopped(tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path) -> tuple[Path, Path]:
    """A config, and its run, killed after six of ten steps."""
    config, run = tiny(), tmp_path / "run"
    saved = ("--checkpoint.in_background", "false")  # by the time of the kill
    assert fit("-c", config, "--run", run, *saved, *kill("batch_start", 12)) == -9
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    return config, run


def assert_nothing_is_lost(fit: Callable[..., int], config: Path, run: Path, straight: Path) -> None:
    assert fit("-c", config, "--run", run) == 0
    assert equal(final_state(straight), final_state(run))
    assert figures(straight) == figures(run)
    assert "exactly once" in audit(run)


def callback(name: str, **settings: object) -> list[str]:
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{k}={v}" for k, v in settings.items())]


# Environments: each is made in the process itself, before the command.


def few_files(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))


def tiny_shared_memory() -> None:
    """A /dev/shm of a megabyte, for this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"], check=True)


def read_only(directory: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x00020000) == 0, os.strerror(ctypes.get_errno())
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", directory, directory], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", directory], check=True)


def full_disk(directory: Path) -> None:
    read_only(directory)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", directory], check=True)
    (directory / "filling").write_bytes(bytes(4096))


@root
@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_run_directory(
    begun: bool, stopped: tuple[Path, Path], straight: Path, fit: Callable[..., int], tmp_path: Path
) -> None:
    config, run = stopped
    place = run if begun else tmp_path / "new"
    place.mkdir(exist_ok=True)
    ended = outcome(tmp_path / "err", "fit", "-c", config, "--run", place, prepare=functools.partial(read_only, place))
    assert "Read-only file system; make room, or choose a place that can be written to" in ended.line(2)
    assert_nothing_is_lost(fit, config, place, straight)


def test_a_directory_deleted_under_a_running_job_ends_it_and_does_not_come_back(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    remove = callback("poison.Remove", number=9, path=run)  # in step 4; the next checkpoint is due after step 6
    line = outcome(tmp_path / "err", "fit", "-c", tiny(), "--run", run, *remove).line(2)
    assert f"{run}: was removed or replaced while training; the run ends here" in line
    assert not run.exists()


@root
def test_no_space_at_the_start(tiny: Callable[..., Path], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()

    config, full = tiny(), functools.partial(full_disk, disk)
    line = outcome(tmp_path / "err", "fit", "-c", config, "--run", disk / "run", prepare=full).line(2)
    assert "No space left on device; make room" in line


@pytest.mark.parametrize("files", [24, 40])
def test_too_many_open_files(
    files: int, stopped: tuple[Path, Path], straight: Path, fit: Callable[..., int], tmp_path: Path
) -> None:
    config, run = stopped
    limit = functools.partial(few_files, files)
    ended = outcome(tmp_path / "err", "fit", "-c", config, "--run", run, "--data.num_workers", 4, prepare=limit)
    line = ended.line(2, noise="_MultiProcessingDataLoaderIter.__del__")
    assert "Too many open files" in line
    assert "ulimit -n" in line
    assert_nothing_is_lost(fit, config, run, straight)


@root
def test_shared_memory_too_small_for_what_workers_send(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """They need little of it, for semaphores: what they load goes through a pipe."""
    # A pack's ids alone take 256 KB, and two packs wait for each of the workers.
    config = tiny(data__global_batch_tokens=65_536, data__num_workers=2, trainer__max_steps=4)
    ended = outcome(tmp_path / "err", "fit", "-c", config, "--run", tmp_path / "run", prepare=tiny_shared_memory)
    assert ended.code == 0, ended.said


def test_a_worker_killed_by_the_kernel_for_memory(
    tiny: Callable[..., Path], straight: Path, fit: Callable[..., int], tmp_path: Path
) -> None:
    config, run = tiny(), tmp_path / "run"
    shoot = callback("poison.KillWorker", number=7)  # early: what is prefetched could do for the rest
    ended = outcome(tmp_path / "err", "fit", "-c", config, "--run", run, "--data.num_workers", 2, *shoot)
    # Not the user's mistake, and the same command may do. torch's signal handler may strike where Python ignores it.
    line = ended.line(1, noise="is killed by signal: Killed")
    assert "a loader worker was killed, as happens where memory runs out" in line
    assert "the same command continues" in line
    assert_nothing_is_lost(fit, config, run, straight)


def test_slurm_installed_but_not_used_is_not_worth_a_word(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{srun.parent}:{os.environ['PATH']}")
    ended = outcome(tmp_path / "err", "fit", "-c", tiny(trainer__max_steps=1), "--run", tmp_path / "run")
    assert ended.code == 0, ended.said
    assert "srun" not in ended.said


DAMAGES = {
    "cut short": (lambda text: text[: len(text) // 2] + "\n - [", "not YAML"),
    "no text": (lambda text: "\udcff\udcfe\x00", "not YAML"),
    "empty": (lambda text: "", "not the settings of a run"),
    "another file": (lambda text: "- 1\n- 2\n", "not the settings of a run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupted_config_in_the_run(
    damage: str, stopped: tuple[Path, Path], straight: Path, fit: Callable[..., int], tmp_path: Path
) -> None:
    config, run = stopped
    kept = (run / "config.yaml").read_text()
    spoil, problem = DAMAGES[damage]
    (run / "config.yaml").write_text(spoil(kept), errors="surrogateescape")
    for command in (("fit", "-c", config, "--run", run), ("inspect", run), ("inspect", run, "--audit")):
        line = outcome(tmp_path / "err", *command).line(2)
        assert line.startswith(str(run / "config.yaml"))
        assert problem in line
        assert "--print_config" in line
    (run / "config.yaml").write_text(kept)
    assert_nothing_is_lost(fit, config, run, straight)


def test_broken_yaml_in_a_config_names_file_and_line(tiny: Callable[..., Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("model:\n  learning_rate: 0.1\n\twarmup_steps: 3\n")
    line = outcome(tmp_path / "err", "fit", "-c", tiny(), "-c", broken, "--run", tmp_path / "run").line(2)
    assert line.startswith(f"{broken}:3: not YAML")
    broken.write_bytes(b"\xff\xfe\x00")
    line = outcome(tmp_path / "err", "fit", f"--config={broken}", "--run", tmp_path / "run").line(2)
    assert line.startswith(f"{broken}: not YAML")


def of_another_model(run: Path, config: Path, text: dict[str, object]) -> str:
    wide = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config.write_text(yaml.safe_dump({**text, "model": {**text["model"], "encoder": wide}}))  # type: ignore[dict-item]
    return "is of another model (hidden_size 32, not 16)"


def of_another_corpus(run: Path, config: Path, text: dict[str, object]) -> str:
    other = config.with_name("other.fasta")
    other.write_text(Path(text["data"]["train"]).read_text().partition("\n>")[2].join([">", ""]))  # type: ignore[index]
    config.write_text(yaml.safe_dump({**text, "data": {**text["data"], "train": str(other)}}))  # type: ignore[dict-item]
    return "was made with corpus"


def of_another_tokenizer(run: Path, config: Path, text: dict[str, object]) -> str:
    return "was made with another tokenizer than esm"


@pytest.mark.parametrize("other", [of_another_model, of_another_corpus, of_another_tokenizer])
def test_a_checkpoint_of_another_run_put_into_this_one(
    other: Callable[..., str], stopped: tuple[Path, Path], straight: Path, fit: Callable[..., int], tmp_path: Path
) -> None:
    config, run = stopped
    (tmp_path / "other").mkdir()
    theirs = tmp_path / "other" / "tiny.yaml"
    shutil.copy(config, theirs)
    expected = other(tmp_path / "other", theirs, yaml.safe_load(config.read_text()))
    assert fit("-c", theirs, "--run", tmp_path / "other" / "run", "--trainer.max_steps", 8) == 0
    planted = run / "checkpoints" / "step-000000008.ckpt"
    checkpoint = read_checkpoint(tmp_path / "other" / "run" / "checkpoints" / "last.ckpt", mapped=False)
    if other is of_another_tokenizer:
        checkpoint["MLMDataModule"]["tokenizer"] = '{"name": "other"}'
    AtomicCheckpointIO().save_checkpoint(checkpoint, planted)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert expected in outcome(tmp_path / "err", "fit", "-c", config, "--run", run).line(2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    planted.unlink()
    assert_nothing_is_lost(fit, config, run, straight)


@pytest.fixture
def corpus(proteins: Path, tmp_path: Path) -> Iterator[Path]:
    """A prepared corpus of its own."""
    from pretrain.corpus.prepare import Settings, prepare
    from pretrain.corpus.tokenizer import load_tokenizer

    prepare([str(proteins)], tmp_path / "corpus", Settings(load_tokenizer("esm")))
    return tmp_path / "corpus"


@pytest.mark.parametrize("fault", ["vanished", "cut short", "changed", "other manifest"])
def test_a_corpus_file_changed_or_vanished_under_the_run(
    fault: str, tiny: Callable[..., Path], corpus: Path, straight: Path, fit: Callable[..., int], tmp_path: Path
) -> None:
    config, run = tiny(data__train=str(corpus)), tmp_path / "run"
    assert fit("-c", config, "--run", run, *kill("batch_start", 12)) == -9
    shard = corpus / "shard-00000.arrow"
    shutil.copytree(corpus, tmp_path / "kept")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if fault == "vanished":
        shard.unlink()
    elif fault == "cut short":
        shard.write_bytes(content[: len(content) // 2])
    elif fault == "changed":
        shard.write_bytes(content)
    else:
        manifest = corpus / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"fingerprint": "', '"fingerprint": "0', 1))
    line = outcome(tmp_path / "err", "fit", "-c", config, "--run", run).line(2)
    assert str(corpus) in line or "was made with corpus" in line
    shutil.rmtree(corpus)
    (tmp_path / "kept").rename(corpus)
    assert_nothing_is_lost(fit, config, run, straight)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corpus_that_vanishes_while_it_is_trained_on_is_still_mapped(
    workers: int, tiny: Callable[..., Path], corpus: Path, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    remove = callback("poison.Remove", number=9, path=corpus)
    config = tiny(data__train=str(corpus), data__num_workers=workers)
    ended = outcome(tmp_path / "err", "fit", "-c", config, "--run", run, *remove)
    assert ended.code == 0, ended.said
    assert not corpus.exists()
    assert equal(final_state(straight), final_state(run))


def test_a_damaged_result_is_made_again(tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert fit("-c", tiny(), "--run", run) == 0
    kept = (run / "result.json").read_text()
    (run / "result.json").write_text(kept[:20])
    assert fit("-c", tiny(), "--run", run) == 0
    assert (run / "result.json").read_text() == kept


def test_a_checkpoint_of_a_newer_format_is_refused_by_name(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    config, run = stopped
    (checkpoint,) = (run / "checkpoints").glob("step-*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "pretrain_format": 2}, checkpoint)
    line = outcome(tmp_path / "err", "fit", "-c", config, "--run", run).line(2)
    assert "checkpoint format 2, this version of pretrain reads 1; update it" in line

"""A signal ends a run after a whole step, with a checkpoint and an exit code that tells a scheduler to continue."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import equal, figures, final_state

from pretrain.cli import main
from pretrain.train import saving
from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.fit import _requeue


def send(name: str, number: int) -> list[str]:
    return [
        "--trainer.callbacks+=poison.Signal",
        f"--trainer.callbacks.number={number}",
        f"--trainer.callbacks.name={name}",
    ]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """A SLURM job with a ``scontrol`` that writes down how it was called and ends with a given code."""

    def make(code: int) -> Path:
        called, directory = tmp_path / "called", tmp_path / "bin"
        directory.mkdir()
        program = directory / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {called}\necho "slurm is down" >&2\nexit {code}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(directory), prepend=os.pathsep)
        monkeypatch.setenv("SLURM_JOB_ID", "4711")
        return called

    return make


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_run_after_the_step_and_the_same_command_continues_it(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, name: str
) -> None:
    straight, run, config = tmp_path / "straight", tmp_path / "run", tiny()
    assert fit("-c", config, "--run", straight) == 0
    assert fit("-c", config, "--run", run, *send(name, 8)) == 128 + signal.Signals[name]  # the first half of step 4
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5
    assert fit("-c", config, "--run", run) == 0
    assert equal(final_state(straight), final_state(run))
    assert figures(straight) == figures(run)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_to_all_processes_of_a_job_ends_the_run_after_the_step(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, name: str
) -> None:
    """As torchrun, SLURM, `timeout` and Ctrl-C send it: the loader's workers are needed until the step is done."""
    run, config = tmp_path / "run", tiny(data__num_workers=2, trainer__accumulate_grad_batches=8)
    to_all = [*send(name, 24), "--trainer.callbacks.to_all=true"]
    assert fit("-c", config, "--run", run, *to_all) == 128 + signal.Signals[name]
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 4
    assert fit("-c", config, "--run", run) == 0


def test_before_the_first_step_a_signal_ends_the_process_as_a_signal_does(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    early = ["--trainer.callbacks+=poison.SignalAtStart", "--trainer.callbacks.name=SIGTERM"]
    run, config = tmp_path / "run", tiny()
    assert fit("-c", config, "--run", run, *early) == -signal.SIGTERM
    assert not list((run / "checkpoints").glob("*"))
    assert fit("-c", config, "--run", run) == 0


def test_the_first_of_two_signals_counts(
    tiny: Callable[..., Path], tmp_path: Path, slurm: Callable[[int], Path]
) -> None:
    called = slurm(0)
    both = [{"class_path": "poison.Signal", "init_args": {"number": 8, "name": n}} for n in ("SIGUSR1", "SIGTERM")]
    command = ["fit", "-c", str(tiny()), "--run", str(tmp_path / "run"), "--trainer.callbacks", json.dumps(both)]
    assert main(command) == 138
    assert called.read_text() == "requeue 4711\n"


def test_a_second_sigint_ends_the_run_at_once(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, command = tmp_path / "run", ["fit", "-c", str(tiny()), "--run", str(tmp_path / "run")]
    before = signal.getsignal(signal.SIGINT)
    twice = {"class_path": "poison.Signal", "init_args": {"number": 8, "name": "SIGINT"}}
    assert main([*command, "--trainer.callbacks", json.dumps([twice, twice])]) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "pretrain: error: interrupted"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 3  # not 5: nothing more was saved
    assert signal.getsignal(signal.SIGINT) is before
    assert main(command) == 0


def test_a_second_sigint_while_the_run_ends_is_one_line_more(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Its loader's workers are being ended by then, where an exception would only be printed."""
    kinds = [
        {"class_path": "poison.Signal", "init_args": {"number": 8, "name": "SIGINT"}},
        {"class_path": "poison.SignalWhenEnding"},
    ]
    command = [sys.executable, "-m", "pretrain", "fit", "-c", tiny(data__num_workers=2), "--run", tmp_path / "run"]
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [*command, "--trainer.callbacks", json.dumps(kinds)],
        env={**os.environ, "PYTHONPATH": here},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.strip()) == (130, "pretrain: error: interrupted")
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_under_slurm_the_warning_before_the_time_limit_requeues_the_job_after_the_checkpoint(
    tiny: Callable[..., Path],
    tmp_path: Path,
    slurm: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    called, run = slurm(0), tmp_path / "run"
    assert main(["fit", "-c", str(tiny()), "--run", str(run), *send("SIGTERM", 3)]) == 143
    assert not called.exists()  # SIGTERM is somebody's wish that the job end
    assert main(["fit", "-c", str(tiny()), "--run", str(run), *send("SIGUSR1", 8)]) == 138
    assert called.read_text() == "requeue 4711\n"
    assert "job 4711 is requeued" in capsys.readouterr().out
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_a_job_that_cannot_be_requeued_says_so_and_is_saved_all_the_same(
    tiny: Callable[..., Path],
    tmp_path: Path,
    slurm: Callable[[int], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    slurm(1)
    run = tmp_path / "run"
    assert main(["fit", "-c", str(tiny()), "--run", str(run), *send("SIGUSR1", 8)]) == 138
    warning = capsys.readouterr().err.strip().splitlines()[-1]
    assert warning == "pretrain: warning: job 4711 is not requeued (slurm is down); submit it again"
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_a_queue_that_does_not_answer_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 60, stderr=b"unable to contact controller\n")

    monkeypatch.setattr(subprocess, "run", hang)
    _requeue("4711")
    assert "job 4711 is not requeued (Command '['scontrol', 'requeue', '4711']' timed out" in capsys.readouterr().err


def test_the_help_lists_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 the run is finished; 2 a person is needed" in text


def test_a_second_interrupt_ends_a_process_at_once_that_waits_for_a_thread_which_speaks_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KeyboardInterrupt would let Python tidy up under that thread, and abort."""
    saves = saving.StepCheckpoint(tmp_path)
    saves._divided, saves._signal, saves._writing = True, signal.SIGINT, saving.Writing(3, {})

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(saving.Writing, "wait", lambda self: saves._on_signal(signal.SIGINT, None))
    with pytest.raises(SystemExit, match="130"):
        saves.finish(None)  # type: ignore[arg-type]

"""A branch begins with the bits of its checkpoint, says where it comes from, and is then a run like any other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_ledger import audit
from test_resume import equal, final_state, kill

from pretrain.cli import main
from pretrain.train import branch as branch_module
from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.logging import read_metrics


@pytest.fixture(scope="module")
def origin(
    write_tiny: Callable[..., Path], fit: Callable[..., int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A config and its finished run of ten steps, with checkpoints after 6, 9 and 10."""
    directory = tmp_path_factory.mktemp("origin")
    config = write_tiny(directory, checkpoint={"every_n_steps": 3, "keep_last": 3})
    assert fit("-c", config, "--run", directory / "run") == 0
    return config, directory / "run"


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_branch_that_changes_nothing_has_the_bits_of_its_origin_also_when_it_is_killed(
    origin: tuple[Path, Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = origin
    before, branch = contents(run), tmp_path / "branch"
    command = ("-c", config, "--run", branch, "--branch_from", run / "checkpoints" / "step-000000006.ckpt")
    assert fit(*command, *kill("batch_start", 15)) == -9
    assert fit(*command) == 0
    assert equal(final_state(run), final_state(branch))
    assert (run / "ledger.csv").read_bytes() == (branch / "ledger.csv").read_bytes()
    rows = [[row for row in read_metrics(d / "metrics.csv") if "throughput" not in row[1]] for d in (run, branch)]
    assert rows[0] == rows[1]
    assert audit(branch, capsys)[0] == 0
    assert contents(run) == before


def test_a_branch_takes_other_history_settings_and_logs_them(
    origin: tuple[Path, Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    config, run = origin
    branch = tmp_path / "branch"
    changed = ("--model.learning_rate", 0.5, "--trainer.max_steps", 12)
    assert fit("-c", config, "--run", branch, "--branch_from", run, *changed) == 0
    checkpoint = read_checkpoint(branch / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 12
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.5 * (3 / 12) ** 0.5)
    recorded = json.loads((branch / "origin.json").read_text())
    assert (recorded["run"], recorded["checkpoint"], recorded["step"]) == (str(run), "step-000000010.ckpt", 10)
    assert recorded["cursor"] == read_checkpoint(run / "checkpoints" / "last.ckpt")["MLMDataModule"]["cursor"]
    (start,) = map(json.loads, (branch / "starts.jsonl").read_text().splitlines())
    assert start["step"] == 10
    assert start["changes"] == [
        {"name": "model.learning_rate", "was": 0.01, "now": 0.5},
        {"name": "trainer.max_steps", "was": 10, "now": 12},
    ]
    # From here on it is a run like any other, whose changes must be allowed; the bare flag and the word both do.
    again = ("-c", config, "--run", branch, "--trainer.max_steps", 13, "--model.learning_rate", 0.5)
    assert fit(*again) == 2
    assert fit(*again, "--branch_from", run) == 2
    assert fit(*again, "--allow_change") == 0
    assert fit(*again, "--trainer.max_steps", 14, "--allow_change", "true") == 0


def test_a_checkpoint_that_its_run_has_removed_meanwhile_is_told(
    origin: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = origin
    shutil.copytree(run, tmp_path / "origin", symlinks=True)
    parts = branch_module.parts_of
    monkeypatch.setattr(branch_module, "parts_of", lambda checkpoint: (checkpoint.unlink(), parts(checkpoint))[1])
    arguments = ("-c", config, "--run", tmp_path / "new", "--branch_from", tmp_path / "origin")
    assert main(["fit", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(".ckpt: the run has gone on and removed it; give the same command again")
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_branched_is_one_line_and_writes_nothing(
    origin: tuple[Path, Path],
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, run = origin
    monkeypatch.chdir(tmp_path)
    stray = tmp_path / "step-000000010.ckpt"
    stray.write_bytes((run / "checkpoints" / "step-000000010.ckpt").read_bytes())
    other = tiny(seed_everything=8)
    for arguments, expected in [
        (("-c", config, "--run", "new", "--branch_from", "nowhere"), "nowhere is neither a run nor a checkpoint in"),
        (("-c", config, "--run", "new", "--branch_from", stray), "is neither a run nor a checkpoint in one"),
        (("-c", config, "--branch_from", run), "a branch is a run of its own; say where with --run"),
        (("-c", config, "--run", run, "--branch_from", run), "is no branch of"),
        (("-c", other, "--run", "new", "--branch_from", run), "was started with seed_everything 7"),
        (("-c", config, "--run", "new", "--branch_from", run, "--trainer.max_steps", 9), "beyond trainer.max_steps 9"),
    ]:
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(["fit", *map(str, arguments)]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: error: "))
        assert expected in line
        assert contents(tmp_path) == before
        assert not (tmp_path / "new").exists()


def test_a_branch_that_has_lost_its_checkpoints_does_not_begin_anew(
    origin: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = origin
    branch = tmp_path / "branch"
    assert main(["fit", "-c", str(config), "--run", str(branch), "--branch_from", str(run)]) == 0
    for path in (branch / "checkpoints").iterdir():
        path.unlink()
    capsys.readouterr()
    assert main(["fit", "-c", str(config), "--run", str(branch)]) == 2
    assert "after step 10, and holds no checkpoint any more; restore one, or branch" in capsys.readouterr().err


def test_a_branch_does_not_take_its_origins_address(
    write_tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, branch = tmp_path / "run", tmp_path / "branch"
    config = write_tiny(tmp_path, checkpoint={"every_n_steps": 3, "remote": f"file://{tmp_path}/afar"})
    assert fit("-c", config, "--run", run, "--trainer.max_steps", 3) == 0
    command = ["fit", "-c", str(config), "--run", str(branch), "--branch_from", str(run), "--trainer.max_steps", "4"]
    assert main(command) == 2
    assert "afar holds a run that is no branch; give the branch an address of its own" in capsys.readouterr().err
    assert not branch.exists()
    command += ["--checkpoint.remote", f"file://{tmp_path}/other"]
    assert main(command) == 0
    shutil.rmtree(branch)  # what is at its own address is the branch
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out


def test_a_checkpoint_under_another_name_is_refused(
    origin: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = origin
    other = tmp_path / "run" / "checkpoints" / "good.ckpt"
    other.parent.mkdir(parents=True)
    other.write_bytes((run / "checkpoints" / "step-000000006.ckpt").read_bytes())
    (tmp_path / "run" / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert main(["fit", "-c", str(config), "--run", str(tmp_path / "b"), "--branch_from", str(other)]) == 2
    assert "good.ckpt is not named as a run names its checkpoints" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()

"""A loss spike is noticed; by option the run goes back and leaves data out, to the same bits however it is killed."""

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_ledger import audit
from test_resume import equal, events, figures, kill

from pretrain.cli import main
from pretrain.downstream.load import checkpoint_of, load
from pretrain.errors import UserError
from pretrain.train.checkpoint import checkpoint_name, read_checkpoint
from pretrain.train.fit import complete
from pretrain.train.fit import fit as fit_here
from pretrain.train.spikes import LossSpikes, RewindError, Skip, read_skips

STEPS = 30
PLACE = 160  # in the order; a step of the tiny run takes about a dozen sequences
REWIND = ["--spikes.rewind", "true", "--spikes.margin", "2"]


def config(tiny: Callable[..., Path]) -> Path:
    return tiny(trainer__max_steps=STEPS, validate_every_n_steps=STEPS, spikes={"window": 8, "threshold": 12.0})


def spike(place: int) -> list[str]:
    return ["--trainer.callbacks+=poison.Spike", f"--trainer.callbacks.place={place}"]


def final(run: Path) -> dict[str, object]:
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == STEPS
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "MLMDataModule")}


def skips(run: Path) -> list[dict[str, int]]:
    path = run / "skips.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_spike_is_reported_once_and_changes_nothing_by_default(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", str(config(tiny)), "--run", str(run), *spike(PLACE)]) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "pretrain: warning" in line)
    losses = {step: value for (step, name), value in figures(run).items() if name == "train/loss"}
    highest = max(losses, key=losses.__getitem__)
    assert f"the loss of step {highest} is " in warning or f"the loss of step {highest - 1} is " in warning
    assert not skips(run)
    assert audit(run, capsys)[0] == 0


def test_a_run_goes_back_and_leaves_the_stretch_out_with_the_same_bits_however_it_is_killed(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    command = ("-c", config(tiny), *REWIND)
    assert fit(*command, "--run", straight, *spike(PLACE)) == 0
    (skip,) = skips(straight)
    assert skip["first"] <= PLACE < skip["end"]
    assert skip["step"] <= skip["spike"] - 2
    code, message = audit(straight, capsys)
    assert code == 0, message
    assert f"but for {skip['end'] - skip['first']} that skips.jsonl leaves out" in message
    assert [step for step, _ in events(straight, "train/loss")] == list(range(STEPS))

    # Killed before the spike; as soon as the skip is written; and after the run went back.
    assert fit(*command, "--run", broken, "--trainer.callbacks", _callbacks("batch_end", 2 * skip["spike"] - 3)) == -9
    assert fit(*command, "--run", broken, "--trainer.callbacks", _callbacks("rewind", 1)) == -9
    assert [line["end"] for line in skips(broken)] == [skip["end"]]
    newest = max((broken / "checkpoints").glob("step-*.ckpt"))
    assert int(newest.stem[5:]) >= skip["step"]
    assert fit(*command, "--run", broken, "--trainer.callbacks", _callbacks("batch_end", 2 * skip["step"] + 5)) == -9
    assert fit(*command, "--run", broken, *spike(PLACE)) == 0
    assert read_skips(straight) == read_skips(broken)
    assert equal(final(straight), final(broken))
    assert figures(straight) == figures(broken)
    assert (straight / "ledger.csv").read_bytes() == (broken / "ledger.csv").read_bytes()
    assert audit(broken, capsys) == (0, message.replace("straight", "broken"))


def _callbacks(moment: str, number: int) -> str:
    kinds = [
        {"class_path": "kill.Kill", "init_args": {"moment": moment, "number": number}},
        {"class_path": "poison.Spike", "init_args": {"place": PLACE}},
    ]
    return json.dumps(kinds)


@pytest.mark.parametrize("name", ["a branch", "the branch"])  # before and after its origin by the alphabet
def test_a_branch_of_a_run_that_went_back_continues_from_its_own_checkpoints(
    name: str, tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, branch = tmp_path / "run", tmp_path / name
    command = ("-c", config(tiny), *REWIND)
    assert fit(*command, "--run", run, *spike(PLACE)) == 0
    longer = (*command, "--run", branch, "--branch_from", run, "--trainer.max_steps", STEPS + 6)
    saved = ("--checkpoint.in_background", "false")  # by the time of the kill
    assert fit(*longer, *kill("batch_start", 2 * STEPS)) == -9  # before its first own
    assert [int(path.stem[5:]) for path in steps_of(branch)] == [STEPS]
    assert fit(*longer, *saved, *kill("batch_end", 2 * (STEPS + 5))) == -9
    newest = int(max((branch / "checkpoints").glob("step-*.ckpt")).stem[5:])
    assert newest > STEPS
    assert fit(*longer) == 0
    starts = [json.loads(line)["step"] for line in (branch / "starts.jsonl").read_text().splitlines()]
    assert starts == [STEPS, STEPS, newest]
    code, message = audit(branch, capsys)
    assert code == 0, message


def test_until_the_run_has_gone_back_nobody_takes_what_it_takes_back(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run, command = tmp_path / "run", ("-c", config(tiny), *REWIND)
    keep = ("--checkpoint.keep_last", "20")
    assert fit(*command, *keep, "--run", run, "--trainer.callbacks", _callbacks("rewind", 1)) == -9
    (skip,) = skips(run)
    target, *_, newest = (path for path in steps_of(run) if int(path.stem[5:]) >= skip["step"])
    assert int(target.stem[5:]) == skip["step"] < int(newest.stem[5:])
    assert checkpoint_of(run)["global_step"] == skip["step"]
    assert load(run).embedding.weight.equal(read_checkpoint(target)["state_dict"]["encoder.embedding.weight"])
    with pytest.raises(UserError, match=r"was taken back after a loss spike; give an earlier one"):
        fit_here(["-c", str(config(tiny)), "--run", str(tmp_path / "branch"), "--branch_from", str(newest)])
    for path in steps_of(run):
        if int(path.stem[5:]) <= skip["step"]:
            path.unlink()
    with pytest.raises(UserError, match=r"goes back to its first step after a loss spike"):
        load(run)


def steps_of(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*.ckpt"))


def test_without_its_skip_the_audit_fails(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert fit("-c", config(tiny), "--run", run, *REWIND, *spike(PLACE)) == 0
    (run / "skips.jsonl").unlink()
    code, message = audit(run, capsys)
    assert code == 2
    assert "differs" in message


def test_going_back_that_does_not_help_ends_the_run(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss is high wherever the data goes on: the skip of one stretch only leads to the next."""
    run = tmp_path / "run"
    always = ["--trainer.callbacks+=poison.SpikeAt", "--trainer.callbacks.step=14"]
    limit = ["--spikes.max_rewinds", "2"]
    assert main(["fit", "-c", str(config(tiny)), "--run", str(run), *REWIND, *limit, *always]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pretrain: error: the loss of step 14 is ")
    assert "went back to step 12 2 times: it is not the data" in error
    assert len(skips(run)) == 2


def test_only_so_many_times_in_a_row_is_too_often(tmp_path: Path) -> None:
    spikes = LossSpikes(tmp_path, [Skip(40, 1, 2), Skip(40, 2, 3), Skip(30, 0, 4)], rewind=True, max_rewinds=2)
    trainer: Any = SimpleNamespace(is_global_zero=True, world_size=1, strategy=SimpleNamespace(barrier=lambda: None))
    (tmp_path / "checkpoints").mkdir()
    for step in (30, 40):
        torch.save(
            {"state_dict": {}, "global_step": step, "MLMDataModule": {"cursor": step, "skips": 3}},
            tmp_path / "checkpoints" / checkpoint_name(step),
        )
    with pytest.raises(RewindError, match="goes back to step 40"):
        spikes._go_back(trainer, 55, 99, "the loss of step 55 is high")


def test_a_damaged_checkpoint_is_not_gone_back_to(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    """It was passed over when the run began, and would be again and again."""
    run, command = tmp_path / "run", ("-c", config(tiny), *REWIND)
    kill_late = ("--trainer.callbacks", _callbacks("batch_end", 21))
    assert fit(*command, "--run", run, *kill_late) == -9
    damaged = steps_of(run)[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    assert fit(*command, "--run", run, *spike(PLACE), "--checkpoint.every_n_steps", "100") == 0
    (skip,) = skips(run)
    assert skip["step"] < int(damaged.stem[5:])


def test_what_a_skip_has_not_taken_back_stays_and_no_link_points_nowhere(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    run, command = tmp_path / "run", ("-c", config(tiny), *REWIND, "--checkpoint.keep_best", "1")
    every = ("--validate_every_n_steps", "1", "--spikes.margin", "6")
    assert fit(*command, *every, "--run", run, "--trainer.callbacks", _callbacks("rewind", 1)) == -9
    unreadable = run / "checkpoints" / checkpoint_name(STEPS - 1)
    unreadable.write_bytes(b"as where the file system fails for a moment")
    (skip,) = skips(run)
    assert fit(*command, *every, "--run", run, "--trainer.callbacks", _callbacks("batch_start", 2 * skip["step"])) == -9
    assert unreadable.exists()
    for link in ("last.ckpt", "best.ckpt"):
        path = run / "checkpoints" / link
        assert path.exists() or not path.is_symlink()
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == skip["step"]


TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def test_two_processes_go_back_together_and_leave_out_what_one_does(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("-c", config(tiny), *REWIND, *spike(PLACE))
    assert fit(*command, "--run", tmp_path / "one") == 0
    assert fit(*command, "--run", tmp_path / "two", *TWO, processes=2) == 0
    assert len(skips(tmp_path / "two")) == 1
    assert read_skips(tmp_path / "two") == read_skips(tmp_path / "one")
    assert audit(tmp_path / "two", capsys)[0] == 0


def test_the_first_attempts_module_is_gone_when_it_is_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU there may not be room for two."""

    class Built:
        def __init__(self) -> None:
            self.trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=None), built=self)  # as trainers refer

    earlier: list[weakref.ref[Built]] = []

    def build(_: Sequence[str]) -> Any:
        assert all(built() is None for built in earlier)
        built = Built()
        earlier.append(weakref.ref(built))
        return built

    def train(_: Any) -> int:
        if len(earlier) < 3:
            raise RewindError("a spike")
        return 0

    monkeypatch.setattr("pretrain.train.fit._fit", train)
    assert complete(build, []) == 0
    assert len(earlier) == 3


@pytest.mark.slow
def test_processes_that_lightning_has_started_go_back_together(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, here = tmp_path / "run", Path(__file__).parent
    command = [sys.executable, "-m", "pretrain", "fit", "-c", str(config(tiny)), "--run", str(run), *TWO, *REWIND]
    path = os.pathsep.join([str(here), str(here.parents[1])])
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": path}
    subprocess.run([*command, *spike(PLACE)], check=True, env=environment, timeout=250)
    assert len(skips(run)) == 1
    assert audit(run, capsys)[0] == 0


@pytest.mark.parametrize(
    ("losses", "loss", "expected"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0, 0.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3.0 + 1.4826, 1.0),  # the median of the distances from 3 is 1
        ([1.0, 2.0, 3.0, 4.0, 500.0], 3.0 + 1.4826, 1.0),  # one outlier in the window moves nothing
        ([1.0, 2.0, 3.0, 4.0], 9.0, None),  # the window is not full
        ([2.0, 2.0, 2.0, 2.0, 2.0], 9.0, None),  # no spread to compare with
        ([1.0, 2.0, 3.0, 4.0, 5.0], float("inf"), None),  # the step was skipped
    ],
)
def test_the_score_is_the_distance_from_the_median_in_robust_standard_deviations(
    losses: list[float], loss: float, expected: float | None, tmp_path: Path
) -> None:
    spikes = LossSpikes(tmp_path, [], window=5)
    spikes._losses.extend(losses)
    assert spikes._deviations(loss) == (expected if expected is None else pytest.approx(expected))

"""One process, two under DDP and two under FSDP2 train the same model, and continue each other's checkpoints."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_resume import equal, kill

import pretrain
from pretrain.cli import main
from pretrain.train.checkpoint import read_checkpoint
from pretrain.train.divided import assemble
from pretrain.train.logging import read_metrics

STEPS = 8
CONFIGS = Path(__file__).parents[2] / "configs"
ONE, DDP, FSDP = "one", "ddp", "fsdp"


class Runs:
    """Runs of one tiny config, by layout: under which strategy, in how many processes."""

    def __init__(self, fit: Callable[..., int], config: Path, home: Path) -> None:
        self.fit, self.config, self.home = fit, config, home

    def run(self, name: str, layout: str, *arguments: object) -> Path:
        overlay = () if layout == ONE else ("-c", CONFIGS / f"{layout}.yaml", "--trainer.devices", 2)
        path = self.home / name
        processes = 1 if layout == ONE else 2
        assert self.fit("-c", self.config, *overlay, "--run", path, *arguments, processes=processes) == 0
        return path


def figures(run: Path, *names: str) -> dict[tuple[int, str], float]:
    return {(step, name): value for step, name, value in read_metrics(run / "metrics.csv") if name in names}


def checkpoint(run: Path, step: int) -> dict[str, object]:
    content: dict[str, object] = assemble(read_checkpoint(run / "checkpoints" / f"step-{step:09d}.ckpt"))
    return content


@pytest.fixture(scope="module")
def runs(fit: Callable[..., int], write_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("layouts")
    # Two parameter groups, so that the optimizer numbers the parameters in another order than the module; a checkpoint
    # a step, so that any can be continued.
    config = write_tiny(
        home,
        model__decay="matrices",
        trainer__max_steps=STEPS,
        trainer__gradient_clip_val=0.5,
        checkpoint={"every_n_steps": 1, "keep_last": STEPS},
    )
    return Runs(fit, config, home)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, Path]:
    """Uninterrupted runs."""
    return {layout: runs.run(layout, layout) for layout in (ONE, DDP, FSDP)}


CURVES = ("train/loss", "train/grad_norm", "val/loss", "val/accuracy")


@pytest.mark.parametrize("layout", [DDP, FSDP])
def test_every_layout_has_the_losses_and_gradient_norms_of_one_process(whole: dict[str, Path], layout: str) -> None:
    expected = figures(whole[ONE], *CURVES)
    assert len(expected) == 2 * STEPS + 2 * 2
    assert max(value for (_, name), value in expected.items() if name == "train/grad_norm") > 0.5, "nothing was clipped"
    assert figures(whole[layout], *CURVES) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", [DDP, FSDP])
def test_every_layout_begins_with_the_same_bits(whole: dict[str, Path], layout: str) -> None:
    # The first step's learning rate is zero, so what is saved after it are the initial weights.
    expected, found = (checkpoint(whole[name], 1)["state_dict"] for name in (ONE, layout))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_checkpoint_holds_the_same_in_every_layout(whole: dict[str, Path]) -> None:
    def shape(value: object) -> object:
        if isinstance(value, torch.Tensor):
            assert type(value) is torch.Tensor
            return value.dtype, value.shape
        if isinstance(value, dict):
            return {name: shape(item) for name, item in value.items()}
        return [shape(item) for item in value] if isinstance(value, list | tuple) else type(value)

    names = ("state_dict", "optimizer_states", "lr_schedulers", "MLMDataModule", "hyper_parameters")
    expected, *others = ({n: shape(checkpoint(whole[run], 4)[n]) for n in names} for run in (ONE, DDP, FSDP))
    assert all(other == expected for other in others)


@pytest.mark.parametrize("chain", [(ONE, FSDP, ONE), (DDP, FSDP, DDP)], ids="-".join)
def test_a_run_continues_in_any_other_layout(runs: Runs, whole: dict[str, Path], chain: tuple[str, str, str]) -> None:
    first, second, third = chain
    run = runs.home / "-".join(chain)
    shutil.copytree(whole[first], run)
    for later in range(4, STEPS + 1):
        (run / "checkpoints" / f"step-{later:09d}.ckpt").unlink()
    runs.run(run.name, second, "--trainer.max_steps", 6, "--allow_change", "true")
    runs.run(run.name, third, "--allow_change", "true")
    names = (*CURVES, "lr-AdamW/pg1", "lr-AdamW/pg2", "data/tokens_seen")
    expected, found = figures(whole[ONE], *names), figures(run, *names)
    found = {key: value for key, value in found.items() if key in expected}  # it also validates after step 6
    assert found == pytest.approx(expected, rel=1e-5)
    ours, theirs = checkpoint(run, STEPS), checkpoint(whole[ONE], STEPS)
    for mine, straight in zip(_moments(ours), _moments(theirs), strict=True):
        assert torch.allclose(mine, straight, rtol=1e-3, atol=1e-7)


def _moments(checkpoint: dict[str, object]) -> list[torch.Tensor]:
    state = checkpoint["optimizer_states"][0]["state"]
    return [state[number][name] for number in sorted(state) for name in ("exp_avg", "exp_avg_sq", "step")]


def test_configured_settings_win_over_those_of_the_checkpoint(runs: Runs, whole: dict[str, Path]) -> None:
    changes = ("--model.weight_decay", 0.5, "--model.learning_rate", 0.02, "--allow_change", "true")
    ends = []
    for layout in (ONE, FSDP):
        run = runs.home / f"changed-{layout}"
        shutil.copytree(whole[layout], run)
        (run / "checkpoints" / f"step-{STEPS:09d}.ckpt").unlink()
        runs.run(run.name, layout, *changes)
        ends.append(checkpoint(run, STEPS))
    groups, expected = (end["optimizer_states"][0]["param_groups"] for end in reversed(ends))
    assert groups == expected
    assert groups[0]["weight_decay"] == 0.5
    for name, tensor in ends[0]["state_dict"].items():
        assert torch.allclose(tensor, ends[1]["state_dict"][name], atol=1e-5), name


def test_clipping_by_value_and_checkpointed_activations_change_nothing_under_fsdp(runs: Runs) -> None:
    clip = ("--trainer.gradient_clip_algorithm", "value", "--trainer.gradient_clip_val", 0.001)
    one = runs.run("value-one", ONE, *clip, "--trainer.max_steps", 4)
    two = runs.run("value-two", FSDP, *clip, "--trainer.max_steps", 4, "--model.activation_checkpointing", "true")
    assert figures(two, *CURVES) == pytest.approx(figures(one, *CURVES), rel=1e-5)


def test_bf16_under_fsdp_follows_bf16_in_one_process(runs: Runs) -> None:
    short = ("--trainer.precision", "bf16-mixed", "--trainer.max_steps", 4)
    one, two = (runs.run(f"bf16-{layout}", layout, *short) for layout in (ONE, FSDP))
    assert figures(two, "train/loss", "val/loss") == pytest.approx(figures(one, "train/loss", "val/loss"), rel=1e-3)
    assert checkpoint(two, 4)["state_dict"]["encoder.blocks.0.qkv.weight"].dtype == torch.float32


@pytest.mark.parametrize("layout", [DDP, FSDP])
def test_compiled_blocks_train_as_one_process_does(runs: Runs, whole: dict[str, Path], layout: str) -> None:
    compiled = ("--model.compile", "true", "--data.static_shapes", "true", "--trainer.callbacks+=traced.Traced")
    run = runs.run(f"compiled-{layout}", layout, *compiled, "--trainer.max_steps", 3)
    expected = {key: value for key, value in figures(whole[ONE], *CURVES[:2]).items() if key[0] < 3}
    assert len(expected) == 6
    assert figures(run, *CURVES[:2]) == pytest.approx(expected, rel=1e-5)
    assert '"compiled": true' in (run / "starts.jsonl").read_text()


def test_a_run_under_fsdp_loads_and_exports(whole: dict[str, Path], tmp_path: Path) -> None:
    encoder = pretrain.load(whole[FSDP])
    state = checkpoint(whole[FSDP], STEPS)["state_dict"]
    assert all(torch.equal(value, state[f"encoder.{name}"]) for name, value in encoder.state_dict().items())
    assert main(["export", str(whole[FSDP]), "--out", str(tmp_path / "export")]) == 0


def test_what_runs_is_recorded(whole: dict[str, Path]) -> None:
    for layout, strategy in ((ONE, "SingleDevice"), (DDP, "DDP"), (FSDP, "FullySharded")):
        (line,) = (whole[layout] / "starts.jsonl").read_text().splitlines()
        assert f'"strategy": "{strategy}Strategy"' in line
        assert f'"processes": {1 if layout == ONE else 2}' in line


def test_one_process_may_use_the_fsdp_overlay(runs: Runs, whole: dict[str, Path]) -> None:
    overlay = ("-c", CONFIGS / "fsdp.yaml", "--trainer.max_steps", 2)
    run = runs.run("alone", ONE, *overlay)
    expected = {key: value for key, value in figures(whole[ONE], "train/loss").items() if key[0] < 2}
    assert figures(run, "train/loss") == pytest.approx(expected, rel=1e-5)


def files(run: Path, step: int) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob(f"step-{step:09d}*"))


def test_each_process_writes_its_half_and_each_file_of_it_goes_when_its_checkpoint_goes(whole: dict[str, Path]) -> None:
    run = whole[FSDP]
    for step in range(1, STEPS + 1):
        begin = f"step-{step:09d}"
        assert files(run, step) == [
            f"{begin}.ckpt",
            f"{begin}.part-0-of-2.safetensors",
            f"{begin}.part-1-of-2.safetensors",
        ]
    sizes = [(run / "checkpoints" / name).stat().st_size for name in files(run, STEPS)[1:]]
    assert max(sizes) < 1.1 * min(sizes)
    in_one_file = whole[DDP] / "checkpoints" / f"step-{STEPS:09d}.ckpt"
    assert max(sizes) < 0.6 * in_one_file.stat().st_size


def test_parts_can_be_read_by_whom_the_checkpoint_can_be_read(whole: dict[str, Path]) -> None:
    modes = {(whole[FSDP] / "checkpoints" / name).stat().st_mode for name in files(whole[FSDP], STEPS)}
    assert len(modes) == 1


def test_machines_that_do_not_share_a_directory_do_not_train_as_if_they_did(runs: Runs, tmp_path: Path) -> None:
    away = f"--trainer.callbacks+=poison.Elsewhere --trainer.callbacks.directory={tmp_path / 'other'}".split()
    run = runs.home / "apart"
    overlay = ("-c", CONFIGS / "fsdp.yaml", "--trainer.devices", 2, "--run", run)
    # The first process, which does not see what the other wrote, says so in a line; the other loses it.
    with pytest.raises(AssertionError, match=r"ended with \{1, 2\}"):
        runs.fit("-c", runs.config, *overlay, *away, processes=2)
    assert not list((run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_while_it_writes_its_part_leaves_the_checkpoint_before(
    runs: Runs, whole: dict[str, Path], rank: int
) -> None:
    run, keep = runs.home / f"killed-{rank}", ("--checkpoint.every_n_steps", 2, "--checkpoint.keep_last", 2)
    killed = ("-c", CONFIGS / "fsdp.yaml", "--trainer.devices", 2, "--run", run, *keep)
    assert runs.fit("-c", runs.config, *killed, *kill("part", 2), f"--trainer.callbacks.rank={rank}", processes=2) == -9
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*.ckpt"))] == ["step-000000002.ckpt"]
    assert len(list((run / "checkpoints").glob(".step-000000004.*.partial"))) == 1
    # It goes on in one process, whose checkpoints have no parts: what the killed ones left is cleared away.
    runs.run(run.name, FSDP, *keep, "--trainer.max_steps", 5, "--allow_change", "true")
    runs.run(run.name, ONE, *keep, "--allow_change", "true")
    assert figures(run, *CURVES[:2]) == pytest.approx(figures(whole[ONE], *CURVES[:2]), rel=1e-5)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step-000000006.ckpt", "step-000000008.ckpt", "last.ckpt"}


def test_under_fsdp_a_run_continues_with_the_same_bits(runs: Runs, whole: dict[str, Path]) -> None:
    run = runs.home / "again"
    shutil.copytree(whole[FSDP], run)
    for later in range(4, STEPS + 1):
        (run / "checkpoints" / f"step-{later:09d}.ckpt").unlink()
    part = run / "checkpoints" / "step-000000003.part-1-of-2.safetensors"
    part.write_bytes(part.read_bytes()[:-1])  # damaged, so that it goes on from the one before
    runs.run(run.name, FSDP)
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert equal(checkpoint(run, STEPS)["state_dict"], checkpoint(whole[FSDP], STEPS)["state_dict"])
    assert equal(checkpoint(run, STEPS)["optimizer_states"], checkpoint(whole[FSDP], STEPS)["optimizer_states"])


def test_divided_checkpoints_go_to_an_address_and_come_back(runs: Runs, whole: dict[str, Path]) -> None:
    run, afar = runs.home / "near", runs.home / "afar"
    remote = ("--checkpoint.remote", f"file://{afar}", "--checkpoint.keep_last", 2)
    runs.run(run.name, FSDP, *remote, "--trainer.max_steps", 4, "--allow_change", "true")
    kept = {path.name for path in (run / "checkpoints").glob("step-*")}
    assert {path.name for path in (afar / "checkpoints").iterdir()} == kept
    assert len(kept) == 2 * 3
    shutil.rmtree(run)
    runs.run(run.name, FSDP, *remote, "--allow_change", "true")
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["step"] == 4
    assert equal(checkpoint(run, STEPS)["state_dict"], checkpoint(whole[FSDP], STEPS)["state_dict"])


def test_a_run_branches_off_a_divided_checkpoint(runs: Runs, whole: dict[str, Path]) -> None:
    branch = runs.run("branch", ONE, "--branch_from", whole[FSDP] / "checkpoints" / "step-000000005.ckpt")
    assert files(branch, 5)[1:] == files(whole[FSDP], 5)[1:]
    expected = figures(whole[ONE], *CURVES[:2])
    assert figures(branch, *CURVES[:2]) == pytest.approx(expected, rel=1e-5)


def test_a_full_disk_under_fsdp_costs_checkpoints_but_not_the_run(
    runs: Runs, whole: dict[str, Path], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        full = {"file": disk / "filling", "first": 6, "last": 11}
        filling = ["--trainer.callbacks+=poison.Fill", *(f"--trainer.callbacks.{k}={v}" for k, v in full.items())]
        # Enough is left for the header of a part, and a part of that; not for the whole.
        filling.append("--trainer.callbacks.leave=20000")
        waiting = ("--checkpoint.in_background", "false", "--checkpoint.keep_last", 2)
        overlay = ("-c", CONFIGS / "fsdp.yaml", "--trainer.devices", 2)
        assert runs.fit("-c", runs.config, *overlay, "--run", disk / "run", *waiting, *filling, processes=2) == 0
        assert figures(disk / "run", "train/loss") == figures(whole[FSDP], "train/loss")
        left = {path.name.partition(".")[0] for path in (disk / "run" / "checkpoints").glob("step-*")}
        assert left == {f"step-{step:09d}" for step in (STEPS - 1, STEPS)}, "parts of no checkpoint take up room"
        assert equal(checkpoint(disk / "run", STEPS)["state_dict"], checkpoint(whole[FSDP], STEPS)["state_dict"])
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)

"""`pretrain plan`: the numbers are those of the real objects, and a mistake is one line."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain.cli import main
from pretrain.corpus.tokenizer import train_tokenizer
from pretrain.model.config import ESM2_SIZES, EncoderConfig
from pretrain.shipped import shipped
from pretrain.train.fit import build
from pretrain.train.plan import PlanCLI, learning_rates
from pretrain.train.settings import parse
from pretrain.train.throughput import GPUS

CONFIGS = Path(__file__).parents[2] / "configs"
PRE_TRAINING = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("finetune")]
OVERLAYS = {"compile", "ddp", "fsdp", "gpu", "wandb"}
PUBLISHED = ["-c", str(CONFIGS / "esm2_8M.yaml"), "-c", str(CONFIGS / "gpu.yaml")]


def planned(*arguments: object) -> PlanCLI:
    return parse(PlanCLI, "plan", None, [str(argument) for argument in arguments])


def shape(size: str) -> list[str]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    values = zip(names, ESM2_SIZES[size], strict=True)
    return [part for name, value in values for part in (f"--model.encoder.{name}", str(value))]


@pytest.mark.parametrize("config", PRE_TRAINING, ids=lambda path: path.stem)
def test_every_config_can_be_planned_without_its_corpus_and_leaves_nothing_behind(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = ["-c", str(config)]
    if config.stem in OVERLAYS:
        files = ["-c", str(CONFIGS / "quickstart.yaml"), *files]
    tokenizer = yaml.safe_load(config.read_text()).get("data", {}).get("tokenizer", "esm")
    if tokenizer != "esm" and not shipped(tokenizer):  # made by a command that the recipe's head gives
        Path(tokenizer).parent.mkdir()
        Path(tokenizer).write_text(train_tokenizer(["some text"], 300).serialize())
    before = sorted(tmp_path.rglob("*"))
    assert main(["plan", *files]) == 0
    assert "parameters" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_encoder_is_the_real_one_without_its_memory(tiny: Callable[..., Path]) -> None:
    cli, real = planned("-c", tiny()), build(["-c", str(tiny())])
    assert {name: p.shape for name, p in cli.model.named_parameters()} == {
        name: p.shape for name, p in real.model.named_parameters()
    }
    assert all(p.is_meta for p in cli.model.parameters())
    assert cli.model.encoder.config == real.model.encoder.config


def test_the_arithmetic_of_a_run() -> None:
    plan = planned(*PUBLISHED, "--gpus", 8, "--gpu", "H200", "--mfu", 0.4).plan
    config = EncoderConfig.named("8M")
    assert plan.flops_per_token * 1024 == config.training_flops([1024], np.array([0.15 * 1024]))
    assert plan.tokens == 500_000 * 2_097_152
    assert plan.pack_tokens == 2_097_152 // (8 * 32)
    assert plan.hours == pytest.approx(plan.tokens * plan.flops_per_token / (8 * 0.4 * GPUS["H200"].bf16_flops) / 3600)
    assert plan.hours * 3600 * plan.tokens_per_second == pytest.approx(plan.tokens)
    growing = planned(*PUBLISHED, "--data.batch_warmup.first", 1_048_576, "--data.batch_warmup.tokens", 10**9).plan
    fewer = 10**9 * np.log(2) / 1_048_576 * 2_097_152 - 10**9  # than full steps see in the same number of steps
    assert plan.tokens - growing.tokens == pytest.approx(fewer, rel=0.01)
    short = planned(*PUBLISHED, "--mean_length", 300).plan
    assert short.flops_per_token * 300 == config.training_flops([300], np.array([45.0]))


def test_the_number_of_gpus_is_the_trainers_unless_given() -> None:
    assert planned(*PUBLISHED).plan.memory.gpus == 1, "devices: auto"
    on_four = (*PUBLISHED, "--trainer.devices", 4, "--trainer.num_nodes", 2)
    assert planned(*on_four).plan.memory.gpus == 8
    assert planned(*on_four, "--gpus", 3).plan.memory.gpus == 3


def test_strategy_precision_and_recomputation_are_read_from_the_config(tmp_path: Path) -> None:
    assert planned(*PUBLISHED).plan.memory.precision == "bf16-mixed"
    for strategy in ("fsdp", "pytorch_lightning.strategies.ModelParallelStrategy"):
        assert planned(*PUBLISHED, "--trainer.strategy", strategy).plan.memory.sharded
    assert not planned(*PUBLISHED, "--trainer.strategy", "ddp").plan.memory.sharded
    overlay = tmp_path / "ddp.yaml"
    overlay.write_text(
        "trainer:\n  strategy:\n    class_path: pytorch_lightning.strategies.DDPStrategy\n"
        "    init_args: {gradient_as_bucket_view: true}\n"
    )
    assert planned(*PUBLISHED, "-c", overlay).plan.memory.gradients_in_buckets
    assert planned(*PUBLISHED, "--model.activation_checkpointing", "true").plan.memory.activation_checkpointing
    assert planned(*PUBLISHED, "--trainer.precision", "bf16").plan.memory.precision == "bf16-mixed"


def test_a_pack_that_does_not_fit_is_told_with_what_does() -> None:
    """Whatever the remedy is, a plan with it fits."""
    for size, gpus, expected in (
        ("650M", 1, "--trainer.accumulate_grad_batches"),
        ("15B", 8, "-c configs/fsdp.yaml"),
        ("15B", 1, "-c configs/fsdp.yaml --model.activation_checkpointing true"),
    ):
        options = (*PUBLISHED, *shape(size), "--trainer.accumulate_grad_batches", 4, "--gpus", gpus)
        plan = planned(*options).plan
        assert not plan.fits
        remedy, _, more = plan.remedy().partition(" on ")
        assert remedy.startswith(expected)
        changed = remedy.replace("-c configs/fsdp.yaml", "--trainer.strategy fsdp").split()
        if more:
            changed += ["--gpus", more.split()[0]]
        assert planned(*options, *changed).plan.fits


def test_the_fewest_packs_fit_and_one_less_does_not() -> None:
    plan = planned(*PUBLISHED, *shape("650M"), "--gpus", 8).plan
    assert plan.fewest_packs
    assert replace(plan, accumulate_grad_batches=plan.fewest_packs).fits
    assert not replace(plan, accumulate_grad_batches=plan.fewest_packs - 1).fits


@pytest.mark.parametrize("warmup", [0, 3, 50, 400])
@pytest.mark.parametrize("schedule", [None, "CosineDecay", "WarmupStableDecay", "ExponentialLR"])
def test_the_curve_is_the_schedule_stepped_all_the_way(
    schedule: str | None, warmup: int, tiny: Callable[..., Path]
) -> None:
    options = ["-c", str(tiny(model__warmup_steps=warmup, model__warmup_init_lr=1e-3))]
    options += ["--model.schedule", schedule] if schedule else []
    options += ["--model.schedule.gamma", "0.99"] if schedule == "ExponentialLR" else []
    module = planned(*options).model
    rates = learning_rates(module, 200, points=20)
    stepped_module = build(options).model
    stepped_module.max_steps = 200
    optimizer, scheduler = stepped_module.build_optimizer()
    optimizer.step()
    stepped = []
    for _ in range(201):
        stepped.append(scheduler.get_last_lr()[0])
        scheduler.step()
    assert {0, min(warmup, 200), 200} <= rates.keys()
    assert rates == {step: stepped[step] for step in rates}


def test_the_picture_is_drawn_and_the_cost_is_said_only_with_a_price(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "rate.png"
    assert main(["plan", *PUBLISHED, "--gpus", "8", "--price", "2.5", "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    plan = planned(*PUBLISHED, "--gpus", 8).plan
    assert f"cost         {8 * plan.hours * 2.5:,.2f}: " in output
    assert re.search(rf"total +{plan.memory.total(8192) / 2**30:.2f}  of 79\.6", output)
    assert main(["plan", *PUBLISHED]) == 0
    assert "cost" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], ["no config", "pretrain plan -c"]),
        (["-c", "missing.yaml"], ["missing.yaml", "pretrain plan --help"]),
        ([*PUBLISHED, "--gpu", "T4"], ["'T4'", *GPUS]),
        ([*PUBLISHED, "--gpus", "0"], ["number of GPUs is 0", "1 or more"]),
        ([*PUBLISHED, "--mfu", "0"], ["mfu is 0", "at most 1"]),
        ([*PUBLISHED, "--mfu", "1.2"], ["mfu is 1.2", "at most 1"]),
        ([*PUBLISHED, "--price", "-1"], ["price is -1"]),
        ([*PUBLISHED, "--mean_length", "2000"], ["mean_length is 2000", "1024"]),
        ([*PUBLISHED, "--trainer.max_steps", "-1"], ["trainer.max_steps is -1"]),
        ([*PUBLISHED, "--trainer.strategy", "no.such.Strategy"], ["no.such.Strategy", "cannot be imported"]),
        ([*PUBLISHED, "--picture", "/dev/null/rate.png"], ["/dev/null/rate.png: cannot be written (Not a directory)"]),
        ([*PUBLISHED, "--gpus", "4096"], ["too small for 131072 packs", "4096 processes"]),
        ([*PUBLISHED, "--gpsu", "8"], ["gpsu"]),
    ],
    ids=lambda value: value[-2:] if value and value[0] == "-c" else None,
)
def test_a_mistake_is_one_line(arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert all(part in line for part in said), line


def test_help_lists_the_options_of_a_plan_and_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for option in ("--gpus", "--gpu", "--mfu", "--price", "--mean_length", "--picture", "--data.max_length"):
        assert f"\n  {option} " in printed
    assert "--allow_change" not in printed


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--gpus", "1"], "GiB for its copy of"),
        (["-c", "ddp", "--gpus", "8"], "GiB for the first one's copy of"),
        (["-c", "fsdp", "--gpus", "8"], "GiB for its part of"),
    ],
)
def test_the_hosts_memory_is_told(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", "esm2_650M", "-c", "gpu", *given]) == 0
    text = capsys.readouterr().out
    parameters = float(re.search(r"parameters +([\d.]+) M", text)[1])  # type: ignore[index]
    built = float(re.search(r"host memory +([\d.]+) GiB for each process", text)[1])  # type: ignore[index]
    copy = float(re.search(rf"([\d.]+) {said}", text)[1])  # type: ignore[index]
    assert built == pytest.approx(4 * parameters * 1e6 / 2**30, rel=0.01)
    assert copy == pytest.approx((3 if "fsdp" not in given else 3 / 8) * built, rel=0.05)


def test_what_does_not_fit_has_no_time_and_no_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", "esm2_15B", "-c", "gpu", "--price", "2"]) == 0
    output = capsys.readouterr().out
    assert "does not fit; try" in output
    assert "time " not in output
    assert "cost " not in output


def test_what_no_gpu_computes_gets_no_time_on_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-c", "quickstart", "--price", "2"]) == 0
    text = capsys.readouterr().out
    assert "add -c gpu" in text
    assert "tokens/s" not in text
    assert "cost" not in text

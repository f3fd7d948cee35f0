"""`pretrain plan`: what a run needs, before a GPU is paid for. It reads the config alone: no corpus, no run, no GPU."""

import math
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy, StrategyRegistry
from typing_extensions import override

from pretrain.errors import UserError
from pretrain.shipped import recipe_name
from pretrain.train.changes import precision_name
from pretrain.train.estimate import Plan
from pretrain.train.memory import COMPUTE_SIZES, GIB, TrainingMemory
from pretrain.train.module import MLMModule
from pretrain.train.picture import drawing
from pretrain.train.schedule import advance
from pretrain.train.settings import SettingsCLI, parse
from pretrain.train.throughput import GPUS


class PlanCLI(SettingsCLI):
    """The settings, the hardware to plan for, and the plan."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--gpus",
            type=int | None,
            default=None,
            help="How many GPUs to plan for (default: trainer.devices x num_nodes if a number is given there, else 1).",
        )
        parser.add_argument("--gpu", type=str, default="H100", help=f"Which GPU: {', '.join(GPUS)}.")
        parser.add_argument(
            "--mfu",
            type=float,
            default=0.45,
            help="Model FLOPs utilisation, a share of the GPU's datasheet rate. The default is an assumption; a short "
            "run logs its own as throughput/mfu.",
        )
        parser.add_argument("--price", type=float | None, default=None, help="Price of a GPU for an hour.")
        parser.add_argument(
            "--mean_length",
            type=int | None,
            default=None,
            help="Mean tokens of a sequence, for the cost of attention (default: data.max_length).",
        )
        parser.add_argument("--picture", type=str | None, default=None, help="PNG to draw the learning rate into.")
        super().add_arguments_to_parser(parser)

    @override
    def instantiate_classes(self) -> None:
        """The module on the meta device, where it takes no memory, and the plan; no Trainer, which needs the GPUs."""
        config = self.config
        if config.gpu not in GPUS:
            raise UserError(f"no datasheet of a GPU '{config.gpu}'; give one of {', '.join(GPUS)}")
        devices, nodes = config.trainer.devices, config.trainer.num_nodes
        gpus = config.gpus
        if gpus is None:
            gpus = int(devices) * nodes if str(devices).isdecimal() else 1
        if gpus < 1:
            raise UserError(f"the number of GPUs is {gpus}; give 1 or more with --gpus")
        if not 0 < config.mfu <= 1:
            raise UserError(f"mfu is {config.mfu}; give a share above 0 and at most 1, such as 0.45")
        if config.price is not None and config.price < 0:
            raise UserError(f"price is {config.price}; give what a GPU costs for an hour, 0 or more")
        config.model.initialize_from = None  # whose weights tell nothing here
        with torch.device("meta"):
            built = self.parser.instantiate_classes(config)
        self.datamodule, self.model = built.data, built.model
        self.datamodule.check_packs(gpus, config.trainer.accumulate_grad_batches)
        length = config.data.max_length if config.mean_length is None else config.mean_length
        if not 1 <= length <= config.data.max_length:
            raise UserError(f"mean_length is {length}; give 1 to data.max_length, which is {config.data.max_length}")
        strategy = config.trainer.strategy
        self.plan = Plan(
            memory=TrainingMemory(
                encoder=self.model.encoder,
                precision=precision_name(config.trainer.precision),
                target_share=self.datamodule.masking.mean_share,
                gpus=gpus,
                sharded=_is_sharded(strategy),
                gradients_in_buckets=bool(_option(strategy, "gradient_as_bucket_view")),
                activation_checkpointing=self.model.encoder.activation_checkpointing,
                muon=self.model.optimizer_name == "muon",
            ),
            gpu=config.gpu,
            mfu=config.mfu,
            max_steps=config.trainer.max_steps,
            step_tokens=config.data.global_batch_tokens,
            batch_warmup=self.datamodule.batch_warmup,
            accumulate_grad_batches=config.trainer.accumulate_grad_batches,
            max_length=config.data.max_length,
            mean_length=length,
        )


def plan(arguments: Sequence[str]) -> int:
    """Say what a run needs: parameters, FLOPs, memory for each GPU, the largest pack, hours and cost.

    Takes the configs and overrides of `pretrain fit`; reads no data, writes no run and uses no GPU. Memory and time
    are estimates.

    Returns:
        The exit code, 0.

    Raises:
        UserError: On any mistake in the arguments or the config.
    """
    cli = parse(PlanCLI, "plan", plan.__doc__.split("\n\n    Returns")[0], arguments)  # type: ignore[union-attr]
    rates = learning_rates(cli.model, cli.plan.max_steps)
    if cli.config.picture:
        draw(rates, cli.model.warmup_steps, Path(cli.config.picture))
    print(describe(cli, rates))
    return 0


def learning_rates(module: MLMModule, max_steps: int, points: int = 1000) -> dict[int, float]:
    """The learning rate after some numbers of optimizer steps, from the module's own scheduler (of its first group).

    One that follows the validation loss stays at the peak: what it will see is not known.

    Args:
        module: Its optimizer and scheduler are built; a module on the meta device will do.
        max_steps: The last of them.
        points: How many to take in the warmup, and as many after it.
    """
    scheduler = module.schedule_over(max_steps)
    end_of_warmup = min(module.warmup_steps, max_steps)
    steps = {round(end_of_warmup * i / points) for i in range(points + 1)}
    steps |= {end_of_warmup + round((max_steps - end_of_warmup) * i / points) for i in range(points + 1)}
    rates = {}
    for step in sorted(steps):
        advance(scheduler, step)
        rates[step] = float(scheduler.optimizer.param_groups[0]["lr"])
    return rates


def describe(cli: PlanCLI, rates: dict[int, float]) -> str:
    """The plan for people, in a few lines and a table."""
    plan, memory = cli.plan, cli.plan.memory
    encoder, config = memory.encoder, memory.encoder.config
    gpu, gpus = GPUS[plan.gpu], memory.gpus
    configs = " + ".join(recipe_name(path.relative) for path in cli.config.config or []) or "options"
    total, embedding, blocks = (
        sum(p.numel() for p in part.parameters()) for part in (encoder, encoder.embedding, encoder.blocks)
    )
    peak = max(rates, key=rates.__getitem__)
    last = max(rates)
    held = "divided among them" if memory.sharded and gpus > 1 else "whole on each" if gpus > 1 else ""
    lines = [
        f"{configs}, on {gpus:,} x {plan.gpu}",
        "",
        f"  parameters   {_short(total)}: embedding {_short(embedding)}, {config.num_hidden_layers} blocks "
        f"{_short(blocks)}, head and final norm {_short(total - embedding - blocks)}",
        f"  work         {_short(plan.flops_per_token)}FLOP a token, for sequences of {plan.mean_length:,} tokens with "
        f"{memory.target_share:.3g} of them targets",
        f"  step         {_short(plan.step_tokens)} tokens in {gpus:,} x {plan.accumulate_grad_batches} packs of "
        f"{plan.pack_tokens:,} (GPUs x accumulate_grad_batches)",
        f"  run          {plan.max_steps:,} steps, {_short(plan.tokens)} tokens, "
        f"{_short(plan.tokens * plan.flops_per_token)}FLOP",
        f"  learning     rate {rates[0]:.3g} at first, {rates[peak]:.3g} at step {peak:,}, "
        f"{rates[last]:.3g} at the end",
        "",
        f"  memory of a GPU in GiB ({', '.join(filter(None, (memory.precision, held)))})",
    ]
    split = memory.split(plan.pack_tokens)
    split["total"] = sum(split.values())
    lines += [
        f"    {name:28}" + (f"{size / GIB:9.2f}" if size >= 0.005 * GIB else "   < 0.01")
        for name, size in split.items()
    ]
    lines[-1] += f"  of {gpu.memory:.1f}"
    copy = split["weights"] + split["optimizer state"]
    whose = "its part" if memory.sharded and gpus > 1 else "the first one's copy" if gpus > 1 else "its copy"
    lines += [
        "",
        f"  host memory  {4 * total / GIB:.2f} GiB for each process, which builds the whole model",
        f"               {copy / GIB:.2f} GiB for {whose} of a checkpoint that is being written",
        _verdict(plan),
    ]
    on_gpu = COMPUTE_SIZES[memory.precision] == 2
    if not on_gpu:
        lines += [
            f"  precision    {memory.precision}: attention over packs needs bfloat16 on a GPU; add -c gpu",
            "  time         none for a GPU, therefore; on a CPU a run's progress bar shows it after some steps",
        ]
    if not (plan.fits and on_gpu):
        return "\n".join(lines + ([f"  picture      {cli.config.picture}"] if cli.config.picture else []))
    lines += [
        f"  time         {_duration(plan.hours)} at {_short(plan.tokens_per_second)} tokens/s: {plan.mfu:.0%} of "
        f"{gpu.bf16_flops / 1e12:,.0f} TFLOP/s a GPU (datasheet, bfloat16)",
        f"               the {plan.mfu:.0%} are an assumption (--mfu); a short run logs its own as throughput/mfu",
    ]
    if cli.config.price is not None:
        lines += [
            f"  cost         {gpus * plan.hours * cli.config.price:,.2f}: {gpus * plan.hours:,.1f} GPU-hours at "
            f"{cli.config.price:g}"
        ]
    if cli.config.picture:
        lines += [f"  picture      {cli.config.picture}"]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return f"  does not fit; try {plan.remedy()}"
    return (
        f"  fits         largest pack {plan.largest_pack:,} tokens: accumulate_grad_batches {plan.fewest_packs} or more"
    )


def draw(rates: dict[int, float], warmup_steps: int, picture: Path) -> None:
    """Draw the learning rate over the run into a PNG file; a short warmup once more, enlarged."""
    steps, peak = list(rates), max(rates, key=rates.__getitem__)
    with drawing(picture, (8, 3.6)) as (axes,):
        axes.plot(steps, list(rates.values()), color="tab:blue")
        axes.plot(peak, rates[peak], "o", color="tab:orange")
        axes.annotate(
            f"peak {rates[peak]:.3g} at step {peak:,}",
            (peak, rates[peak]),
            xytext=(10, 6),
            textcoords="offset points",
            va="bottom",
        )
        axes.set(xlabel="optimizer step", ylabel="learning rate", xlim=(0, steps[-1]), ylim=(0, 1.15 * rates[peak]))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if 0 < warmup_steps < 0.1 * steps[-1]:
            shown = [step for step in steps if step <= 3 * warmup_steps]
            # In the corner that the curve leaves free: a rate that falls late leaves the lower left.
            middle = rates[min(rates, key=lambda step: abs(step - 0.6 * steps[-1]))]
            corner = (0.56, 0.45) if middle < 0.45 * rates[peak] else (0.08, 0.14)
            inset = axes.inset_axes((*corner, 0.4, 0.38))
            inset.plot(shown, [rates[step] for step in shown], color="tab:blue")
            inset.plot(peak, rates[peak], "o", color="tab:orange", markersize=4)
            inset.set_title("warmup, enlarged", fontsize="small")
            inset.set(xlim=(0, 3 * warmup_steps), ylim=(0, 1.1 * rates[peak]), yticks=[])
            inset.xaxis.set_major_formatter("{x:,.0f}")
            inset.tick_params(labelsize="small")
            inset.spines[["top", "right"]].set_visible(False)


def _is_sharded(strategy: str | Namespace) -> bool:
    """Whether a strategy, as the config names it, divides the model among the processes."""
    name = strategy if isinstance(strategy, str) else strategy.class_path
    kind: Any = None
    if name in StrategyRegistry:
        kind = StrategyRegistry[name]["strategy"]
    elif "." in name:
        try:
            kind = pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"trainer.strategy is {name}, which cannot be imported ({error}); see configs/") from error
    return isinstance(kind, type) and issubclass(kind, FSDPStrategy | ModelParallelStrategy)


def _option(strategy: str | Namespace, name: str) -> Any:
    return None if isinstance(strategy, str) else (strategy.get("init_args") or {}).get(name)


def _short(number: float) -> str:
    """Three figures and a prefix: 7.51 M."""
    power = min(int(math.log10(number) // 3), 8) if number >= 1 else 0
    scaled = number / 1000**power
    figures = max(0, 2 - int(math.log10(scaled))) if power else 0
    return f"{scaled:.{figures}f} {'_kMGTPEZY'[power]}".replace(" _", " ")


def _duration(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.2g} seconds"
    if hours < 1:
        return f"{60 * hours:.1f} minutes"
    if hours < 48:
        return f"{hours:.1f} hours"
    return f"{hours / 24:,.1f} days" if hours < 2 * 365 * 24 else f"{hours / 24 / 365:,.1f} years"

"""Learning-rate schedules, as functions of the number of optimizer steps taken."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from pretrain.errors import UserError


class InverseSqrtScheduler(LambdaLR):
    """Linear warmup, then decay with the inverse square root of the step.

    With n optimizer steps taken, w = ``warmup_steps`` and the optimizer's own learning rate as the peak::

        n < w:   warmup_init_lr + (peak - warmup_init_lr) * n / w
        n >= w:  peak * sqrt(w / n)

    For w > 0 these are the numbers of fairseq's ``inverse_square_root_schedule``. Where fairseq divides by zero,
    w = 0 gives ``peak / sqrt(max(n, 1))``.

    Args:
        optimizer: Its parameter groups' learning rates are the peaks.
        warmup_steps: Optimizer steps until the peak.
        last_epoch: Steps taken already, less one; hence -1 to start afresh (torch's name and convention).
        warmup_init_lr: Learning rate before the first step, when there is a warmup.

    Raises:
        UserError: If ``warmup_steps`` or ``warmup_init_lr`` is negative.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int, last_epoch: int = -1, warmup_init_lr: float = 0.0
    ) -> None:
        self.warmup_steps = warmup_steps
        self.warmup_init_lr = warmup_init_lr

        def decay(step: int) -> float:
            return float((max(warmup_steps, 1) / max(step, 1)) ** 0.5)

        super().__init__(optimizer, _factors(optimizer, warmup_steps, warmup_init_lr, decay), last_epoch)


class Schedule(ABC):
    """What the learning rate does after a linear warmup, in a run whose length is known: a pure function.

    Stretches of the run are given as shares of its steps, so that a recipe keeps its meaning when it is made longer or
    shorter. `ShapedScheduler` makes one of torch's schedulers of it.
    """

    @abstractmethod
    def factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        """Share of the peak with which the next step is taken.

        Args:
            step: Optimizer steps taken, ``warmup_steps`` or more.
            warmup_steps: Steps of the warmup.
            total_steps: Steps of the whole run.
        """


class LinearDecay(Schedule):
    """A straight line from the peak down to a floor, where it stays. By default, ESM-2's: a tenth, at 90 % of the run.

    Lin et al. 2023, supplementary A.2; the numbers of fairseq's ``polynomial_decay_schedule`` with power 1. With
    ``floor`` 0 and ``end`` 1, those of transformers' ``get_linear_schedule_with_warmup``.

    Args:
        floor: Where the line ends, as a share of the peak.
        end: When it gets there, as a share of the run's steps.
    """

    def __init__(self, floor: float = 0.1, end: float = 0.9) -> None:
        _check_shares(floor=floor, end=end)
        self.floor, self.end = floor, end

    @override
    def factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        left = 1 - _progress(step, warmup_steps, self.end * total_steps)
        return self.floor + (1 - self.floor) * left


class CosineDecay(Schedule):
    """Half a cosine wave from the peak to a floor at the end of the run (Loshchilov and Hutter 2017, without restarts).

    The numbers of transformers' ``get_cosine_with_min_lr_schedule_with_warmup``.

    Args:
        floor: Where it ends, as a share of the peak.
    """

    def __init__(self, floor: float = 0.0) -> None:
        _check_shares(floor=floor)
        self.floor = floor

    @override
    def factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        wave = 0.5 * (1 + math.cos(math.pi * _progress(step, warmup_steps, total_steps)))
        return self.floor + (1 - self.floor) * wave


class Constant(Schedule):
    """The peak, from the warmup on (transformers' ``get_constant_schedule_with_warmup``)."""

    @override
    def factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        return 1.0


class WarmupStableDecay(Schedule):
    """The peak until the last part of the run, then down to a floor (Hu et al. 2024, Haegele et al. 2024).

    Until the decay begins, the curve does not depend on how long the run is, so a run can be made longer
    (`--allow_change`) from any checkpoint before it. The numbers of transformers' ``get_wsd_schedule``.

    Args:
        decay: The share of the run's steps that decays.
        shape: ``sqrt`` falls as 1 - sqrt(share of the decay that is done), ``linear`` in a straight line.
        floor: Where it ends, as a share of the peak.
    """

    def __init__(self, decay: float = 0.2, shape: Literal["sqrt", "linear"] = "sqrt", floor: float = 0.0) -> None:
        _check_shares(decay=decay, floor=floor)
        self.decay, self.shape, self.floor = decay, shape, floor

    @override
    def factor(self, step: int, warmup_steps: int, total_steps: int) -> float:
        begin = max(warmup_steps, total_steps - round(self.decay * total_steps))
        done = _progress(step, begin, total_steps) if step >= begin else 0.0
        return self.floor + (1 - self.floor) * (1 - (math.sqrt(done) if self.shape == "sqrt" else done))


class ShapedScheduler(LambdaLR):
    """Linear warmup from ``warmup_init_lr`` to the peak, then as a `Schedule` says.

    Args:
        optimizer: Its parameter groups' learning rates are the peaks.
        schedule: What comes after the warmup.
        warmup_steps: Optimizer steps until the peak.
        total_steps: Optimizer steps of the whole run.
        last_epoch: See `InverseSqrtScheduler`.
        warmup_init_lr: Learning rate before the first step, when there is a warmup.

    Raises:
        UserError: If ``warmup_steps`` or ``warmup_init_lr`` is negative, or the length of the run is not known.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        warmup_steps: int,
        total_steps: int,
        last_epoch: int = -1,
        warmup_init_lr: float = 0.0,
    ) -> None:
        if total_steps < 1:
            raise UserError(
                f"{type(schedule).__name__} ends with the run, whose steps are {total_steps}; give trainer.max_steps"
            )

        def after(step: int) -> float:
            return schedule.factor(step, warmup_steps, total_steps)

        super().__init__(optimizer, _factors(optimizer, warmup_steps, warmup_init_lr, after), last_epoch)


def advance(scheduler: LRScheduler, steps: int) -> None:
    """Bring a new scheduler to where it stands after ``steps`` optimizer steps, and its optimizer's groups with it.

    Those that are given by a formula go there at once; others are walked there, some microseconds a step, since what
    they do at a step may follow from the one before. `ReduceLROnPlateau` follows a loss, not the steps: it stays.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    scheduler.optimizer.step()  # without gradients it changes nothing; torch warns of a scheduler that goes first
    if isinstance(scheduler, LambdaLR) and scheduler.last_epoch < steps:
        scheduler.last_epoch, scheduler._step_count = steps - 1, steps
    while scheduler.last_epoch < steps:
        scheduler.step()


def restore(checkpoint: dict[str, Any], optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Let a Lightning checkpoint continue under the settings of a new optimizer and scheduler, which may differ.

    The state of a schedule follows from the step and is computed anew, so that it is the configured one's. Only what
    `ReduceLROnPlateau` has seen cannot be; it is kept, and so is the rate it came to, relative to the peak.

    Args:
        checkpoint: Its hyper-parameters and its schedule's state are replaced.
        optimizer: As it is made for a run's first step.
        scheduler: The same.
    """
    (saved,) = checkpoint["lr_schedulers"]
    saved_groups = checkpoint["optimizer_states"][0]["param_groups"]
    if isinstance(scheduler, ReduceLROnPlateau):
        if "num_bad_epochs" in saved:
            for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch"):
                setattr(scheduler, name, saved[name])
            for old, group in zip(saved_groups, optimizer.param_groups, strict=True):
                group["lr"] = old["lr"] * (group["initial_lr"] / old["initial_lr"])
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
    else:
        advance(scheduler, checkpoint["global_step"])
    for old, group in zip(saved_groups, optimizer.param_groups, strict=True):
        old.update({name: value for name, value in group.items() if name != "params"})
    checkpoint["lr_schedulers"] = [scheduler.state_dict()]


def _factors(
    optimizer: Optimizer, warmup_steps: int, warmup_init_lr: float, after: Callable[[int], float]
) -> list[Callable[[int], float]]:
    """For each parameter group, the learning rate over its peak: the warmup's line, then ``after``."""
    if warmup_steps < 0 or warmup_init_lr < 0:
        raise UserError(f"warmup_steps is {warmup_steps}, warmup_init_lr is {warmup_init_lr}; neither can be negative")

    def factor_of(peak: float) -> Callable[[int], float]:
        floor = warmup_init_lr / peak if peak else 0.0

        def factor(step: int) -> float:
            return floor + (1.0 - floor) * step / warmup_steps if step < warmup_steps else after(step)

        return factor

    return [factor_of(float(group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]


def _progress(step: int, begin: float, end: float) -> float:
    """How much of the way from ``begin`` to ``end`` is done; all of it where the way has no length."""
    return min(1.0, (step - begin) / (end - begin)) if end > begin else 1.0


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"the schedule's {name} is {share}; give a share from 0 to 1")

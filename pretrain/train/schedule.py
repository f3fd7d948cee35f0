"""Learning-rate schedules, as functions of the number of optimizer steps taken."""

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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
        if warmup_steps < 0 or warmup_init_lr < 0:
            raise UserError(
                f"warmup_steps is {warmup_steps}, warmup_init_lr is {warmup_init_lr}; neither can be negative"
            )
        self.warmup_steps = warmup_steps
        self.warmup_init_lr = warmup_init_lr
        peaks = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, [self._factor(float(peak)) for peak in peaks], last_epoch)

    def _factor(self, peak: float) -> Callable[[int], float]:
        warmup, floor = self.warmup_steps, self.warmup_init_lr / peak if peak else 0.0

        def factor(step: int) -> float:
            if step < warmup:
                return floor + (1.0 - floor) * step / warmup
            return float((max(warmup, 1) / max(step, 1)) ** 0.5)

        return factor


class LinearScheduler(LambdaLR):
    """Linear warmup, then linear decay to zero at ``max_steps``: transformers' ``get_linear_schedule_with_warmup``.

    Args:
        optimizer: Its parameter groups' learning rates are the peaks.
        warmup_steps: Optimizer steps until the peak.
        max_steps: Optimizer steps until zero.
        last_epoch: Steps taken already, less one; hence -1 to start afresh (torch's name and convention).

    Raises:
        UserError: If ``warmup_steps`` is negative, or not below ``max_steps``.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, max_steps: int, last_epoch: int = -1) -> None:
        check_warmup(warmup_steps, max_steps)

        def factor(step: int) -> float:
            if step < warmup_steps:
                return step / warmup_steps
            return max(0.0, (max_steps - step) / (max_steps - warmup_steps))

        super().__init__(optimizer, factor, last_epoch)


def check_warmup(warmup_steps: int, max_steps: int) -> None:
    """Raises `UserError` if a warmup leaves nothing of a run."""
    if not 0 <= warmup_steps < max_steps:
        raise UserError(f"warmup_steps is {warmup_steps} of {max_steps} steps in all; give 0 to {max_steps - 1}")

"""The mistake that everybody makes once: a schedule by the step that Lightning, by default, steps once an epoch."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class EveryEpoch(LambdaLR):
    """Linear warmup and inverse square root, as of a step count that goes up by one an epoch.

    Args:
        optimizer: Its learning rate is the peak.
        warmup_steps: As one would give them for steps.
        steps_in_epoch: Optimizer steps until the count goes up.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, steps_in_epoch: int) -> None:
        def factor(step: int) -> float:
            count = step // steps_in_epoch
            return count / warmup_steps if count < warmup_steps else float((warmup_steps / count) ** 0.5)

        super().__init__(optimizer, factor)

"""What the processes of a run do together: sums, agreements, and waiting for each other."""

from datetime import timedelta
from functools import lru_cache

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

_LONGEST_WAIT = timedelta(days=2)
"""Whoever dies meanwhile is missed at once: a connection is closed."""


def over_processes(trainer: pl.Trainer, tensor: Tensor, operation: ReduceOp.RedOpType) -> Tensor:
    """A tensor's sum, maximum, ... over all processes, in place.

    Lightning's ``strategy.reduce`` holds a barrier first, at which the host waits for the GPU.
    """
    if trainer.world_size > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def largest(trainer: pl.Trainer, value: int) -> int:
    """The largest of the processes' values, on all of them; no GPU is waited for."""
    tensor = torch.tensor(value)
    if trainer.world_size > 1:
        dist.all_reduce(tensor, ReduceOp.MAX, _between_hosts(trainer))
    return int(tensor)


def wait_for_all(trainer: pl.Trainer) -> None:
    """Until all processes are here, also where one works for longer than a collective may take (30 minutes)."""
    if trainer.world_size > 1:
        dist.barrier(_gloo_beside(dist.GroupMember.WORLD, _LONGEST_WAIT))


def _between_hosts(trainer: pl.Trainer) -> ProcessGroup | None:
    """The group of all processes that needs no GPU; None is the default one."""
    if trainer.strategy.root_device.type == "cpu":
        return None
    return _gloo_beside(dist.GroupMember.WORLD, getattr(trainer.strategy, "_timeout", None))


@lru_cache(maxsize=2)
def _gloo_beside(default: ProcessGroup, timeout: timedelta | None) -> ProcessGroup:
    """A group like the default one, with another patience; all processes must ask for it at once, the first time."""
    group: ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return group

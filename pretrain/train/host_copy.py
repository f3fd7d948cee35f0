"""A figure on its way from the GPU."""

import torch
from torch import Tensor


class HostCopy:
    """One number of a tensor, read later: reading then waits for what was asked of a GPU before, not since.

    ``float(tensor)`` would wait for all that the GPU has to do, while it should be given more.

    Args:
        figure: A tensor of one element, which is not changed any more.
    """

    def __init__(self, figure: Tensor) -> None:
        self._figure, self._event = figure.detach(), None
        if figure.is_cuda:
            on_host = torch.empty(figure.shape, dtype=figure.dtype, pin_memory=True)
            self._figure = on_host.copy_(figure.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def __float__(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._figure)

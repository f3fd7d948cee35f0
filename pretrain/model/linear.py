"""Products of activations and weights, by torch or by the project's own kernels for CPUs."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.model.cpu_kernels import has_avx512, takes

MIN_ROWS = 256
"""Of fewer rows the project's own kernels are no faster."""
MIN_MULTIPLICATIONS = 0 if has_avx512() else 2**27
"""Likewise: with AVX2 they gain so little that calling them costs more in small products."""


def linear(
    x: Float[Tensor, "T K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None, llvm: bool
) -> Float[Tensor, "T N"]:
    """``torch.nn.functional.linear``; see there.

    Args:
        x: Activations.
        weight: A weight.
        bias: What is added to each row.
        llvm: Let the project's own kernels compute it where they can: see `takes`.
    """
    if (
        llvm
        and takes(x, weight, *([] if bias is None else [bias]))
        and not torch.is_autocast_enabled("cpu")
        and x.dim() == 2
        and len(x) >= MIN_ROWS
        and len(x) * weight.numel() >= MIN_MULTIPLICATIONS
        and x.shape[1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        from pretrain.model.cpu_linear import cpu_linear

        return cpu_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by `linear`.

    Attributes:
        llvm: Whether the project's own kernels are to compute it on a CPU.
    """

    llvm = False

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``, [T, N]."""
        return linear(x, self.weight, self.bias, self.llvm)

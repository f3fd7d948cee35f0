"""Low-rank adaptation (Hu et al. 2021) of the encoder's matrices, by torch's own parametrizations.

A parametrized layer's ``weight`` is ``W + alpha / r * B A`` wherever it is read. So it also holds where the encoder's
last block reads rows of a weight by itself, for which a layer that only replaces ``forward`` (as peft's do) would be
passed over without a word. Merging is renaming.
"""

import math
import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pretrain.model.encoder import Block, Encoder

_ORIGINAL = re.compile(r"^(.*)\.parametrizations\.weight\.original$")


class LowRank(nn.Module):
    """The sum of a fixed matrix and a trained one of low rank, which begins as zero.

    Args:
        weight: The fixed matrix.
        rank: Rank of what is added.
        alpha: What is added is scaled by ``alpha / rank``.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # as the authors' code and peft do

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted matrix."""
        return weight + self.scale * (self.B @ self.A).to(weight.dtype)


def add_lora(encoder: Encoder, rank: int, alpha: float) -> None:
    """Freeze an encoder and give every matrix of its blocks a trainable low-rank part."""
    encoder.requires_grad_(False)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        for layer in (block.qkv, block.out, block.ffn_in, block.ffn_out):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha))


def merge_lora(state: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """An encoder's state dict with the low-rank parts added to their matrices, under the usual names.

    Args:
        state: As a module with `add_lora` saves it; one without comes back as it is.
        scale: ``alpha / rank``; None where there are no such parts.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _ORIGINAL.match(name):
            assert scale is not None
            place = f"{match[1]}.parametrizations.weight.0"
            merged[f"{match[1]}.weight"] = tensor + scale * (state[f"{place}.B"] @ state[f"{place}.A"])
        elif ".parametrizations." not in name:
            merged[name] = tensor
    return merged

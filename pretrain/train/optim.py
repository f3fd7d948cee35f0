"""AdamW and its parameter groups."""

from typing import Literal

from torch import nn
from torch.optim import AdamW


def build_adamw(
    model: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay: Literal["all", "matrices"],
) -> AdamW:
    """Fused AdamW over a model's parameters (Loshchilov and Hutter 2019).

    Args:
        model: Its trainable parameters are optimised.
        learning_rate: Peak learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        decay: ``all``: one group, decay everywhere, as fairseq did for ESM. ``matrices``: a second group without decay
            for biases and layer norms, as nanoGPT does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [{"params": parameters}]
    if decay == "matrices":
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

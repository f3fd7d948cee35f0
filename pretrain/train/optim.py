"""Optimizers and their parameter groups."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from typing_extensions import override


def build_optimizer(
    model: nn.Module,
    name: Literal["adamw", "muon"],
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay: Literal["all", "matrices"],
) -> Optimizer:
    """Fused AdamW over a model's parameters (Loshchilov and Hutter 2019), or Muon over its hidden layers' matrices.

    Args:
        model: Its trainable parameters are optimised.
        name: ``adamw`` for all; ``muon`` for the matrices that are not embeddings, with AdamW for the rest.
        learning_rate: Peak learning rate, of both.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's, added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        decay: ``all``: decay everywhere, as fairseq did for ESM; AdamW then has one group. ``matrices``: a group
            without decay for biases and layer norms, as nanoGPT does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden: list[Tensor] = []
    if name == "muon":
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        hidden = [p for p in parameters if p.ndim == 2 and id(p) not in embeddings]
        parameters = [p for p in parameters if p.ndim != 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if decay == "matrices":
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
    adamw = AdamW(groups, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
    if name == "adamw":
        return adamw
    # Scaled so that an update is as large as AdamW's: one learning rate serves both.
    muon = Muon(hidden, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(muon, adamw)


class MuonWithAdamW(Optimizer):
    """Muon for some parameters and AdamW for others, as one optimizer: Muon's groups come first.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; with the scale of Liu et al. 2025,
    "Muon is scalable for LLM training", section 2.2.

    Args:
        muon: A new optimizer.
        adamw: Another, of other parameters; fused.

    Attributes:
        found_inf: Where it is 1, a step changes nothing, as with torch's fused optimizers. Muon is not fused, so the
            host waits for the device here, once a step.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.found_inf: Tensor | None = None
        self._muon, self._adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both work on this optimizer's groups and state."""
        split = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        self._muon.state = self._adamw.state = self.state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which makes new groups
        self._share()

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the gradients, and reports in ``found_inf`` whether they are finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.found_inf is None or not bool(self.found_inf):
            self._muon.step()
            self._adamw.step()
        return loss

"""What a validation finds: loss and accuracy over all targets, by length and by token, and what is taken for what."""

from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed import ReduceOp

from pretrain.corpus.batch import Batch
from pretrain.corpus.padding import IGNORED
from pretrain.train.together import over_processes

LENGTH_BINS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Upper bounds, inclusive, of the length bins, in tokens of the crop."""

MOST_TOKENS = 64
"""Vocabularies up to this size are reported token by token: alphabets, not words."""

RESIDUE_CLASSES = {
    "aliphatic": "AVILM",
    "aromatic": "FWY",
    "polar": "STNQ",
    "positive": "KRH",
    "negative": "DE",
    "special": "CGP",
}
"""The twenty residues by their side chains."""


def prefixes(name: str, first: bool) -> list[str]:
    """What the figures of a validation set are logged under: of the first one as ``val``, too; the name may be ""."""
    found = []
    if first:
        found.append("val")
    if name:
        found.append(f"val/{name}")
    return found


class Findings(NamedTuple):
    """Sums over the targets of one validation set, on all processes, on the CPU.

    Attributes:
        lengths: Loss, correct predictions and targets of each bin of lengths, [bins, 3].
        token_losses: Loss by the true token, [V]; empty for a large vocabulary.
        confusion: How often the token of a row was taken for that of a column, [V, V]; empty for a large vocabulary.
    """

    lengths: Tensor
    token_losses: Tensor
    confusion: Tensor

    @property
    def loss(self) -> Tensor:
        """Mean loss over all targets, in nats."""
        return self._mean(0)

    @property
    def accuracy(self) -> Tensor:
        """Share of the targets that are predicted best."""
        return self._mean(1)

    @property
    def targets(self) -> int:
        """How many there were."""
        return int(self.lengths[:, 2].sum())

    def figures(self, tokens: tuple[str, ...]) -> dict[str, Any]:
        """All of it as plain values; an alphabet's tokens one by one."""
        figures: dict[str, Any] = {
            "targets": self.targets,
            "loss": float(self.loss),
            "perplexity": float(self.loss.double().exp()),
            "accuracy": float(self.accuracy),
            "by_length": self.by_length(),
        }
        if by_token := self.by_token(tokens):
            figures["by_token"] = by_token
        return figures

    def _mean(self, column: int) -> Tensor:
        sums = self.lengths.sum(0)
        return (sums[column] / sums[2].clamp(min=1)).float()

    def class_accuracies(self, tokens: tuple[str, ...]) -> dict[str, float]:
        """Accuracy by class of residue, of the classes that occur; ``tokens`` are the vocabulary's."""
        found = {}
        for name, residues in RESIDUE_CLASSES.items():
            rows = [tokens.index(residue) for residue in residues]
            if total := float(self.confusion[rows].sum()):
                found[name] = float(self.confusion[rows, rows].sum()) / total
        return found

    def by_length(self) -> list[dict[str, float]]:
        """Targets, loss and accuracy of the bins that hold any: of sequences of ``from`` to ``to`` tokens."""
        bounds = [0, *LENGTH_BINS, 2**31]
        return [
            {"from": low + 1, "to": high, **_means(*sums)}
            for low, high, sums in zip(bounds, bounds[1:], self.lengths.tolist(), strict=False)
            if sums[2]
        ]

    def by_token(self, tokens: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """Targets, loss and accuracy of the tokens that occur."""
        counts, correct = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        sums = zip(tokens, self.token_losses.tolist(), correct, counts, strict=False)
        return {token: _means(loss, right, count) for token, loss, right, count in sums if count}


def _means(loss: float, correct: float, targets: float) -> dict[str, float]:
    return {"targets": int(targets), "loss": loss / targets, "accuracy": correct / targets}


class Tally:
    """Adds up findings batch by batch, on the device, and over the processes at the end: exact, however it was divided.

    Args:
        vocab_size: Number of tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        self.size = vocab_size if vocab_size <= MOST_TOKENS else 0
        self._sums: Tensor | None = None

    def add(self, batch: Batch, losses: Tensor, predictions: Tensor) -> None:
        """Count a batch.

        Args:
            batch: Rows that only fill a static shape do not count.
            losses: Cross-entropy of each target, shape [M].
            predictions: The most likely token at each target, shape [M].
        """
        bins = 3 * (len(LENGTH_BINS) + 1)
        if self._sums is None:
            self._sums = torch.zeros(bins + self.size + self.size**2, dtype=torch.float64, device=losses.device)
            self._bounds = torch.tensor(LENGTH_BINS, device=losses.device)
        counted = (batch.targets != IGNORED).double()
        targets = batch.targets.clamp(min=0)
        losses = losses.double() * counted
        correct = (predictions == targets) * counted
        sequence = torch.searchsorted(batch.cu_seqlens[1:].long(), batch.target_positions, right=True)
        lengths = batch.cu_seqlens.diff().long()[sequence.clamp(max=len(batch.cu_seqlens) - 2)]
        place = 3 * torch.bucketize(lengths, self._bounds)
        for column, values in enumerate((losses, correct, counted)):
            self._sums.index_add_(0, place + column, values)
        if self.size:
            self._sums.index_add_(0, bins + targets, losses)
            self._sums.index_add_(0, bins + self.size + self.size * targets + predictions, counted)

    def collect(self, trainer: pl.Trainer | None = None) -> Findings:
        """The findings of all processes of a Trainer, or of this one; begins anew."""
        assert self._sums is not None
        sums = (over_processes(trainer, self._sums, ReduceOp.SUM) if trainer else self._sums).cpu()
        self._sums = None
        lengths, losses, confusion = sums.split([3 * (len(LENGTH_BINS) + 1), self.size, self.size**2])
        return Findings(lengths.view(-1, 3), losses, confusion.view(self.size, self.size))

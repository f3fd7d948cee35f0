"""Static shapes: batches padded to one of a few sizes, so that compiled code sees the same shapes in every step.

Padding is laid out as sequences of its own, which no real token attends to, and its rows of the loss are ignored: the
function computed is that of the unpadded batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from pretrain.corpus.batch import Batch, PackDataset
from pretrain.corpus.packing import Pack

IGNORED = -100
"""Target of padding, or of a residue without a label: `torch.nn.functional.cross_entropy` leaves it out of the sum."""

_SPARE = 1.01  # room for packs that are not quite equal: they differ by about 0.2 %
_MULTIPLE = 128  # of tokens and targets: whole tiles of a GPU's matrix products


@dataclass(frozen=True)
class StaticShape:
    """The sizes that a batch is padded to.

    Attributes:
        tokens: Length of ``input_ids``.
        targets: Rows of the loss.
        sequences: Number of sequences, padding included; the last of them may be empty.
        max_length: Length of the longest sequence possible, padding included.
    """

    tokens: int
    targets: int
    sequences: int
    max_length: int

    def holds(self, batch: Batch) -> bool:
        """Whether a batch fits."""
        room = self.tokens - len(batch.input_ids)
        sequences = len(batch.cu_seqlens) - 1 + -(-room // self.max_length)
        return room >= 0 and len(batch.targets) <= self.targets <= self.tokens and sequences <= self.sequences

    def pad(self, batch: Batch, pad_token_id: int) -> Batch:
        """The batch with padding to this shape; it must fit."""
        real = len(batch.input_ids)
        bounds = batch.cu_seqlens.tolist() + list(range(real + self.max_length, self.tokens, self.max_length))
        bounds += [self.tokens] * (self.sequences + 1 - len(bounds))
        # Padded rows take the last places that are no target: padding, and then tokens, whose rows are ignored, too.
        targets = torch.full((self.tokens,), IGNORED)
        is_row = torch.ones(self.tokens, dtype=torch.bool)
        is_row[batch.target_positions] = False
        is_row[is_row.nonzero().flatten()[: self.tokens - self.targets]] = False
        targets[batch.target_positions] = batch.targets
        is_row[batch.target_positions] = True
        target_positions = is_row.nonzero().flatten()
        return replace(
            batch,
            input_ids=F.pad(batch.input_ids, (0, self.tokens - real), value=pad_token_id),
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            target_positions=target_positions,
            targets=targets[target_positions],
            max_seqlen=self.max_length,
        )


def static_shapes(
    mean_tokens: float, mean_length: float, max_length: int, target_share: float, target_deviation: float = 0.0
) -> tuple[StaticShape, ...]:
    """Three sizes for packs of about ``mean_tokens``: nearly all packs fit the first, any usual one the last.

    Args:
        mean_tokens: Tokens in a pack on average, before padding.
        mean_length: Tokens in a sequence on average.
        max_length: Tokens in a sequence at most.
        target_share: Share of the tokens that are targets, on average.
        target_deviation: Standard deviation of their number in such a pack.
    """

    def shape(tokens: float) -> StaticShape:
        tokens = _round_up(tokens)
        targets = _round_up(target_share * tokens + 3 * target_deviation)
        return StaticShape(tokens, min(tokens, targets), int(1.2 * tokens / mean_length) + 32, max_length)

    # Dealing out the longest first, no pack is more than one sequence above the mean.
    return tuple(
        shape(tokens) for tokens in (_SPARE * mean_tokens, mean_tokens + max_length / 2, mean_tokens + max_length)
    )


class PaddedDataset(Dataset[Batch]):
    """Pads each batch of a dataset to the smallest shape that holds it; leaves it as it is where none does.

    Args:
        dataset: Makes the batches.
        shapes: Sizes to choose from, ascending.
    """

    def __init__(self, dataset: PackDataset, shapes: Sequence[StaticShape]) -> None:
        self.dataset, self.shapes = dataset, shapes

    def __getitem__(self, pack: Pack) -> Batch:
        batch = self.dataset[pack]
        shape = next((shape for shape in self.shapes if shape.holds(batch)), None)
        return shape.pad(batch, self.dataset.corpus.tokenizer.pad_token_id) if shape else batch


def _round_up(value: float) -> int:
    return -int(-value // _MULTIPLE) * _MULTIPLE

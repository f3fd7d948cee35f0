"""Labelled sequences to packs whose targets are labels: what is planned, and what a loader worker makes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.counter import Int64
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Pack, StepPlanner, validation_packs
from pretrain.corpus.padding import IGNORED
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.downstream.finetune.labels import Labels
from pretrain.downstream.finetune.pairs import PairOrder, Tokens, cut_pair, swaps


class Labelled(NamedTuple):
    """Sequences (pairs count as one), and their labels by the same index."""

    corpus: Corpus
    labels: Labels


class LabelPlanner(StepPlanner):
    """Plans for labels: one target a sequence, or one a residue that has a label.

    A sequence with one label shows its beginning where it is too long, as transformers' truncation does; one with a
    label for each residue shows a random window, a new one in each epoch.

    Args:
        data: The sequences and their labels.
        order: The order of the sequences.
        max_length: Tokens in a crop, at most.
        swap_seed: Of pairs whose order has no meaning: what draws the order that each epoch shows.
    """

    def __init__(self, data: Labelled, order: Order, max_length: int, swap_seed: int | None = None) -> None:
        super().__init__(data.corpus, order, max_length)
        self.labels, self.swap_seed = data.labels, swap_seed
        if data.labels.offsets is not None:
            self._counts = np.concatenate([[0], np.cumsum(data.labels.values != IGNORED)])

    @override
    def crop_starts(self, epochs: Int64, indices: Int64, room: Int64) -> Int64:
        if self.labels.offsets is None:
            return np.zeros_like(room)
        return super().crop_starts(epochs, indices, room)

    @override
    def target_counts(self, epochs: Int64, indices: Int64, starts: Int64, lengths: Int64, maskable: Int64) -> Int64:
        if self.labels.offsets is None:
            return np.ones_like(indices)
        first = self.labels.offsets[indices] + np.maximum(starts - 1, 0)  # the first token, <cls>, is no residue
        counts: Int64 = self._counts[first + maskable] - self._counts[first]
        return counts


@dataclass
class LabelledBatch(Batch):
    """One pack whose targets are labels.

    Attributes:
        target_positions: Places in the pack, ascending: of each sequence's ``<cls>``, or of the residues with labels.
        targets: The label of each of them: [M] numbers or classes, or [M, K] zeros and ones.
        between: Places of the ``<eos>`` between the two sequences of each pair; None where there are no pairs.
    """

    targets: Tensor
    between: Tensor | None = None


class LabelledDataset(Dataset[LabelledBatch]):
    """A pure function from a pack's description to its batch.

    Args:
        data: The sequences and their labels.
    """

    def __init__(self, data: Labelled) -> None:
        self.corpus, self.labels = data

    def crops(self, pack: Pack) -> list[Tokens]:
        """The tokens of each sequence that the pack shows."""
        crops = zip(pack.indices.tolist(), pack.starts.tolist(), pack.lengths.tolist(), strict=True)
        return [self.corpus.tokens(index)[start : start + length] for index, start, length in crops]

    def __getitem__(self, pack: Pack) -> LabelledBatch:
        tokens = np.concatenate(self.crops(pack)).astype(np.int64)
        cu_seqlens = np.concatenate([[0], np.cumsum(pack.lengths)])
        if (offsets := self.labels.offsets) is None:
            positions = cu_seqlens[:-1]
            tokens[cu_seqlens[1:] - 1] = self.corpus.tokenizer.eos_token_id  # also of what was truncated
            targets = self.labels.values[pack.indices]
        else:
            labels = np.full(len(tokens), IGNORED)
            parts = (pack.indices, pack.starts, cu_seqlens[:-1], pack.maskable)
            for index, start, begin, residues in zip(*(part.tolist() for part in parts), strict=True):
                first = offsets[index] + max(start - 1, 0)
                begin += start == 0
                labels[begin : begin + residues] = self.labels.values[first : first + residues]
            (positions,) = np.nonzero(labels != IGNORED)
            targets = labels[positions]
        return LabelledBatch(
            input_ids=torch.from_numpy(tokens),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            target_positions=torch.from_numpy(positions),
            targets=torch.from_numpy(targets),
            max_seqlen=int(pack.lengths.max()),
            pack=pack,
        )


class PairDataset(LabelledDataset):
    """The same for pairs.

    Args:
        data: The pairs, as one sequence each, and their labels.
        swap_seed: Show each pair in an order drawn with this seed, a new one in each epoch; None for that of ``data``.
    """

    def __init__(self, data: Labelled, swap_seed: int | None) -> None:
        super().__init__(data)
        self.swap_seed = swap_seed

    @override
    def crops(self, pack: Pack) -> list[Tokens]:
        swap = np.zeros(len(pack.indices), bool) if self.swap_seed is None else swaps(pack, self.swap_seed)
        crops = zip(pack.indices.tolist(), pack.lengths.tolist(), swap.tolist(), strict=True)
        return [cut_pair(self.corpus.tokens(index), length, swapped) for index, length, swapped in crops]

    @override
    def __getitem__(self, pack: Pack) -> LabelledBatch:
        batch = super().__getitem__(pack)
        (ends,) = torch.nonzero(batch.input_ids == self.corpus.tokenizer.eos_token_id, as_tuple=True)
        return replace(batch, between=ends[::2])  # each pair has two


def dataset_of(planner: LabelPlanner, pair_order: PairOrder | None) -> LabelledDataset:
    """From a planner's packs to batches: of pairs, or where ``pair_order`` is None of single sequences."""
    data = Labelled(planner.corpus, planner.labels)
    return LabelledDataset(data) if pair_order is None else PairDataset(data, planner.swap_seed)


def evaluation_planner(data: Labelled, max_length: int) -> LabelPlanner:
    """What plans everything once; residues are all evaluated, so their sequences are not cropped."""
    if data.labels.offsets is not None:
        max_length = int(data.corpus.lengths(np.arange(data.corpus.num_sequences)).max())
    return LabelPlanner(data, Order(data.corpus.num_sequences, 0), max_length)


def evaluation_batches(
    data: Labelled, max_length: int, pack_tokens: int, pair_order: PairOrder | None
) -> Iterator[LabelledBatch]:
    """Everything once, in packs of about ``pack_tokens``, in one process."""
    planner = evaluation_planner(data, max_length)
    (packs,) = validation_packs(planner, pack_tokens, 1)
    dataset = dataset_of(planner, pair_order)
    return (dataset[pack] for pack in packs)


class InMemoryCorpus(Corpus):
    """Sequences that no file holds, for `evaluation_batches`.

    Args:
        sequences: Their ids, with ``<cls>`` and ``<eos>``.
        tokenizer: What made the ids.
    """

    def __init__(self, sequences: Sequence[Tokens], tokenizer: Tokenizer) -> None:
        self.tokenizer, self.num_sequences = tokenizer, len(sequences)
        self._sequences = sequences
        self._lengths = np.array([len(sequence) for sequence in sequences])

    @override
    def tokens(self, index: int) -> Tokens:
        return self._sequences[index]

"""The order of a corpus that is not all there: shuffled within groups of shards, and the groups anew in each epoch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pretrain.corpus.counter import Int64, RandomStream, bits, derive_key
from pretrain.corpus.order import Order


class _Epoch(NamedTuple):
    """How one epoch goes through the shards."""

    shards: Int64
    """The shards in the order of this epoch; each ``group_shards`` of them are a group."""
    ends: Int64
    """For each of these, the place in the epoch where its sequences end, were they not shuffled."""


class GroupOrder:
    """As `Order`, but only ``group_shards`` shards are needed at a time.

    In each epoch the shards are shuffled and cut into groups; the order goes through one group after the other, and
    through the sequences of a group in a pseudo-random permutation. Like `Order` it is a pure function of (seed, n);
    what it computes once an epoch takes time and memory for the number of shards, whatever the number of sequences.

    Args:
        shard_sizes: Sequences in each shard of the corpus, none of them empty.
        group_shards: Shards in a group, at least 1; the last group of an epoch may have fewer.
        seed: The run's seed.
    """

    def __init__(self, shard_sizes: ArrayLike, group_shards: int, seed: int) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        if group_shards < 1 or not len(self._sizes) or self._sizes.min() < 1:
            raise ValueError(f"group_shards is {group_shards} of {len(self._sizes)} shards; each must hold something")
        self.seed = seed
        self.group_shards = group_shards
        self.num_sequences = int(self._sizes.sum())
        self.sizes: tuple[int, ...] = (self.num_sequences,)
        self.groups_per_epoch = -(-len(self._sizes) // group_shards)
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        self._epochs: dict[int, _Epoch] = {}

    def __call__(self, positions: ArrayLike) -> tuple[Int64, Int64]:
        """Where the order stands at ``positions`` (any n >= 0): the epoch n // N and the sequence's index in [0, N)."""
        n = np.atleast_1d(np.asarray(positions, np.int64))
        epochs, places = np.divmod(n, self.num_sequences)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            ends = self._epoch(epoch).ends
            in_epoch = np.flatnonzero(epochs == epoch)
            groups = np.searchsorted(ends, places[in_epoch], side="right") // self.group_shards
            for group in np.unique(groups).tolist():
                here = in_epoch[groups == group]
                indices[here] = self._within(epoch, group, places[here])
        return epochs, indices

    def places(self, indices: Int64) -> Int64:
        """What an epoch visits exactly once: the sequences."""
        return indices

    def groups(self, positions: ArrayLike) -> Int64:
        """The group that each position falls in, counted from the run's first group on."""
        n = np.atleast_1d(np.asarray(positions, np.int64))
        epochs, places = np.divmod(n, self.num_sequences)
        groups = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shard = np.searchsorted(self._epoch(epoch).ends, places[here], side="right")
            groups[here] = epoch * self.groups_per_epoch + shard // self.group_shards
        return groups

    def shards(self, group: int) -> list[int]:
        """The shards of a group that `groups` counts."""
        epoch, number = divmod(group, self.groups_per_epoch)
        order: list[int] = self._epoch(epoch).shards.tolist()
        return order[number * self.group_shards : (number + 1) * self.group_shards]

    def _within(self, epoch: int, group: int, places: Int64) -> Int64:
        """Indices of the sequences at places of an epoch that all fall into one group."""
        shards, ends = self._epoch(epoch)
        begin, end = group * self.group_shards, min((group + 1) * self.group_shards, len(shards))
        start = int(ends[begin - 1]) if begin else 0
        # Two groups of the same size and epoch have permutations of their own, as have two epochs of one group.
        seed = int(derive_key(self.seed, RandomStream.GROUP, epoch, group)[0])
        _, shuffled = Order(int(ends[end - 1]) - start, seed)(places - start)
        shard = np.searchsorted(ends[begin:end], shuffled + start, side="right") + begin
        before = np.where(shard > 0, ends[shard - 1], 0)
        return self._first[shards[shard]] + shuffled + start - before

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            key = derive_key(self.seed, RandomStream.SHARDS, epoch)
            shards = np.argsort(bits(key, np.arange(len(self._sizes))), kind="stable")
            if len(self._epochs) > 2:  # a step reaches from one epoch into the next, seldom further
                self._epochs.clear()
            self._epochs[epoch] = _Epoch(shards, np.cumsum(self._sizes[shards]))
        return self._epochs[epoch]

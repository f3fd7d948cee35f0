"""Mixtures: several corpora that are trained on together, each in its own order and epochs, in exact proportions."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import override

from pretrain.corpus.clusters import ClusterOrder
from pretrain.corpus.counter import Int64, RandomStream, derive_key
from pretrain.corpus.order import AnyOrder, Order
from pretrain.corpus.store import Corpus, Shard
from pretrain.errors import UserError

MAX_BLOCK = 1_000_000
"""Draws after which the proportions must have come out exactly."""


class JoinedCorpus(Corpus):
    """Several corpora as one: the sequences of the first, then those of the second, and so on.

    Args:
        corpora: At least one, all made with the same tokenizer.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = tuple(corpora)
        self.path = Path(", ".join(str(corpus.path) for corpus in corpora))
        self.tokenizer = corpora[0].tokenizer
        self.num_sequences = sum(corpus.num_sequences for corpus in corpora)
        self.num_tokens = sum(corpus.num_tokens for corpus in corpora)
        self.manifest, self.prepared = {}, {}
        self.fingerprint = hashlib.sha256(" ".join(corpus.fingerprint for corpus in corpora).encode()).hexdigest()[:16]
        self.first = np.cumsum([0, *(corpus.num_sequences for corpus in corpora)])

    @override
    def __reduce__(self) -> tuple[type["JoinedCorpus"], tuple[tuple[Corpus, ...]]]:  # type: ignore[override]
        return JoinedCorpus, (self.corpora,)

    @property
    @override
    def has_words(self) -> bool:
        return all(corpus.has_words for corpus in self.corpora)

    @property
    @override
    def components(self) -> tuple[Corpus, ...]:
        return self.corpora

    @property
    @override
    def clusters_fingerprint(self) -> str | None:
        of_each = [corpus.clusters_fingerprint for corpus in self.corpora]
        return ", ".join(one or "none" for one in of_each) if any(of_each) else None

    @override
    def lengths(self, indices: ArrayLike) -> Int64:
        indices = np.asarray(indices, np.int64)
        lengths = np.empty(indices.shape, np.int64)
        owner = np.searchsorted(self.first, indices, side="right") - 1
        for number, corpus in enumerate(self.corpora):
            here = owner == number
            lengths[here] = corpus.lengths(indices[here] - self.first[number])
        return lengths

    @override
    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences} in {len(self.corpora)} corpora")
        number = int(np.searchsorted(self.first, index, side="right")) - 1
        return self.corpora[number]._locate(index - int(self.first[number]))


def draws_of_a_block(mixture: Mapping[str, float]) -> Int64:
    """The fewest draws of each component that have exactly the weights' proportions: 0.7 and 0.3 are 7 and 3.

    Args:
        mixture: The components and their weights.

    Raises:
        UserError: If a weight is not a number above zero, or their proportion takes more than `MAX_BLOCK` draws.
    """
    if not mixture:
        raise UserError("data.train is empty; give a source, or several with their weights")
    for name, weight in mixture.items():
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"data.train: the weight of {name} is {weight}; give a number above 0, or leave it out")
    weights = list(mixture.values())
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(share.denominator for share in exact))
    counts = [int(share * scale) for share in exact]
    divisor = math.gcd(*counts)
    block = sum(counts) // divisor
    if block > MAX_BLOCK:
        rounder = " and ".join(f"{weight / sum(weights):.3g}" for weight in weights)
        raise UserError(
            f"data.train: the weights {', '.join(map(str, weights))} come out exactly only after {block:,} draws, at "
            f"most {MAX_BLOCK:,} are possible; round them, for example to {rounder}"
        )
    return np.array(counts, np.int64) // divisor


class MixtureOrder:
    """An order of several corpora: which component is drawn n-th, and which of its sequences. O(1) to seek.

    Weights count *sequences* (draws), not tokens: a component's share of the tokens is its weight times the mean length
    of its crops. Components take turns in a fixed pattern, a *block*, in which component k comes ``counts[k]`` times,
    spread as evenly as can be. So the proportions are exact in every aligned block, and at no place in between is a
    component more than a few draws ahead or behind. The m-th draw of a component is the m-th sequence of its own order,
    whatever the weights: each of its epochs visits each of its sequences exactly once.

    Args:
        orders: Of each component.
        offsets: Where each component begins in the joined corpus.
        counts: Draws of each in a block, from `draws_of_a_block`.
        seed: The run's seed.
    """

    def __init__(self, orders: Sequence[AnyOrder], offsets: ArrayLike, counts: Int64, seed: int) -> None:
        self.orders, self.offsets, self.counts, self.seed = orders, np.asarray(offsets, np.int64), counts, seed
        self.sizes = tuple(size for order in orders for size in order.sizes)
        # The j-th of c draws is due at (j + 1/2) / c of the block; all draws of all components, as they fall due.
        component = np.repeat(np.arange(len(counts)), counts)
        rank = np.concatenate([np.arange(count) for count in counts])
        due = np.lexsort((component, (2 * rank + 1) / (2 * counts[component])))
        self._component, self._rank = component[due].astype(np.int16), rank[due].astype(np.int32)

    def __call__(self, positions: ArrayLike) -> tuple[Int64, Int64]:
        """The epoch of its component, and the index in the joined corpus, at each of ``positions`` (any n >= 0)."""
        n = np.atleast_1d(np.asarray(positions, np.int64))
        block, slot = np.divmod(n, len(self._component))
        epochs, indices = np.empty_like(n), np.empty_like(n)
        component = self._component[slot]
        draw = block * self.counts[component] + self._rank[slot]
        for number, order in enumerate(self.orders):
            here = component == number
            epochs[here], local = order(draw[here])
            indices[here] = local + self.offsets[number]
        return epochs, indices

    def drawn(self, cursor: int) -> Int64:
        """How often each component comes in the first ``cursor`` draws."""
        block, rest = divmod(cursor, len(self._component))
        return block * self.counts + np.bincount(self._component[:rest], minlength=len(self.counts))

    def places(self, indices: Int64) -> Int64:
        """What an epoch of a component visits exactly once, numbered over all components."""
        places = np.empty_like(indices)
        owner = np.searchsorted(self.offsets, indices, side="right") - 1
        first = 0
        for number, order in enumerate(self.orders):
            here = owner == number
            places[here] = first + order.places(indices[here] - self.offsets[number])
            first += sum(order.sizes)
        return places


def whole_order(corpus: Corpus, seed: int) -> AnyOrder:
    """The order of one corpus, shuffled as a whole: over its clusters, if it was prepared with a table of them."""
    return ClusterOrder(corpus.clusters(), seed) if corpus.num_clusters else Order(corpus.num_sequences, seed)


def mixture_of(corpus: JoinedCorpus, counts: Int64, seed: int) -> MixtureOrder:
    """The order of several corpora that come ``counts`` times in a block; see `MixtureOrder`."""
    # Seeds of their own, so that corpora of one size are not shuffled alike.
    seeds = [int(derive_key(seed, RandomStream.COMPONENT, number)[0]) for number in range(len(counts))]
    orders = [whole_order(component, own) for component, own in zip(corpus.corpora, seeds, strict=True)]
    return MixtureOrder(orders, corpus.first[:-1], counts, seed)


class Share(NamedTuple):
    """What one component is of a mixture.

    Attributes:
        sequences: Its share of the sequences that are drawn.
        tokens: Its share of the tokens, estimated from some of its crops.
        epoch_size: Sequences, or clusters, that it has.
    """

    sequences: float
    tokens: float
    epoch_size: int


def shares(corpus: JoinedCorpus, order: MixtureOrder, max_length: int) -> list[Share]:
    """What each component is of a mixture, with crops of at most ``max_length`` tokens."""
    sample = np.arange(1024)
    lengths = [
        np.minimum(component.lengths(own(sample)[1]), max_length).mean()
        for component, own in zip(corpus.corpora, order.orders, strict=True)
    ]
    sequences = order.counts / order.counts.sum()
    tokens = sequences * lengths / (sequences * lengths).sum()
    sizes = [sum(own.sizes) for own in order.orders]
    return [Share(*row) for row in zip(sequences.tolist(), tokens.tolist(), sizes, strict=True)]

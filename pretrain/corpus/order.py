"""The order: which sequence comes n-th. A pure function of (seed, n): computed, never stored, O(1) to seek."""

from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.corpus.counter import Int64, RandomStream, bits, derive_key

ORDER_VERSION = 2
"""Written into checkpoints. Any change of which sequences, crops or masks a seed gives must raise it."""

_ROUNDS = 8
_SMALLEST_WIDTH = 5  # bits; narrower networks favour some places: at N = 5, by a tenth


class AnyOrder(Protocol):
    """What the sampler asks of an order, whatever it is made of: sequences, clusters, or several corpora.

    Attributes:
        seed: The run's seed.
        sizes: How many visits make an epoch: one number for each part that has epochs of its own.
    """

    seed: int
    sizes: tuple[int, ...]

    def __call__(self, positions: ArrayLike) -> tuple[Int64, Int64]:
        """The epoch and the sequence's index in the corpus at each of ``positions`` (any n >= 0)."""

    def places(self, indices: Int64) -> Int64:
        """What an epoch visits exactly once, numbered over all parts: the sequence itself, or its cluster."""


class Order:
    """A fresh pseudo-random permutation of ``num_sequences`` sequences in each epoch, with random access.

    A Feistel network permutes the smallest power of two that holds ``num_sequences``, from 32 on; positions that land
    outside are sent through again until they land inside (cycle walking), which keeps it a permutation and takes fewer
    than two passes on average. Reference: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002,
    method 3.

    Args:
        num_sequences: N, the size of the corpus, at least 1.
        seed: The run's seed.
    """

    def __init__(self, num_sequences: int, seed: int) -> None:
        if num_sequences < 1:
            raise ValueError(f"num_sequences is {num_sequences}; an order needs at least one sequence")
        self.num_sequences = num_sequences
        self.seed = seed
        self.sizes: tuple[int, ...] = (num_sequences,)
        width = max(_SMALLEST_WIDTH, (num_sequences - 1).bit_length())
        self._low_bits = np.uint64(width // 2)
        self._low_mask = np.uint64(2 ** (width // 2) - 1)
        self._high_mask = np.uint64(2 ** (width - width // 2) - 1)

    def __call__(self, positions: ArrayLike) -> tuple[Int64, Int64]:
        """Where the order stands at ``positions`` (any n >= 0): the epoch n // N and the sequence's index in [0, N)."""
        n = np.atleast_1d(np.asarray(positions, np.int64))
        epochs, place = np.divmod(n, self.num_sequences)
        keys = derive_key(self.seed, RandomStream.ORDER, epochs)
        indices = self._permute(place.astype(np.uint64), keys)
        outside = np.flatnonzero(indices >= self.num_sequences)
        while outside.size:
            indices[outside] = self._permute(indices[outside], keys[outside])
            outside = outside[indices[outside] >= self.num_sequences]
        return epochs, indices.astype(np.int64)

    def places(self, indices: Int64) -> Int64:
        """What an epoch visits exactly once: the sequences."""
        return indices

    def _permute(self, x: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = x >> self._low_bits, x & self._low_mask
        for round_number in range(0, _ROUNDS, 2):  # unbalanced when the width is odd, so two half-rounds at a time
            high = high ^ (bits(keys + np.uint64(round_number), low) & self._high_mask)
            low = low ^ (bits(keys + np.uint64(round_number + 1), high) & self._low_mask)
        return (high << self._low_bits) | low

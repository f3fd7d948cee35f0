"""Counter-based randomness: random bits as a pure function of integers, with no state to save or to share.

Every random choice about the data (order, crops, masks) is ``bits(key, counter)``: the same on any rank, in any worker
and after any restart.

Reference: SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014). Its
output function is applied to ``key + (counter + 1) * GOLDEN``: the counter-th draw of a generator seeded with ``key``.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

Int64 = NDArray[np.int64]
U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class RandomStream(IntEnum):
    """What the bits are for. Two streams of one seed are independent."""

    ORDER = 1
    CROP = 2
    MASK_COUNT = 3
    MASK_POSITION = 4
    MASK_ACTION = 5
    MASK_SHARE = 6
    MASK_SPAN = 7
    MASK_TURN = 8
    COMPONENT = 20
    CLUSTER_MEMBER = 21
    SHARDS = 30
    GROUP = 31
    PAIR = 40
    DROPOUT = 50


def _mix(z: U64) -> U64:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def bits(key: ArrayLike, counter: ArrayLike) -> U64:
    """64 random bits for each (key, counter); the two broadcast against each other."""
    key, counter = np.atleast_1d(np.asarray(key, np.uint64)), np.atleast_1d(np.asarray(counter, np.uint64))
    return _mix(key + (counter + np.uint64(1)) * _GOLDEN)  # uint64 arithmetic wraps, as it should


def derive_key(seed: int, stream: RandomStream, *counters: ArrayLike) -> U64:
    """A key for ``stream`` that depends on the seed and on every counter (for example epoch and sequence index)."""
    key = bits(np.uint64(seed % 2**64), np.uint64(stream))
    for counter in counters:
        key = bits(key, counter)
    return key


def uniform(random_bits: U64) -> NDArray[np.float64]:
    """Bits to floats in [0, 1), using the upper 53 bits."""
    return (random_bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def below(random_bits: U64, bound: ArrayLike) -> Int64:
    """Bits to integers in [0, bound), for bounds below 2**32: a multiply and a shift, bias under 2**-32 * bound."""
    upper = random_bits >> np.uint64(32)
    return ((upper * np.asarray(bound, np.uint64)) >> np.uint64(32)).astype(np.int64)

"""Ranks of values, and the correlations of Pearson and Spearman, where each value counts a number of times.

All is in float64, and ties have their average rank, however many they are.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


class Ranks:
    """The ranks that some values have among all, from 1 on, for any weights; they are sorted once.

    Args:
        values: All of them, [N].
        of: Those whose ranks are wanted, [M]; by default all.
    """

    def __init__(self, values: NDArray[np.floating], of: NDArray[np.floating] | None = None) -> None:
        self._order = np.argsort(values)
        ordered, wanted = values[self._order], values if of is None else of
        first, past = (np.searchsorted(ordered, wanted, side) for side in ("left", "right"))
        self._bounds, places = np.unique(np.concatenate([[0], first, past, [len(values)]]), return_inverse=True)
        self._first, self._past = np.split(places[1:-1], 2)

    def __call__(self, weights: Float64) -> Float64:
        """The ranks [S, M] where value n counts ``weights[s, n]`` times, as if it stood there so often."""
        below = np.zeros((len(weights), len(self._bounds)))
        between = np.add.reduceat(np.take(weights, self._order, axis=1), self._bounds[:-1], axis=1)
        np.cumsum(between, axis=1, out=below[:, 1:])
        return (below[:, self._first] + below[:, self._past] + 1) / 2


def pearson(one: Float64, other: Float64, weights: Float64) -> Float64:
    """Pearson's correlation [S] of two sides, each [N] or [S, N], with weights [S, N]; NaN where a side is constant."""
    x, y = centred(one, weights), centred(other, weights)
    spread = np.sqrt((weights * x**2).sum(1) * (weights * y**2).sum(1))
    defined = varies(one, weights) & varies(other, weights)
    correlation: Float64 = np.divide((weights * x * y).sum(1), spread, out=np.full(len(weights), np.nan), where=defined)
    return correlation


def centred(values: Float64, weights: Float64) -> Float64:
    """Values [N] or [S, N] less their weighted mean, [S, N]."""
    mean: Float64 = (weights * values).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    return values - mean


def varies(values: Float64, weights: Float64) -> NDArray[np.bool_]:
    """Whether those values [N] or [S, N] that count at all differ, [S]; rounding would hide it from their variance."""
    lowest = np.where(weights > 0, values, np.inf).min(1)
    highest = np.where(weights > 0, values, -np.inf).max(1)
    return np.asarray(lowest < highest)


def spearman(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's rank correlation, as scipy's ``spearmanr``; NaN of fewer than two, or of a constant or a NaN."""
    sides = [np.asarray(side, np.float64) for side in (one, other)]
    if len(sides[0]) < 2 or any(np.isnan(side).any() for side in sides):
        return float("nan")
    weights = np.ones((1, len(sides[0])))
    x, y = (Ranks(side)(weights) for side in sides)
    return float(pearson(x, y, weights)[0])

"""How the loss falls with parameters and tokens: a law fitted to the ladder's small rungs, and what it says beyond.

Loss = E + A / N^a + B / D^b (Hoffmann et al. 2022, approach 3), N parameters, D tokens seen. Every validation of a run
is a point: under the inverse square root a run's middle is a shorter run's end. How sure the law is of itself is seen
by leaving out each size in turn and by drawing the points anew.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from pretrain.train.picture import drawing

Floats = NDArray[np.float64]

FIRST_STEP = 750
"""Points before it still feel the warmup, or the plateau at the unigram."""

DRAWS = 100
TOKENS = (1e7, 1e8)
"""For which losses are predicted."""
LARGEST = 3.4e8
"""Parameters up to which the law is drawn: those of BERT-large."""


def fit(points: Floats) -> Floats:
    """The law's (log A, log B, log E, a, b) for rows of (parameters, tokens, loss)."""
    n, d, loss = points.T

    def residuals(law: Floats) -> Floats:
        return np.log(predict(law, n, d)) - np.log(loss)

    starts = [np.array([a * 10, b * 10, 0.7, a, b]) for a in (0.2, 0.5) for b in (0.2, 0.5)]
    bounds = ([-5, -5, -5, 0.02, 0.02], [60, 60, math.log(2.9), 3, 3])
    found = [least_squares(residuals, start, bounds=bounds, loss="huber", f_scale=1e-3) for start in starts]
    best: Floats = min(found, key=lambda one: float(one.cost)).x
    return best


def predict(law: Floats, n: Floats | float, d: Floats | float) -> Floats:
    """Loss in nats."""
    log_a, log_b, log_e, a, b = law
    loss: Floats = np.exp(log_e) + np.exp(log_a - a * np.log(n)) + np.exp(log_b - b * np.log(d))
    return loss


def points_of(run: dict[str, Any]) -> Floats:
    """What a run's validations say, as rows of (parameters, tokens, loss)."""
    tokens, size = dict(run["data/tokens_seen"]), run["figures"]["parameters"]
    return np.array([(size, tokens[step], loss) for step, loss in run["val/loss"] if step >= FIRST_STEP])


def other_laws(rungs: Sequence[Floats]) -> list[Floats]:
    """Laws fitted on points drawn anew, each time also without one of the rungs."""
    generator = np.random.default_rng(0)
    laws = []
    for draw in range(DRAWS):
        points = np.concatenate([rung for number, rung in enumerate(rungs) if number != draw % (len(rungs) + 1)])
        laws.append(fit(points[generator.integers(len(points), size=len(points))]))
    return laws


def spread(laws: Sequence[Floats], n: Floats | float, d: Floats | float) -> tuple[Floats, Floats]:
    """Between which losses nine in ten laws lie."""
    low, high = np.quantile([predict(law, n, d) for law in laws], [0.05, 0.95], axis=0)
    return low, high


def draw(names: Sequence[str], rungs: Sequence[Floats], law: Floats, laws: Sequence[Floats], path: Path) -> None:
    """The rungs with their law; and the law far beyond them, with what it does not know."""
    colours = ("#9ec5e8", "#5a9bd4", "#1f6fb4", "#0c3f6e")
    with drawing(path, (10.5, 4.1), columns=2) as (near, far):
        for name, rung, colour in zip(names, rungs, colours, strict=False):
            size = rung[0, 0]
            tokens = np.geomspace(rung[0, 1] / 1.3, rung[-1, 1] * 1.5, 50)
            near.plot(tokens / 1e6, predict(law, size, tokens), color=colour, linewidth=1.2)
            label = f"{name.replace(' x ', ' wide, ')} layers: {size / 1e3:,.0f} k"
            near.plot(rung[:, 1] / 1e6, rung[:, 2], "o", color=colour, label=label, markersize=5)
        near.set(xscale="log", xlabel="million tokens seen", ylabel="validation loss, nats")
        near.set_title("measured on small rungs, and the law fitted to them", fontsize=10)
        near.legend(frameon=False, fontsize=8)
        near.xaxis.set_major_formatter("{x:g}")
        near.xaxis.set_minor_formatter("{x:g}")
        sizes = np.geomspace(rungs[0][0, 0], LARGEST, 40)
        last = [rung[-1] for rung in rungs]
        here = float(np.mean([tokens for _, tokens, _ in last]))
        beyond = [
            (tokens, colour, f"{tokens / 1e6:,.0f} M tokens")
            for tokens, colour in zip((here, *TOKENS), ("#1f6fb4", "#e0752d", "#6a9a3b"), strict=True)
        ]
        for tokens, colour, name in beyond:
            low, high = spread(laws, sizes, tokens)
            far.fill_between(sizes, low, high, color=colour, alpha=0.18, linewidth=0)
            far.plot(sizes, predict(law, sizes, tokens), color=colour, label=f"predicted for {name}")
        far.plot(*np.array([(n, loss) for n, _, loss in last]).T, "o", color="black", label="measured", markersize=4)
        highest = 1.2 * max(loss for _, _, loss in last)
        far.set(xscale="log", xlabel="parameters", ylabel="validation loss, nats", ylim=(0, highest))
        far.set_title("beyond them a guess, in bands of how unsure it is", fontsize=10)
        far.legend(frameon=False, fontsize=8)

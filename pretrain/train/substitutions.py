"""The residues that a model takes for each other, as a picture beside BLOSUM62."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pretrain.corpus.blosum import RESIDUES, blosum62

_CELL, _MARGIN, _HEAD = 20, 26, 44
_PRIOR = 5.0  # observations and expectations added, so that what is hardly ever seen says nothing
_STRONGEST = 5.0  # half-bits at which a cell is coloured fully


def log_odds(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much more often a residue is taken for another than that other is predicted anyway, in half-bits.

    Args:
        confusion: Counts by true residue (rows) and prediction (columns).
    """
    expected = confusion.sum(1, keepdims=True) * confusion.sum(0) / max(confusion.sum(), 1)
    odds: NDArray[np.float64] = 2 * np.log2((confusion + _PRIOR) / (expected + _PRIOR))
    return odds


def picture(confusion: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The log-odds of a confusion matrix beside BLOSUM62, [height, width, 3].

    Args:
        confusion: Counts by true residue and prediction, rows and columns in `RESIDUES`.
    """
    size = _CELL * len(RESIDUES)
    image = Image.new("RGB", (2 * (size + 2 * _MARGIN), size + _HEAD + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    for left, title, values in (
        (_MARGIN, "this model: what it takes a residue for", log_odds(confusion)),
        (size + 3 * _MARGIN, "BLOSUM62", blosum62()),
    ):
        draw.text((left, 4), title, fill="black", font=font)
        for i, residue in enumerate(RESIDUES):
            middle = _CELL * i + _CELL // 2
            draw.text((left + middle, _HEAD - 10), residue, fill="black", font=font, anchor="mm")
            draw.text((left - 12, _HEAD + middle), residue, fill="black", font=font, anchor="mm")
            for j in range(len(RESIDUES)):
                x, y = left + _CELL * j, _HEAD + _CELL * i
                draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=_colour(values[i, j]))
    draw.text(
        (_MARGIN, _HEAD + size + 6),
        "rows: the true residue; blue: more often than by chance, red: less often (full colour: 5 half-bits)",
        fill="black",
        font=ImageFont.load_default(11),
    )
    return np.asarray(image)


def _colour(half_bits: float) -> tuple[int, int, int]:
    """Blue above zero, red below, white at zero."""
    strength = min(1.0, abs(half_bits) / _STRONGEST)
    full = (33, 102, 172) if half_bits > 0 else (178, 24, 43)
    red, green, blue = (round(255 + strength * (channel - 255)) for channel in full)
    return red, green, blue

"""The residues that a model takes for each other, as a picture beside BLOSUM62."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

ORDER = "AVILMCFWYHKRDENQSTGP"
"""The twenty residues, similar ones side by side."""

_BLOSUM62 = """
   A  R  N  D  C  Q  E  G  H  I  L  K  M  F  P  S  T  W  Y  V
A  4 -1 -2 -2  0 -1 -1  0 -2 -1 -1 -1 -1 -2 -1  1  0 -3 -2  0
R -1  5  0 -2 -3  1  0 -2  0 -3 -2  2 -1 -3 -2 -1 -1 -3 -2 -3
N -2  0  6  1 -3  0  0  0  1 -3 -3  0 -2 -3 -2  1  0 -4 -2 -3
D -2 -2  1  6 -3  0  2 -1 -1 -3 -4 -1 -3 -3 -1  0 -1 -4 -3 -3
C  0 -3 -3 -3  9 -3 -4 -3 -3 -1 -1 -3 -1 -2 -3 -1 -1 -2 -2 -1
Q -1  1  0  0 -3  5  2 -2  0 -3 -2  1  0 -3 -1  0 -1 -2 -1 -2
E -1  0  0  2 -4  2  5 -2  0 -3 -3  1 -2 -3 -1  0 -1 -3 -2 -2
G  0 -2  0 -1 -3 -2 -2  6 -2 -4 -4 -2 -3 -3 -2  0 -2 -2 -3 -3
H -2  0  1 -1 -3  0  0 -2  8 -3 -3 -1 -2 -1 -2 -1 -2 -2  2 -3
I -1 -3 -3 -3 -1 -3 -3 -4 -3  4  2 -3  1  0 -3 -2 -1 -3 -1  3
L -1 -2 -3 -4 -1 -2 -3 -4 -3  2  4 -2  2  0 -3 -2 -1 -2 -1  1
K -1  2  0 -1 -3  1  1 -2 -1 -3 -2  5 -1 -3 -1  0 -1 -3 -2 -2
M -1 -1 -2 -3 -1  0 -2 -3 -2  1  2 -1  5  0 -2 -1 -1 -1 -1  1
F -2 -3 -3 -3 -2 -3 -3 -3 -1  0  0 -3  0  6 -4 -2 -2  1  3 -1
P -1 -2 -2 -1 -3 -1 -1 -2 -2 -3 -3 -1 -2 -4  7 -1 -1 -4 -3 -2
S  1 -1  1  0 -1  0  0  0 -1 -2 -2  0 -1 -2 -1  4  1 -3 -2 -2
T  0 -1  0 -1 -1 -1 -1 -2 -2 -1 -1 -1 -1 -2 -1  1  5 -2 -2  0
W -3 -3 -4 -4 -2 -2 -3 -2 -2 -3 -2 -3 -1  1 -4 -3 -2 11  2 -3
Y -2 -2 -2 -3 -2 -1 -2 -3  2 -1 -1 -2 -1  3 -3 -2 -2  2  7 -1
V  0 -3 -3 -3 -1 -2 -2 -3 -3  3  1 -2  1 -1 -2 -2  0 -3 -1  4
"""

_CELL, _MARGIN, _HEAD = 20, 26, 44
_PRIOR = 5.0  # observations and expectations added, so that what is hardly ever seen says nothing
_STRONGEST = 5.0  # half-bits at which a cell is coloured fully


def blosum62() -> NDArray[np.float64]:
    """Henikoff and Henikoff 1992, in half-bits; rows and columns in `ORDER`."""
    names, *rows = _BLOSUM62.split("\n")[1:-1]
    table = np.array([[float(value) for value in row.split()[1:]] for row in rows])
    places = [names.split().index(residue) for residue in ORDER]
    return table[np.ix_(places, places)]


def log_odds(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much oftener a residue is taken for another than that other is predicted anyway, in half-bits.

    Args:
        confusion: Counts by true residue (rows) and prediction (columns).
    """
    expected = confusion.sum(1, keepdims=True) * confusion.sum(0) / max(confusion.sum(), 1)
    odds: NDArray[np.float64] = 2 * np.log2((confusion + _PRIOR) / (expected + _PRIOR))
    return odds


def picture(confusion: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The log-odds of a confusion matrix beside BLOSUM62, [height, width, 3].

    Args:
        confusion: Counts by true residue and prediction, rows and columns in `ORDER`.
    """
    size = _CELL * len(ORDER)
    image = Image.new("RGB", (2 * (size + 2 * _MARGIN), size + _HEAD + _MARGIN), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(13)
    for left, title, values in (
        (_MARGIN, "this model: what it takes a residue for", log_odds(confusion)),
        (size + 3 * _MARGIN, "BLOSUM62", blosum62()),
    ):
        draw.text((left, 4), title, fill="black", font=font)
        for i, residue in enumerate(ORDER):
            middle = _CELL * i + _CELL // 2
            draw.text((left + middle, _HEAD - 10), residue, fill="black", font=font, anchor="mm")
            draw.text((left - 12, _HEAD + middle), residue, fill="black", font=font, anchor="mm")
            for j in range(len(ORDER)):
                x, y = left + _CELL * j, _HEAD + _CELL * i
                draw.rectangle((x, y, x + _CELL - 2, y + _CELL - 2), fill=_colour(values[i, j]))
    draw.text(
        (_MARGIN, _HEAD + size + 6),
        "rows: the true residue; blue: oftener than by chance, red: more rarely (full colour: 5 half-bits)",
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

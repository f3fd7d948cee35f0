"""BLOSUM62: how much more often than by chance residues are aligned in homologues, and what one tells of the other."""

import numpy as np
from numpy.typing import NDArray

RESIDUES = "AVILMCFWYHKRDENQSTGP"
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


def blosum62() -> NDArray[np.float64]:
    """Henikoff and Henikoff 1992, in half-bits; rows and columns in `RESIDUES`."""
    names, *rows = _BLOSUM62.split("\n")[1:-1]
    table = np.array([[float(value) for value in row.split()[1:]] for row in rows])
    places = [names.split().index(residue) for residue in RESIDUES]
    return table[np.ix_(places, places)]


def nats_given_homologue(frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected -log p of each residue, in nats, given the aligned residue of a homologue.

    The joint distribution of the two is p(a) p(b) 2^(s(a, b) / 2), as BLOSUM62 was made, and the mean is over the
    homologue's residues.

    Args:
        frequencies: Of the residues in `RESIDUES`.
    """
    joint = np.outer(frequencies, frequencies) * 2 ** (blosum62() / 2)
    given = joint / joint.sum(0)  # of the residue of a row, where the homologue has that of the column
    nats: NDArray[np.float64] = -(joint * np.log(given)).sum(1) / joint.sum(1)
    return nats

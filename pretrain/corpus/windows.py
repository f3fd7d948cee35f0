"""Windows: a document that is longer than a model reads, cut into sequences without losing a token."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.names import window_name

Int = NDArray[np.unsignedinteger]
Bool = NDArray[np.bool_]


def into_windows(
    name: str, tokens: Int, word_starts: Bool | None, max_length: int
) -> Iterator[tuple[str, Int, Bool | None]]:
    """Cut a sequence into as few windows of at most ``max_length`` tokens as can be, of nearly equal length.

    Each window is a sequence of its own, between ``<cls>`` and ``<eos>`` as a document given to the trained model will
    be; so what comes after (order, ledger, audit) need not know that there was a longer one.

    Args:
        name: The sequence's id; the n-th of several windows is called ``name#n``, from 1 on.
        tokens: Its ids, with ``<cls>`` and ``<eos>``, shape [T].
        word_starts: Whether a word begins at each, or None where words are not known, shape [T].
        max_length: Tokens of a window at most, ``<cls>`` and ``<eos>`` included.
    """
    if len(tokens) <= max_length:
        yield name, tokens, word_starts
        return
    inside = len(tokens) - 2
    num_windows = -(-inside // (max_length - 2))
    bounds = 1 + np.arange(num_windows + 1) * inside // num_windows
    for number, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True), 1):
        places = np.r_[0, begin:end, len(tokens) - 1]
        yield window_name(name, number), tokens[places], None if word_starts is None else word_starts[places]

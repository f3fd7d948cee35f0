"""Pairs of sequences, as one input: ``<cls> A <eos> B <eos>``.

Attention runs over both, so that every layer can compare a residue of one with all of the other. For sentences this
is BERT's form (Devlin et al. 2019, section 3) and more accurate than two encoders whose vectors are compared (Humeau
et al. 2020, "Poly-encoders"); for proteins it is that of PLM-interact (Liu et al. 2025), and what transformers'
``EsmTokenizer`` makes of two sequences. A pair is a sequence like any other to corpus, order and packs.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.counter import RandomStream, bits, derive_key
from pretrain.corpus.packing import Pack
from pretrain.corpus.tokenizer import Tokenizer, encode_or_refuse
from pretrain.downstream.finetune.table import Row

Tokens = NDArray[np.unsignedinteger]
PairOrder = Literal["given", "any"]

SHORTEST_PAIR = 5
"""Tokens: one of each sequence, ``<cls>``, and ``<eos>`` twice."""


def encode(row: Row, tokenizer: Tokenizer, pair_order: PairOrder) -> Tokens:
    """A row's sequence with ``<cls>`` and ``<eos>``, or its pair; with ``any`` order the same pair in either order.

    Raises:
        UserError: If a symbol has no id, or nothing is left of a sequence; names file and row.
    """
    what = f"{row.where}: record '{row.id}'"
    first = encode_or_refuse(tokenizer, row.sequence, what)
    if row.second is None:
        return first
    second = encode_or_refuse(tokenizer, row.second, f"{what}, in its second sequence,")
    if pair_order == "any" and row.second < row.sequence:
        first, second = second, first
    return np.concatenate([first, second[1:]])


def split_pair(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """The two sequences of ``<cls> A <eos> B <eos>``."""
    middle = int(np.argmax(tokens == tokens[-1]))
    return tokens[1:middle], tokens[middle + 1 : -1]


def cut_pair(tokens: Tokens, length: int, swap: bool) -> Tokens:
    """A pair in ``length`` tokens: the longer sequence loses its end first, then both, as ``longest_first`` does.

    Args:
        tokens: ``<cls> A <eos> B <eos>``.
        length: Tokens to keep, all of them or fewer; at least `SHORTEST_PAIR`.
        swap: Give ``<cls> B <eos> A <eos>``.
    """
    cls, eos = tokens[:1], tokens[-1:]
    first, second = split_pair(tokens)
    if swap:
        first, second = second, first
    room = length - 3
    kept = min(len(first), max(room - len(second), -(-room // 2)))
    return np.concatenate([cls, first[:kept], eos, second[: room - kept], eos])


def swaps(pack: Pack, seed: int) -> NDArray[np.bool_]:
    """Which pairs of a pack are shown the other way round: each in half of the epochs, whoever asks."""
    return (bits(derive_key(seed, RandomStream.PAIR, pack.epochs, pack.indices), 0) >> np.uint64(63)).astype(bool)

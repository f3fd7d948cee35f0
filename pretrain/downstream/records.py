"""Sources as `pretrain prepare` takes them, to tokens one record at a time: what a model is applied to."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.readers import read_located
from pretrain.corpus.sources import Source, SourceOptions
from pretrain.corpus.tokenizer import Tokenizer, encode_or_refuse
from pretrain.errors import UserError


class TokenizedRecord(NamedTuple):
    """One record.

    Attributes:
        id: Its name.
        ids: Its tokens, with ``<cls>`` and, unless it was cropped, ``<eos>``.
        length: Tokens before it was cropped.
    """

    id: str
    ids: NDArray[np.unsignedinteger]
    length: int


def long_lines(lengths: Iterable[int], longest: int | None) -> list[str]:
    """How many sequences are longer than a model's training sequences and taken whole, for people; nothing if none is.

    Args:
        lengths: Tokens of each, ``<cls>`` and ``<eos>`` included.
        longest: Tokens of the longest training sequences, where that is known.
    """
    long = sum(longest is not None and length > longest for length in lengths)
    taken = f"  {long:,} longer than {longest:,} tokens: taken whole, though the model was trained on no longer ones"
    return [taken] if long else []


def read_tokens(
    sources: Sequence[Source], tokenizer: Tokenizer, options: SourceOptions, max_length: int | None, crop: bool
) -> Iterator[TokenizedRecord]:
    """The records of all sources, in order; in memory is a piece of a source at a time.

    Args:
        sources: From `find_sources`.
        tokenizer: What makes the ids.
        options: How the sources are read.
        max_length: The longest record that is taken whole; None for any.
        crop: Take the first ``max_length`` tokens of a longer one, rather than refuse it.

    Raises:
        UserError: If a source is unreadable, or a record is bad, empty or too long; names file and line.
    """
    for what, record in read_located(sources, options):
        ids = encode_or_refuse(tokenizer, record.text, what)
        if max_length is not None and len(ids) > max_length and not crop:
            raise UserError(
                f"{what} has {len(ids):,} tokens, more than {max_length:,}; give --long_sequences crop or whole, or "
                "another --max_length"
            )
        yield TokenizedRecord(record.id, ids[:max_length] if crop else ids, len(ids))

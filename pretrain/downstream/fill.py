"""`pretrain fill`: what a model puts in the place of masks."""

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.readers import read_located
from pretrain.corpus.sources import SourceOptions, find_sources
from pretrain.corpus.tokenizer import InvalidSymbolError, TextTokenizer, Tokenizer
from pretrain.downstream.load import load_masked_lm, use_device
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.records import long_lines
from pretrain.errors import UserError
from pretrain.files import atomic_file, refuse_existing

MASK = "<mask>"
_BLOCK = 512


class Prediction(NamedTuple):
    """One mask.

    Attributes:
        position: Its place among the tokens, from 1, ``<cls>`` not counted: of a protein, the residue's number.
        tokens: The most probable tokens, the best first.
        probabilities: Theirs, over the whole vocabulary.
    """

    position: int
    tokens: list[str]
    probabilities: list[float]


def fill(
    path: Path,
    texts: Sequence[str],
    source: str | None = None,
    top: int = 5,
    out: Path | None = None,
    options: SourceOptions | None = None,
    device: str | None = None,
) -> Iterator[str]:
    """The most probable tokens at each mask, for people or as a CSV file.

    Args:
        path: The model: a run, a checkpoint or a transformers directory.
        texts: Strings with ``<mask>`` in them.
        source: A file of further ones.
        top: How many tokens for each mask.
        out: A CSV file to write instead: ``id,mask,position,rank,token,probability``.
        options: How ``source`` is read.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.

    Yields:
        Lines for people.

    Raises:
        UserError: If there is no text, one has no mask or an unknown symbol, or ``out`` exists.
    """
    if not texts and source is None:
        raise UserError(f"no text is given; give one with {MASK} in it, or --file SOURCE")
    if out and out.suffix.lower() != ".csv":
        raise UserError(f"{out}: a table is written as .csv; give such a name with --out")
    if out:
        refuse_existing(out)
    model = load_masked_lm(path).to(use_device(device))
    if not 1 <= top <= model.tokenizer.vocab_size:
        raise UserError(f"top is {top}; give 1 to {model.tokenizer.vocab_size}, the size of the vocabulary")
    given = (_Text(f"text {n}", text, f"text {n}") for n, text in enumerate(texts, 1))
    blocks = _blocks(itertools.chain(given, _read(source, options or SourceOptions())))
    lengths: list[int] = []

    def fill_all() -> Iterator[tuple[_Text, list[Prediction]]]:
        for block in blocks:
            tokens = [encode_masked(model.tokenizer, one.text, one.what) for one in block]
            lengths.extend(length for length in map(len, tokens) if model.max_length and length > model.max_length)
            yield from zip(block, _fill(model, tokens, top), strict=True)

    if out is None:
        for one, masks in fill_all():
            yield one.text
            yield from _lines(masks, model.tokenizer)
        yield from long_lines(lengths, model.max_length)
        return
    with atomic_file(out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "mask", "position", "rank", "token", "probability"))
        count = 0
        for one, masks in fill_all():
            for number, mask in enumerate(masks, 1):
                count += 1
                for rank, (token, probability) in enumerate(zip(mask.tokens, mask.probabilities, strict=True), 1):
                    writer.writerow((one.id, number, mask.position, rank, token, f"{probability:.6g}"))
    yield f"{out}: {count:,} masks, the best {top} tokens for each"
    yield from long_lines(lengths, model.max_length)


class _Text(NamedTuple):
    id: str
    text: str
    what: str
    """What errors call it."""


def _read(source: str | None, options: SourceOptions) -> Iterator[_Text]:
    for what, record in read_located(find_sources([source], options), options) if source else ():
        yield _Text(record.id, record.text.decode("utf-8", "replace"), what)


def _blocks(texts: Iterable[_Text]) -> Iterator[list[_Text]]:
    texts = iter(texts)
    while block := list(itertools.islice(texts, _BLOCK)):
        yield block


def _fill(model: PretrainedEncoder, tokens: Sequence[NDArray[np.int64]], top: int) -> Iterator[list[Prediction]]:
    places = [np.flatnonzero(ids == model.tokenizer.mask_token_id).tolist() for ids in tokens]
    for where, rows in zip(places, model.log_probabilities(tokens, places), strict=True):
        best = np.argsort(-rows, axis=-1, kind="stable")[:, :top]
        chances = np.exp(np.take_along_axis(rows, best, -1))
        yield [
            Prediction(place, [_show(model.tokenizer, token) for token in ids], probabilities)
            for place, ids, probabilities in zip(where, best.tolist(), chances.tolist(), strict=True)
        ]


def encode_masked(tokenizer: Tokenizer, text: str, name: str) -> NDArray[np.int64]:
    """A string's ids, with the mask's where ``<mask>`` (or the tokenizer's own word for it) stands.

    A space before a mask belongs to the word that is looked for, as in RoBERTa: byte-level tokens begin with theirs.

    Raises:
        UserError: If there is no mask, or a symbol without an id. ``name`` is what it calls the string.
    """
    own = tokenizer.tokens[tokenizer.mask_token_id]
    parts = text.replace(own, MASK).split(MASK)
    if len(parts) == 1:
        raise UserError(f"{name} has no {MASK}; put one where a token is to be predicted")
    if isinstance(tokenizer, TextTokenizer):
        parts = [*(part.removesuffix(" ") for part in parts[:-1]), parts[-1]]
    elif any(part.endswith("*") for part in parts[:-1]):  # encoding drops a stop, and residues would have other numbers
        raise UserError(f"{name} has '*' before a {MASK}; a stop may stand at the end only: remove it")
    ids = [tokenizer.cls_token_id]
    for part in parts:
        try:
            ids += [*tokenizer.encode(part.encode("utf-8", "surrogatepass"))[1:-1].tolist(), tokenizer.mask_token_id]
        except InvalidSymbolError as error:
            raise UserError(f"{name} has {error.symbol} in {part!r}; allowed: {error.allowed}, {MASK}") from error
    return np.array([*ids[:-1], tokenizer.eos_token_id])


def _show(tokenizer: Tokenizer, token: int) -> str:
    shown = tokenizer.tokens[token]
    if isinstance(tokenizer, TextTokenizer) and token in tokenizer.replacement_ids:
        return str(tokenizer.backend.decode([token]))
    return shown


def _lines(masks: Sequence[Prediction], tokenizer: Tokenizer) -> Iterator[str]:
    text = isinstance(tokenizer, TextTokenizer)
    for mask in masks:
        chances = (
            f"{repr(token) if text else token} {probability:.1%}"
            for token, probability in zip(mask.tokens, mask.probabilities, strict=True)
        )
        yield f"  {'token' if text else 'residue'} {mask.position:<5} {'   '.join(chances)}"

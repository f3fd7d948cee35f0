"""Pieces to shards, on all cores, continuing what a killed process left.

A shard is made of one block of pieces: a function of the block's bytes and the settings, and of nothing else. So the
result is the same for any number of processes, and a shard that is there already is good if the block's checksum and
its own are those of its entry in the journal.
"""

import hashlib
import json
import os
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pretrain.corpus.duplicates import deduplicate
from pretrain.corpus.journal import Journal, ShardEntry, is_intact, report_file
from pretrain.corpus.pieces import Piece, cut
from pretrain.corpus.processes import Engine
from pretrain.corpus.readers import Flaw, parse
from pretrain.corpus.sources import Source, SourceOptions
from pretrain.corpus.store import FORMAT_VERSION
from pretrain.corpus.tokenizer import InvalidSymbolError, Tokenizer
from pretrain.corpus.windows import into_windows
from pretrain.corpus.writing import write_shard
from pretrain.errors import UserError

BLOCK_BYTES = 2**25
"""A block, and so a shard, is at least this many bytes of a source, or what is left: a process holds a few of them."""

_NEEDS_TOKENIZER = (
    "correct or remove it, or, if this is text, give its tokenizer: --data.tokenizer FILE (in prepare --tokenizer FILE)"
)


@dataclass(frozen=True)
class Filters:
    """Which records are kept, the others being counted, and whether long ones are cut.

    Attributes:
        min_length: Shorter sequences are left out; in tokens, ``<cls>`` and ``<eos>`` included.
        max_length: Longer sequences are left out; in tokens, as above.
        deduplicate: Keep the first of those that have the same tokens. Needs about 50 bytes of memory a sequence.
        skip_bad: Skip records that cannot be read or have no token, and list them; otherwise the first one is an error.
        windows: Cut longer sequences into several of at most this many tokens, ``<cls>`` and ``<eos>`` included.

    Raises:
        UserError: If no length is left, or too little to cut into.
    """

    min_length: int | None = None
    max_length: int | None = None
    deduplicate: bool = False
    skip_bad: bool = False
    windows: int | None = None

    def __post_init__(self) -> None:
        shortest, longest = self.min_length or 0, self.max_length
        if shortest < 0 or (longest is not None and longest < max(shortest, 1)):
            raise UserError(
                f"lengths from {self.min_length} to {longest} leave nothing; give 0 <= min <= max, max >= 1"
            )
        if self.windows is not None and self.windows < 3:
            raise UserError(f"sequences cannot be split into windows of {self.windows} tokens; give at least 3")


class Job(NamedTuple):
    """What the shards of a corpus have in common."""

    directory: Path
    tokenizer: Tokenizer
    options: SourceOptions
    filters: Filters


class Block(NamedTuple):
    """What a shard is made of."""

    number: int
    pieces: list[Piece]
    previous: ShardEntry | None
    is_whole: bool
    """Otherwise a mistake in the sources follows: the pieces before it are looked through, and not written."""


class Portion:
    """Which of the blocks are made: every ``of``-th one, so that machines can share the work; and what all are like.

    Args:
        number: This machine's number, from 1.
        of: How many machines there are.

    Attributes:
        num_blocks: Blocks seen so far, of this portion or not.
    """

    def __init__(self, number: int = 1, of: int = 1) -> None:
        if not 1 <= number <= of:
            raise UserError(f"--shard is {number}/{of}; give I/N with I from 1 to N, such as 2/8")
        self.number, self.of = number, of
        self.num_blocks = 0
        self._layout = hashlib.sha256()

    @classmethod
    def parse(cls, text: str) -> "Portion":
        """The portion that ``I/N`` names.

        Raises:
            UserError: If it names none.
        """
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal()):
            raise UserError(f"--shard is {text}; give I/N with I from 1 to N, such as 2/8")
        return cls(int(number), int(of))

    def takes(self, pieces: Sequence[Piece]) -> bool:
        """Whether the next block of the sources is of this portion."""
        number, self.num_blocks = self.num_blocks, self.num_blocks + 1
        for piece in pieces:
            self._layout.update(json.dumps([piece.line, piece.columns, len(piece.data)]).encode())
        return number % self.of == self.number - 1

    @property
    def layout(self) -> str:
        """How the sources were cut: the same for all portions of the same sources."""
        return self._layout.hexdigest()


def make_shards(
    sources: Sequence[Source],
    directory: Path,
    tokenizer: Tokenizer,
    options: SourceOptions,
    filters: Filters,
    engine: Engine,
    portion: Portion | None = None,
    make: Callable[[Job, Block], ShardEntry] | None = None,
) -> list[ShardEntry]:
    """Tokenise sources into shards in ``directory``, continuing what an earlier call left there.

    Args:
        sources: What to read, in this order.
        directory: Where to write; its content is this function's own.
        tokenizer: What makes the ids.
        options: How the sources are read.
        filters: Which sequences are kept.
        engine: What maps over the blocks; the result does not depend on it.
        portion: Which blocks of the sources to make; by default all. Duplicates are taken out within them.
        make: What makes a shard of a block; by default `make_shard`.

    Raises:
        UserError: If a source is unreadable or, unless they are skipped, holds a bad record.
        OSError: If the disk is full; names the file.
    """
    settings = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "block_bytes": BLOCK_BYTES,
        **asdict(options),
        **asdict(filters),
    }
    portion = portion or Portion()
    if portion.of > 1:
        settings["portion"] = [portion.number, portion.of]
    journal = Journal(directory, settings)
    job = Job(directory, tokenizer, options, filters)
    sizes = [os.path.getsize(source.name) for source in sources if source.is_regular_file]
    bar = tqdm(
        total=sum(sizes) if len(sizes) == len(sources) else None,
        desc="preparing",
        unit="B",
        unit_scale=True,
        disable=None,  # shown on a terminal only
    )
    ends: deque[int] = deque()
    before = hashlib.sha256()
    some_are_thinned = any(entry.before for entry in journal.entries.values())

    def blocks() -> Iterator[Block]:
        for number, (pieces, end, is_whole) in enumerate(_blocks(sources, options)):
            if not portion.takes(pieces):
                continue
            ends.append(end)
            previous = journal.entries.get(number)
            if previous and previous.before not in ("", before.hexdigest()):
                previous = None
            yield Block(number, pieces, previous, is_whole)
            if some_are_thinned:  # else nothing is compared with it
                before.update(_checksum(pieces).encode())

    entries = []
    with bar:
        begin, sequences = time.monotonic(), 0
        for entry in engine(partial(make or make_shard, job), blocks()):
            if entry != journal.entries.get(entry.number):
                journal.add(entry)
            entries.append(entry)
            sequences += entry.num_sequences + sum(entry.skipped.values())
            bar.set_postfix_str(f"{sequences / (time.monotonic() - begin):,.0f} sequences/s", refresh=False)
            bar.update(ends.popleft() - bar.n)
    if filters.deduplicate:
        entries = deduplicate(directory, entries, journal, engine)
    return entries


def _blocks(sources: Sequence[Source], options: SourceOptions) -> Iterator[tuple[list[Piece], int, bool]]:
    """Blocks of pieces, each with the bytes of all sources read up to its end, and whether it is whole."""
    pieces: list[Piece] = []
    size = before = end = 0
    try:
        for source in sources:
            for piece in cut(source, options):
                pieces.append(piece)
                size, end = size + len(piece.data), before + piece.position
                if size >= BLOCK_BYTES:
                    yield pieces, end, True
                    pieces, size = [], 0
            before = end
    except UserError:  # what may be wrong before that place is to be reported first
        if pieces:
            yield pieces, end, False
        raise
    if pieces:
        yield pieces, end, True


def make_shard(job: Job, block: Block) -> ShardEntry:
    """Tokenise one block into a shard, unless that is there already."""
    if not job.directory.is_dir():
        raise UserError(
            f"{job.directory}: not to be seen on {socket.gethostname()}; for --engine ray give --out a directory that "
            "all nodes share"
        )
    checksum = _checksum(block.pieces)
    if block.previous and block.previous.input == checksum and is_intact(job.directory, block.previous):
        return block.previous
    ids: list[str] = []
    tokens: list[NDArray[np.unsignedinteger]] = []
    word_starts: list[NDArray[np.bool_]] = []
    report: list[str] = []
    skipped: Counter[str] = Counter()
    shortest, longest = job.filters.min_length or 0, job.filters.max_length or sys.maxsize
    for piece in block.pieces:
        for item in parse(piece, job.options):
            if not isinstance(item, Flaw):
                try:
                    encoded, words = job.tokenizer.encode_words(item.text)
                except InvalidSymbolError as error:
                    is_text = error.symbol == "' '" and piece.source.kind != "fasta"
                    item = Flaw(
                        item.line,
                        f"record '{item.id}' has {error.symbol} at position {error.position}; allowed: "
                        f"{error.allowed}; {_NEEDS_TOKENIZER if is_text else 'correct or remove it'}",
                    )
                else:
                    if len(encoded) < 3:  # <cls> and <eos>, of a lone stop or what a normaliser empties
                        reason = f"record '{item.id}' has nothing that becomes a token; correct or remove it"
                        item = Flaw(item.line, reason)
            if isinstance(item, Flaw):
                if not job.filters.skip_bad:
                    raise UserError(f"{piece.where(item.line)}: {item.reason}")
                skipped["bad"] += 1
                report.append("\t".join(map(_field, (piece.source, item.line or "", item.reason))) + "\n")
            elif len(encoded) < shortest:
                skipped["short"] += 1
            elif len(encoded) > longest:
                skipped["long"] += 1
            else:
                for name, window, starts in into_windows(item.id, encoded, words, job.filters.windows or len(encoded)):
                    ids.append(name)
                    tokens.append(window)
                    if starts is not None:
                        word_starts.append(starts)
    if not block.is_whole:
        return ShardEntry(block.number, "", None, 0, 0, "", {})
    if report:
        report_file(job.directory, block.number).write_text("".join(report), encoding="utf-8")
    if not ids:
        return ShardEntry(block.number, checksum, None, 0, 0, "", dict(skipped))
    file = job.directory / f"shard-{block.number:05d}.arrow"
    sha256 = write_shard(file, ids, tokens, job.tokenizer.dtype, word_starts)
    num_tokens = sum(map(len, tokens))
    return ShardEntry(block.number, checksum, file.name, len(ids), num_tokens, sha256, dict(skipped))


def _field(value: object) -> str:
    """What a column of the report holds: a file's name may have line ends, and may be no UTF-8."""
    text = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return re.sub(r"\s", " ", text)


def _checksum(pieces: Sequence[Piece]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(json.dumps([*piece.source, piece.line, piece.columns, len(piece.data)]).encode())
        digest.update(piece.data)
    return digest.hexdigest()

"""Pieces to shards, on all cores, with a journal that outlives a killed process.

A shard is made of one block of pieces: a function of the block's bytes and the settings, and of nothing else. So the
result is the same for any number of processes, and a shard that is there already is good if the block's checksum and
its own are those of its entry in the journal.
"""

import hashlib
import itertools
import json
import os
import shutil
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pretrain.corpus.pieces import Piece, cut
from pretrain.corpus.processes import Engine
from pretrain.corpus.readers import Flaw, parse
from pretrain.corpus.sources import Source, SourceOptions
from pretrain.corpus.store import FORMAT_VERSION, file_checksum, open_shard
from pretrain.corpus.tokenizer import InvalidSymbolError, Tokenizer
from pretrain.corpus.windows import into_windows
from pretrain.corpus.writing import write_rows, write_shard
from pretrain.errors import UserError

BLOCK_BYTES = 2**25
"""A block, and so a shard, is at least this many bytes of a source, or what is left: a process holds a few of them."""

JOURNAL = "journal.jsonl"

_NEEDS_TOKENIZER = (
    "correct or remove it, or, if this is text, give its tokenizer: --data.tokenizer FILE (in prepare --tokenizer FILE)"
)


@dataclass(frozen=True)
class Filters:
    """Which records are kept, the others being counted, and whether long ones are cut.

    Attributes:
        min_length: Shorter sequences are left out; in tokens, ``<cls>`` and ``<eos>`` included.
        max_length: Longer ones are.
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


class ShardEntry(NamedTuple):
    """One block of the sources and the shard that was made of it."""

    number: int
    input: str
    """Checksum of the block."""
    file: str | None
    """The shard; None if nothing in the block is kept."""
    num_sequences: int
    num_tokens: int
    sha256: str
    skipped: dict[str, int]
    """Records left out, by the reason: ``short``, ``long``, ``bad``, ``duplicate``."""
    before: str = ""
    """If duplicates were taken out, a checksum of the blocks before this one, where their first copies are."""


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


class Journal:
    """The shards that are finished, one line each, in the directory where they are made.

    Args:
        directory: That directory; emptied of what was made with other settings.
        settings: All that the shards depend on besides the sources.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self._path = directory / JOURNAL
        self.entries: dict[int, ShardEntry] = {}
        head = json.dumps(settings)
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        if lines[:1] == [head]:
            for line in lines[1:]:
                try:
                    entry = ShardEntry(**json.loads(line))
                except (ValueError, TypeError):  # the line that was being written when the process was killed
                    break
                self.entries[entry.number] = entry
        else:
            for file in directory.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        self._path.write_text("".join(f"{line}\n" for line in [head, *map(_line, self.entries.values())]))

    def add(self, entry: ShardEntry) -> None:
        """Write down a finished shard."""
        self.entries[entry.number] = entry
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{_line(entry)}\n")


def _line(entry: ShardEntry) -> str:
    return json.dumps(entry._asdict())


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
        disable=not sys.stderr.isatty(),
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
    except UserError:  # what may be wrong before that place is to be told first
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
                report.append(f"{piece.source}\t{item.line or ''}\t{' '.join(item.reason.split())}\n")
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


def report_file(directory: Path, number: int) -> Path:
    """Where the bad records of a block are listed, if it has any."""
    return directory / f"skipped-{number:05d}.tsv"


def _checksum(pieces: Sequence[Piece]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(json.dumps([*piece.source, piece.line, piece.columns, len(piece.data)]).encode())
        digest.update(piece.data)
    return digest.hexdigest()


def is_intact(directory: Path, entry: ShardEntry) -> bool:
    """Whether what was made of a block is still there as it was."""
    if entry.skipped.get("bad") and not report_file(directory, entry.number).is_file():
        return False
    file = directory / entry.file if entry.file else None
    return file is None or (file.is_file() and file_checksum(file) == entry.sha256)


# --- duplicates -------------------------------------------------------------------------------------------------------


def deduplicate(directory: Path, entries: list[ShardEntry], journal: Journal, engine: Engine) -> list[ShardEntry]:
    """Take out of the shards what an earlier sequence repeats.

    Shards that have been through this already stay as they are, so it may be killed and repeated at any point.
    """
    if not (full := [entry for entry in entries if entry.file]):
        return entries
    before, before_each = hashlib.sha256(), dict[int, str]()
    for entry in entries:
        before_each[entry.number] = before.hexdigest()
        before.update(entry.input.encode())
    hashes = list(engine(partial(_hash_sequences, directory), full))
    kept = _is_first(np.concatenate(hashes))
    keeps = np.split(kept, np.cumsum([len(entry) for entry in hashes])[:-1])
    unique = {entry.number: entry for entry in entries}
    repeated = [(entry, keep) for entry, keep in zip(full, keeps, strict=True) if not keep.all()]
    for entry in engine(partial(_take_out, directory), repeated):
        unique[entry.number] = entry._replace(before=before_each[entry.number])
        journal.add(unique[entry.number])
    return list(unique.values())


def _hash_sequences(directory: Path, entry: ShardEntry) -> NDArray[np.uint64]:
    """A hash of 128 bits for each sequence of a shard: two equal ones of different sequences are not to be expected."""
    shard = open_shard(directory / (entry.file or ""))
    tokens = shard.tokens.view(np.uint8).data
    bounds = (shard.offsets * shard.tokens.itemsize).tolist()
    digests = [hashlib.blake2b(tokens[a:b], digest_size=16).digest() for a, b in itertools.pairwise(bounds)]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def _is_first(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal ones the first in the corpus comes first
    first = np.ones(len(hashes), np.bool_)
    first[order[1:]] = (hashes[order[1:]] != hashes[order[:-1]]).any(axis=1)
    return first


def _take_out(directory: Path, task: tuple[ShardEntry, NDArray[np.bool_]]) -> ShardEntry:
    entry, keep = task
    file = directory / (entry.file or "")
    skipped = {**entry.skipped, "duplicate": entry.skipped.get("duplicate", 0) + int((~keep).sum())}
    if not keep.any():
        file.unlink()
        return entry._replace(file=None, num_sequences=0, num_tokens=0, sha256="", skipped=skipped)
    sha256 = write_rows(file, keep)
    num_tokens = len(open_shard(file).tokens)
    return entry._replace(num_sequences=int(keep.sum()), num_tokens=num_tokens, sha256=sha256, skipped=skipped)

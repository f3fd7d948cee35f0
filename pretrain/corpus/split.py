"""Which sequences are for validation: chosen by their names, so that growth of the sources moves none of them."""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.journal import Journal, ShardEntry, is_intact
from pretrain.corpus.processes import Engine
from pretrain.corpus.sources import Source, Stream
from pretrain.corpus.store import open_shard
from pretrain.corpus.writing import write_rows
from pretrain.errors import UserError

SIDES = ("train", "validation")
_READ_BYTES = 2**24
_WINDOW = re.compile(r"#[0-9]+$")

U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Split:
    """Two corpora instead of one: for training, and for validation.

    Attributes:
        share: Share of the names (of the clusters, where they are given) that goes to validation. A name's side depends
            on the name and the share only, and with a larger share none leaves validation.
        clusters: A table of cluster and member, as ``mmseqs cluster`` and ``createtsv`` write it; the members of a
            cluster go to one side.
        ids: A list of the names that go to validation, one a line, instead of a share.

    Raises:
        UserError: If that is no split.
    """

    share: float | None = None
    clusters: str | None = None
    ids: str | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.ids is None):
            raise UserError("a split needs either --validation_share or --validation_ids")
        if self.share is not None and not 0 < self.share < 1:
            raise UserError(f"validation_share is {self.share}; give a share between 0 and 1, such as 0.01")
        if self.clusters and self.ids:
            raise UserError(
                "--split_clusters goes with --validation_share; --validation_ids names every sequence itself"
            )

    @classmethod
    def of(cls, share: float | None, clusters: str | None, ids: str | None) -> "Split | None":
        """The split that options ask for, if one of them is given."""
        return cls(share, clusters, ids) if any((share is not None, clusters, ids)) else None

    def check_files(self) -> None:
        """Make sure that the lists are there, before the hours that reading the sources may take.

        Raises:
            UserError: If one cannot be opened.
        """
        for path in filter(None, (self.clusters, self.ids)):
            Stream(Source(path, "tsv")).close()


class _Table(NamedTuple):
    """The names of a file as hashes, ascending, and whether each is for validation: nine bytes a name."""

    hashes: U64
    validation: NDArray[np.bool_]

    def find(self, names: Sequence[str], windows: bool) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Of each name, whether it is in the table, and where: as it is, by its accession, or as the window of one."""
        found, place = self._find(names)
        for other_name in (_accession, *((_whole, lambda name: _accession(_whole(name))) if windows else ())):
            missing = [(number, names[number]) for number in np.flatnonzero(~found).tolist()]
            others = {number: other for number, name in missing if (other := other_name(name)) != name}
            if others:
                found[[*others]], place[[*others]] = self._find([*others.values()])
        return found, place

    def _find(self, names: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        hashes = _hashes(name.encode() for name in names)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return self.hashes[place] == hashes, place


def _accession(name: str) -> str:
    """What `mmseqs` writes, P12345, for what FASTA headers of UniProt call sp|P12345|NAME."""
    return name.split("|")[1] if name.count("|") == 2 else name


def _whole(name: str) -> str:
    """The sequence that a window is cut from, if it is one."""
    return _WINDOW.sub("", name)


class _Job(NamedTuple):
    directory: Path
    split: Split
    table: _Table | None
    windows: bool


class _Task(NamedTuple):
    entry: ShardEntry
    previous: tuple[ShardEntry | None, ...]


def split_shards(
    directory: Path, into: Path, entries: Sequence[ShardEntry], split: Split, engine: Engine, windows: bool = False
) -> tuple[list[ShardEntry], list[ShardEntry]]:
    """Write the shards of ``directory`` again as those of ``into/train`` and ``into/validation``.

    Args:
        directory: Where the shards are.
        into: Where to write; what an earlier call made there of the same shards is kept.
        entries: The shards, as they stand in the journal.
        split: Which sequences go where.
        engine: What maps over the shards; the result does not depend on it.
        windows: Whether long sequences were cut; ``name#n`` is then on the side of ``name``.

    Raises:
        UserError: If a list cannot be read, a sequence is in no cluster, or one side would be empty.
    """
    table = _read_clusters(split) if split.clusters else _read_ids(split.ids) if split.ids else None
    settings: dict[str, Any] = {**asdict(split), "windows": windows}
    if table is not None:
        settings["table"] = hashlib.sha256(table.hashes.tobytes() + table.validation.tobytes()).hexdigest()
    for name in SIDES:
        (into / name).mkdir(parents=True, exist_ok=True)
    journals = [Journal(into / name, settings) for name in SIDES]
    job = _Job(directory, split, table, windows)
    tasks = (
        _Task(entry, tuple(journal.entries.get(entry.number) for journal in journals))
        for entry in entries
        if entry.file
    )
    made: tuple[list[ShardEntry], list[ShardEntry]] = ([], [])
    for both in engine(partial(_split_shard, job, into), tasks):
        for entry, journal, side in zip(both, journals, made, strict=True):
            if entry != journal.entries.get(entry.number):
                journal.add(entry)
            side.append(entry)
    for name, result in zip(SIDES, made, strict=True):
        if not any(entry.file for entry in result):
            total = sum(entry.num_sequences for entry in entries)
            which = f"--validation_share {split.share}" if split.ids is None else f"--validation_ids {split.ids}"
            raise UserError(f"{which} leaves no sequence of {total:,} for {name}; give another share or list")
    if split.ids and table:
        held = (into / SIDES[1] / entry.file for entry in made[1] if entry.file)
        _warn_of_missing(split.ids, table, held, windows)
    return made


def _split_shard(job: _Job, into: Path, task: _Task) -> tuple[ShardEntry, ...]:
    entry = task.entry
    sides = [into / side for side in SIDES]
    if all(
        old and old.input == entry.sha256 and is_intact(side, old)
        for old, side in zip(task.previous, sides, strict=True)
    ):
        return tuple(old for old in task.previous if old)
    file = job.directory / (entry.file or "")
    validation = _is_validation(job, open_shard(file).ids.to_pylist())
    made = []
    for side, keep in zip(sides, (~validation, validation), strict=True):
        if not keep.any():
            made.append(ShardEntry(entry.number, entry.sha256, None, 0, 0, "", {}))
            continue
        sha256 = write_rows(file, keep, side / file.name)
        num_tokens = len(open_shard(side / file.name).tokens)
        made.append(ShardEntry(entry.number, entry.sha256, file.name, int(keep.sum()), num_tokens, sha256, {}))
    return tuple(made)


def _is_validation(job: _Job, names: Sequence[str]) -> NDArray[np.bool_]:
    if job.table is None:
        return _below(_hashes((_whole(name) if job.windows else name).encode() for name in names), job.split.share or 0)
    found, place = job.table.find(names, job.windows)
    if job.split.clusters and not found.all():
        missing = names[int(np.flatnonzero(~found)[0])]
        raise UserError(
            f"{job.split.clusters}: sequence '{missing}' is in no cluster; cluster the sequences that are prepared, or "
            "split by their names, without --split_clusters"
        )
    return found & job.table.validation[place]


def _warn_of_missing(ids: str, table: _Table, shards: Iterator[Path], windows: bool) -> None:
    """Say how many of the listed names there are: what goes by another name here is trained on."""
    seen = np.zeros(len(table.hashes), np.bool_)
    for shard in shards:
        _, place = table.find(open_shard(shard).ids.to_pylist(), windows)
        seen[place] = True
    for names in _listed(ids):
        missing = np.isin(_hashes(names), table.hashes[~seen])
        if missing.any():
            first = names[int(np.argmax(missing))].decode("utf-8", "replace")
            message = f"{seen.sum():,} of {len(seen):,} names of {ids} are here; the first missing is '{first}'"
            print(f"pretrain: warning: {message}", file=sys.stderr, flush=True)
            return


def _below(hashes: U64, share: float) -> NDArray[np.bool_]:
    return hashes < np.uint64(int(share * 2.0**64))


def _hashes(names: Iterable[bytes]) -> U64:
    """64 bits of each: among a hundred million names two equal ones are not to be expected."""
    return np.frombuffer(b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names), "<u8").astype(
        np.uint64
    )


def _read_clusters(split: Split) -> _Table:
    path = split.clusters or ""
    members: list[U64] = []
    sides: list[NDArray[np.bool_]] = []
    for line, text in _lines(path):
        rows = [row.rstrip(b"\r").split(b"\t") for row in text.split(b"\n")]
        wrong = next((place for place, row in enumerate(rows) if len(row) != 2 and row != [b""]), None)
        if wrong is not None:
            raise UserError(
                f"{path}:{line + wrong}: {len(rows[wrong])} columns; a cluster, a tab and a member of it are expected"
            )
        rows = [row for row in rows if len(row) == 2]
        members.append(_hashes(row[1] for row in rows))
        sides.append(_below(_hashes(row[0] for row in rows), split.share or 0.0))
    table = _table(members, sides)
    same = np.flatnonzero(table.hashes[1:] == table.hashes[:-1])
    if (table.validation[same] != table.validation[same + 1]).any():
        raise UserError(f"{path}: a member stands in two clusters that go to different sides; give each one cluster")
    if not len(table.hashes):
        raise UserError(f"{path}: is empty; lines of a cluster, a tab and a member are expected")
    return table


def _read_ids(path: str) -> _Table:
    names = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_hashes, _listed(path))]))
    if not len(names):
        raise UserError(f"{path}: is empty; names of sequences, one a line, are expected")
    return _Table(names, np.ones(len(names), np.bool_))


def _listed(path: str) -> Iterator[list[bytes]]:
    """The names of a list, some of them at a time."""
    for _, text in _lines(path):
        yield [name for row in text.split(b"\n") if (name := row.strip())]


def _table(hashes: list[U64], validation: list[NDArray[np.bool_]]) -> _Table:
    names = np.concatenate([np.zeros(0, np.uint64), *hashes])
    order = np.argsort(names, kind="stable")
    return _Table(names[order], np.concatenate([np.zeros(0, np.bool_), *validation])[order])


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file, a few megabytes at a time, each time with the number of the first."""
    line, rest = 1, b""
    with Stream(Source(path, "tsv")) as stream:
        while data := stream.read(_READ_BYTES):
            text, end, rest = (rest + data).rpartition(b"\n")
            if end:
                yield line, text
                line += text.count(b"\n") + 1
    if rest:
        yield line, rest

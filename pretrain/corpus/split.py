"""Which sequences are for validation: chosen by their names, so that growth of the sources moves none of them."""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.clusters import read_clusters
from pretrain.corpus.journal import Journal, ShardEntry, is_intact
from pretrain.corpus.names import NameTable, hash_names, read_lines, whole_name
from pretrain.corpus.processes import Engine
from pretrain.corpus.store import open_shard
from pretrain.corpus.writing import write_rows
from pretrain.errors import UserError

SIDES = ("train", "validation")


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


class _Job(NamedTuple):
    directory: Path
    split: Split
    table: NameTable | None
    has_windows: bool


class _Task(NamedTuple):
    entry: ShardEntry
    previous: tuple[ShardEntry | None, ...]


def split_shards(
    directory: Path, into: Path, entries: Sequence[ShardEntry], split: Split, engine: Engine, has_windows: bool = False
) -> tuple[list[ShardEntry], list[ShardEntry]]:
    """Write the shards of ``directory`` again as those of ``into/train`` and ``into/validation``.

    Args:
        directory: Where the shards are.
        into: Where to write; what an earlier call made there of the same shards is kept.
        entries: The shards, as they stand in the journal.
        split: Which sequences go where.
        engine: What maps over the shards; the result does not depend on it.
        has_windows: Whether long sequences were cut; ``name#n`` is then on the side of ``name``.

    Raises:
        UserError: If a list cannot be read, a sequence is in no cluster, or one side would be empty.
    """
    table = _read_table(split)
    settings: dict[str, Any] = {**asdict(split), "windows": has_windows}
    if table is not None:
        settings["table"] = hashlib.sha256(table.hashes.tobytes() + table.values.tobytes()).hexdigest()
    for name in SIDES:
        (into / name).mkdir(parents=True, exist_ok=True)
    journals = [Journal(into / name, settings) for name in SIDES]
    job = _Job(directory, split, table, has_windows)
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
        _warn_of_missing(split.ids, table, held, has_windows)
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
        wholes = map(whole_name, names) if job.has_windows else names
        return _below(hash_names(name.encode() for name in wholes), job.split.share or 0.0)
    found, place = job.table.find(names, job.has_windows)
    if job.split.clusters and not found.all():
        missing = names[int(np.flatnonzero(~found)[0])]
        raise UserError(
            f"{job.split.clusters}: sequence '{missing}' is in no cluster; cluster the sequences that are prepared, or "
            "split by their names, without --split_clusters"
        )
    validation: NDArray[np.bool_] = found & job.table.values[place]
    return validation


def _warn_of_missing(ids: str, table: NameTable, shards: Iterator[Path], has_windows: bool) -> None:
    """Say how many of the listed names there are: what goes by another name here is trained on."""
    seen = np.zeros(len(table.hashes), np.bool_)
    for shard in shards:
        _, place = table.find(open_shard(shard).ids.to_pylist(), has_windows)
        seen[place] = True
    for names in _listed(ids):
        missing = np.isin(hash_names(names), table.hashes[~seen])
        if missing.any():
            first = names[int(np.argmax(missing))].decode("utf-8", "replace")
            message = f"{seen.sum():,} of {len(seen):,} names of {ids} are here; the first missing is '{first}'"
            print(f"pretrain: warning: {message}", file=sys.stderr, flush=True)
            return


def _below(hashes: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    return hashes < np.uint64(int(share * 2.0**64))


def _read_table(split: Split) -> NameTable | None:
    """The names that decide, if not all names do, and of each whether it goes to validation."""
    if split.clusters:
        members, clusters = read_clusters(split.clusters)
        return NameTable(members, _below(clusters, split.share or 0.0))
    if not split.ids:
        return None
    names = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(hash_names, _listed(split.ids))]))
    if not len(names):
        raise UserError(f"{split.ids}: is empty; names of sequences, one a line, are expected")
    return NameTable(names, np.ones(len(names), np.bool_))


def _listed(path: str) -> Iterator[list[bytes]]:
    """The names of a list, some of them at a time."""
    for _, lines in read_lines(path):
        yield [name for line in lines if (name := line.strip())]

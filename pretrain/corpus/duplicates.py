"""Taking out of the shards of a corpus in the making what an earlier sequence repeats."""

import hashlib
import itertools
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.journal import Journal, ShardEntry
from pretrain.corpus.processes import Engine
from pretrain.corpus.store import open_shard
from pretrain.corpus.writing import write_rows


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

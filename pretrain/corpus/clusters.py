"""Clusters: an order that visits clusters, and at each visit draws one of the cluster's sequences.

As ESM-2 did it with UniRef: an epoch goes over the UniRef50 clusters, and each visit takes a UniRef90 sequence of the
cluster at random (Lin et al. 2023, "Evolutionary-scale prediction of atomic-level protein structure with a language
model", supplement A.1.1). So large families do not dominate, and their diversity is still seen.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from typing_extensions import override

from pretrain.corpus.counter import Int64, RandomStream, below, bits, derive_key
from pretrain.corpus.names import NameTable, hash_names, read_lines
from pretrain.corpus.order import Order
from pretrain.corpus.store import CLUSTERS, Clusters, open_shard
from pretrain.corpus.writing import write_batch
from pretrain.errors import UserError


class ClusterOrder(Order):
    """A fresh permutation of the clusters in each epoch; each visit draws one member, uniformly.

    The member is a function of (seed, epoch, cluster): no state, O(1) to seek.

    Args:
        clusters: Which sequences each cluster holds.
        seed: The run's seed.
    """

    def __init__(self, clusters: Clusters, seed: int) -> None:
        super().__init__(len(clusters.offsets) - 1, seed)
        self.clusters = clusters

    @override
    def __call__(self, positions: ArrayLike) -> tuple[Int64, Int64]:
        """At each of ``positions`` the epoch, and the index of the member that is drawn."""
        epochs, visited = super().__call__(positions)
        first = self.clusters.offsets[visited]
        sizes = self.clusters.offsets[visited + 1] - first
        draws = bits(derive_key(self.seed, RandomStream.CLUSTER_MEMBER, epochs, visited), 0)
        return epochs, self.clusters.members[first + below(draws, sizes)].astype(np.int64)

    @override
    def places(self, indices: Int64) -> Int64:
        """What an epoch visits exactly once: the clusters."""
        return self._cluster_of[indices]

    @cached_property
    def _cluster_of(self) -> Int64:
        offsets, members = self.clusters
        cluster_of = np.empty(len(members), np.int64)
        cluster_of[members] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        return cluster_of


def read_clusters(table: str) -> NameTable:
    """A table of clusters: its members, and of each the hash of its cluster's name.

    Args:
        table: Lines of a cluster's name, a tab, and the id of one of its sequences, as ``mmseqs createtsv`` writes
            them; it may be compressed.

    Raises:
        UserError: If it is unreadable, is empty, or holds a sequence in two clusters.
    """
    members, clusters = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for first, lines in read_lines(table):
        rows = [line.split(b"\t") for line in lines]
        for line, row in enumerate(rows, first):
            if len(row) != 2 and row != [b""]:
                raise UserError(f"{table}:{line}: {len(row)} columns; a cluster, a tab and a member of it are expected")
        members.append(hash_names(row[1] for row in rows if len(row) == 2))
        clusters.append(hash_names(row[0] for row in rows if len(row) == 2))
    hashes = np.concatenate(members)
    if not len(hashes):
        raise UserError(f"{table}: is empty; lines of a cluster, a tab and a member are expected")
    order = np.argsort(hashes)
    found = NameTable(hashes[order], np.concatenate(clusters)[order])
    twice = (found.hashes[1:] == found.hashes[:-1]) & (found.values[1:] != found.values[:-1])
    if twice.any():
        name = _member(table, found.hashes[1:][twice][0])
        raise UserError(f"{table}: '{name}' is in two clusters; a sequence belongs to one")
    return found


def _member(table: str, wanted: np.uint64) -> str:
    """The member that has a hash."""
    members = (line.partition(b"\t")[2] for _, lines in read_lines(table) for line in lines)
    return next(member.decode("utf-8", "replace") for member in members if hash_names([member])[0] == wanted)


def write_clusters(directory: Path, shards: Sequence[str], table: str, has_windows: bool) -> dict[str, Any]:
    """Look up the cluster of each sequence, and write the sequences by cluster beside the shards.

    Needs about 70 bytes of memory a line of the table.

    Args:
        directory: Where the shards are.
        shards: Their names.
        table: As `read_clusters` takes it; it may name sequences that the corpus does not hold.
        has_windows: Whether long sequences were cut; the windows are then members of their sequence's cluster.

    Returns:
        What the manifest records.

    Raises:
        UserError: As `read_clusters`, or if the table leaves a sequence of the corpus out.
    """
    known, clusters = read_clusters(table), list[NDArray[np.uint64]]()
    missing, first_missing = 0, ""
    for shard in shards:
        names = open_shard(directory / shard).ids.to_pylist()
        found, place = known.find(names, has_windows)
        clusters.append(known.values[place])
        first_missing = first_missing if missing or found.all() else names[int(np.argmin(found))]
        missing += int((~found).sum())
    if missing:
        raise UserError(
            f"{table}: {missing:,} of {sum(map(len, clusters)):,} sequences are in no cluster, the first is "
            f"'{first_missing}'; add lines CLUSTER<TAB>ID, with its own id as the cluster of one that stands alone"
        )
    # Numbered as they first come in the corpus: so the order depends on who is with whom, not on their names.
    _, first, numbers = np.unique(np.concatenate(clusters), return_index=True, return_inverse=True)
    renumbered = np.empty_like(first)
    renumbered[np.argsort(first)] = np.arange(len(first))
    cluster_of = renumbered[numbers]
    members = np.argsort(cluster_of, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cluster_of))])
    column = pa.LargeListArray.from_arrays(offsets, members.astype(np.min_scalar_type(len(members))))
    checksum = write_batch(directory / CLUSTERS, pa.record_batch({"members": column}))
    return {"table": table, "num_clusters": len(first), "sha256": checksum}

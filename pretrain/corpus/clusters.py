"""Clusters: an order that visits clusters, and at each visit draws one of the cluster's sequences.

As ESM-2 did it with UniRef: an epoch goes over the UniRef50 clusters, and each visit takes a UniRef90 sequence of the
cluster at random (Lin et al. 2023, "Evolutionary-scale prediction of atomic-level protein structure with a language
model", supplement A.1.1). So large families do not dominate, and their diversity is still seen.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from numpy.typing import ArrayLike, NDArray
from typing_extensions import override

from pretrain.corpus.counter import Stream as Randomness
from pretrain.corpus.counter import below, bits, derive_key
from pretrain.corpus.order import Order
from pretrain.corpus.sources import Source, Stream
from pretrain.corpus.store import CLUSTERS, Clusters, open_shard
from pretrain.corpus.writing import write_batch
from pretrain.errors import UserError

Int64 = NDArray[np.int64]

_BARS = r"^[^|]*\|([^|]+)(\|.*)?$"  # sp|P12345|NAME, which mmseqs calls P12345


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
        draws = bits(derive_key(self.seed, Randomness.CLUSTER_MEMBER, epochs, visited), 0)
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


class _Table(NamedTuple):
    """A cluster table: the names of the sequences, each once, and the number of each one's cluster."""

    names: pa.Array
    clusters: Int64


def check_table(table: str) -> None:
    """Make sure that a table is there, before the hours that reading the sources may take.

    Raises:
        UserError: If it cannot be opened.
    """
    Stream(Source(table, "tsv")).close()


def write_clusters(directory: Path, shards: Sequence[str], table: str) -> dict[str, Any]:
    """Look up the cluster of each sequence, and write the sequences by cluster beside the shards.

    Needs about 200 bytes of memory a line of the table.

    Args:
        directory: Where the shards are.
        shards: Their names.
        table: Lines of a cluster's name, a tab, and the id of one of its sequences, as ``mmseqs`` writes them; it may
            be compressed, and may name sequences that the corpus does not hold.

    Returns:
        What the manifest records.

    Raises:
        UserError: If the table is unreadable, holds a sequence in two clusters, or leaves one of the corpus out.
    """
    names, clusters = _read_table(table)
    ids = pa.chunked_array([open_shard(directory / shard).ids for shard in shards])
    rows = pc.index_in(ids, value_set=names)
    if rows.null_count:
        accessions = pc.replace_substring_regex(ids, _BARS, r"\1")
        rows = pc.coalesce(rows, pc.index_in(accessions, value_set=names))
    if rows.null_count:  # windows of a long one, name#1, name#2, ..., are members of its cluster
        whole = pc.replace_substring_regex(ids, r"#[0-9]+$", "")
        rows = pc.coalesce(rows, pc.index_in(whole, value_set=names))
    if rows.null_count:
        missing = ids.filter(pc.is_null(rows))
        raise UserError(
            f"{table}: {len(missing):,} of {len(ids):,} sequences are in no cluster, the first is '{missing[0]}'; add "
            "lines CLUSTER<TAB>ID, with its own id as the cluster of one that stands alone"
        )
    found = clusters[rows.to_numpy()]
    # Numbered as they first come in the corpus: so the order depends on who is with whom, not on the table's lines.
    _, first, numbers = np.unique(found, return_index=True, return_inverse=True)
    renumbered = np.empty_like(first)
    renumbered[np.argsort(first)] = np.arange(len(first))
    cluster_of = renumbered[numbers]
    members = np.argsort(cluster_of, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(cluster_of))])
    column = pa.LargeListArray.from_arrays(offsets, members.astype(np.min_scalar_type(len(members))))
    checksum = write_batch(directory / CLUSTERS, pa.record_batch({"members": column}))
    return {"table": table, "num_clusters": len(first), "sha256": checksum}


def _read_table(table: str) -> _Table:
    flaws = []

    def note(row: Any) -> str:
        flaws.append(row)
        return "error"

    with Stream(Source(table, "tsv")) as stream:
        try:
            rows = pa.csv.read_csv(
                pa.PythonFile(stream, mode="r"),
                pa.csv.ReadOptions(column_names=["cluster", "member"], use_threads=False),
                pa.csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=note),
                pa.csv.ConvertOptions(column_types={"cluster": pa.large_string(), "member": pa.large_string()}),
            )
        except pa.ArrowInvalid as error:
            where = f"line {flaws[0].number} has {flaws[0].actual_columns} columns" if flaws else str(error).rstrip(".")
            raise UserError(f"{table}: {where}; a cluster table has two: CLUSTER<TAB>MEMBER") from error
    clusters = rows["cluster"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    members = rows["member"].combine_chunks().dictionary_encode()
    numbers = members.indices.to_numpy()
    cluster_of = np.empty(len(members.dictionary), np.int64)
    cluster_of[numbers] = clusters
    twice = np.flatnonzero(cluster_of[numbers] != clusters)
    if len(twice):
        raise UserError(f"{table}: '{rows['member'][twice[0]]}' is in two clusters; a sequence belongs to one")
    return _Table(members.dictionary, cluster_of)

"""Training ahead of the download: in which order a corpus is read, and what must be there when."""

import numpy as np
from numpy.typing import ArrayLike

from pretrain.corpus.counter import Int64
from pretrain.corpus.groups import GroupOrder
from pretrain.corpus.mixture import JoinedCorpus, whole_order
from pretrain.corpus.order import AnyOrder
from pretrain.corpus.packing import StepPlanner
from pretrain.corpus.remote import RemoteCorpus
from pretrain.corpus.store import Corpus
from pretrain.errors import UserError

GROUP_SHARDS = 32
"""Shards that are shuffled together, where nothing else is said: about a gigabyte."""


class PrefetchingOrder:
    """A group order that has the shards brought before they are read; the same order otherwise.

    Args:
        order: The order.
        corpus: The corpus that it is of.
    """

    def __init__(self, order: GroupOrder, corpus: RemoteCorpus) -> None:
        self.order, self.corpus = order, corpus
        # A step may reach from one group into the next. Loader workers, which start later, take this over.
        corpus.max_open = 2 * order.group_shards
        self.seed, self.sizes = order.seed, order.sizes

    def __call__(self, positions: ArrayLike) -> tuple[Int64, Int64]:
        """As the order, once the shards that hold these sequences are there."""
        n = np.atleast_1d(np.asarray(positions, np.int64))
        self.corpus.bring(self.order, n)
        return self.order(n)

    def places(self, indices: Int64) -> Int64:
        """As the order."""
        return self.order.places(indices)


def group_size(corpus: Corpus, wanted: int | str | None) -> int | None:
    """Shards in a group, for a setting that may be ``all`` or left out; None if all are one group.

    Raises:
        UserError: If groups are asked for where the order is over clusters, or of several corpora.
    """
    together = "several corpora are mixed" if isinstance(corpus, JoinedCorpus) else ""
    together = together or ("the order is over clusters" if corpus.num_clusters else "")
    if together:
        if wanted not in (None, "all"):
            raise UserError(f"data.group_shards is {wanted}, but {together}; leave it out")
        return None
    shards = len(corpus.manifest["shards"])
    if wanted is None:
        wanted = GROUP_SHARDS if isinstance(corpus, RemoteCorpus) else "all"
    return int(wanted) if wanted != "all" and int(wanted) < shards else None


def order_of(corpus: Corpus, group_shards: int | str | None, seed: int) -> AnyOrder:
    """The order of a corpus, shuffled as a whole or within groups of so many shards."""
    size = group_size(corpus, group_shards)
    if size is None:
        return whole_order(corpus, seed)
    return GroupOrder([shard["num_sequences"] for shard in corpus.manifest["shards"]], size, seed)


def prefetch_shards(planner: StepPlanner) -> None:
    """Have the shards of a planner's corpus brought before they are read, if they are far away.

    Raises:
        UserError: If the cache has no room for what is needed at a time, or the shards cannot be had.
    """
    corpus, order = planner.corpus, planner.order
    if isinstance(corpus, RemoteCorpus) and isinstance(order, GroupOrder):
        corpus.check_cache(order.group_shards)
        planner.order = PrefetchingOrder(order, corpus)
        return
    for part in corpus.components:
        if isinstance(part, RemoteCorpus):
            part.check_cache(None)
            part.bring_all()

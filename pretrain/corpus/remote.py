"""A remote corpus: its manifest and lengths first, its shards when they are needed."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pyarrow as pa
from typing_extensions import override

from pretrain.corpus.cache import Cache, RemoteFile, cache_directory
from pretrain.corpus.counter import Int64
from pretrain.corpus.groups import GroupOrder
from pretrain.corpus.remote_files import read_remote
from pretrain.corpus.store import (
    LENGTHS,
    MANIFEST,
    Clusters,
    Corpus,
    Shard,
    check_shard_names,
    damaged,
    open_shard,
    parse_manifest,
)
from pretrain.errors import UserError


def is_remote(name: str | Path) -> bool:
    """Whether a name is the address of a remote file or corpus, and no Hub dataset."""
    return "://" in str(name) and not str(name).startswith("hf://")


class RemoteCorpus(Corpus):
    """A corpus at an fsspec URL, as `Corpus` for a directory. Pickled it is its address.

    Args:
        url: The directory's address, such as ``s3://bucket/corpora/uniref50``.
        cache_bytes: How much of it to keep on the local disk; by default what is in use.

    Attributes:
        max_open: How many shards a process has mapped at a time: what is evicted leaves the disk once nobody has it.

    Raises:
        UserError: If there is no corpus, it cannot be reached, or it is damaged or of another format.
    """

    def __init__(self, url: str, cache_bytes: int | None = None) -> None:
        self.url, self.cache_bytes = url.rstrip("/"), cache_bytes
        self.path = Path(self.url)
        content = read_remote(f"{self.url}/{MANIFEST}")
        self._take_manifest(parse_manifest(content, self.url), self.url)
        try:
            self._files = [
                RemoteFile(shard["file"], shard["sha256"], shard["num_bytes"]) for shard in self.manifest["shards"]
            ]
            check_shard_names((file.name for file in self._files), self.url)
            sizes = [shard["num_sequences"] for shard in self.manifest["shards"]]
            entry = self.manifest["lengths"]
            lengths = RemoteFile(LENGTHS, entry["sha256"], entry["num_bytes"])
        except (KeyError, TypeError) as error:
            raise damaged(self.url, error) from error
        self._first = np.cumsum([0, *sizes])
        self._cache = Cache(self.url, cache_directory() / "remote" / self.fingerprint, cache_bytes)
        copy = self._cache.fetch(lengths)
        try:
            self._take_lengths(copy)
        except UserError:
            raise
        except ValueError as error:
            raise _damaged_copy(copy, error) from error
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self.max_open = len(self._files)
        self._window: tuple[int, int] | None = None

    @override
    def __reduce__(  # type: ignore[override]
        self,
    ) -> tuple[type["RemoteCorpus"], tuple[str, int | None], dict[str, int]]:
        return RemoteCorpus, (self.url, self.cache_bytes), {"max_open": self.max_open}

    def __str__(self) -> str:
        return self.url

    @property
    @override
    def has_words(self) -> bool:
        return self._shard(0).word_starts is not None

    @override
    def clusters(self) -> Clusters:
        raise UserError(
            f"{self.url}: was prepared with clusters, which are read from a directory on this machine only; copy the "
            "corpus here"
        )

    def bring_all(self) -> None:
        """Fetch the whole corpus, and keep it."""
        self._bring(list(range(len(self._files))), [], [])

    def bring(self, order: GroupOrder, positions: Int64) -> None:
        """Fetch what the order needs at these positions, and then, in the background, the group after them."""
        groups = order.groups(positions)
        first, last = int(groups.min()), int(groups.max())
        if self._window == (first, last):
            return
        needed = [shard for group in range(first, last + 1) for shard in order.shards(group)]
        self._bring(needed, order.shards(last + 1), order.shards(first - 1) if first else [])
        self._window = (first, last)

    def check_cache(self, group_shards: int | None) -> None:
        """Make sure that the cache has room for what is needed at a time: a group, and those before and behind it.

        Raises:
            UserError: If not.
        """
        sizes = sorted((file.num_bytes for file in self._files), reverse=True)
        least = sum(sizes if group_shards is None else sizes[: 3 * group_shards])
        if self.cache_bytes is not None and self.cache_bytes < least:
            what = "the whole corpus" if group_shards is None else f"three groups of {group_shards} shards"
            raise UserError(
                f"data.cache_gb is {self.cache_bytes / 1e9:g}, {what} take up to {least / 1e9:.3g}; give at least "
                "that, or a smaller data.group_shards"
            )

    def _bring(self, needed: list[int], next_ones: list[int], before: list[int]) -> None:
        self._cache.bring(*([self._files[number] for number in some] for some in (needed, next_ones, before)))

    @override
    def _shard(self, number: int) -> Shard:
        self._cache.after_fork()
        if number not in self._open:
            for _ in range(3):
                fetched = not (self._cache.directory / self._files[number].name).exists()
                try:
                    shard = open_shard(self._cache.fetch(self._files[number]))
                    break
                except FileNotFoundError:  # evicted in between
                    continue
                except pa.ArrowException as error:
                    raise _damaged_copy(self._cache.directory / self._files[number].name, error) from error
            else:
                raise UserError(
                    f"{self._cache.directory}: {self._files[number].name} vanishes as soon as it is there; give each "
                    "program its own $PRETRAIN_CACHE"
                )
            self._open[number] = shard
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)
            if fetched:
                self._cache.evict()
        self._open.move_to_end(number)
        return self._open[number]


def _damaged_copy(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: damaged ({error}); delete this file and give the same command again")

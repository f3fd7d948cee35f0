"""Making a corpus at an fsspec URL: who makes a shard also puts it there, so that no disk of ours need hold them all.

Beside each shard lie, until all are made, the lengths of its sequences and its list of bad records, if it has any. The
manifest comes last: without it there is no corpus at the address. What is finished is written down in the cache of this
machine, so that a call that was killed is continued.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.corpus.cache import cache_directory
from pretrain.corpus.journal import ShardEntry, report_file
from pretrain.corpus.prepare import Settings, prepared_record, write_report
from pretrain.corpus.processes import choose_engine
from pretrain.corpus.remote import RemoteCorpus
from pretrain.corpus.remote_files import get_file, put_file, remove_file, written_at
from pretrain.corpus.repeat import describe
from pretrain.corpus.shards import Block, Job, make_shard, make_shards
from pretrain.corpus.sources import find_sources
from pretrain.corpus.store import LENGTHS, MANIFEST, REPORT
from pretrain.corpus.whole import exclusive
from pretrain.corpus.writing import Extent, extent_of, write_manifest
from pretrain.errors import UserError


def prepare_remote(
    sources: Sequence[str | Path], url: str, settings: Settings, workers: int | None = None, engine: str = "local"
) -> RemoteCorpus:
    """Tokenise sources into a corpus at an address; otherwise as `prepare`, and byte for byte the same.

    Args:
        sources: As for `prepare`.
        url: Where to make it: an address that can be written to, such as ``s3://bucket/corpora/uniref50``.
        settings: What the corpus depends on; nothing that reads the finished shards again.
        workers: Blocks at a time.
        engine: What maps over them.

    Raises:
        UserError: As `prepare`; or if the address cannot be written to, or the settings need a directory.
        CrashError: As `prepare`.
    """
    url = url.rstrip("/")
    if url.startswith("http"):
        raise UserError(f"{url}: a web server takes no files; prepare into a directory, and copy it there")
    if settings.filters.deduplicate or settings.split or settings.clusters:
        raise UserError(
            f"{url}: --deduplicate, --clusters and a split read the finished shards again; prepare into a directory, "
            "and copy it there"
        )
    chosen = choose_engine(engine, workers)
    found = find_sources(sources, settings.options)
    described, work = describe(found), cache_directory() / "preparing" / hashlib.sha256(url.encode()).hexdigest()[:16]
    work.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(work.with_suffix(".lock")):
        if (written := written_at(f"{url}/{MANIFEST}")) is not None:
            made = RemoteCorpus(url)
            settings.check(url, made.manifest, written, described, [source.name for source in found])
            return made
        work.mkdir(exist_ok=True)
        given = (settings.tokenizer, settings.options, settings.filters)
        entries = make_shards(found, work, *given, chosen, make=partial(_make_shard_at, url))
        _finish(url, work, entries, settings, described)
        shutil.rmtree(work)
    return RemoteCorpus(url)


def _make_shard_at(url: str, job: Job, block: Block) -> ShardEntry:
    """As `make_shard`; what an earlier call put at the address is fetched to see whether it is intact."""
    with tempfile.TemporaryDirectory(prefix="pretrain-") as folder:
        here = Path(folder)
        if block.previous and not all(get_file(f"{url}/{file.name}", file) for file in _files(here, block.previous)):
            block = block._replace(previous=None)
        entry = make_shard(job._replace(directory=here), block)
        if entry is not block.previous and block.is_whole:
            if entry.file:
                extent = extent_of(here / entry.file)
                np.save(_extent_file(here, entry.number), np.concatenate([[extent.num_bytes], extent.lengths]))
            for file in _files(here, entry):
                put_file(file, f"{url}/{file.name}")
        return entry


def _files(directory: Path, entry: ShardEntry) -> list[Path]:
    """What is kept of a block."""
    bad = [report_file(directory, entry.number)] if entry.skipped.get("bad") else []
    return [*bad, _extent_file(directory, entry.number), directory / entry.file] if entry.file else bad


def _extent_file(directory: Path, number: int) -> Path:
    return directory / f"lengths-{number:05d}.npy"


def _finish(
    url: str, work: Path, entries: Sequence[ShardEntry], settings: Settings, sources: list[dict[str, Any]]
) -> None:
    prepared = prepared_record(entries, settings, sources)
    extents = {}
    for entry in entries:
        for file in _files(work, entry):
            if file.name == entry.file:
                extents[entry.file] = _extent_file(work, entry.number)
            elif not get_file(f"{url}/{file.name}", file):
                raise UserError(f"{url}/{file.name}: vanished meanwhile; give the same command again")

    def extent(shard: str) -> Extent:
        num_bytes, *_ = numbers = np.load(extents[shard])
        return Extent(int(num_bytes), numbers[1:])

    write_report(work, work, entries)
    shards = [entry.listed() for entry in entries if entry.file]
    write_manifest(work, shards, settings.tokenizer, prepared, extent)
    for name in (REPORT, LENGTHS, MANIFEST):  # the manifest last: with it, it is a corpus
        if (work / name).exists():
            put_file(work / name, f"{url}/{name}")
    for entry in entries:
        for file in _files(work, entry):
            if file.name != entry.file:
                remove_file(f"{url}/{file.name}")

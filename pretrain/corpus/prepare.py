"""Preparing: sources to a corpus, which appears at its place when it is complete."""

import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.readers import read_records
from pretrain.corpus.shards import JOURNAL, Filters, Part, make_shards, report_file
from pretrain.corpus.sources import Source, SourceOptions, find_sources
from pretrain.corpus.store import FORMAT_VERSION, REPORT, Corpus, is_corpus, write_manifest, write_shard
from pretrain.corpus.tokenizer import Tokenizer, train_tokenizer
from pretrain.errors import UserError, disk_is_full


def prepare(
    sources: Sequence[str | Path],
    out: Path,
    tokenizer: Tokenizer,
    options: SourceOptions | None = None,
    filters: Filters | None = None,
    workers: int | None = None,
) -> Corpus:
    """Tokenise sources into a corpus at ``out``.

    The corpus is written beside its final place and renamed into it as the last act, so ``out`` either does not exist
    or is complete. A call that was killed is continued by the next one with the same settings; what has changed in the
    sources since then is made anew.

    Args:
        sources: Files, patterns, directories, URLs, ``hf://`` datasets, or ``-`` for standard input.
        out: The directory to make.
        tokenizer: What makes the ids.
        options: How the sources are read.
        filters: Which sequences are kept.
        workers: Processes; by default one for each core. The corpus does not depend on it.

    Raises:
        UserError: If a source is unreadable or holds something that has no token, or ``out`` exists already.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another place, or remove it first")
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; give at least 1")
    options = options or SourceOptions()
    found = find_sources(sources, options)  # a misspelt name shows at once, not after the hours that the others take
    return _prepare_once(found, out, tokenizer, options, filters or Filters(), workers)


def _prepare_once(
    sources: Sequence[Source],
    out: Path,
    tokenizer: Tokenizer,
    options: SourceOptions,
    filters: Filters,
    workers: int | None,
) -> Corpus:
    """Prepare, or wait for whoever is preparing the same corpus and take theirs."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out}: cannot be made, as {error.filename} is a file; choose another place") from error
    partial = out.parent / f".{out.name}.partial"
    with _exclusive(out.parent / f".{out.name}.lock"):
        if is_corpus(out):
            return Corpus(out)
        if out.exists():
            raise UserError(f"{out}: exists already and is no corpus; remove it first")
        try:
            partial.mkdir(exist_ok=True)
            parts = make_shards(sources, partial, tokenizer, options, filters, workers or _cores())
            _finish(partial, parts, tokenizer, options, filters)
            partial.rename(out)
        except OSError as error:
            if not disk_is_full(error):
                raise
            raise UserError(
                f"{error.filename or partial}: {error.strerror}; make room and give the same command again: it "
                "continues where it stopped"
            ) from error
        finally:
            if not any(partial.glob("shard-*.arrow")):  # nothing that would be worth keeping
                shutil.rmtree(partial, ignore_errors=True)
    return Corpus(out)


def _finish(
    directory: Path, parts: Sequence[Part], tokenizer: Tokenizer, options: SourceOptions, filters: Filters
) -> None:
    """Write the report and the manifest, and remove all else: a directory with a journal is no corpus yet."""
    shards = [part for part in parts if part.file]
    skipped = sum((Counter(part.skipped) for part in parts), Counter())
    if not shards:
        raise UserError(
            f"no sequence is left ({_list(skipped)}); loosen --min_length and --max_length, or see the sources"
        )
    if skipped["bad"]:
        with (directory / REPORT).open("wb") as report:
            report.write(b"source\tline\treason\n")
            for part in parts:
                if part.skipped.get("bad"):
                    report.write(report_file(directory, part.number).read_bytes())
    fields = ("file", "num_sequences", "num_tokens", "sha256")
    write_manifest(
        directory,
        [{field: getattr(part, field) for field in fields} for part in shards],
        tokenizer,
        {**asdict(options), **asdict(filters), "skipped": dict(skipped)},
    )
    ours = {REPORT, "manifest.json", *(part.file for part in shards)}
    for file in sorted(directory.iterdir(), key=lambda file: file.name == JOURNAL):  # the journal last
        if file.name not in ours:
            file.unlink()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Wait for the lock file at ``path``, hold it, and remove it."""
    while True:
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                ours = os.path.samestat(os.fstat(lock.fileno()), path.stat())
            except FileNotFoundError:
                ours = False
            if not ours:  # the one that held it removed it, so it protects nothing: try again with the present one
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def open_or_prepare(sources: Sequence[str | Path], tokenizer: Tokenizer) -> Corpus:
    """Open a corpus, or prepare raw sources into the cache: once for each content and tokenizer.

    The cache is ``$PRETRAIN_CACHE``, or ``pretrain`` in ``$XDG_CACHE_HOME`` (``~/.cache``).

    Raises:
        UserError: If a corpus was made with another tokenizer than ``tokenizer``.
    """
    if len(sources) == 1 and is_corpus(sources[0]):
        corpus = Corpus(sources[0])
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{corpus.path}: made with tokenizer '{corpus.tokenizer.name}' ({corpus.tokenizer.vocab_size} ids, "
                f"{corpus.tokenizer.fingerprint}), the config asks for '{tokenizer.name}' ({tokenizer.vocab_size} ids, "
                f"{tokenizer.fingerprint}); set data.tokenizer to the corpus's, or prepare the sources again"
            )
        return corpus
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, tokenizer.fingerprint]).encode())
    options = SourceOptions()
    found = find_sources(sources, options)
    for source in found:
        if not source.is_regular_file:
            raise UserError(
                f"{source}: only files are prepared into the cache; run `pretrain prepare '{source.name}' --out DIR` "
                "once, and give DIR"
            )
        key.update(source.kind.encode())  # the same bytes make another corpus as .txt than as .jsonl
        with Path(source.name).open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    cached = _cache() / key.hexdigest()[:16]
    return Corpus(cached) if is_corpus(cached) else _prepare_once(found, cached, tokenizer, options, Filters(), None)


def open_or_store(ids: Sequence[str], sequences: Sequence[NDArray[np.unsignedinteger]], tokenizer: Tokenizer) -> Corpus:
    """A corpus of sequences that are tokenised already, in the cache: once for each content.

    Args:
        ids: Their names.
        sequences: Their ids, with ``<cls>`` and ``<eos>``.
        tokenizer: What made the ids.
    """
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, tokenizer.fingerprint, list(ids)]).encode())
    for sequence in sequences:
        key.update(hashlib.sha256(sequence.tobytes()).digest())
    cached = _cache() / key.hexdigest()[:16]
    cached.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(cached.parent / f".{cached.name}.lock"):
        if not is_corpus(cached):
            partial = cached.parent / f".{cached.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir()
                file = partial / "shard-00000.arrow"
                checksum = write_shard(file, ids, sequences, tokenizer.dtype)
                tokens = sum(map(len, sequences))
                shard = {"file": file.name, "num_sequences": len(ids), "num_tokens": tokens, "sha256": checksum}
                write_manifest(partial, [shard], tokenizer, {})
                partial.rename(cached)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Corpus(cached)


def _cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PRETRAIN_CACHE") or home / "pretrain")


def _list(skipped: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items())) or "none was read"


def train_tokenizer_file(sources: Sequence[str | Path], out: Path, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the records of source files and write it as a ``tokenizer.json``.

    Raises:
        UserError: If a source is unreadable, ``out`` exists, or ``vocab_size`` is too small.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name, or remove it first")
    documents = (record.text.decode("utf-8", "replace") for source in sources for record in read_records(source))
    tokenizer = train_tokenizer(documents, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(tokenizer.serialize(), encoding="utf-8")
    partial.rename(out)
    return tokenizer

"""Preparing: source files to a corpus, whole or not at all."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pretrain.corpus.sources import Record, kind, read_records
from pretrain.corpus.store import FORMAT_VERSION, Corpus, is_corpus, write_corpus
from pretrain.corpus.tokenizer import InvalidSymbolError, Tokenizer, train_tokenizer
from pretrain.errors import UserError


def prepare(sources: Sequence[str | Path], out: Path, tokenizer: Tokenizer) -> Corpus:
    """Tokenise source files into a corpus at ``out``.

    The corpus is written beside its final place and renamed into it as the last act, so ``out`` either does not exist
    or is complete. What a killed run left behind is cleared by the next one.

    Raises:
        UserError: If a source is unreadable or holds something that has no token, or ``out`` exists already.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another place, or remove it first")
    return _prepare_once(sources, out, tokenizer)


def _prepare_once(sources: Sequence[str | Path], out: Path, tokenizer: Tokenizer) -> Corpus:
    """Prepare, or wait for whoever is preparing the same corpus and take theirs."""
    paths = [Path(source) for source in sources]
    if not paths:
        raise UserError("no source is given; name at least one file")
    for path in paths:
        kind(path)  # a misspelt name shows at once, not after the hours that the files before it take
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
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_corpus(partial, _tokenise(paths, tokenizer), tokenizer)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Corpus(out)


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
    for path in map(Path, sources):
        key.update(kind(path).encode())  # the same bytes make another corpus as .txt than as .jsonl
        with path.open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = Path(os.environ.get("PRETRAIN_CACHE") or home / "pretrain") / key.hexdigest()[:16]
    return Corpus(cached) if is_corpus(cached) else _prepare_once(sources, cached, tokenizer)


def _tokenise(paths: Sequence[Path], tokenizer: Tokenizer) -> Iterator[tuple[str, NDArray[np.unsignedinteger]]]:
    for path in paths:
        with tqdm(
            read_records(path), f"preparing {path.name}", unit=" sequences", disable=not sys.stderr.isatty()
        ) as records:
            for record in records:
                try:
                    yield record.id, tokenizer.encode(record.text)
                except InvalidSymbolError as error:
                    raise UserError(_describe(path, record, error)) from error


def _describe(path: Path, record: Record, error: InvalidSymbolError) -> str:
    return (
        f"{path}:{record.line}: record '{record.id}' has {error.symbol} at position {error.position}; "
        f"allowed: {error.allowed}; correct or remove it"
    )


def train_tokenizer_file(sources: Sequence[str | Path], out: Path, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the records of source files and write it as a ``tokenizer.json``.

    Raises:
        UserError: If a source is unreadable, ``out`` exists, or ``vocab_size`` is too small.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name, or remove it first")
    documents = (record.text.decode("utf-8", "replace") for source in sources for record in read_records(Path(source)))
    tokenizer = train_tokenizer(documents, vocab_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(tokenizer.serialize(), encoding="utf-8")
    partial.rename(out)
    return tokenizer

"""Opening what a config names: a corpus, wherever it is, or raw sources, which are prepared into the cache."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.cache import cache_directory
from pretrain.corpus.prepare import Settings, prepare_found
from pretrain.corpus.processes import choose_engine
from pretrain.corpus.remote import RemoteCorpus, is_remote
from pretrain.corpus.shards import Filters
from pretrain.corpus.sources import SourceOptions, find_sources, known_kind
from pretrain.corpus.store import FORMAT_VERSION, Corpus, is_corpus
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.corpus.whole import make_whole
from pretrain.corpus.writing import write_manifest, write_shard
from pretrain.errors import UserError


def open_or_prepare(
    sources: Sequence[str | Path], tokenizer: Tokenizer, windows: int | None = None, cache_bytes: int | None = None
) -> Corpus:
    """Open a corpus, or prepare raw sources into the cache: once for each content and tokenizer.

    The cache is ``$PRETRAIN_CACHE``, or ``pretrain`` in ``$XDG_CACHE_HOME`` (``~/.cache``).

    Args:
        sources: Raw sources, or one corpus.
        tokenizer: What makes the ids.
        windows: Tokens that longer sequences are cut into, at most; None leaves them whole.
        cache_bytes: Most bytes of a remote corpus that are kept here; None for as many as are in use.

    Raises:
        UserError: If a corpus was made with another tokenizer than ``tokenizer``, or not cut as ``windows`` says.
    """
    corpus: Corpus | None = None
    if len(sources) == 1 and is_remote(sources[0]) and not known_kind(str(sources[0])):
        corpus = RemoteCorpus(str(sources[0]), cache_bytes)
    elif len(sources) == 1 and is_corpus(sources[0]):
        corpus = Corpus(sources[0])
    if corpus is not None:
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{corpus}: made with tokenizer '{corpus.tokenizer.name}' ({corpus.tokenizer.vocab_size} ids, "
                f"{corpus.tokenizer.fingerprint}), the model's is '{tokenizer.name}' ({tokenizer.vocab_size} ids, "
                f"{tokenizer.fingerprint}); prepare the sources again, or train with data.tokenizer as the corpus's"
            )
        was = corpus.prepared.get("windows")
        if windows and not (was and was <= windows):
            given = f"with --windows {was}" if was else "without --windows"
            raise UserError(
                f"{corpus}: was prepared {given}, long_sequences split needs at most {windows} "
                f"tokens in each; prepare it again with --windows {windows}, or set long_sequences to crop"
            )
        return corpus
    key = hashlib.sha256(json.dumps([FORMAT_VERSION, tokenizer.fingerprint, windows]).encode())
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
    cached = cache_directory() / key.hexdigest()[:16]
    settings = Settings(tokenizer, options, Filters(windows=windows))
    prepare_found(found, cached, settings, choose_engine(), is_corpus)
    return Corpus(cached)


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
    cached = cache_directory() / key.hexdigest()[:16]

    def fill(partial: Path) -> Path:
        file = partial / "shard-00000.arrow"
        checksum = write_shard(file, ids, sequences, tokenizer.dtype)
        tokens = sum(map(len, sequences))
        shard = {"file": file.name, "num_sequences": len(ids), "num_tokens": tokens, "sha256": checksum}
        write_manifest(partial, [shard], tokenizer, {})
        return partial

    make_whole(cached, is_corpus, fill)
    return Corpus(cached)

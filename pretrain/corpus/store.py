"""The corpus: tokenised sequences in Arrow shards; written once, then memory-mapped, never loaded whole.

corpus/
  manifest.json          counts, tokenizer, shards with their checksums, fingerprint
  shard-00000.arrow      one record batch: id, and tokens in the smallest integer type that holds the vocabulary
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from pretrain.corpus.tokenizer import Tokenizer, tokenizer_from_string
from pretrain.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 2**26
"""Tokens in a shard, about: what the writer holds in memory."""


class Shard(NamedTuple):
    """One open shard: views into the mapped file."""

    ids: pa.StringArray
    offsets: NDArray[np.int64]
    tokens: NDArray[np.unsignedinteger]


class Corpus:
    """An open corpus. Reads are zero-copy; a pickled corpus is its path, so loader workers share the mapped pages.

    Args:
        path: A directory that `pretrain prepare` made.

    Raises:
        UserError: If there is no corpus, or it is damaged or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            version = manifest["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{self.path}: corpus format {version}, this version reads {FORMAT_VERSION}; prepare it again"
                )
            self.manifest = manifest
            self.fingerprint: str = manifest["fingerprint"]
            self.num_sequences: int = manifest["num_sequences"]
            self.num_tokens: int = manifest["num_tokens"]
            self.tokenizer: Tokenizer = tokenizer_from_string(manifest["tokenizer"]["serialized"], str(self.path))
            self._shards = [_open_shard(self.path / shard["file"]) for shard in manifest["shards"]]
            sizes = [len(shard.offsets) - 1 for shard in self._shards]
            if sizes != [shard["num_sequences"] for shard in manifest["shards"]] or sum(sizes) != self.num_sequences:
                raise UserError(
                    f"{self.path}: the shards do not hold the sequences that {MANIFEST} counts; prepare it again"
                )
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{error.filename}: not found; a corpus is a directory that `pretrain prepare` made"
            ) from error
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.path}: damaged corpus ({type(error).__name__}: {error}); prepare it again"
            ) from error
        self._first = np.cumsum([0, *sizes])

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path]]:
        return Corpus, (self.path,)

    def __len__(self) -> int:
        return self.num_sequences

    def lengths(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Tokens in each of the sequences, ``<cls>`` and ``<eos>`` included; shape as ``indices``."""
        indices = np.asarray(indices, np.int64)
        lengths = np.empty(indices.shape, np.int64)
        shard_of = np.searchsorted(self._first, indices, side="right") - 1
        for number in np.unique(shard_of):
            here = shard_of == number
            local = indices[here] - self._first[number]
            offsets = self._shards[number].offsets
            lengths[here] = offsets[local + 1] - offsets[local]
        return lengths

    def tokens(self, index: int) -> NDArray[np.unsignedinteger]:
        """The ids of one sequence, with ``<cls>`` and ``<eos>``: a read-only view of the file."""
        shard, local = self._locate(index)
        return shard.tokens[shard.offsets[local] : shard.offsets[local + 1]]

    def id(self, index: int) -> str:
        """The name that the sequence had in its source."""
        shard, local = self._locate(index)
        return str(shard.ids[local].as_py())

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of a corpus of {self.num_sequences}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[number], index - int(self._first[number])


def is_corpus(path: str | Path) -> bool:
    """Whether ``path`` is a prepared corpus rather than a raw source."""
    return (Path(path) / MANIFEST).is_file()


def write_corpus(
    directory: Path, sequences: Iterable[tuple[str, NDArray[np.unsignedinteger]]], tokenizer: Tokenizer
) -> None:
    """Write shards and, last, the manifest into an existing empty directory; the same input gives the same bytes.

    Args:
        directory: Where to write.
        sequences: Pairs of id and token ids (with ``<cls>`` and ``<eos>``), consumed one by one.
        tokenizer: What made the ids.
    """
    shards: list[dict[str, Any]] = []
    ids: list[str] = []
    tokens: list[NDArray[np.unsignedinteger]] = []
    waiting = 0

    def flush() -> None:
        nonlocal waiting
        file = directory / f"shard-{len(shards):05d}.arrow"
        _write_shard(file, ids, tokens, tokenizer.dtype)
        with file.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        shards.append({"file": file.name, "num_sequences": len(ids), "num_tokens": waiting, "sha256": digest})
        ids.clear()
        tokens.clear()
        waiting = 0

    for name, sequence in sequences:
        ids.append(name)
        tokens.append(sequence)
        waiting += len(sequence)
        if waiting >= SHARD_TOKENS:
            flush()
    if ids:
        flush()
    identity = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer.fingerprint,
        "shards": [s["sha256"] for s in shards],
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
        "num_sequences": sum(shard["num_sequences"] for shard in shards),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "dtype": tokenizer.dtype.name,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "serialized": tokenizer.serialize(),
        },
        "shards": shards,
    }
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_shard(file: Path, ids: list[str], tokens: list[NDArray[np.unsignedinteger]], dtype: np.dtype[Any]) -> None:
    offsets = np.cumsum([0, *(len(sequence) for sequence in tokens)], dtype=np.int64)
    values = np.concatenate(tokens).astype(dtype, copy=False)
    batch = pa.record_batch(
        {"id": pa.array(ids, pa.large_string()), "tokens": pa.LargeListArray.from_arrays(offsets, values)},
    )
    with file.open("wb") as sink:
        with pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        sink.flush()
        os.fsync(sink.fileno())


def _open_shard(file: Path) -> Shard:
    if not file.is_file():
        raise FileNotFoundError(2, "no such file", str(file))
    batch = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
    column = batch.column("tokens")
    return Shard(
        ids=batch.column("id"),
        offsets=column.offsets.to_numpy(zero_copy_only=True),
        tokens=column.values.to_numpy(zero_copy_only=True),
    )

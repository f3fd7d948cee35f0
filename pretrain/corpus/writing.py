"""Writing a corpus: shards, lengths and manifest; `store.py` says what lies where."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pretrain.corpus.store import FORMAT_VERSION, LENGTHS, MANIFEST, file_checksum, fingerprint_of, open_shard
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.files import atomic_path, write_whole


def write_shard(
    file: Path,
    ids: Sequence[str],
    tokens: Sequence[NDArray[np.unsignedinteger]],
    dtype: np.dtype[Any],
    word_starts: Sequence[NDArray[np.bool_]] = (),
) -> str:
    """Write one shard, whole or not at all; the same input gives the same bytes.

    Args:
        file: Where to write.
        ids: The names of the sequences.
        tokens: Their ids (with ``<cls>`` and ``<eos>``).
        dtype: The type to store them in.
        word_starts: Whether a word begins at each id, where words are known.

    Returns:
        The file's checksum.
    """
    offsets = np.cumsum([0, *(len(sequence) for sequence in tokens)], dtype=np.int64)
    values = np.concatenate(tokens).astype(dtype, copy=False)
    columns = {"id": pa.array(ids, pa.large_string()), "tokens": _lists(offsets, values)}
    if word_starts:
        columns["word_starts"] = _lists(offsets, np.concatenate(word_starts))
    return write_batch(file, pa.record_batch(columns))


def write_rows(file: Path, keep: NDArray[np.bool_], to: Path | None = None) -> str:
    """Write a shard again, ``to`` another file or in its place, with those of its sequences that ``keep`` marks."""
    shard = open_shard(file)
    lengths = np.diff(shard.offsets)
    offsets = np.concatenate([[0], np.cumsum(lengths[keep])])
    kept = np.repeat(keep, lengths)
    columns = {"id": shard.ids.filter(pa.array(keep)), "tokens": _lists(offsets, shard.tokens[kept])}
    if shard.word_starts is not None:
        word_starts = np.unpackbits(shard.word_starts, count=len(kept), bitorder="little").view(np.bool_)
        columns["word_starts"] = _lists(offsets, word_starts[kept])
    return write_batch(to or file, pa.record_batch(columns))


def _lists(offsets: NDArray[np.int64], values: NDArray[Any]) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(offsets, pa.array(values))


def write_batch(file: Path, batch: pa.RecordBatch) -> str:
    """Write one record batch, whole or not at all, and return the file's checksum."""
    with atomic_path(file, replace=True) as partial:
        with partial.open("wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        return file_checksum(partial)


class Extent(NamedTuple):
    """How large a shard is, and the length of each of its sequences."""

    num_bytes: int
    lengths: NDArray[np.int64]


def extent_of(shard: Path) -> Extent:
    """Measure a shard."""
    return Extent(shard.stat().st_size, np.diff(open_shard(shard).offsets))


def write_manifest(
    directory: Path,
    shards: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    prepared: dict[str, Any],
    extent: Callable[[str], Extent] | None = None,
) -> None:
    """Write the manifest, which makes a directory of shards a corpus.

    Args:
        directory: Where the shards are; the lengths of their sequences are written beside them.
        shards: Of each ``file``, ``num_sequences``, ``num_tokens`` and ``sha256``, in their order.
        tokenizer: What made the ids.
        prepared: How it was made and what was left out, for the record.
        extent: Measures a shard by its name, where it is not in the directory.
    """
    measure = extent or (lambda name: extent_of(directory / name))
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint_of(tokenizer.fingerprint, [shard["sha256"] for shard in shards]),
        "num_sequences": sum(shard["num_sequences"] for shard in shards),
        "num_tokens": sum(shard["num_tokens"] for shard in shards),
        "dtype": tokenizer.dtype.name,
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "serialized": tokenizer.serialize(),
        },
        "prepared": prepared,
        "lengths": _write_lengths(directory / LENGTHS, [shard["file"] for shard in shards], measure),
        "shards": [{**shard, "num_bytes": measure(shard["file"]).num_bytes} for shard in shards],
    }
    write_whole(directory / MANIFEST, json.dumps(manifest, indent=1), replace=True)


def _write_lengths(path: Path, shards: Sequence[str], measure: Callable[[str], Extent]) -> dict[str, Any]:
    """Write the lengths of all sequences, and return what the manifest says of the file; a shard at a time."""
    longest = count = 0
    for shard in shards:
        lengths = measure(shard).lengths
        longest, count = max(longest, int(lengths.max())), count + len(lengths)
    dtype = np.min_scalar_type(longest)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    with path.open("wb") as sink:
        np.lib.format.write_array_header_1_0(sink, header)
        for shard in shards:
            sink.write(measure(shard).lengths.astype(dtype).tobytes())
        sink.flush()
        os.fsync(sink.fileno())
    return {"file": path.name, "sha256": file_checksum(path), "num_bytes": path.stat().st_size}

"""Files of embeddings: the parts that `pretrain embed` makes, and Parquet, safetensors and NumPy files of them.

A file has a column (an array) for each layer. Nothing is larger in memory than a part. `write_npz_arrays` and
`write_safetensors_arrays` take any arrays, made a chunk at a time.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pretrain.errors import UserError
from pretrain.files import atomic_path

LONGEST_ID = 1000
"""Bytes of a name in NumPy and safetensors files, where every name takes as much as the longest."""
_CHECKSUM = b"records"
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # a zip archive has no earlier one: equal embeddings make equal files
_METADATA = "__metadata__"
_SAFETENSORS = {"f4": "F32", "f2": "F16", "i8": "I64", "u1": "U8"}


def write_part(
    file: Path,
    ids: Sequence[str],
    names: Sequence[str],
    values: NDArray[np.floating],
    offsets: NDArray[np.int64] | None,
    checksum: str,
) -> None:
    """Write one part, whole or not at all.

    Args:
        file: Where.
        ids: The records' names, N of them.
        names: The columns' names, one a layer.
        values: Shape [rows, layers, D].
        offsets: Where each record's rows begin, and their number last; None if each has one row.
        checksum: Identifies the records; `part_checksum` gives it back.
    """
    columns: list[pa.Array] = [pa.array(ids, pa.string())]
    for layer in range(len(names)):
        flat = pa.array(np.ascontiguousarray(values[:, layer]).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, values.shape[-1])
        columns.append(column if offsets is None else pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), column))
    batch = pa.record_batch(columns, names=["id", *names]).replace_schema_metadata({_CHECKSUM: checksum})
    with atomic_path(file, replace=True) as partial_file, pa.ipc.new_file(str(partial_file), batch.schema) as writer:
        writer.write_batch(batch)


def part_checksum(file: Path) -> str | None:
    """What a part was made of; None if there is none, or it is damaged."""
    try:
        with pa.memory_map(str(file)) as source:
            return cast(bytes, pa.ipc.open_file(source).schema.metadata[_CHECKSUM]).decode()
    except (OSError, pa.ArrowException):
        return None


def _batch(file: Path) -> Any:
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)


def write_parquet(file: Path, parts: Sequence[Path], about: dict[str, str]) -> None:
    """``id``, and a column of lists for each layer; per residue, of lists of lists. A row group is a part."""
    schema = _batch(parts[0]).schema.with_metadata(about)
    with pq.ParquetWriter(file, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for part in parts:
            writer.write_batch(_batch(part).replace_schema_metadata(about))


class Array(NamedTuple):
    """One array of a file, a part at a time."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[NDArray[Any]]]


def _arrays(parts: Sequence[Path], encode_ids: Callable[[list[str]], NDArray[Any]]) -> list[Array]:
    """``offsets`` (per residue), one array a layer, and ``ids``: [N + 1], [rows, D] and [N, ...]."""
    first = _batch(parts[0])
    names = [name for name in first.schema.names if name != "id"]
    per_residue = pa.types.is_list(first.schema.field(names[0]).type)
    counts = [np.diff(_batch(part).column(names[0]).offsets) for part in parts] if per_residue else None
    records = sum(_batch(part).num_rows for part in parts)
    rows = records if counts is None else sum(int(count.sum()) for count in counts)

    def values(name: str) -> Iterator[NDArray[Any]]:
        for part in parts:
            column = _batch(part).column(name)
            column = column.flatten() if per_residue else column
            yield column.flatten().to_numpy().reshape(-1, column.type.list_size)

    def ids(dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
        for part in parts:
            yield encode_ids(_batch(part).column("id").to_pylist()).astype(dtype)

    arrays = []
    if counts is not None:
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts), dtype=np.int64)])
        arrays.append(Array("offsets", offsets.dtype, offsets.shape, lambda: iter([offsets])))
    for name in names:
        chunk = next(values(name))
        arrays.append(Array(name, chunk.dtype, (rows, chunk.shape[1]), partial(values, name)))
    widest = max((encode_ids(_batch(part).column("id").to_pylist()).dtype for part in parts), key=lambda d: d.itemsize)
    arrays.append(Array("ids", widest, (records,), partial(ids, widest)))
    return arrays


def write_npz(file: Path, parts: Sequence[Path], about: dict[str, str]) -> None:
    """An array ``ids`` of strings, and one [N, D] for each layer; per residue, [rows, D] and ``offsets``.

    Another, ``about``, is a string of JSON: model, layers, ``per`` and pooling, the metadata of the other formats.
    """
    note = np.array(json.dumps(about))
    arrays = _arrays(parts, lambda ids: np.array(ids, np.str_))
    write_npz_arrays(file, [*arrays, Array("about", note.dtype, (), lambda: iter([note]))])


def write_npz_arrays(file: Path, arrays: Sequence[Array]) -> None:
    """Write arrays into a NumPy file, a chunk at a time."""
    with zipfile.ZipFile(file, "w") as archive:
        for array in arrays:
            with archive.open(zipfile.ZipInfo(f"{array.name}.npy", _FIRST_DATE), "w", force_zip64=True) as member:
                descr = np.lib.format.dtype_to_descr(array.dtype)
                header = {"descr": descr, "fortran_order": False, "shape": array.shape}
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in array.chunks():
                    member.write(np.ascontiguousarray(chunk).data.cast("B") if chunk.ndim else chunk.tobytes())


def write_safetensors(file: Path, parts: Sequence[Path], about: dict[str, str]) -> None:
    """As for NumPy; ``ids`` are UTF-8 bytes, [N, width], filled up with zeros."""
    write_safetensors_arrays(
        file, _arrays(parts, lambda ids: np.array([name.encode() for name in ids], np.bytes_)), about
    )


def write_safetensors_arrays(file: Path, arrays: Sequence[Array], about: dict[str, str]) -> None:
    """Write arrays into a safetensors file with some metadata, a chunk at a time; bytes become [..., width].

    Raises:
        UserError: If an array has the metadata's name.
    """
    header: dict[str, Any] = {_METADATA: about}
    end = 0
    for array in arrays:
        if array.name == _METADATA:
            raise UserError(f"'{_METADATA}' is a name that safetensors keeps for itself; give the sequence another")
        begin, end = end, end + array.dtype.itemsize * int(np.prod(array.shape))
        is_ids = array.dtype.kind == "S"
        header[array.name] = {
            "dtype": "U8" if is_ids else _SAFETENSORS[array.dtype.str[1:]],
            "shape": [*array.shape, array.dtype.itemsize] if is_ids else array.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the first tensor begins at a multiple of eight
    with file.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for array in arrays:
            for chunk in array.chunks():
                sink.write(chunk.tobytes())


Writer = Callable[[Path, Sequence[Path], dict[str, str]], None]
WRITERS: dict[str, Writer] = {".parquet": write_parquet, ".safetensors": write_safetensors, ".npz": write_npz}

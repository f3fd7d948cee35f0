"""Labelled files to rows: CSV, TSV, JSON lines, Parquet, and FASTA with labels in its headers or in a table beside."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from pretrain.corpus.pieces import ID_COLUMNS, TEXT_COLUMNS
from pretrain.corpus.sources import Source, SourceOptions, Stream, find_sources
from pretrain.errors import UserError

csv.field_size_limit(2**31 - 1)

_PAIR = re.compile(r'([^\s=]+)=("[^"]*"|\S*)')
"""In a FASTA header, as ``label=nucleus`` or ``label="cell membrane"``."""

_SPLIT = "split"

PAIR_COLUMNS = tuple(
    (name + one, name + two)
    for name in ("sequence", "seq", "protein", "text", "sentence")
    for one, two in (("_a", "_b"), ("_A", "_B"), ("_1", "_2"), ("1", "2"))
)
"""Columns that hold a pair, where there is none for a single sequence."""


class Row(NamedTuple):
    """One labelled sequence, or pair of sequences.

    Attributes:
        where: File and line (of a table, its row), as messages name it.
        id: Its name.
        sequence: The sequence or text, as bytes.
        label: What its label column holds: a string, a number, a list, or nothing.
        split: What its split column holds, if there is one.
        second: What the sequence is paired with, if anything.
    """

    where: str
    id: str
    sequence: bytes
    label: Any = None
    split: str | None = None
    second: bytes | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns (JSON fields, FASTA ``key=value`` pairs) hold what.

    Attributes:
        label: The label.
        text: The sequence; by default the first of ``text``, ``sequence``, ``seq`` and ``content`` that there is.
        id: The name; by default ``id`` where there is one, else the line.
        split: Which split a row belongs to; by default ``split``, where there is one.
        pair: What the sequence is paired with; by default the second of `PAIR_COLUMNS`, where ``text`` is not given
            and none of its usual names is there.
    """

    label: str = "label"
    text: str | None = None
    id: str | None = None
    split: str | None = None
    pair: str | None = None


def read_rows(path: str, columns: Columns, labels: str | None = None) -> list[Row]:
    """The rows of a labelled file.

    Args:
        path: The file: ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet`` or FASTA, also compressed.
        columns: Which column holds what.
        labels: A table of ids, labels and perhaps splits, where ``path`` itself holds none (FASTA, mostly).

    Raises:
        UserError: If there is no such file or column, or a row cannot be read; names file and line.
    """
    beside = _by_id(labels, columns) if labels else {}
    rows = []
    for line, fields in read_fields(path):
        row = _row(path, line, fields, columns)
        if labels:
            if row.id not in beside:
                raise UserError(
                    f"{row.where}: record '{row.id}' has no row in {labels}; add it there or remove the record"
                )
            fields = {**fields, **beside[row.id]}
        for name in (columns.label, columns.split):
            if name is not None and name not in fields:
                where = row.where if path_is_fasta(path) else f"{path} with {labels}" if labels else path
                raise UserError(_no_column(where, name, fields))
        split = fields.get(columns.split or _SPLIT)
        rows.append(row._replace(label=fields[columns.label], split=None if split is None else str(split)))
    if not rows:
        raise UserError(f"{path}: holds no row; at least one labelled sequence is needed")
    return rows


def read_pairs(path: str, columns: Columns) -> Iterator[Row]:
    """The pairs of a table, without labels.

    Raises:
        UserError: If there is no such file or column, or a row cannot be read; names file and line.
    """
    for line, fields in read_fields(path):
        row = _row(path, line, fields, columns)
        if row.second is None:
            raise UserError(
                f"{path}: has one sequence a row, the model takes pairs; name the column of the other (pair_column)"
            )
        yield row


def _row(path: str, line: int, fields: dict[str, Any], columns: Columns) -> Row:
    """What is known of a row without its label."""
    where = f"{path}:{line}"
    text_column, pair_column = _text_columns(path, fields, columns)
    id_column = columns.id or ID_COLUMNS[0]
    if columns.id and columns.id not in fields:
        raise UserError(_no_column(path, columns.id, fields))
    name = str(line if fields.get(id_column) is None else fields[id_column])
    sequence = _sequence(where, name, text_column, fields)
    second = _sequence(where, name, pair_column, fields) if pair_column else None
    return Row(where, name, sequence, second=second)


def _text_columns(path: str, fields: dict[str, Any], columns: Columns) -> tuple[str, str | None]:
    """The column of the sequence, and that of what it is paired with, if anything."""
    usual = [name for name in TEXT_COLUMNS if name in fields]
    if not usual and not columns.text and not columns.pair:
        for first, second in PAIR_COLUMNS:
            if first in fields and second in fields:
                return first, second
    text = columns.text or (usual[0] if usual else "' or '".join(TEXT_COLUMNS))
    for name in (text, columns.pair):
        if name is not None and name not in fields:
            raise UserError(_no_column(path, name, fields))
    if text == columns.pair:
        raise UserError(f"{path}: '{text}' is paired with itself; name both columns: text_column and pair_column")
    return text, columns.pair


def _sequence(where: str, name: str, column: str, fields: dict[str, Any]) -> bytes:
    text = fields[column]
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: record '{name}' has nothing in '{column}'; fill it in or remove the row")
    return text.strip().encode("utf-8", "surrogateescape")


def path_is_fasta(path: str) -> bool:
    """Whether the labels of a file stand in its headers, so that one may lack what another has."""
    return _source(path).kind == "fasta"


def _by_id(path: str, columns: Columns) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for line, fields in read_fields(path):
        id_column = columns.id or ID_COLUMNS[0]
        for name in (id_column, columns.label):
            if name not in fields:
                raise UserError(_no_column(path, name, fields))
        if str(fields[id_column]) in found:
            raise UserError(f"{path}:{line}: '{fields[id_column]}' has a row already; keep one of them")
        kept = columns.label, columns.split or _SPLIT
        found[str(fields[id_column])] = {k: v for k, v in fields.items() if k in kept}
    return found


def _no_column(where: str, name: str, fields: dict[str, Any]) -> str:
    return (
        f"{where}: no column '{name}'; it has {', '.join(fields)}: name the right one (text_column, label_column, "
        "pair_column, id_column, split_column), or add it"
    )


def _source(path: str) -> Source:
    found = find_sources([path], SourceOptions())
    if len(found) != 1 or not found[0].is_regular_file or found[0].kind not in _READERS:
        raise UserError(f"{path}: give one labelled file: {', '.join(_READERS)} (compressed or not)")
    return found[0]


def read_fields(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line (or row) and named fields of each record of a file.

    Raises:
        UserError: If it cannot be read; names file and line.
    """
    source = _source(path)
    return _READERS[source.kind](source)


def _text(source: Source) -> str:
    with Stream(source) as stream:
        data = b"".join(iter(lambda: stream.read(2**22), b""))
    return data.decode("utf-8", "surrogateescape")  # what is no UTF-8 is for the tokenizer to refuse


def _read_csv(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(_text(source), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(
                f"{source}:{line}: not CSV ({error}); a field with a comma, a quote or a line end must stand in quotes"
            ) from error
        if row is None:
            return
        if header is None:
            header = _header(source, row)
        elif row:
            yield line, _fields(source, line, header, row)


def _read_tsv(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    for line, text in enumerate(_text(source).split("\n"), 1):
        row = text.rstrip("\r").split("\t")
        if header is None:
            header = _header(source, row)
        elif row != [""]:
            yield line, _fields(source, line, header, row)


def _header(source: Source, row: list[str]) -> list[str]:
    if twice := sorted({name for name in row if row.count(name) > 1}):
        raise UserError(f"{source}:1: column '{twice[0]}' stands there twice; rename one")
    return row


def _fields(source: Source, line: int, header: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(header):
        raise UserError(f"{source}:{line}: has {len(row)} fields, the header has {len(header)}; correct or remove it")
    return dict(zip(header, row, strict=True))


def _read_json_lines(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(_text(source).split("\n"), 1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source}:{line}: not a JSON object on one line ({error})") from error
        if not isinstance(fields, dict):
            raise UserError(f"{source}:{line}: not a JSON object but {text.strip()[:20]!r}")
        yield line, fields


def _read_parquet(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source.name)
        row = 0
        for batch in file.iter_batches():
            for fields in batch.to_pylist():
                row += 1
                yield row, fields
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source}: not a Parquet file that can be read ({error})") from error


def _read_fasta(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    header, parts, start = "", list[str](), 0
    for line, text in enumerate([*_text(source).splitlines(), ">"], 1):
        if text.startswith(">"):
            if start:
                name = header.split(None, 1)[0] if header.split() else str(start)
                pairs = {key: value.strip('"') for key, value in _PAIR.findall(header)}
                yield start, {**pairs, "id": name, "sequence": "".join(parts)}
            header, parts, start = text[1:], [], line
        elif not start and text.strip():
            raise UserError(f"{source}:{line}: not FASTA: a header line that begins with '>' is expected")
        else:
            parts.append(text.strip())


_READERS = {
    "csv": _read_csv,
    "tsv": _read_tsv,
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
    "fasta": _read_fasta,
}

"""Labelled files to rows: CSV, TSV, JSON lines, Parquet, and FASTA with labels in its headers or in a table beside."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from pretrain.corpus.pieces import ID_COLUMNS, TEXT_COLUMNS, Piece, choose_column, read_whole
from pretrain.corpus.readers import Flaw, parse, parse_fields
from pretrain.corpus.sources import Source, SourceOptions, check_uncompressed, find_sources
from pretrain.errors import UserError

_KINDS = ("csv", "tsv", "jsonl", "parquet", "fasta")
_LABEL = "label"
_OWN = (*ID_COLUMNS, *TEXT_COLUMNS)

_PAIR = re.compile(r'([^\s=]+)=("[^"]*"|\S*)')
"""In a FASTA header, as ``label=nucleus`` or ``label="cell membrane"``."""
PAIR_COLUMNS = tuple(
    (name + one, name + two)
    for name in ("sequence", "seq", "protein", "text", "sentence")
    for one, two in (("_a", "_b"), ("_1", "_2"), ("1", "2"))
)
"""Columns that hold a pair, where there is none for a single sequence; also in upper case."""


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
    """Which columns (JSON fields, FASTA ``key=value`` pairs) hold what; the usual names also in upper case.

    Attributes:
        label: The label; by default ``label``.
        text: The sequence; by default the first of ``text``, ``sequence``, ``seq`` and ``content`` that there is.
        id: The name; by default ``id`` where there is one, else the line.
        split: Which split a row belongs to; by default ``split``, where there is one.
        pair: What the sequence is paired with; by default the second of `PAIR_COLUMNS`, where ``text`` is not given
            and none of its usual names is there.
    """

    label: str | None = None
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
            fields = {**beside[row.id], **fields, **beside[row.id]}  # where its columns are found first, too
        found = _find_columns(columns, tuple(fields))
        if found.label is None or (columns.split and found.split is None):
            missing = columns.label or _LABEL if found.label is None else str(columns.split)
            raise _no_column(path, line, missing, fields, labels)
        split = None if found.split is None else fields[found.split]
        rows.append(row._replace(label=fields[found.label], split=None if split is None else str(split)))
    if not rows:
        raise UserError(f"{path}: holds no row; at least one labelled sequence is needed")
    return rows


def read_pairs(path: str, columns: Columns, kind: str | None = None) -> Iterator[Row]:
    """The pairs of a table, without labels; ``kind`` is what it holds, by default what its name says.

    Raises:
        UserError: If there is no such file or column, or a row cannot be read; names file and line.
    """
    for line, fields in read_fields(path, kind):
        row = _row(path, line, fields, columns)
        if row.second is None:
            raise UserError(
                f"{path}: has one sequence a row, the model takes pairs; name the column of the other (pair_column)"
            )
        yield row


def _row(path: str, line: int, fields: dict[str, Any], columns: Columns) -> Row:
    """What is known of a row without its label."""
    where = f"{path}:{line}"
    found = _find_columns(columns, tuple(fields))
    for wanted, name in ((columns.text, found.text), (columns.pair, found.pair), (columns.id, found.id)):
        if wanted is not None and name is None:
            raise _no_column(path, line, wanted, fields)
    if found.text is None:
        raise _no_column(path, line, "' or '".join(TEXT_COLUMNS), fields)
    if found.text == found.pair:
        raise UserError(f"{path}: '{found.text}' is paired with itself; name both columns: text_column and pair_column")
    name = _name(line, fields, found.id)
    sequence = _sequence(where, name, found.text, fields)
    return Row(where, name, sequence, second=_sequence(where, name, found.pair, fields) if found.pair else None)


@lru_cache
def _find_columns(columns: Columns, names: tuple[str, ...]) -> Columns:
    """What the columns are called among these; None for those that are not there."""
    find = partial(choose_column, names)
    text, pair = find(columns.text, TEXT_COLUMNS), find(columns.pair, ())
    if text is None and columns.text is None and columns.pair is None:
        both = ((find(None, (one,)), find(None, (two,))) for one, two in PAIR_COLUMNS)
        text, pair = next((names for names in both if all(names)), (None, None))
    label, split = find(columns.label, (_LABEL,)), find(columns.split, ("split",))
    return Columns(label, text, find(columns.id, ID_COLUMNS), split, pair)


def _name(line: int, fields: dict[str, Any], column: str | None) -> str:
    given = None if column is None else fields[column]
    return str(line if given is None else given).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _sequence(where: str, name: str, column: str, fields: dict[str, Any]) -> bytes:
    text = fields[column]
    if text is None or text in ("", b""):
        raise UserError(f"{where}: record '{name}' has nothing in '{column}'; fill it in or remove the row")
    if not isinstance(text, str | bytes):
        raise UserError(f"{where}: '{column}' is {text!r}; a sequence is expected there: name another column")
    # What is no UTF-8 is for the tokenizer to refuse.
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _by_id(path: str, columns: Columns) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for line, fields in read_fields(path):
        found = _find_columns(columns, tuple(fields))
        if found.id is None or found.label is None:
            missing = columns.id or ID_COLUMNS[0] if found.id is None else columns.label or _LABEL
            raise _no_column(path, line, missing, fields)
        name = _name(line, fields, found.id)
        if name in rows:
            raise UserError(f"{path}:{line}: '{name}' has a row already; keep one of them")
        rows[name] = {column: fields[column] for column in (found.label, found.split) if column is not None}
    return rows


def _no_column(path: str, line: int, name: str, fields: dict[str, Any], labels: str | None = None) -> UserError:
    headed = find_sources([path], SourceOptions())[0].kind in ("csv", "tsv", "parquet")
    where, beside = path if headed else f"{path}:{line}", f" with {labels}" if labels else ""
    return UserError(
        f"{where}{beside}: no column '{name}'; it has {', '.join(fields)}: name the right one (text_column, "
        "label_column, pair_column, id_column, split_column), or add it"
    )


def read_fields(path: str, kind: str | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line (or row) and named fields of each record of a file; ``kind`` is what it holds, by default as named.

    Raises:
        UserError: If it cannot be read; names file and line.
    """
    found = find_sources([path], SourceOptions(kind))
    if len(found) != 1 or not found[0].is_regular_file or found[0].kind not in _KINDS:
        raise UserError(f"{path}: give one labelled file: {kind or ', '.join(_KINDS)} (compressed or not)")
    if found[0].kind == "parquet":
        yield from _read_parquet(found[0])
        return
    piece = read_whole(found[0])
    if twice := sorted({name for name in piece.columns if piece.columns.count(name) > 1}):
        raise UserError(f"{piece.where(1)}: column '{twice[0]}' stands there twice; rename one")
    for line, fields in _PARSE.get(piece.source.kind, parse_fields)(piece):
        if isinstance(fields, str):
            raise UserError(f"{piece.where(line)}: {fields}")
        yield line, fields


def _parse_fasta(piece: Piece) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Headers as fields, beside the name and the sequence, which no header can replace."""
    piece = piece._replace(data=piece.data.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
    lines = piece.data.split(b"\n")
    for record in parse(piece, SourceOptions()):
        if isinstance(record, Flaw):
            yield record.line, record.reason
            continue
        header = lines[record.line - 1].decode("utf-8", "surrogateescape")
        pairs = {key: value.strip('"') for key, value in _PAIR.findall(header) if key.lower() not in _OWN}
        yield record.line, {"id": record.id, "sequence": record.text.decode("utf-8", "surrogateescape"), **pairs}


def _parse_json_lines(piece: Piece) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for line, fields in parse_fields(piece):
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            fields = f"holds half a surrogate pair ({error}); valid Unicode is needed"
        yield line, fields


_PARSE = {"fasta": _parse_fasta, "jsonl": _parse_json_lines}


def _read_parquet(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(source.name).iter_batches()
        yield from enumerate((fields for batch in batches for fields in batch.to_pylist()), 1)
    except (pa.ArrowException, OSError) as error:
        check_uncompressed(source)
        raise UserError(f"{source}: not a Parquet file that can be read ({error})") from error

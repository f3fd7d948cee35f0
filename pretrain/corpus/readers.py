"""Pieces to records: what is in FASTA, text, JSON lines, CSV, TSV and tables."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pretrain.corpus.pieces import ID_COLUMNS, TEXT_COLUMNS, Piece, choose_column, cut, find_column, not_csv
from pretrain.corpus.sources import Source, SourceOptions, find_sources
from pretrain.errors import UserError


class Record(NamedTuple):
    """One sequence as read from a source.

    Attributes:
        id: Its name: the FASTA header's first word, the id column, the file's name where it is one document, or else
            the number of its line or row.
        text: The sequence or document, as bytes.
        line: The line where it begins (of a table, its row), from 1.
    """

    id: str
    text: bytes
    line: int


class Flaw(NamedTuple):
    """A record that cannot be read: where it begins (0 for the whole source), and what is wrong and to do."""

    line: int
    reason: str


def read_records(name: str | Path, options: SourceOptions | None = None) -> Iterator[Record]:
    """The records of a source (a file, a pattern, a URL, ...), in order; in memory is a piece at a time.

    Raises:
        UserError: If the source is missing, empty, truncated or not what its name says; names file and line.
    """
    options = options or SourceOptions()
    for _, record in read_located(find_sources([name], options), options):
        yield record


def read_located(sources: Sequence[Source], options: SourceOptions) -> Iterator[tuple[str, Record]]:
    """As `read_records`, of several sources; beside each record what a message about it begins with: place and name."""
    for source in sources:
        for piece in cut(source, options):
            for item in parse(piece, options):
                where = piece.where(item.line)
                if isinstance(item, Flaw):
                    raise UserError(f"{where}: {item.reason}")
                yield f"{where}: record '{item.id}'", item


def parse(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    """The records of a piece, one at a time; what is no record is a `Flaw`, and the rest goes on behind it."""
    if not piece.data:
        yield Flaw(0, "is empty; at least one sequence is needed")
    elif piece.source.kind == "txt":
        yield from _PARSE_TEXT[options.document](piece, options)
    else:
        yield from _PARSE[piece.source.kind](piece, options)


def parse_fields(piece: Piece) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line and all fields of each JSON object or row of CSV or TSV, or what is wrong with it.

    What is no UTF-8 stands as surrogate escapes in fields of CSV and TSV.
    """
    if piece.source.kind == "jsonl":
        yield from _json_objects(piece)
        return
    for line, row in _rows(piece):
        if isinstance(row, str):
            yield line, row
        else:
            fields = (field.decode("utf-8", "surrogateescape") for field in row)
            yield line, dict(zip(piece.columns, fields, strict=True))


def _parse_fasta(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    data = piece.data
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    before, *entries = (b"\n" + data).split(b"\n>")
    for line, text in enumerate(before.split(b"\n")[1:], piece.line):
        if text.strip():
            shown = text.strip()[:20].decode("utf-8", "replace")
            yield Flaw(line, f"not FASTA: a header line that begins with '>' is expected, found {shown!r}")
            break
    line = piece.line + before.count(b"\n")
    for entry in entries:
        header, first_end, body = entry.partition(b"\n")
        words = header.split(None, 1)
        name = words[0].decode("utf-8", "replace") if words else ""
        sequence = b"".join(body.split())
        line_ends = body.count(b"\n")
        if len(sequence) + line_ends < len(body):  # a space within a line is no residue, and must not vanish
            sequence = b"".join(part.strip() for part in body.split(b"\n"))
        if sequence:
            yield Record(name, sequence, line)
        else:
            yield Flaw(line, f"record '{name}' has no sequence; remove its header or add the sequence")
        line += 1 + len(first_end) + line_ends


def _parse_lines(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    for line, raw in enumerate(io.BytesIO(piece.data), piece.line):
        if text := raw.strip():
            yield Record(str(line), text, line)


def _parse_paragraphs(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    parts, start = list[bytes](), 0
    for line, raw in enumerate(io.BytesIO(piece.data + b"\n\n"), piece.line):
        if text := raw.strip():
            start = start if parts else line
            parts.append(text)
        elif parts:
            yield Record(str(start), b"\n".join(parts), start)
            parts.clear()


def _parse_file(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    if text := piece.data.strip():
        name = Path(piece.source.name).name.encode("utf-8", "surrogateescape")  # a file's name may be any bytes
        yield Record(name.decode("utf-8", "replace"), text, 1)


def _json_objects(piece: Piece) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for line, raw in enumerate(io.BytesIO(piece.data), piece.line):
        if not raw.strip():
            continue
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError) as error:
            yield line, f"not a JSON object on one line ({error})"
            continue
        yield line, fields if isinstance(fields, dict) else 'not a JSON object, such as {"text": "..."}'


def _parse_json_lines(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    expected = options.text_column or "' or '".join(TEXT_COLUMNS)
    for line, fields in _json_objects(piece):
        if isinstance(fields, str):
            yield Flaw(line, fields)
            continue
        text_field, id_field = _json_columns(options, tuple(fields))
        text = None if text_field is None else fields[text_field]
        if not isinstance(text, str) or not text:
            yield Flaw(line, f"an object with a non-empty string '{expected}' is expected")
            continue
        given = None if id_field is None else fields[id_field]
        if options.id_column and given is None:
            yield Flaw(line, f"an object with '{options.id_column}' is expected")
            continue
        name = str(line if given is None else given)
        try:
            name.encode()
            record = Record(name, text.encode(), line)
        except UnicodeEncodeError as error:
            yield Flaw(line, f"the id or the text holds half a surrogate pair ({error}); valid Unicode is needed")
            continue
        yield record


@lru_cache
def _json_columns(options: SourceOptions, names: tuple[str, ...]) -> tuple[str | None, str | None]:
    """Which of an object's fields are its text and its id."""
    text = choose_column(names, options.text_column, TEXT_COLUMNS)
    return text, choose_column(names, options.id_column, ID_COLUMNS)


def _csv_rows(piece: Piece) -> Iterator[tuple[int, list[bytes] | str]]:
    # What is no UTF-8 goes through unchanged: whether it is allowed is for the tokenizer to say.
    lines = csv.reader(io.StringIO(piece.data.decode("utf-8", "surrogateescape"), newline=""), strict=True)
    while True:
        line = piece.line + lines.line_num
        try:
            row = next(lines, None)
        except csv.Error as error:
            yield line, not_csv(error)
            continue
        if row is None:
            return
        yield line, [field.encode("utf-8", "surrogateescape") for field in row]


def _tsv_rows(piece: Piece) -> Iterator[tuple[int, list[bytes] | str]]:
    for line, raw in enumerate(io.BytesIO(piece.data), piece.line):
        yield line, raw.rstrip(b"\r\n").split(b"\t")


def _rows(piece: Piece) -> Iterator[tuple[int, list[bytes] | str]]:
    """The rows that are not empty, each with its line, as fields or as what is wrong with it."""
    for line, row in (_csv_rows if piece.source.kind == "csv" else _tsv_rows)(piece):
        if isinstance(row, str) or len(row) == len(piece.columns):
            yield line, row
        elif row not in ([], [b""]):
            yield line, f"has {len(row)} fields, the header has {len(piece.columns)}; correct or remove it"


def _parse_rows(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    text_column = find_column(piece.source, piece.columns, options.text_column, TEXT_COLUMNS) or ""
    id_column = find_column(piece.source, piece.columns, options.id_column, ID_COLUMNS)
    text_place = piece.columns.index(text_column)
    id_place = piece.columns.index(id_column) if id_column else None
    for line, row in _rows(piece):
        if isinstance(row, str):
            yield Flaw(line, row)
            continue
        name = str(line) if id_place is None else row[id_place].decode("utf-8", "replace")
        if text := row[text_place]:
            yield Record(name, text, line)
        else:
            yield Flaw(line, f"record '{name}' has nothing in '{text_column}'; fill it in or remove the row")


def _parse_table(piece: Piece, options: SourceOptions) -> Iterator[Record | Flaw]:
    first = piece.line
    for batch in pa.ipc.open_stream(piece.data):
        texts = batch.column("text").to_pylist()
        names = batch.column("id").to_pylist() if "id" in batch.schema.names else [None] * len(texts)
        for row, (given, text) in enumerate(zip(names, texts, strict=True), first):
            name = str(row) if given is None else given
            if text:
                yield Record(name, text, row)
            else:
                yield Flaw(row, f"record '{name}' has no text; fill it in or remove the row")
        first += len(texts)


_Parser = Callable[[Piece, SourceOptions], Iterator[Record | Flaw]]
_PARSE_TEXT: dict[str, _Parser] = {"line": _parse_lines, "paragraph": _parse_paragraphs, "file": _parse_file}
_PARSE: dict[str, _Parser] = {
    "fasta": _parse_fasta,
    "jsonl": _parse_json_lines,
    "csv": _parse_rows,
    "tsv": _parse_rows,
    "parquet": _parse_table,
    "arrow": _parse_table,
    "hub": _parse_table,
}

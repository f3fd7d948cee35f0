"""Sources to pieces: cut in order and cheaply, each piece a few megabytes that begin and end with a record.

Parsing a piece is then a pure function (`readers`), so any process may do it. Where a source is cut depends on its
content only.
"""

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.corpus.sources import Source, SourceOptions, Stream, check_uncompressed, open_hub, open_raw
from pretrain.errors import UserError, one_line

PIECE_BYTES = 2**24
"""A piece is cut when a source has given this many bytes, at the last record that ends in them."""

MAX_RECORD_BYTES = 2**26
"""A longer record may be refused: such a line is damage, or a bomb."""

csv.field_size_limit(2**31 - 1)  # MAX_RECORD_BYTES is the limit

TEXT_COLUMNS = ("text", "sequence", "seq", "content")
ID_COLUMNS = ("id",)
_ROWS = 256


class Piece(NamedTuple):
    """Whole records of a source, unparsed.

    Attributes:
        source: Where they are from.
        data: Bytes of the source; of a table, an Arrow stream with its two columns. Empty says that the source is.
        line: The number of the first line or row.
        columns: Of CSV and TSV, the header.
        position: Bytes of the source read up to here, for a progress bar.
    """

    source: Source
    data: bytes
    line: int
    columns: tuple[str, ...]
    position: int

    def where(self, line: int) -> str:
        """A place in the source, as messages name it."""
        return f"{self.source}:{line}" if line else str(self.source)


def cut(source: Source, options: SourceOptions) -> Iterator[Piece]:
    """A source's pieces, in order, read once from begin to end.

    Raises:
        UserError: If the source cannot be read or decompressed, lacks a column, or has a record without end.
    """
    cutter = _cut_table if source.kind in _TABLES else _cut_bytes
    empty = True
    for piece in cutter(source, options):
        empty = empty and piece.data.isspace()
        yield piece
    if empty:
        yield Piece(source, b"", 0, (), 0)


def read_whole(source: Source) -> Piece:
    """All of a file as one piece, whatever its columns; of tables only CSV and TSV.

    Raises:
        UserError: If it cannot be read or decompressed.
    """
    with Stream(source) as stream:
        columns, line = _header(source, stream) if source.kind in ("csv", "tsv") else ((), 1)
        return Piece(source, stream.read(sys.maxsize), line, columns, stream.position)


def _cut_bytes(source: Source, options: SourceOptions) -> Iterator[Piece]:
    last_end = _LAST_END[options.document if source.kind == "txt" else source.kind]
    with Stream(source) as stream:
        line, columns = 1, tuple[str, ...]()
        if source.kind in ("csv", "tsv"):
            columns, line = _header(source, stream)
            if not "".join(columns).strip() and not stream.peek(1):
                return
            find_column(source, columns, options.text_column, TEXT_COLUMNS)  # a wrong name shows at once
        data, wanted = b"", PIECE_BYTES
        while True:
            data += stream.read(wanted - len(data))
            ended = len(data) < wanted
            end = len(data) if ended else last_end(data)
            if end:
                yield Piece(source, data[:end], line, columns, stream.position)
                line += data.count(b"\n", 0, end)
                if source.kind in ("fasta", "csv"):  # where a lone carriage return ends a line, too
                    line += data.count(b"\r", 0, end) - data.count(b"\r\n", 0, end)
                data = data[end:]
            elif len(data) > MAX_RECORD_BYTES:
                raise UserError(
                    f"{source}:{line}: here begins a record of more than {MAX_RECORD_BYTES:,} bytes; split it, or "
                    "check that the source is what its name or --kind says"
                )
            if ended:
                return
            wanted = len(data) + PIECE_BYTES if end else 2 * len(data)


def _last_fasta_end(data: bytes) -> int:
    return data.rfind(b"\n>") + 1


def _last_line_end(data: bytes) -> int:
    return data.rfind(b"\n") + 1


def _last_paragraph_end(data: bytes) -> int:
    end = data.rfind(b"\n") + 1
    while begin := data.rfind(b"\n", 0, end - 1) + 1:
        if data[begin:end].isspace():
            return end
        end = begin
    return 0


def _no_end(data: bytes) -> int:
    return 0


def _last_csv_end(data: bytes) -> int:
    end = data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, -1) + 1  # one at the end may be half of a line end
    if data.find(b'"', 0, end) < 0:
        return end
    # Only the parser's own reader knows what a quote means, where it opens a field and where it is a mistake.
    consumed, ended = 0, False

    def lines() -> Iterator[str]:
        nonlocal consumed, ended
        for line in io.StringIO(data[:end].decode("latin-1"), newline=""):
            consumed += len(line)
            yield line
        ended = True

    rows, last = csv.reader(lines(), strict=True), 0
    while not ended:
        with contextlib.suppress(csv.Error):  # it goes on behind the line with the mistake, as the parser does
            next(rows, None)
        last = last if ended else consumed
    return last


_LAST_END: dict[str, Callable[[bytes], int]] = {
    "fasta": _last_fasta_end,
    "line": _last_line_end,
    "paragraph": _last_paragraph_end,
    "file": _no_end,
    "jsonl": _last_line_end,
    "csv": _last_csv_end,
    "tsv": _last_line_end,
}


def _header(source: Source, stream: Stream) -> tuple[tuple[str, ...], int]:
    """The names of the columns, which must end within a million bytes, and the number of the line behind them."""
    head = stream.peek(2**20)
    if source.kind == "tsv":
        row, end, _ = head.partition(b"\n")
        stream.read(len(row + end))
        return tuple(row.removesuffix(b"\r").decode("utf-8", "replace").split("\t")), 2
    lines = io.StringIO(head.decode("latin-1"), newline="")
    rows = csv.reader(lines, strict=True)
    try:
        names = next(rows, [])
    except csv.Error as error:
        raise UserError(f"{source}:1: the header is {not_csv(error)}") from error
    stream.read(lines.tell())
    return tuple(name.encode("latin-1").decode("utf-8", "replace") for name in names), 1 + rows.line_num


def not_csv(error: csv.Error) -> str:
    """What is said of lines that are no row."""
    return f"not CSV ({error}); a field with a comma, a quote or a line end must stand in quotes"


def find_column(source: Source, columns: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """As `choose_column`; an error where there is none that is needed."""
    shown = ", ".join(repr(column) for column in columns[:20]) + (", ..." if len(columns) > 20 else "")
    found = choose_column(columns, wanted, usual)
    if found is None and wanted is not None:
        raise UserError(f"{source}: no column '{wanted}'; its columns are {shown}")
    if found is None and usual is TEXT_COLUMNS:
        raise UserError(
            f"{source}: no column {' or '.join(usual)}; its columns are {shown}; rename one to text, or name it, as in "
            "`pretrain prepare --text_column NAME`"
        )
    return found


def choose_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str]) -> str | None:
    """The column wanted, or else the first usual one, in upper or lower case; None where it is not there.

    Of columns that differ in this only, it is the one that is spelt as usual, or the first.
    """
    if wanted is not None:
        return wanted if wanted in columns else None
    by_lower = {column.lower(): column for column in reversed(columns)} | {column: column for column in columns}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def _cut_table(source: Source, options: SourceOptions) -> Iterator[Piece]:
    first = row = 1
    waiting: list[pa.RecordBatch] = []
    size = position = 0

    try:
        for table, position in _TABLES[source.kind](source, options):
            for start in range(0, table.num_rows, _ROWS):
                waiting.append(_two_columns(source, table.slice(start, _ROWS), options))
                row += waiting[-1].num_rows
                size += waiting[-1].nbytes
                if size >= PIECE_BYTES:
                    yield Piece(source, _serialise(waiting), first, (), position)
                    waiting.clear()
                    first, size = row, 0
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        check_uncompressed(source)
        said = one_line(error, 200)
        raise UserError(f"{source}: damaged {source.kind} data ({said}); fetch or write the file again") from error
    if waiting:
        yield Piece(source, _serialise(waiting), first, (), position)


def _serialise(batches: list[pa.RecordBatch]) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def _two_columns(source: Source, table: Any, options: SourceOptions) -> pa.RecordBatch:
    names = table.schema.names
    text = find_column(source, names, options.text_column, TEXT_COLUMNS)
    name = find_column(source, names, options.id_column, ID_COLUMNS)
    columns = {}
    for label, column, target in (("text", text, pa.large_binary()), ("id", name, pa.large_string())):
        if column is None:
            continue
        values = table.column(column)
        plain = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
        fits = pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)
        fits = fits or (pa.types.is_binary(plain) or pa.types.is_large_binary(plain) if label == "text" else False)
        if not fits and not (label == "id" and pa.types.is_integer(plain)):
            allowed = "strings" if label == "text" else "strings or integers"
            raise UserError(f"{source}: column '{column}' holds {values.type}; {allowed} are needed; name another")
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        columns[label] = values.cast(plain).cast(target)
    return pa.record_batch(columns)


def _parquet_tables(source: Source, options: SourceOptions) -> Iterator[tuple[Any, int]]:
    with open_raw(source) as file:
        if not file.seekable():
            raise UserError(f"{source}: Parquet cannot be read from a pipe; give a file")
        size = file.seek(0, io.SEEK_END)
        if not size:
            return
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        text = find_column(source, names, options.text_column, TEXT_COLUMNS)
        name = find_column(source, names, options.id_column, ID_COLUMNS)
        rows = 0
        for batch in parquet.iter_batches(_ROWS, columns=[column for column in (text, name) if column is not None]):
            rows += batch.num_rows
            yield batch, size * rows // parquet.metadata.num_rows


def _arrow_tables(source: Source, options: SourceOptions) -> Iterator[tuple[Any, int]]:
    with Stream(source) as stream:
        head = stream.peek(8)
        if not head:
            return
        mapped = source.is_regular_file and not stream.compression  # a batch may be larger than memory
        file = pa.memory_map(source.name) if mapped else pa.PythonFile(stream, mode="r")
        if head.startswith(b"ARROW1"):  # the file format is the stream format behind eight bytes
            file.read(8)
        for batch in pa.ipc.open_stream(file):
            yield batch, file.tell() if mapped else stream.position


def _hub_tables(source: Source, options: SourceOptions) -> Iterator[tuple[Any, int]]:
    rows = open_hub(source).with_format("arrow").iter(batch_size=_ROWS)
    while True:
        try:
            table = next(rows, None)
        except Exception as error:  # `datasets` and what it reads with have exceptions of their own
            said = one_line(error, 200)
            raise UserError(f"{source}: cannot be read ({said}); try again") from error
        if table is None:
            return
        yield table, 0


_TABLES: dict[str, Callable[[Source, SourceOptions], Iterator[tuple[Any, int]]]] = {
    "parquet": _parquet_tables,
    "arrow": _arrow_tables,
    "hub": _hub_tables,
}

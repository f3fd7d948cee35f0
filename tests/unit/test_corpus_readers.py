"""Readers: what is written in any format is what is read, wherever it is cut."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pretrain.corpus import pieces
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.readers import Flaw, Record, parse, read_records
from pretrain.corpus.sources import Source, SourceOptions
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.errors import UserError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: bytes(pa.compress(content, codec="zstd", asbytes=True)),
}


def written(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return path


def read(name: str, content: bytes, **options: str) -> list[Record]:
    with tempfile.TemporaryDirectory() as directory:
        return list(read_records(written(Path(directory), name, content), SourceOptions(**options)))


@contextlib.contextmanager
def cut_at(size: int) -> Iterator[None]:
    """Cut sources into pieces of so many bytes."""
    with patch.object(pieces, "PIECE_BYTES", size):
        yield


# --- what is written is what is read ----------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=10)
line_ends = st.sampled_from([b"\n", b"\r\n"])
gz = st.sampled_from(sorted(COMPRESS))
sizes = st.integers(1, 300)
fields = st.text(st.characters(codec="utf-8", exclude_characters="\r")) | st.text('a",\n')
residues = st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=50)


@given(
    records=st.lists(st.tuples(words, words, residues), min_size=1, max_size=5),
    suffix=st.sampled_from([".fasta", ".fa", ".faa", ".fas", ".FASTA"]),
    gz=gz,
    width=st.integers(1, 60),
    end=line_ends,
    blank=st.integers(0, 2),
    last_end=st.booleans(),
    size=sizes,
)
def test_fasta_written_is_fasta_read(
    records: list[tuple[str, str, str]],
    suffix: str,
    gz: str,
    width: int,
    end: bytes,
    blank: int,
    last_end: bool,
    size: int,
) -> None:
    lines, expected = [], []
    for name, description, sequence in records:
        lines += [b""] * blank
        expected.append(Record(name, sequence.encode(), len(lines) + 1))
        lines += [f">{name} {description}".encode()]
        lines += [sequence[first : first + width].encode() for first in range(0, len(sequence), width)]
    with cut_at(size):
        assert read(f"x{suffix}{gz}", end.join(lines) + (end if last_end else b"")) == expected


@given(
    records=st.lists(st.tuples(words, st.text(min_size=1, max_size=30)), min_size=1, max_size=5),
    suffix=st.sampled_from([".jsonl", ".ndjson", ".JSONL"]),
    gz=gz,
    end=line_ends,
    blank=st.booleans(),
    ascii_only=st.booleans(),
    size=sizes,
)
def test_json_lines_written_are_json_lines_read(
    records: list[tuple[str, str]], suffix: str, gz: str, end: bytes, blank: bool, ascii_only: bool, size: int
) -> None:
    lines, expected = [], []
    for name, text in records:
        lines += [b""] * blank
        expected.append(Record(name, text.encode(), len(lines) + 1))
        lines.append(json.dumps({"id": name, "text": text, "more": [1]}, ensure_ascii=ascii_only).encode())
    with cut_at(size):
        assert read(f"x{suffix}{gz}", end.join(lines) + end) == expected


@given(documents=st.lists(words, min_size=1, max_size=5), gz=gz, end=line_ends, blank=st.integers(0, 2), size=sizes)
def test_text_written_is_text_read(documents: list[str], gz: str, end: bytes, blank: int, size: int) -> None:
    lines = [line for document in documents for line in [b""] * blank + [f"  {document} {document}".encode()]]
    expected = [Record(str(n), line.strip(), n) for n, line in enumerate(lines, 1) if line]
    with cut_at(size):
        assert read(f"x.txt{gz}", end.join(lines)) == expected


@given(
    documents=st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=5),
    end=line_ends,
    blank=st.lists(st.sampled_from([b"", b" ", b"\t "]), min_size=1, max_size=3),
    size=sizes,
)
def test_paragraphs_written_are_paragraphs_read(
    documents: list[list[str]], end: bytes, blank: list[bytes], size: int
) -> None:
    lines, expected = [], []
    for document in documents:
        lines += blank
        text = [line.encode() for line in document]
        expected.append(Record(str(len(lines) + 1), b"\n".join(text), len(lines) + 1))
        lines += text
    with cut_at(size):
        assert read("x.txt", end.join(lines) + end, document="paragraph") == expected


@given(
    rows=st.lists(st.tuples(fields, fields.filter(bool)), min_size=1, max_size=8),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    gz=gz,
    size=sizes,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@example(rows=[("1", 'one\ntwo ""three\nfour\nfive')], end="\n", gz="", size=30, quoting=csv.QUOTE_MINIMAL)
def test_csv_written_is_csv_read(rows: list[tuple[str, str]], end: str, gz: str, size: int, quoting: int) -> None:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator=end, quoting=quoting)
    writer.writerows([("id", "score", "text"), *((name, 0.5, text) for name, text in rows)])
    with cut_at(size):
        found = read(f"x.csv{gz}", sink.getvalue().encode())
    assert [(record.id, record.text.decode()) for record in found] == rows


@given(body=st.text('a",\r\n'), end=st.sampled_from(["\n", "\r\n", "\r"]), size=sizes)
@example(body='a"a\n"a\na\na\n', end="\n", size=5)
def test_any_csv_gives_the_same_rows_and_mistakes_wherever_it_is_cut(body: str, end: str, size: int) -> None:
    options = SourceOptions(text_column="text")
    with tempfile.TemporaryDirectory() as directory:
        source = Source(str(written(Path(directory), "x.csv", f"text,other{end}{body}".encode())), "csv")
        whole = [item for piece in pieces.cut(source, options) for item in parse(piece, options)]
        with cut_at(size):
            parts = [item for piece in pieces.cut(source, options) for item in parse(piece, options)]
    assert parts == whole


@given(rows=st.lists(st.tuples(words, words), min_size=1, max_size=8), end=line_ends, size=sizes)
def test_tsv_written_is_tsv_read(rows: list[tuple[str, str]], end: bytes, size: int) -> None:
    """A quote is a character like any other."""
    lines = [b"Sequence\tlength\tID", *(f"{text}\t3\t{name}".encode() for name, text in rows)]
    expected = [Record(name, text.encode(), line) for line, (name, text) in enumerate(rows, 2)]
    with cut_at(size):
        assert read("x.tsv", end.join(lines)) == expected


@given(
    rows=st.lists(st.tuples(st.text(), st.text(min_size=1)), min_size=1, max_size=8),
    kind=st.sampled_from(["x.parquet", "x.arrow", "x.arrow.gz", "file.arrow"]),
    categories=st.booleans(),
    binary=st.booleans(),
    batch=st.integers(1, 5),
    size=sizes,
)
def test_tables_written_are_tables_read(
    rows: list[tuple[str, str]], kind: str, categories: bool, binary: bool, batch: int, size: int
) -> None:
    rows = [tuple(field.encode("utf-8", "replace").decode() for field in row) for row in rows]
    names, texts = map(list, zip(*rows, strict=True))
    column = pa.array([text.encode() for text in texts]) if binary else pa.array(texts)
    table = pa.table({"id": names, "text": column.dictionary_encode() if categories else column, "n": range(len(rows))})
    sink = io.BytesIO()
    if kind == "x.parquet":
        pq.write_table(table, sink, row_group_size=batch)
    else:
        new = pa.ipc.new_file if kind == "file.arrow" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
    with cut_at(size), patch.object(pieces, "_ROWS", 2):
        expected = [Record(name, text.encode(), row) for row, (name, text) in enumerate(rows, 1)]
        assert read(kind, sink.getvalue()) == expected


def slow_fasta(content: bytes) -> list[Record | Flaw]:
    """Line by line, with nothing clever."""
    found: list[Record | Flaw] = []
    entries: list[tuple[int, bytes, list[bytes]]] = []
    strange = False
    for number, line in enumerate(re.split(rb"\r\n|\r|\n", content), 1):
        if line.startswith(b">"):
            entries.append((number, line[1:], []))
        elif entries:
            entries[-1][2].append(line.strip())
        elif line.strip() and not strange:
            strange = True
            shown = line.strip()[:20].decode("utf-8", "replace")
            found.append(Flaw(number, f"not FASTA: a header line that begins with '>' is expected, found {shown!r}"))
    for number, header, lines in entries:
        name = header.split()[0].decode("utf-8", "replace") if header.split() else ""
        if sequence := b"".join(lines):
            found.append(Record(name, sequence, number))
        else:
            found.append(Flaw(number, f"record '{name}' has no sequence; remove its header or add the sequence"))
    return found or [Flaw(0, "is empty; at least one sequence is needed")]


fragments = st.sampled_from(
    [b">", b"\n", b"\r\n", b"\r", b" ", b"\t", b"\0", b"MKLA", b"a b", b"\xff", b"\x0b", b"\x85"]
)


@given(content=st.binary() | st.lists(fragments, max_size=60).map(b"".join), size=sizes)
@example(content=b">a\nM\n\r\n>b\nK", size=5)
@example(content=b"\n\n>", size=1)
@example(content=b"\r>a\rMK\r>b", size=3)
def test_any_bytes_as_fasta_are_read_as_a_slow_and_obvious_reader_reads_them(content: bytes, size: int) -> None:
    if content.startswith((b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return  # no FASTA, or packed
    options = SourceOptions()
    with tempfile.TemporaryDirectory() as directory, cut_at(size):
        source = Source(str(written(Path(directory), "x.fasta", content)), "fasta")
        found = [item for piece in pieces.cut(source, options) for item in parse(piece, options)]
    assert found == slow_fasta(content)


def test_a_json_record_without_an_id_is_named_by_its_line() -> None:
    assert read("x.jsonl", b'\n{"text": "a"}\n{"id": 7, "text": "b"}') == [Record("2", b"a", 2), Record("7", b"b", 3)]


def test_a_fasta_header_may_lack_a_name_and_names_may_repeat() -> None:
    assert [record.id for record in read("x.fasta", b">\nMK\n>a\nMK\n>a b\nMK\n")] == ["", "a", "a"]


def test_lower_case_gaps_stops_and_rare_letters_of_fasta_become_tokens(tmp_path: Path) -> None:
    corpus = prepare(
        [written(tmp_path, "x.fasta", b">a\nmk-.\nBJOUXZ*\n")], tmp_path / "corpus", Settings(ProteinTokenizer())
    )
    assert "".join(corpus.tokenizer.tokens[i] for i in corpus.tokens(0)) == "<cls>MK-.BXOUXZ<eos>"


def test_a_byte_order_mark_is_no_content() -> None:
    mark = b"\xef\xbb\xbf"
    assert read("x.fasta", mark + b">a\nMK\n") == [Record("a", b"MK", 1)]
    assert read("x.csv", mark + b"text,id\nMK,a\n") == [Record("a", b"MK", 2)]


def test_a_whole_file_is_one_document_named_by_the_file() -> None:
    assert read("x.txt.gz", b"\none\n\ntwo\n", document="file") == [Record("x.txt.gz", b"one\n\ntwo", 1)]


def test_columns_have_the_names_that_are_given() -> None:
    names = {"text_column": "body", "id_column": "key"}
    assert read("x.csv", b"key,text,body,id\na,no,MK,no\n", **names) == [Record("a", b"MK", 2)]
    assert read("x.jsonl", b'{"key": "a", "text": "no", "body": "MK", "id": 0}', **names) == [Record("a", b"MK", 1)]
    assert read("x.jsonl", b'{"Text": "MK"}', text_column="Text") == [Record("1", b"MK", 1)]
    assert read("x.jsonl", b'{"ID": 7, "TEXT": "MK", "id": "a", "text": "LA"}') == [Record("a", b"LA", 1)]
    assert read("x.csv", b"ID,TEXT,id,text\n7,MK,a,LA\n") == [Record("a", b"LA", 2)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": ["a"], "text": ["no"], "body": ["MK"], "id": [0]}), sink)
    assert read("x.parquet", sink.getvalue(), **names) == [Record("a", b"MK", 1)]


def test_rows_without_an_id_are_named_by_their_number() -> None:
    assert [record.id for record in read("x.tsv", b"seq\nMK\nLA\n")] == ["2", "3"]
    sink = io.BytesIO()
    pq.write_table(pa.table({"id": [7, None], "content": ["MK", "LA"]}), sink)
    assert [record.id for record in read("x.parquet", sink.getvalue())] == ["7", "2"]


def test_gzip_is_known_by_its_content_and_may_have_several_members(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    plain = tmp_path / "y.txt.gz"  # unpacked on the way, but not renamed
    plain.write_bytes(b"one\ntwo\n")
    assert list(read_records(path)) == list(read_records(plain)) == [Record("1", b"one", 1), Record("2", b"two", 2)]


def test_records_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A mistake far behind does not keep the records before it from being read."""
    records = read_records(written(tmp_path, "x.fasta", b">a\nMK\n>b\n"))
    assert next(records) == Record("a", b"MK", 1)
    with pytest.raises(UserError):
        next(records)


def test_a_paragraph_is_cut_off_where_it_ends(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", b"a\nb\n \t\n" * 100)
    with cut_at(20), patch.object(pieces, "MAX_RECORD_BYTES", 40):
        found = list(read_records(path, SourceOptions(document="paragraph")))
    assert found == [Record(str(line), b"a\nb", line) for line in range(1, 300, 3)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_header_of_csv_may_have_several_lines(end: str) -> None:
    content = f'id,"the\nname","text"{end}a,"b\nc",MK{end}d,e,LA{end}'.encode()
    with cut_at(10):
        assert read("x.csv", content) == [Record("a", b"MK", 3), Record("d", b"LA", 5)]


def test_a_source_is_not_read_ahead_of_its_records(tmp_path: Path) -> None:
    content = b">a\nMK\n" * 100
    with cut_at(8):
        stream = pieces.cut(Source(str(written(tmp_path, "x.fasta", content)), "fasta"), SourceOptions())
        assert next(stream).position < 30


# --- where sources are ------------------------------------------------------------------------------------------------

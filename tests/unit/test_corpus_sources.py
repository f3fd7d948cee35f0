"""Sources: files to records. What is wrong with a file is told in one line that names it."""

import gzip
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.prepare import prepare, train_tokenizer_file
from pretrain.corpus.sources import Record, read_records
from pretrain.corpus.tokenizer import ProteinTokenizer, Tokenizer, train_tokenizer
from pretrain.errors import UserError

ESM, TEXT = ProteinTokenizer(), train_tokenizer([], 261)


def written(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def read(name: str, content: bytes) -> list[Record]:
    with tempfile.TemporaryDirectory() as directory:
        return list(read_records(written(Path(directory), name, content)))


# --- what is written is what is read ----------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=["Z", "C"]), min_size=1, max_size=10)
line_ends = st.sampled_from([b"\n", b"\r\n"])
gz = st.sampled_from(["", ".gz"])
residues = st.text("ACDEFGHIKLMNPQRSTVWY", min_size=1, max_size=50)


@given(
    records=st.lists(st.tuples(words, words, residues), min_size=1, max_size=5),
    suffix=st.sampled_from([".fasta", ".fa", ".faa", ".fas", ".FASTA"]),
    gz=gz,
    width=st.integers(1, 60),
    end=line_ends,
    blank=st.integers(0, 2),
    last_end=st.booleans(),
)
def test_fasta_written_is_fasta_read(
    records: list[tuple[str, str, str]], suffix: str, gz: str, width: int, end: bytes, blank: int, last_end: bool
) -> None:
    lines, expected = [], []
    for name, description, sequence in records:
        lines += [b""] * blank
        expected.append(Record(name, sequence.encode(), len(lines) + 1))
        lines += [f">{name} {description}".encode()]
        lines += [sequence[first : first + width].encode() for first in range(0, len(sequence), width)]
    assert read(f"x{suffix}{gz}", end.join(lines) + (end if last_end else b"")) == expected


@given(
    records=st.lists(st.tuples(words, st.text(min_size=1, max_size=30)), min_size=1, max_size=5),
    suffix=st.sampled_from([".jsonl", ".ndjson", ".JSONL"]),
    gz=gz,
    end=line_ends,
    blank=st.booleans(),
    ascii_only=st.booleans(),
)
def test_json_lines_written_are_json_lines_read(
    records: list[tuple[str, str]], suffix: str, gz: str, end: bytes, blank: bool, ascii_only: bool
) -> None:
    lines, expected = [], []
    for name, text in records:
        lines += [b""] * blank
        expected.append(Record(name, text.encode(), len(lines) + 1))
        lines.append(json.dumps({"id": name, "text": text, "more": [1]}, ensure_ascii=ascii_only).encode())
    assert read(f"x{suffix}{gz}", end.join(lines) + end) == expected


@given(documents=st.lists(words, min_size=1, max_size=5), gz=gz, end=line_ends, blank=st.integers(0, 2))
def test_text_written_is_text_read(documents: list[str], gz: str, end: bytes, blank: int) -> None:
    lines = [line for document in documents for line in [b""] * blank + [f"  {document} {document}".encode()]]
    expected = [Record(str(n), line.strip(), n) for n, line in enumerate(lines, 1) if line]
    assert read(f"x.txt{gz}", end.join(lines)) == expected


def test_a_json_record_without_an_id_is_named_by_its_line() -> None:
    assert read("x.jsonl", b'\n{"text": "a"}\n{"id": 7, "text": "b"}') == [Record("2", b"a", 2), Record("7", b"b", 3)]


def test_a_fasta_header_may_lack_a_name_and_names_may_repeat() -> None:
    assert [record.id for record in read("x.fasta", b">\nMK\n>a\nMK\n>a b\nMK\n")] == ["", "a", "a"]


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


# --- what is wrong with a file ----------------------------------------------------------------------------------------

NO_FASTA = "not FASTA: a header line that begins with '>' is expected, found"
NO_TEXT = "an object with a non-empty string 'text' is expected"
PROTEINS = "allowed: the letters A-Z, '-' and '.'; correct or remove it"
KINDS = (
    "unknown kind of file; the name must end in .fasta, .fa, .faa, .fas (sequences), .jsonl (objects with a 'text') or "
    ".txt (one document a line), with or without .gz"
)
PACKED = gzip.compress(b"one\ntwo\n" + bytes(range(14, 256)) * 10)

MISTAKES: dict[str, tuple[Tokenizer, str, bytes | None, str]] = {
    "missing": (
        ESM, "x.fasta", None, "{file}: no such file; give a source file, or a corpus made by `pretrain prepare`",
    ),
    "directory": (
        ESM, "directory", None,
        "{file}: is a directory; name the files in it, or a single corpus made by `pretrain prepare`",
    ),
    "unknown suffix": (ESM, "x.csv", b"a,b\n", "{file}: " + KINDS),
    "no suffix": (ESM, "fasta", b">a\nMK\n", "{file}: " + KINDS),
    "empty FASTA": (ESM, "x.fasta", b"", "{file}: is empty; at least one sequence is needed"),
    "blank FASTA": (ESM, "x.fasta", b" \r\n\n", "{file}: is empty; at least one sequence is needed"),
    "empty gzipped text": (TEXT, "x.txt.gz", b"", "{file}: is empty; at least one sequence is needed"),
    "empty JSON lines": (TEXT, "x.jsonl", b"\n\n", "{file}: is empty; at least one sequence is needed"),
    "HTML named FASTA": (ESM, "x.fa", b"<!DOCTYPE html>\n<html>", f"{{file}}:1: {NO_FASTA} '<!DOCTYPE html>'"),
    "binary named FASTA": (ESM, "x.fa", b"\n\xff\xfe\x00\x01", f"{{file}}:2: {NO_FASTA} '��\\x00\\x01'"),
    "sequence before header": (ESM, "x.fasta", b"\nMKVLAAGG\n>a\nMK\n", f"{{file}}:2: {NO_FASTA} 'MKVLAAGG'"),
    "header without sequence": (
        ESM, "x.fasta", b">a\nMK\n>b more\n\n>c\nMK\n",
        "{file}:3: record 'b' has no sequence; remove its header or add the sequence",
    ),
    "last header without sequence": (
        ESM, "x.fasta", b">a\nMK\n>b", "{file}:3: record 'b' has no sequence; remove its header or add the sequence",
    ),
    "unknown residue": (
        ESM, "x.fasta", b">a\nMK\n>b\nMKL\nA1K\n", f"{{file}}:3: record 'b' has '1' at position 5; {PROTEINS}",
    ),
    "stop within a protein": (
        ESM, "x.fasta", b">a\nMK*A*\n", f"{{file}}:1: record 'a' has '*' at position 3; {PROTEINS}",
    ),
    "space within a protein": (
        ESM, "x.fasta", b">a\nMK LA\n", f"{{file}}:1: record 'a' has ' ' at position 3; {PROTEINS}",
    ),
    "letter that is not ASCII": (
        ESM, "x.fasta", ">a\nMKé\n".encode(), f"{{file}}:1: record 'a' has 'é' at position 3; {PROTEINS}",
    ),
    "text as protein": (ESM, "x.txt", b"MK\nMy text", f"{{file}}:2: record '2' has ' ' at position 3; {PROTEINS}"),
    "bad JSON": (
        TEXT, "x.jsonl", b'{"text": "a"}\n{"text": \n',
        "{file}:2: not a JSON object on one line (Expecting value: line 2 column 1 (char 10))",
    ),
    "bottomless JSON": (
        TEXT, "x.jsonl", b"[" * 100_000,
        "{file}:1: not a JSON object on one line (maximum recursion depth exceeded…)",
    ),
    "JSON that is not UTF-8": (
        TEXT, "x.jsonl", b'{"text": "\xff"}',
        "{file}:1: not a JSON object on one line ('utf-8' codec can't decode byte 0xff in position 10…)",
    ),
    "JSON list": (TEXT, "x.jsonl", b'["text"]', f"{{file}}:1: {NO_TEXT}"),
    "JSON without text": (TEXT, "x.jsonl", b'\n{"id": 1, "sequence": "a"}', f"{{file}}:2: {NO_TEXT}"),
    "JSON with empty text": (TEXT, "x.jsonl", b'{"text": ""}', f"{{file}}:1: {NO_TEXT}"),
    "JSON with a number for text": (TEXT, "x.jsonl", b'{"text": 1}', f"{{file}}:1: {NO_TEXT}"),
    "half a surrogate pair in a text": (
        TEXT, "x.jsonl", b'{"text": "a\\ud800"}',
        "{file}:1: 'id' or 'text' holds half a surrogate pair ('utf-8' codec can't encode character '\\ud800' in "
        "position 1: surrogates not allowed); valid Unicode is needed",
    ),
    "half a surrogate pair in an id": (
        TEXT, "x.jsonl", b'{"text": "a", "id": "\\ud800"}',
        "{file}:1: 'id' or 'text' holds half a surrogate pair ('utf-8' codec can't encode character '\\ud800' in "
        "position 0: surrogates not allowed); valid Unicode is needed",
    ),
    "text that is not UTF-8": (
        TEXT, "x.txt", b"one\ntw\xff\n",
        "{file}:2: record '2' has b'\\xff' at position 3; allowed: UTF-8 text; correct or remove it",
    ),
    "truncated gzip": (
        TEXT, "x.txt", PACKED[:-20],
        "{file}: damaged gzip data after record 2 (Compressed file ended before the end-of-stream marker was reached); "
        "fetch the file again",
    ),
    "rubbish after gzip": (
        TEXT, "x.txt", gzip.compress(b"one\n") + b"rubbish",
        "{file}: damaged gzip data after record 1 (Not a gzipped file (b'ru')); fetch the file again",
    ),
    "rubbish in gzip": (
        TEXT, "x.txt", PACKED[:10] + b"\xff" * 100,
        "{file}: damaged gzip data after record 0 (Error -3 while decompressing data…); fetch the file again",
    ),
    "gzip with a wrong checksum": (
        TEXT, "x.txt", gzip.compress(b"one\n")[:-8] + bytes(8),
        "{file}: damaged gzip data after record 1 (CRC check failed…); fetch the file again",
    ),
    "gzip in its first two bytes only": (
        TEXT, "x.txt", b"\x1f\x8brubbish, rubbish",
        "{file}: damaged gzip data after record 0 (Unknown compression method); fetch the file again",
    ),
}  # fmt: skip


def place(directory: Path, name: str, content: bytes | None) -> Path:
    directory.mkdir()
    if name == "directory":
        (directory / name).mkdir()
    return directory / name if content is None else written(directory, name, content)


def agrees(error: UserError, message: str, source: Path) -> bool:
    """Whether an error says ``message``, word for word but for what other libraries say at ``…``."""
    return re.fullmatch(re.escape(message.replace("{file}", str(source))).replace("…", ".*"), str(error)) is not None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_source_is_told_in_one_line_and_leaves_nothing_behind(mistake: str, tmp_path: Path) -> None:
    tokenizer, name, content, message = MISTAKES[mistake]
    source = place(tmp_path / "source", name, content)
    here = tmp_path / "corpora"
    here.mkdir()
    with pytest.raises(UserError) as caught:
        prepare([source], here / "corpus", tokenizer)
    assert agrees(caught.value, message, source), caught.value
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "mistake", ["missing", "directory", "unknown suffix", "empty FASTA", "bad JSON", "truncated gzip"]
)
def test_a_mistake_in_a_source_leaves_no_tokenizer_behind(mistake: str, tmp_path: Path) -> None:
    _, name, content, message = MISTAKES[mistake]
    source = place(tmp_path / "source", name, content)
    here = tmp_path / "tokenizers"
    here.mkdir()
    with pytest.raises(UserError) as caught:
        train_tokenizer_file([source], here / "tokenizer.json", 300)
    assert agrees(caught.value, message, source), caught.value
    assert not list(here.iterdir())


def test_a_trained_tokenizer_never_replaces_a_file(tmp_path: Path) -> None:
    out = written(tmp_path, "tokenizer.json", b"mine")
    with pytest.raises(UserError) as caught:
        train_tokenizer_file([written(tmp_path, "x.txt", b"text\n")], out, 300)
    assert str(caught.value) == f"{out}: exists already; choose another name, or remove it first"
    assert out.read_bytes() == b"mine"

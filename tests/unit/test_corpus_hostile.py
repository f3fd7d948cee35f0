"""What is wrong with a source is told in one exact line, with exit code 2, and nothing half-written is left."""

import bz2
import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.cli import main
from pretrain.corpus import pieces
from pretrain.corpus.command import train_tokenizer_file
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.tokenizer import ProteinTokenizer, train_tokenizer
from pretrain.errors import UserError

ESM = ProteinTokenizer()
Content = bytes | None | Callable[[Path], object]

NO_FASTA = "not FASTA: a header line that begins with '>' is expected, found"
NO_TEXT = "an object with a non-empty string 'text' or 'sequence' or 'seq' or 'content' is expected"
NO_COLUMN = "no column text or sequence or seq or content"
NAME_ONE = "rename one to text, or name it, as in `pretrain prepare --text_column NAME`"
PROTEINS = "allowed: the letters A-Z, '-' and '.'; correct or remove it"
EMPTY = "{file}: is empty; at least one sequence is needed"
ENDINGS = (
    "the name must end in .fasta, .fa, .faa, .fas (sequences), .txt (documents), .jsonl, .csv, .tsv, .parquet or "
    ".arrow (with a column 'text' or 'sequence'), with or without .gz, .bz2 or .zst; or name the kind, as in "
    "`pretrain prepare --kind fasta`"
)
AGAIN = "fetch the file again"
REWRITE = "fetch or write the file again"
TRUNCATED = "Truncated compressed stream"
ENDLESS = (
    "here begins a record of more than 16,384 bytes; split it, or check that the source is what its name or --kind says"
)
LINES = b"one\ntwo\n" + bytes(range(14, 256)) * 10
PACKED = gzip.compress(LINES)


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def parquet(**columns: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def arrow(**columns: object) -> bytes:
    table, sink = pa.table(columns), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def dataset(*, state: str | None = None, data: bytes | None = None) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / "state.json").write_text(state or json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
        if data is not None:
            (path / "data-0.arrow").write_bytes(data)

    return make


def splits(path: Path) -> None:
    for split in ("train", "test"):
        (path / split).mkdir(parents=True)
        (path / split / "state.json").touch()
    (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def directory_with(name: str, *, link_to: str | None = None) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        if link_to:
            (path / name).symlink_to(link_to)
        else:
            (path / name).touch()

    return make


def make_corpus(path: Path) -> None:
    source = path.with_name("good.fasta")
    source.write_text(">a\nMK\n")
    prepare([source], path, Settings(ESM))


# Of each: the name of the source, what is in it, the message, and further arguments ("text" stands for a tokenizer).
MISTAKES: dict[str, tuple[str, Content, str] | tuple[str, Content, str, str]] = {
    # names
    "missing": (
        "x.fasta", None, "{file}: no such file; give a source file, or a corpus made by `pretrain prepare`",
    ),
    "a link to itself": (
        "x.fasta", lambda path: path.symlink_to(path),
        "{file}: no such file; give a source file, or a corpus made by `pretrain prepare`",
    ),
    "pattern without a match": ("*.fasta", None, "{file}: no file matches this pattern"),
    "empty directory": ("directory", Path.mkdir, f"{{file}}: no source in this directory; {ENDINGS}"),
    "directory of other things": (
        "directory", directory_with("LICENSE"), f"{{file}}: no source in this directory; {ENDINGS}",
    ),
    "directory with a dangling link": (
        "directory", directory_with("x.fasta", link_to="gone"),
        "{file}/x.fasta: a link to a file that is not there; remove it, or restore the file",
    ),
    "directory with an empty file": ("directory", directory_with("x.fa"), EMPTY.replace("{file}", "{file}/x.fa")),
    "a corpus as a source": (
        "corpus-0", make_corpus, "{file}: is a prepared corpus; it stands alone, and cannot be a source",
    ),
    "unknown suffix": ("x.pdb", b"ATOM\n", f"{{file}}: unknown kind of file; {ENDINGS}"),
    "suffix not at the end": ("x.fasta.bak", b">a\nMK\n", f"{{file}}: unknown kind of file; {ENDINGS}"),
    "no suffix": ("fasta", b">a\nMK\n", f"{{file}}: unknown kind of file; {ENDINGS}"),
    "only a compression's suffix": ("x.gz", b">a\nMK\n", f"{{file}}: unknown kind of file; {ENDINGS}"),
    "unknown protocol": (
        "ftps3://bucket/x.fasta", None,
        "{file}: cannot be opened (Protocol not known: ftps3); check the address and the network",
    ),
    "missing at a URL": ("memory://nowhere/x.fasta", None, "{file}: no such file; check the address"),
    "a server that is down": (
        "http://127.0.0.1:1/x.fasta", None,
        "{file}: cannot be opened (Cannot connect to host 127.0.0.1:1 …); check the address and the network",
    ),
    "URL pattern without a match": ("memory://nowhere/*.fasta", None, f"{{file}}: no source there; {ENDINGS}"),
    "no such Hub dataset": (
        "hf://nobody/nothing", None, "{file}: …; check the address…",
    ),
    "standard input of unknown kind": (
        "-", None,
        "standard input has no name that tells its kind; name it, as in `pretrain prepare - --kind fasta`: one of "
        "fasta, txt, jsonl, csv, tsv, parquet, arrow",
    ),
    "Parquet from standard input": (
        "-", None, "standard input: Parquet cannot be read from a pipe; give a file", "--kind parquet",
    ),
    # options
    "unknown kind": (
        "x.fasta", b">a\nMK\n", "kind is 'fastq'; give one of fasta, txt, jsonl, csv, tsv, parquet, arrow",
        "--kind fastq",
    ),
    "unknown document": (
        "x.txt", b"MK\n", "document is 'page'; give one of line, paragraph, file", "--document page",
    ),
    "lengths that leave nothing": (
        "x.txt", b"MK\n", "lengths from 9 to 8 leave nothing; give 0 <= min <= max, max >= 1",
        "--min_length 9 --max_length 8",
    ),
    "no worker": ("x.txt", b"MK\n", "workers is 0; give at least 1", "--workers 0"),
    "nothing is left": (
        "x.txt", b"MK\nMKLAA\n1\n",
        "no sequence is left (1 bad, 1 long, 1 short); loosen --min_length and --max_length, or see the sources",
        "--min_length 6 --max_length 6 --skip_bad",
    ),
    # FASTA
    "empty FASTA": ("x.fasta", b"", EMPTY),
    "blank FASTA": ("x.fasta", b" \r\n\n", EMPTY),
    "HTML named FASTA": ("x.fa", b"<!DOCTYPE html>\n<html>", f"{{file}}:1: {NO_FASTA} '<!DOCTYPE html>'"),
    "FASTQ named FASTA": ("x.fa", b"@read\nACGT\n+\n!!!!\n", f"{{file}}:1: {NO_FASTA} '@read'"),
    "binary named FASTA": ("x.fa", b"\n\xff\xfe\x00\x01", f"{{file}}:2: {NO_FASTA} '��\\x00\\x01'"),
    "UTF-16": (
        "x.fasta", ">a\nMK\n".encode("utf-16"),
        "{file}: is UTF-16; convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`",
    ),
    "sequence before header": ("x.fasta", b"\nMKVLAAGG\n>a\nMK\n", f"{{file}}:2: {NO_FASTA} 'MKVLAAGG'"),
    "header without sequence": (
        "x.fasta", b">a\nMK\n>b more\n\n>c\nMK\n",
        "{file}:3: record 'b' has no sequence; remove its header or add the sequence",
    ),
    "last header without sequence": (
        "x.fasta", b">a\nMK\n>b", "{file}:3: record 'b' has no sequence; remove its header or add the sequence",
    ),
    "nothing but a mark": ("x.fa", b">", "{file}:1: record '' has no sequence; remove its header or add the sequence"),
    "unknown residue": (
        "x.fasta", b">a\nMK\n>b\nMKL\nA1K\n", f"{{file}}:3: record 'b' has '1' at position 5; {PROTEINS}",
    ),
    "unknown residue after mixed line ends": (
        "x.fasta", b">a\rMK\r\n>b\nM!\n", f"{{file}}:3: record 'b' has '!' at position 2; {PROTEINS}",
    ),
    "NUL byte": ("x.fasta", b">a\nM\0K\n", f"{{file}}:1: record 'a' has '\\x00' at position 2; {PROTEINS}"),
    "stop and nothing else": (
        "x.fasta", b">a\nMK\n>b\n*\n", "{file}:3: record 'b' has nothing that becomes a token; correct or remove it",
    ),
    "stop within a protein": ("x.fasta", b">a\nMK*A*\n", f"{{file}}:1: record 'a' has '*' at position 3; {PROTEINS}"),
    "space within a protein": ("x.fasta", b">a\nMK LA\n", f"{{file}}:1: record 'a' has ' ' at position 3; {PROTEINS}"),
    "letter that is not ASCII": (
        "x.fasta", ">a\nMKé\n".encode(), f"{{file}}:1: record 'a' has 'é' at position 3; {PROTEINS}",
    ),
    "indented header": ("x.fasta", b">a\nMK\n >b\nMK\n", f"{{file}}:1: record 'a' has '>' at position 3; {PROTEINS}"),
    "far behind": (
        "x.fasta", b">a\nMKLA\n" * 4000 + b">b\n",
        "{file}:8001: record 'b' has no sequence; remove its header or add the sequence",
    ),
    # records without end
    "endless line": ("x.txt", b"MK\n" + b"A" * 10**5, f"{{file}}:2: {ENDLESS}"),
    "endless FASTA record": ("x.fasta", b">a\nMK\n>b\n" + b"AAAAAAAA\n" * 10**4, f"{{file}}:3: {ENDLESS}"),
    "endless paragraph": ("x.txt", b"MK\n" * 10**5, f"{{file}}:1: {ENDLESS}", "--document paragraph"),
    "endless document": ("x.txt", b"MK\n\n" * 10**5, f"{{file}}:1: {ENDLESS}", "--document file"),
    "endless CSV field": ("x.csv", b'text\nMK\n"' + b"MK\n" * 10**5, f"{{file}}:3: {ENDLESS}"),
    "gzip bomb": ("x.txt", gzip.compress(bytes(10**8)), f"{{file}}:1: {ENDLESS}"),
    "zstd bomb": ("x.txt", zstd(bytes(10**8)), f"{{file}}:1: {ENDLESS}"),
    # text
    "empty gzipped text": ("x.txt.gz", gzip.compress(b""), EMPTY, "text"),
    "text as protein": (
        "x.txt", b"MK\nMy text", f"{{file}}:2: record '2' has ' ' at position 3; {PROTEINS}, or, if this is text, "
        "give its tokenizer: --data.tokenizer FILE (in prepare --tokenizer FILE)",
    ),
    "text that is not UTF-8": (
        "x.txt", b"one\ntw\xff\n",
        "{file}:2: record '2' has b'\\xff' at position 3; allowed: UTF-8 text; correct or remove it", "text",
    ),
    "packed twice": (
        "x.txt.gz", gzip.compress(gzip.compress(b"one\n", mtime=0)),
        "{file}:1: record '1' has b'\\x8b' at position 2; allowed: UTF-8 text; correct or remove it", "text",
    ),
    # JSON lines
    "empty JSON lines": ("x.jsonl", b"\n\n", EMPTY),
    "bad JSON": (
        "x.jsonl", b'{"text": "a"}\n{"text": \n',
        "{file}:2: not a JSON object on one line (Expecting value: line 2 column 1 (char 10))", "text",
    ),
    "bottomless JSON": (
        "x.jsonl", b"[" * 10_000, "{file}:1: not a JSON object on one line (maximum recursion depth exceeded…)",
    ),
    "JSON that is not UTF-8": (
        "x.jsonl", b'{"text": "\xff"}',
        "{file}:1: not a JSON object on one line ('utf-8' codec can't decode byte 0xff in position 10…)",
    ),
    "JSON list": ("x.jsonl", b'["text"]', '{file}:1: not a JSON object, such as {"text": "..."}'),
    "JSON on several lines": ("x.jsonl", b'{\n"text": "a"\n}', "{file}:1: not a JSON object on one line (Expecting…)"),
    "JSON without text": ("x.jsonl", b'\n{"id": 1, "residues": "a"}', f"{{file}}:2: {NO_TEXT}"),
    "JSON with empty text": ("x.jsonl", b'{"text": ""}', f"{{file}}:1: {NO_TEXT}"),
    "JSON with null for text": ("x.jsonl", b'{"text": null}', f"{{file}}:1: {NO_TEXT}"),
    "JSON with a number for text": ("x.jsonl", b'{"text": 1}', f"{{file}}:1: {NO_TEXT}"),
    "JSON without the field asked for": (
        "x.jsonl", b'{"text": "MK"}', "{file}:1: an object with a non-empty string 'body' is expected",
        "--text_column body",
    ),
    "JSON without the id asked for": (
        "x.jsonl", b'{"text": "MK"}', "{file}:1: an object with 'accession' is expected", "--id_column accession",
    ),
    "half a surrogate pair in a text": (
        "x.jsonl", b'{"text": "a\\ud800"}',
        "{file}:1: the id or the text holds half a surrogate pair ('utf-8' codec can't encode character '\\ud800' in "
        "position 1: surrogates not allowed); valid Unicode is needed",
    ),
    "half a surrogate pair in an id": (
        "x.jsonl", b'{"text": "a", "id": "\\ud800"}',
        "{file}:1: the id or the text holds half a surrogate pair ('utf-8' codec can't encode character '\\ud800' in "
        "position 0: surrogates not allowed); valid Unicode is needed",
    ),
    # CSV and TSV
    "empty CSV": ("x.csv", b"", EMPTY),
    "CSV header without an end": (
        "x.csv", b'id,"text\n1,MK\n', "{file}:1: the header is not CSV (unexpected end of data); a field with a comma, "
        "a quote or a line end must stand in quotes",
    ),
    "CSV of a header": ("x.csv", b"id,text\n", EMPTY),
    "CSV without a header": ("x.csv", b"a,MK\nb,MK\n", f"{{file}}: {NO_COLUMN}; its columns are 'a', 'MK'; {NAME_ONE}"),
    "CSV without the column asked for": (
        "x.csv", b"id,text\n1,MK\n", "{file}: no column 'body'; its columns are 'id', 'text'", "--text_column body",
    ),
    "CSV without the id column asked for": (
        "x.csv", b"id,text\n1,MK\n", "{file}: no column 'accession'; its columns are 'id', 'text'",
        "--id_column accession",
    ),
    "ragged CSV": (
        "x.csv", b"id,text\n1,MK\n\n2,MK,LA\n", "{file}:4: has 3 fields, the header has 2; correct or remove it",
    ),
    "CSV with a quote that is not closed": (
        "x.csv", b'id,text\n1,MK\n2,"MK\n',
        "{file}:3: not CSV (unexpected end of data); a field with a comma, a quote or a line end must stand in quotes",
    ),
    "CSV with text behind a quote": (
        "x.csv", b'id,text\n1,"M"K\n',
        "{file}:2: not CSV (',' expected after '\"'); a field with a comma, a quote or a line end must stand in quotes",
    ),
    "CSV with an empty sequence": (
        "x.csv", b"id,text\na,\n", "{file}:2: record 'a' has nothing in 'text'; fill it in or remove the row",
    ),
    "CSV that is not UTF-8": (
        "x.csv", b"id,text\na,M\xff\n", f"{{file}}:2: record 'a' has '�' at position 2; {PROTEINS}",
    ),
    "CSV named TSV": ("x.tsv", b"id,text\n1,MK\n", f"{{file}}: {NO_COLUMN}; its columns are 'id,text'; {NAME_ONE}"),
    "ragged TSV": ("x.tsv", b"id\ttext\n1\n", "{file}:2: has 1 fields, the header has 2; correct or remove it"),
    # Parquet and Arrow
    "empty Parquet": ("x.parquet", b"", EMPTY),
    "Parquet without rows": ("x.parquet", parquet(text=pa.array([], pa.string())), EMPTY),
    "truncated Parquet": ("x.parquet", parquet(text=["MK"])[:-9], f"{{file}}: damaged parquet data (…); {REWRITE}"),
    "rubbish named Parquet": ("x.parquet", b"rubbish" * 9, f"{{file}}: damaged parquet data (…); {REWRITE}"),
    "Parquet with a damaged page": (
        "x.parquet", b"PAR1" + b"\xff" * 30 + parquet(text=["MK" * 99])[34:],
        f"{{file}}: damaged parquet data (…); {REWRITE}",
    ),
    "Parquet without the column": (
        "x.parquet", parquet(number=[1]), f"{{file}}: {NO_COLUMN}; its columns are 'number'; {NAME_ONE}",
    ),
    "Parquet with numbers for text": (
        "x.parquet", parquet(text=[1]), "{file}: column 'text' holds int64; strings are needed; name another",
    ),
    "Parquet with lists for text": (
        "x.parquet", parquet(text=[["M"]]),
        "{file}: column 'text' holds list<…>; strings are needed; name another",
    ),
    "Parquet with fractions for ids": (
        "x.parquet", parquet(text=["MK"], id=[0.5]),
        "{file}: column 'id' holds double; strings or integers are needed; name another",
    ),
    "Parquet with a null": (
        "x.parquet", parquet(text=["MK", None]), "{file}:2: record '2' has no text; fill it in or remove the row",
    ),
    "empty Arrow": ("x.arrow", b"", EMPTY),
    "truncated Arrow": ("x.arrow", arrow(text=["MK" * 99])[:-99], f"{{file}}: damaged arrow data (…); {REWRITE}"),
    "rubbish named Arrow": ("x.arrow", b"rubbish" * 9, f"{{file}}: damaged arrow data (…); {REWRITE}"),
    "dataset without its file": (
        "saved", dataset(),
        "{file}/data-0.arrow: no such file, but state.json beside it names it; save the dataset again",
    ),
    "dataset with a damaged state": (
        "saved", dataset(state="{"), "{file}: damaged dataset directory (state.json: …); save it again",
    ),
    "dataset without rows": (
        "saved", dataset(data=arrow(text=pa.array([], pa.string()))), EMPTY.replace("{file}", "{file}/data-0.arrow"),
    ),
    "dataset of several splits": (
        "saved", splits, "{file}: holds several splits (test, train); name one, as in {file}/train",
    ),
    # compression
    "truncated gzip": ("x.txt", PACKED[:-20], f"{{file}}: damaged gzip data ({TRUNCATED}); {AGAIN}"),
    "rubbish after gzip": (
        "x.txt", gzip.compress(b"MK\n") + b"rubbish",
        f"{{file}}: damaged gzip data (zlib inflate failed: incorrect header check); {AGAIN}",
    ),
    "rubbish in gzip": (
        "x.txt", PACKED[:10] + b"\xff" * 100, f"{{file}}: damaged gzip data (zlib inflate failed: …); {AGAIN}",
    ),
    "gzip with a wrong checksum": (
        "x.txt", gzip.compress(b"MK\n")[:-8] + bytes(8),
        f"{{file}}: damaged gzip data (zlib inflate failed: incorrect data check); {AGAIN}",
    ),
    "gzip in its first two bytes only": (
        "x.txt", b"\x1f\x8brubbish, rubbish",
        f"{{file}}: damaged gzip data (zlib inflate failed: unknown compression method); {AGAIN}",
    ),
    "truncated bzip2": ("x.txt", bz2.compress(LINES)[:-9], f"{{file}}: damaged bz2 data ({TRUNCATED}); {AGAIN}"),
    "rubbish in bzip2": ("x.txt", b"BZh9rubbish", f"{{file}}: damaged bz2 data (bz2 decompress failed: …); {AGAIN}"),
    "truncated zstd": ("x.txt", zstd(LINES)[:-9], f"{{file}}: damaged zstd data ({TRUNCATED}); {AGAIN}"),
    "rubbish in zstd": (
        "x.txt", zstd(LINES)[:8] + b"\xff" * 99, f"{{file}}: damaged zstd data (ZSTD decompress failed: …); {AGAIN}",
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer([], 261).serialize())
    return path


def place(directory: Path, name: str, content: Content) -> str:
    directory.mkdir()
    if name == "-" or "://" in name:
        return name
    if isinstance(content, bytes):
        (directory / name).write_bytes(content)
    elif content:
        content(directory / name)
    return str(directory / name)


def agrees(said: str, message: str, source: str) -> bool:
    """Whether ``said`` is ``message``, word for word but for what other libraries say at ``…``."""
    return re.fullmatch(re.escape(message.replace("{file}", source)).replace("…", ".*"), said) is not None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_source_is_told_in_one_line_and_leaves_nothing_behind(
    mistake: str,
    tmp_path: Path,
    text_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, content, message, *more = MISTAKES[mistake]
    source = place(tmp_path / "source", name, content)
    here = tmp_path / "corpora"
    here.mkdir()
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**12)
    monkeypatch.setattr(pieces, "MAX_RECORD_BYTES", 2**14)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(_Pipe(b"")))
    options = f"--tokenizer {text_tokenizer}" if more == ["text"] else " ".join(more)
    assert main(["prepare", source, "--out", str(here / "corpus"), *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert agrees(line.removeprefix("pretrain: error: "), message, source), line
    assert not list(here.iterdir())


class _Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


@pytest.mark.parametrize(
    "mistake", ["missing", "empty directory", "unknown suffix", "empty FASTA", "bad JSON", "truncated gzip"]
)
def test_a_mistake_in_a_source_leaves_no_tokenizer_behind(mistake: str, tmp_path: Path) -> None:
    name, content, message, *_ = MISTAKES[mistake]
    source = place(tmp_path / "source", name, content)
    here = tmp_path / "tokenizers"
    here.mkdir()
    with pytest.raises(UserError) as caught:
        train_tokenizer_file([source], here / "tokenizer.json", 300)
    assert agrees(str(caught.value), message, source), caught.value
    assert not list(here.iterdir())

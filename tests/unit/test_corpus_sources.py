"""Sources: files, directories, addresses and pipes are found, and read whatever their compression."""

import functools
import gzip
import http.server
import io
import json
import os
import sys
import threading
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_corpus_readers import COMPRESS, cut_at, written

from pretrain.cli import main
from pretrain.corpus.command import train_tokenizer_file
from pretrain.corpus.readers import Record, read_records
from pretrain.corpus.sources import KINDS, Source, SourceOptions, find_sources
from pretrain.errors import UserError


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.fasta", "fasta"), ("x.FAA.GZ", "fasta"), ("x.csv.fa.zst", "fasta"), ("a.fasta.d/x.txt", "txt"),
        ("x.fasta.ndjson.bz2", "jsonl"), ("x.gz.tab", "tsv"), ("x.csv", "csv"), ("x.parquet", "parquet"),
        ("x.arrow", "arrow"),
    ],
)  # fmt: skip
def test_the_kind_is_told_by_the_end_of_the_name(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert find_sources([path], SourceOptions()) == [Source(str(path), kind)]
    for other in KINDS:
        assert find_sources([path], SourceOptions(kind=other)) == [Source(str(path), other)]


def test_directories_and_patterns_stand_for_their_files_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b.fasta", "a/z.fa.gz", "a/y.txt", "a/.hidden.fa", ".git/x.fa", "README.md", "c.fasta"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)

    def found(*names: str, **options: str) -> list[str]:
        return [os.path.relpath(source.name) for source in find_sources(names, SourceOptions(**options))]

    assert found(".") == ["b.fasta", "c.fasta", "a/y.txt", "a/z.fa.gz"]
    assert found("a") == ["a/y.txt", "a/z.fa.gz"]
    assert found("*.fasta", "a/*.txt", "b.fasta") == ["b.fasta", "c.fasta", "a/y.txt", "b.fasta"]
    assert found("a/**/*.gz") == ["a/z.fa.gz"]
    assert found(".", kind="txt")[:3] == ["README.md", "b.fasta", "c.fasta"]


def test_a_manifest_of_something_else_makes_no_corpus(tmp_path: Path) -> None:
    for place, content in (("set", b'{"version": 3}'), ("set/meta", b"3")):
        (tmp_path / place).mkdir()
        written(tmp_path, f"{place}/manifest.json", content)
    written(tmp_path, "set/a.fasta", b">a\nMK\n")
    assert [record.id for record in read_records(tmp_path / "set")] == ["a"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_compressed_as_a_whole_is_told(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"t.{kind}.gz", b"PAR1 and so on")
    with pytest.raises(UserError, match=rf"t\.{kind}\.gz: is compressed by gzip as a whole; decompress it first"):
        list(read_records(path))


def test_a_name_with_a_star_that_is_a_file_is_that_file(tmp_path: Path) -> None:
    path = written(tmp_path, "x[1]*.fasta", b">a\nMK\n")
    written(tmp_path, "x1.fasta", b">b\nMK\n")
    assert [record.id for record in read_records(path)] == ["a"]


def test_a_saved_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"id": [str(n) for n in range(9)], "text": [f"t{n}" for n in range(9)]})
    rows.shuffle(seed=1).save_to_disk(tmp_path / "saved", num_shards=3)
    expected = [(row["id"], row["text"].encode()) for row in datasets.load_from_disk(str(tmp_path / "saved"))]
    assert [(record.id, record.text) for record in read_records(tmp_path / "saved")] == expected
    assert expected[0] != ("0", b"t0")


def test_a_hub_dataset_is_streamed_by_name_configuration_and_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"text": f"{split} {n}", "id": n} for n in range(600)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = [{"config_name": "small", "data_files": [{"split": s, "path": f"{s}.jsonl"} for s in ("train", "test")]}]
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(card)}\n---\n")
    monkeypatch.chdir(tmp_path)
    for name, split in (("hf://org/name", "train"), ("hf://org/name:small@test", "test")):
        found = list(read_records(name))
        assert found == [Record(str(n), f"{split} {n}".encode(), n + 1) for n in range(600)]
    with pytest.raises(UserError, match=r"^hf://org/name:large: .*large"):
        list(read_records("hf://org/name:large"))


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_a_url_is_read_as_a_file_is(suffix: str) -> None:
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/records{suffix}/part-{number}.fasta{suffix}", COMPRESS[suffix](b">a\nMK\n>b\nLA\n"))
    memory.pipe(f"/records{suffix}/README", b"no source")
    one = [Record("a", b"MK", 1), Record("b", b"LA", 3)]
    assert list(read_records(f"memory://records{suffix}/part-1.fasta{suffix}")) == one
    assert list(read_records(f"memory://records{suffix}/part-*.fasta{suffix}")) == one * 3
    assert list(read_records(f"memory://records{suffix}")) == one * 3


def test_parquet_is_read_from_a_url() -> None:
    with fsspec.open("memory://tables/x.parquet", "wb") as file:
        pq.write_table(pa.table({"text": ["MK"]}), file)
    assert list(read_records("memory://tables/x.parquet")) == [Record("1", b"MK", 1)]


def test_a_web_address_is_read_and_its_query_is_no_ending(tmp_path: Path) -> None:
    written(tmp_path, "x.fasta.gz", b">a\nMK\n")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        assert list(read_records(f"{base}/x.fasta.gz")) == [Record("a", b"MK", 1)]
        assert list(read_records(f"{base}/x.fasta.gz?token=x.txt")) == [Record("a", b"MK", 1)]
        with pytest.raises(UserError, match=rf"^{base}/y.fasta: no such file; check the address$"):
            list(read_records(f"{base}/y.fasta"))
        server.shutdown()


@pytest.mark.parametrize("suffix", sorted(COMPRESS))
def test_a_pipe_is_read_once_however_it_delivers(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pipe.fasta{suffix}"
    os.mkfifo(path)
    content = COMPRESS[suffix](b">a\nMK\n>b\nLA\n")

    def drip() -> None:
        with path.open("wb", buffering=0) as pipe:
            for n in range(len(content)):
                pipe.write(content[n : n + 1])

    writer = threading.Thread(target=drip)
    writer.start()
    with cut_at(4):
        assert list(read_records(path)) == [Record("a", b"MK", 1), Record("b", b"LA", 3)]
    writer.join()


def test_standard_input_is_read_as_the_kind_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(b"id,seq\na,MK\n"))))
    assert list(read_records("-", SourceOptions(kind="csv"))) == [Record("a", b"MK", 2)]


def test_an_address_that_cannot_be_read_to_the_end_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/broken/x.fasta", b">a\nMK\n")

    def fail(*_: object) -> bytes:
        raise RuntimeError("connection\nlost")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", fail)
    with pytest.raises(UserError) as caught:
        list(read_records("memory://broken/x.fasta"))
    assert str(caught.value) == "memory://broken/x.fasta: cannot be read (connection lost); try again"


def test_a_tokenizer_is_trained_on_what_prepare_reads(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat"] * 9
    written(tmp_path, "x.txt", "\n".join(texts).encode())
    written(tmp_path, "x.dump", "\n".join(["number,body", *(f"1,{text}" for text in texts)]).encode())
    for name, *options in (["x.txt"], ["x.dump", "--kind", "csv", "--text_column", "body"]):
        given = ["--vocab_size", "270", "--algorithm", "bpe", *options]
        assert main(["tokenizer", str(tmp_path / name), "--out", str(tmp_path / f"{name}.json"), *given]) == 0
    assert (tmp_path / "x.dump.json").read_bytes() == (tmp_path / "x.txt.json").read_bytes()


def test_a_trained_tokenizer_never_replaces_a_file(tmp_path: Path) -> None:
    out = written(tmp_path, "tokenizer.json", b"mine")
    with pytest.raises(UserError) as caught:
        train_tokenizer_file([written(tmp_path, "x.txt", b"text\n")], out, 300)
    assert str(caught.value) == f"{out}: exists already; choose another name, or remove it first"
    assert out.read_bytes() == b"mine"

"""`prepare --out URL`: byte for byte the corpus that is made in a directory, without a disk that holds it."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.cli import main
from pretrain.corpus import pieces, prepare_remote, remote_files, shards
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.remote import RemoteCorpus
from pretrain.corpus.shards import Filters
from pretrain.corpus.tokenizer import ProteinTokenizer

ESM = ProteinTokenizer()
URL = "memory://bucket/corpora/x"
COMMAND = ["prepare", "x.fasta", "--out", URL, "--workers", "1", "--skip_bad"]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Proteins for about a dozen blocks, some of them bad."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 250)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 500)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    generator = random.Random(1)
    some = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randint(1, 60))) for _ in range(150)]
    path = tmp_path / "x.fasta"
    path.write_text("".join(f">{n}\n{residues}\n" + ">bad\n1\n" * (n % 9 == 0) for n, residues in enumerate(some)))
    return path


@pytest.fixture
def bucket() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    yield memory
    if memory.exists("/bucket"):
        memory.rm("/bucket", recursive=True)


def there(files: Any, path: str = "/bucket/corpora/x") -> dict[str, bytes]:
    return {name.rpartition("/")[2]: files.cat_file(name) for name in files.ls(path, detail=False)}


def here(tmp_path: Path) -> dict[str, bytes]:
    whole = prepare(["x.fasta"], tmp_path / "whole", Settings(ESM, filters=Filters(skip_bad=True))).path
    return {file.name: file.read_bytes() for file in whole.iterdir()}


def test_a_corpus_made_at_an_address_is_that_of_a_directory(
    source: Path, bucket: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(COMMAND) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{URL}: 150 sequences, ")
    assert f"the bad ones are listed in {URL}/skipped.tsv" in told
    assert there(bucket) == here(tmp_path)
    assert len(there(bucket)) > 10
    assert not list((tmp_path / "cache" / "preparing").iterdir())
    assert main(COMMAND) == 0
    assert capsys.readouterr().out == told.replace(f"{URL}: 150", f"{URL}: is ready, 150")
    assert main([*COMMAND, "--min_length", "9"]) == 2
    assert capsys.readouterr().err == (
        f"pretrain: error: {URL}: exists already, prepared with min_length None instead of 9; choose another place, or "
        "remove it first\n"
    )


def test_what_was_ended_is_continued_and_is_no_corpus_before(
    source: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, names, ended = prepare_remote.put_file, list[str](), list[str]()

    def watched(file: Path, url: str) -> None:
        names.append(file.name)
        if file.name == "shard-00005.arrow" and not ended:
            ended.append(file.name)
            raise KeyboardInterrupt
        put(file, url)

    monkeypatch.setattr(prepare_remote, "put_file", watched)
    assert main(COMMAND) == 130
    assert "manifest.json" not in there(bucket)
    bucket.pipe("/bucket/corpora/x/shard-00001.arrow", b"half")
    bucket.rm("/bucket/corpora/x/lengths-00003.npy")
    names.clear()
    assert main(COMMAND) == 0
    assert [name for name in names if name.startswith("shard")][:3] == [f"shard-0000{n}.arrow" for n in (1, 3, 5)]
    assert there(bucket) == here(tmp_path)


def test_a_lost_connection_is_tried_again(
    source: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put, waits = type(bucket).put_file, list[float]()

    def lost(self: Any, local: str, remote: str, **options: Any) -> None:
        if remote.endswith("shard-00002.arrow") and len(waits) < 2:
            raise ConnectionResetError("connection lost")
        put(self, local, remote, **options)

    monkeypatch.setattr(type(bucket), "put_file", lost)
    monkeypatch.setattr(remote_files, "_wait", waits.append)
    assert main(COMMAND) == 0
    assert waits == [1.0, 2.0]
    assert f"pretrain: warning: {URL}/shard-00002.arrow: connection lost; again in 1 s" in capsys.readouterr().err
    assert there(bucket) == here(tmp_path)


def test_a_corpus_is_not_replaced_where_the_connection_is_lost_as_it_is_looked_for(
    source: Path, bucket: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(COMMAND) == 0
    made = there(bucket)

    def lost(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr(remote_files, "_wait", lambda _: None)
    with monkeypatch.context() as patched:
        for method in ("info", "modified"):
            patched.setattr(type(bucket), method, lost)
        assert main([*COMMAND, "--min_length", "9"]) == 2
    assert f"{URL}/manifest.json: cannot be read (connection lost) in 3 attempts" in capsys.readouterr().err
    assert there(bucket) == made


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_corpus_made_in_an_s3_bucket(
    source: Path, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND[:3], "s3://made/x", *COMMAND[4:]]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("pretrain: error: s3://made/x/")
    s3.mkdir("made")
    assert main(command) == 0
    assert there(s3, "made/x") == here(tmp_path)
    assert len(RemoteCorpus("s3://made/x")) == 150
    capsys.readouterr()
    written = s3.modified("made/x/manifest.json").timestamp()
    os.utime(source, (written + 0.9, written + 0.9))  # within the same second, which is all that S3 tells
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("s3://made/x: is ready, 150 sequences")
    os.utime(source, (written + 2, written + 2))
    assert main(command) == 2
    assert "x.fasta has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("http://127.0.0.1:1/x", [], "http://127.0.0.1:1/x: a web server takes no files; prepare into a directory, and "
         "copy it there"),
        (URL, ["--deduplicate"], f"{URL}: --deduplicate, --clusters and a split read the finished shards again; "
         "prepare into a directory, and copy it there"),
        (URL, ["--shard", "1/2"], f"{URL}: parts are made and joined in directories; prepare into one, and copy it "
         "there"),
    ],
)  # fmt: skip
def test_what_needs_a_directory_is_told(
    out: str, options: list[str], message: str, source: Path, bucket: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "x.fasta", "--out", out, *options]) == 2
    assert capsys.readouterr().err == f"pretrain: error: {message}\n"
    assert not bucket.exists("/bucket")

"""A `prepare` that is repeated: the same is ready, and anything else is an error that names the difference."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.corpus import prepare as prepare_module
from pretrain.corpus import shards
from pretrain.corpus.journal import ShardEntry
from pretrain.corpus.tokenizer import load_tokenizer

TABLE = "A\ta\nA\tb\nC\tc\nD\td\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with two sources, a cluster table and a list of ids, of an hour ago."""
    monkeypatch.chdir(tmp_path)
    files = {"x.fasta": ">a\nMKT\n>b\nMKV\n>bad\nM1\n", "y.fasta": ">c\nLLL\n>d\nMKT\n", "z.fasta": ">e\nW\n"}
    files |= {"clusters.tsv": TABLE, "ids.txt": "b\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        age(tmp_path / name, -3600)
    return tmp_path


def age(path: Path, seconds: float) -> None:
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + seconds))


WAYS = {
    "one corpus": ["--deduplicate"],
    "two corpora": ["--validation_ids", "ids.txt"],
    "clusters": ["--clusters", "clusters.tsv"],
    "a part": ["--shard", "1/2"],
}


def test_a_source_that_is_named_twice_is_another_corpus(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "z.fasta", "z.fasta", "--out", "out"]) == 0
    capsys.readouterr()
    assert main(["prepare", "z.fasta", "--out", "out"]) == 2
    assert "out: exists already, prepared from 2 sources instead of 1; choose" in capsys.readouterr().err


@pytest.mark.parametrize("way", WAYS)
def test_the_same_again_is_ready_and_does_nothing(
    way: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["prepare", "x.fasta", "y.fasta", "--out", "out", "--skip_bad", *WAYS[way]]
    assert main(command) == 0
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*")}
    monkeypatch.setattr(prepare_module, "make_shards", lambda *_: pytest.fail("prepared again"))
    monkeypatch.setattr(shards, "write_shard", lambda *_: pytest.fail("prepared again"))
    assert main([*command, "--workers", "1"]) == 0
    again = capsys.readouterr().out
    assert again != first
    assert again.replace("is ready, ", "") == first
    assert {path: path.stat().st_mtime_ns for path in (here / "out").rglob("*")} == before
    assert {path.name for path in here.iterdir() if path.name.startswith(".")} == set()


def test_joining_the_same_parts_again_is_ready(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in (1, 2):
        assert main(["prepare", "y.fasta", "z.fasta", "--out", f"part{n}", "--shard", f"{n}/2"]) == 0
    capsys.readouterr()
    command = ["prepare", "--merge", "part1", "part2", "--out", "out"]
    assert main(command) == 0
    assert main(command) == 0
    first, again = capsys.readouterr().out.splitlines()
    assert again == first.replace("out: ", "out: is ready, ")
    shutil.rmtree("part2")
    assert main(["prepare", "y.fasta", "z.fasta", "--out", "part2", "--shard", "2/2"]) == 0
    age(here / "part2" / "part.json", 60)
    assert main(command) == 2
    assert "out: exists already, and part2/part.json has changed since; choose another" in capsys.readouterr().err


def test_a_source_that_grew_while_it_was_read_is_not_taken_for_the_same(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_shards(*given: Any) -> list[ShardEntry]:
        made = shards.make_shards(*given)
        longer(here / "x.fasta")  # as by a download, after its end was read
        return made

    monkeypatch.setattr(prepare_module, "make_shards", make_shards)
    command = ["prepare", "x.fasta", "--out", "out", "--skip_bad"]
    assert main(command) == 0
    assert main(command) == 2
    assert "x.fasta has changed: fasta, 22 bytes then, fasta, 31 bytes now" in capsys.readouterr().err


def longer(path: Path) -> None:
    path.write_text(path.read_text() + ">new\nMKL\n")
    age(path, -3600)


Change = Callable[[Path], object]
DIFFERENCES: dict[str, tuple[str, str, Change | None, str]] = {
    "a setting": ("", "--min_length 3", None, "prepared with min_length None instead of 3"),
    "a setting less": ("--deduplicate", "", None, "prepared with deduplicate True instead of False"),
    "how it is read": ("", "--kind fasta", None, "prepared with kind None instead of 'fasta'"),
    "one source more": ("", "z.fasta", None, "prepared without z.fasta"),
    "one source less": ("z.fasta", "", None, "prepared with z.fasta, too"),
    "clusters": ("", "--clusters clusters.tsv", None, "prepared with clusters None instead of 'clusters.tsv'"),
    "a split": ("", "--validation_ids ids.txt", None, "and holds one corpus"),
    "no split": ("--validation_ids ids.txt", "", None, "and holds two corpora, train and validation"),
    "another share": (
        "--validation_share 0.47",
        "--validation_share 0.4",
        None,
        "prepared with validation_share 0.47 instead of 0.4",
    ),
    "another part": ("--shard 1/2", "--shard 2/2", None, "prepared with part '1/2' instead of '2/2'"),
    "a source that grew": (
        "",
        "",
        lambda here: longer(here / "y.fasta"),
        "and y.fasta has changed: fasta, 14 bytes then, fasta, 23 bytes now",
    ),
    "a newer source": ("", "", lambda here: age(here / "y.fasta", 7200), "and y.fasta has changed since"),
    "a newer list": (
        "--validation_ids ids.txt",
        "--validation_ids ids.txt",
        lambda here: age(here / "ids.txt", 7200),
        "and ids.txt has changed since",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_named(difference: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    then, now, change, message = DIFFERENCES[difference]
    command = ["--out", "out", "--skip_bad"]
    assert main(["prepare", "x.fasta", "y.fasta", *then.split(), *command]) == 0
    if change:
        change(here)
    before = {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["prepare", "x.fasta", "y.fasta", *now.split(), *command]) == 2
    comma = "" if message.startswith("has") else ", "
    told = f"pretrain: error: out: exists already{comma}{message}; choose another place, or remove it first\n"
    assert capsys.readouterr().err == told
    assert {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()} == before


def test_another_tokenizer_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "y.fasta", "--out", "out"]) == 0
    assert main(["prepare", "y.fasta", "--out", "out", "--tokenizer", "data/text/tokenizer.json"]) == 2
    was, now = (load_tokenizer(name).fingerprint for name in ("esm", "data/text/tokenizer.json"))
    assert capsys.readouterr().err == (
        f"pretrain: error: out: exists already, prepared with another tokenizer ({was} instead of {now}); choose "
        "another place, or remove it first\n"
    )


def test_sources_in_another_order_and_what_cannot_be_read_again(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["prepare", "y.fasta", "z.fasta", "--out", "out"]) == 0
    assert main(["prepare", "z.fasta", "y.fasta", "--out", "out"]) == 2
    assert "out: exists already, prepared from the same sources in another order;" in capsys.readouterr().err
    for expected in (0, 2):
        with (here / "y.fasta").open() as given:
            monkeypatch.setattr("sys.stdin", given)
            assert main(["prepare", "-", "--kind", "fasta", "--out", "piped"]) == expected
    assert "piped: exists already, and standard input cannot be read again to compare;" in capsys.readouterr().err

"""`pretrain inspect` of a corpus: what it counts, draws and verifies."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.corpus import pieces, shards
from pretrain.corpus.prepare import Settings, prepare, prepare_split
from pretrain.corpus.shards import Filters
from pretrain.corpus.split import Split
from pretrain.corpus.tokenizer import ProteinTokenizer, train_tokenizer
from pretrain.downstream import inspect as inspect_module
from pretrain.downstream.inspect import inspect


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """101 proteins of 1 to 101 residues, all A but for one W, in several shards."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)
    source = tmp_path / "x.txt"
    source.write_text("\n".join(["A" * n for n in range(1, 101)] + ["A" * 100 + "W", "1"]))
    return prepare([source], tmp_path / "corpus", Settings(ProteinTokenizer(), filters=Filters(skip_bad=True))).path


def told(text: str) -> dict[str, str]:
    """The lines of a description by their first word."""
    return {line.split(None, 1)[0]: line.split(None, 1)[1] for line in text.splitlines()[1:]}


def test_a_corpus_is_described_by_its_lengths_and_tokens(corpus: Path) -> None:
    text = inspect(corpus)
    lines = told(text)
    assert text.splitlines()[0] == f"{corpus}: 101 sequences, {sum(range(1, 102)) + 2 * 101:,} tokens"
    assert lines["lengths"] == (
        "min 3  5% 8  25% 28  50% 53  75% 78  95% 98  max 103  (tokens, <cls> and <eos> included)"
    )
    assert lines["tokens"] == "A 99.98%  W 0.02%"
    assert lines["left"] == "out     bad 1; the bad ones are listed in skipped.tsv"
    assert int(lines["shards"].split(",")[0]) > 3


def test_one_side_of_a_split_names_the_report_that_it_shares(tmp_path: Path) -> None:
    source = tmp_path / "x.fasta"
    source.write_text("".join(f">{n}\nMK\n" for n in range(50)) + ">bad\n1\n")
    settings = Settings(ProteinTokenizer(), filters=Filters(skip_bad=True), split=Split(share=0.5))
    for side in prepare_split([source], tmp_path / "two", settings):
        assert told(inspect(side.path))["left"] == (
            f"out     bad 1 (train and validation together); the bad ones are listed in {tmp_path}/two/skipped.tsv"
        )
    assert (tmp_path / "two" / "skipped.tsv").is_file()


def test_lengths_are_exact_quantiles_for_any_shards(corpus: Path) -> None:
    opened = inspect_module.Corpus(corpus)
    statistics = inspect_module._statistics(opened)
    lengths = opened.lengths(np.arange(len(opened)))
    for share in np.linspace(0, 1, 21):
        assert statistics.quantile(share) == np.quantile(lengths, share, method="inverted_cdf")


def test_of_a_large_corpus_evenly_spread_tokens_are_counted(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspect_module, "_SAMPLE_TOKENS", 2000)
    monkeypatch.setattr(inspect_module, "_CHUNK", 10)
    opened = inspect_module.Corpus(corpus)
    statistics = inspect_module._statistics(opened)
    assert statistics.stride == 3
    assert 1700 < statistics.tokens.sum() < 2100
    assert told(inspect(corpus))["tokens"].endswith("(counted on one part in 3)")


@pytest.mark.parametrize("kind", ["proteins", "text", "one"])
def test_a_picture_of_a_corpus_is_a_png_of_one_page(kind: str, corpus: Path, tmp_path: Path) -> None:
    if kind != "proteins":
        source = tmp_path / "text.txt"
        source.write_text("one" if kind == "one" else "\n".join(map("".join, itertools.permutations("abcde $_^"[:6]))))
        corpus = prepare([source], tmp_path / kind, Settings(train_tokenizer(["abc"] * 9, 263))).path
    picture = tmp_path / "picture.png"
    assert main(["inspect", str(corpus), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_is_a_mistake(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    picture = tmp_path / "file" / "picture.png"
    assert main(["inspect", str(corpus), "--picture", str(picture)]) == 2
    assert capsys.readouterr().err == (
        f"pretrain: error: {picture}: cannot be written (Not a directory); choose another place\n"
    )


@pytest.mark.parametrize("name", ["keep.txt", "picture.pdf", "picture"])
def test_a_file_of_another_kind_never_becomes_a_picture(
    name: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / name
    picture.write_text("mine")
    assert main(["inspect", str(corpus), "--picture", str(picture)]) == 2
    assert "the name must end in .png" in capsys.readouterr().err
    assert picture.read_text() == "mine"


def test_a_picture_is_drawn_anew_while_a_run_goes_on(corpus: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_text("earlier")
    assert main(["inspect", str(corpus), "--picture", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_makes_its_directory(corpus: Path, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "picture.png"
    assert main(["inspect", str(corpus), "--picture", str(picture)]) == 0
    assert [file.name for file in picture.parent.iterdir()] == ["picture.png"]


def test_verify_tells_an_intact_corpus_from_a_broken_one(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(corpus), "--verify"]) == 0
    shards_there = len(list(corpus.glob("*.arrow")))
    files_there = shards_there + 1  # and the lengths
    assert capsys.readouterr().out == f"{corpus}: {shards_there} shards, all as the manifest says\n"
    (corpus / "shard-00001.arrow").write_bytes(b"")
    assert main(["inspect", str(corpus), "--verify"]) == 2
    assert capsys.readouterr().err == (
        f"pretrain: error: {corpus}: 1 of {files_there} files broken: shard-00001.arrow (another content); copy the "
        "corpus again, or prepare it again\n"
    )


def test_verifying_what_is_no_corpus_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
    assert capsys.readouterr().err == (
        f"pretrain: error: {tmp_path}/manifest.json: not found; a corpus is a directory that `pretrain prepare` made\n"
    )
    (tmp_path / "config.yaml").touch()
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
    assert capsys.readouterr().err == f"pretrain: error: {tmp_path}: is a run; --verify checks a corpus\n"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--html", "x.html", "--audit"], "--html writes a page and nothing else; leave out --audit"),
        (["--html", "x.html", "--verify", "--picture", "x.png"], "leave out --picture, --verify"),
        (["--audit", "--verify"], "--audit checks runs, --verify corpora; give one of the two"),
    ],
)
def test_no_flag_is_dropped_in_silence(
    flags: list[str],
    said: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(corpus), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(said)
    assert {path.name for path in tmp_path.iterdir()} == {"x.txt", "corpus"}

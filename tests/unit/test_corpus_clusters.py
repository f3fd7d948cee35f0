"""`prepare --clusters`: from a table of cluster and member to what each cluster holds."""

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from pretrain.cli import main
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.shards import Filters
from pretrain.corpus.store import CLUSTERS, REPORT, Corpus, verify
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.errors import UserError
from pretrain.shipped import shipped

IDS = ["UniRef90_A", "sp|P12345|NAME", "C", "D", "E"]
TABLE = "UniRef50_A\tUniRef90_A\nP12345\tP12345\nUniRef50_A\tC\nP12345\tD\nE\tE\nE\tE\nE\tnot in the corpus\n"


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "some.fasta"
    path.write_text("".join(f">{name} n=1 RepID=X\nMKV{'L' * number}\n" for number, name in enumerate(IDS)))
    return path


@pytest.fixture
def make(fasta: Path, tmp_path: Path) -> Callable[[str], Corpus]:
    def made(table: str) -> Corpus:
        (tmp_path / "table.tsv").write_text(table)
        out = tmp_path / "corpus"
        return prepare([fasta], out, Settings(load_tokenizer("esm"), clusters=str(tmp_path / "table.tsv")))

    return made


def groups(corpus: Corpus) -> list[list[str]]:
    offsets, members = corpus.clusters()
    return [[corpus.id(int(m)) for m in members[a:b]] for a, b in itertools.pairwise(offsets)]


def test_a_corpus_knows_the_members_of_its_clusters_by_id_or_accession(make: Callable[[str], Corpus]) -> None:
    corpus = make(TABLE)
    assert groups(corpus) == [["UniRef90_A", "C"], ["sp|P12345|NAME", "D"], ["E"]]
    assert corpus.num_clusters == 3
    assert verify(corpus.path) == 1


def test_the_windows_of_a_cut_sequence_are_members_of_its_cluster(tmp_path: Path) -> None:
    (tmp_path / "long.fasta").write_text(f">long\n{'MKTAY' * 10}\n>short\nMKTAY\n")
    (tmp_path / "table.tsv").write_text("A\tlong\nB\tshort\n")
    corpus = prepare(
        [tmp_path / "long.fasta"],
        tmp_path / "corpus",
        Settings(load_tokenizer("esm"), filters=Filters(windows=32), clusters=str(tmp_path / "table.tsv")),
    )
    assert groups(corpus) == [["long#1", "long#2"], ["short"]]


def test_the_order_of_the_table_and_its_compression_change_nothing(
    make: Callable[[str], Corpus], fasta: Path, tmp_path: Path
) -> None:
    lines = TABLE.splitlines(keepends=True)
    packed = tmp_path / "table.tsv.gz"
    packed.write_bytes(gzip.compress("".join(reversed(lines)).encode()))
    other = prepare([fasta], tmp_path / "other", Settings(load_tokenizer("esm"), clusters=str(packed)))
    assert other.clusters_fingerprint == make(TABLE).clusters_fingerprint


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE.replace("P12345\tD\n", ""), "1 of 5 sequences are in no cluster, the first is 'D'; add lines"),
        ("X\tY\n", "5 of 5 sequences are in no cluster, the first is 'UniRef90_A'; add lines"),
        (TABLE + "other\tC\n", "'C' is in two clusters; a sequence belongs to one"),
        (TABLE + "alone\n", "table.tsv:8: 1 columns; a cluster, a tab and a member of it are expected"),
        ("", "is empty; lines of a cluster, a tab and a member are expected"),
    ],
)
def test_a_table_that_does_not_fit_is_told_in_one_line(
    make: Callable[[str], Corpus], tmp_path: Path, table: str, message: str
) -> None:
    with pytest.raises(UserError, match=r"table\.tsv:") as error:
        make(table)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "corpus").exists()


def test_a_table_that_is_missing_is_told_before_the_sources_are_read(fasta: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no-such\.tsv: cannot be read"):
        prepare([fasta], tmp_path / "corpus", Settings(load_tokenizer("esm"), clusters=str(tmp_path / "no-such.tsv")))
    assert not list(tmp_path.glob(".corpus*"))


def test_a_missing_or_damaged_cluster_file_is_noticed(make: Callable[[str], Corpus]) -> None:
    corpus = make(TABLE)
    file = corpus.path / CLUSTERS
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(UserError, match="damaged corpus"):
        corpus.clusters()
    with pytest.raises(UserError, match=r"1 of 3 files broken: clusters\.arrow \(another content\)"):
        verify(corpus.path)
    file.unlink()
    with pytest.raises(UserError, match="damaged corpus"):
        corpus.clusters()


def test_prepare_and_inspect_say_how_many_clusters_there_are(
    fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.tsv").write_text(TABLE)
    out = str(tmp_path / "corpus")
    assert main(["prepare", str(fasta), "--out", out, "--clusters", str(tmp_path / "table.tsv")]) == 0
    assert main(["inspect", out]) == 0
    prepared, inspected = capsys.readouterr().out.split("\n" + out, 1)
    assert "clusters     3" in prepared
    assert "clusters     3: an epoch visits each once" in inspected


def test_over_many_epochs_each_member_of_a_real_cluster_is_drawn_equally_often(tmp_path: Path) -> None:
    """Chi-square on the first 2,000 proteins of the sample, in 1,467 clusters of up to 7.

    tests/data/sample_clusters.tsv.gz was made by Debian 12's mmseqs2 (14-7e284):
        zcat data/proteins/train.fasta.gz | head -n 4000 > some.fasta
        mmseqs createdb some.fasta db && mmseqs cluster db clusters tmp --min-seq-id 0.3 -c 0.8
        mmseqs createtsv db db clusters clusters.tsv && gzip -9n clusters.tsv
    """
    table = Path(__file__).parents[1] / "data" / "sample_clusters.tsv.gz"
    with gzip.open(str(shipped("data/proteins/train.fasta.gz"))) as sample:
        (tmp_path / "some.fasta").write_bytes(b"".join(itertools.islice(sample, 4000)))
    corpus = prepare(
        [tmp_path / "some.fasta"], tmp_path / "corpus", Settings(load_tokenizer("esm"), clusters=str(table))
    )
    offsets, members = corpus.clusters()
    sizes, epochs = np.diff(offsets), 1000
    assert (len(sizes), sizes.max(), len(members)) == (1467, 7, 2000)

    data = MLMDataModule(str(corpus.path), max_length=64, global_batch_tokens=512, seed=1)
    data.setup("fit")
    _, drawn = data.train_order()(np.arange(epochs * len(sizes)))
    times = np.bincount(drawn, minlength=len(members))[members]  # those of a cluster side by side
    assert (np.add.reduceat(times, offsets[:-1]) == epochs).all()  # an epoch visits each cluster once
    expected = epochs / np.repeat(sizes, sizes)
    statistic = np.add.reduceat((times - expected) ** 2 / expected, offsets[:-1])[sizes > 1]
    freedom = sizes[sizes > 1] - 1
    each = scipy.stats.chi2.sf(statistic, freedom)
    assert len(each) == 343
    assert each.min() > 0.001 / len(each)
    assert 0.001 < scipy.stats.chi2.sf(statistic.sum(), freedom.sum()) < 0.999
    assert scipy.stats.kstest(each, "uniform").pvalue > 0.001


def test_a_report_of_a_call_that_failed_is_none_of_the_next(fasta: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "table.tsv", tmp_path / "corpus"
    command = ["prepare", str(fasta), "--out", str(out), "--skip_bad", "--clusters", str(table)]
    whole = fasta.read_text()
    fasta.write_text(whole + ">bad\nM1\n")
    table.write_text("X\tnot in the corpus\n")
    assert main(command) == 2
    fasta.write_text(whole)
    table.write_text(TABLE)
    assert main(command) == 0
    assert not (out / REPORT).exists()

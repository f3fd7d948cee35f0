"""Train and validation: chosen by names, so that no sequence changes its side when the corpus grows."""

import gzip
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from pretrain.cli import main
from pretrain.corpus import names as names_module
from pretrain.corpus import pieces, shards, split
from pretrain.corpus.prepare import Settings, prepare, prepare_split
from pretrain.corpus.shards import Filters
from pretrain.corpus.split import Split
from pretrain.corpus.store import Corpus, verify
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.errors import UserError

ESM = ProteinTokenizer()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(names_module, "_READ_BYTES", 100)


def write(path: Path, names: list[str]) -> Path:
    """A FASTA file of sequences with these names."""
    generator = random.Random(1)
    residues = {name: "".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randint(5, 40))) for name in names}
    path.write_text("".join(f">{name}\n{residues[name]}\n" for name in names))
    return path


NAMES = [f"sequence{number}" for number in range(600)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "x.fasta", NAMES)


def names(corpus: Corpus) -> list[str]:
    return [corpus.id(i) for i in range(len(corpus))]


def content(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_a_list_is_no_pipe_since_it_is_read_more_than_once(source: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, shown in ((str(tmp_path / "pipe"), str(tmp_path / "pipe")), ("-", "standard input")):
        with pytest.raises(UserError, match=f"^{shown}: is no file; write the list into one"):
            prepare_split([source], tmp_path / "out", Settings(ESM, split=Split(ids=name)))
    assert not list(tmp_path.glob("*out*"))


def test_every_sequence_goes_to_one_side_and_keeps_its_order_and_tokens(source: Path, tmp_path: Path) -> None:
    whole = prepare([source], tmp_path / "whole", Settings(ESM))
    sides = prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(share=0.2)))
    assert [str(corpus.path) for corpus in sides] == [str(tmp_path / "two" / name) for name in ("train", "validation")]
    train, validation = map(names, sides)
    assert sorted([*train, *validation]) == sorted(NAMES)
    assert train == [name for name in NAMES if name in set(train)]
    assert 80 < len(validation) < 160
    tokens = {whole.id(i): whole.tokens(i).tolist() for i in range(len(whole))}
    for corpus in sides:
        assert [corpus.tokens(i).tolist() for i in range(len(corpus))] == [tokens[name] for name in names(corpus)]
        assert verify(corpus.path) == len(corpus.shards)
        assert corpus.manifest["prepared"]["split"]["share"] == 0.2


def test_no_sequence_changes_its_side_when_the_sources_grow_or_are_shuffled(source: Path, tmp_path: Path) -> None:
    _, before = prepare_split([source], tmp_path / "1", Settings(ESM, split=Split(share=0.2)))
    more = [*NAMES, *(f"new{number}" for number in range(400))]
    random.Random(2).shuffle(more)
    _, after = prepare_split([write(tmp_path / "y.fasta", more)], tmp_path / "2", Settings(ESM, split=Split(share=0.2)))
    assert set(names(before)) == set(names(after)) & set(NAMES)
    assert set(names(after)) - set(NAMES)


def test_with_a_larger_share_no_sequence_leaves_validation(source: Path, tmp_path: Path) -> None:
    small, large = (
        set(names(prepare_split([source], tmp_path / str(share), Settings(ESM, split=Split(share=share)))[1]))
        for share in (0.1, 0.4)
    )
    assert small < large


@pytest.mark.parametrize("packed", [False, True])
def test_whole_clusters_go_to_one_side(packed: bool, source: Path, tmp_path: Path) -> None:
    cluster = {name: NAMES[number - number % 7] for number, name in enumerate(NAMES)}
    table = tmp_path / ("clusters.tsv.gz" if packed else "clusters.tsv")
    rows = "".join(f"{cluster[name]}\t{name}\n" for name in reversed(NAMES)).encode()
    table.write_bytes(gzip.compress(rows) if packed else rows)
    train, validation = (
        set(names(corpus))
        for corpus in prepare_split(
            [source], tmp_path / "two", Settings(ESM, split=Split(share=0.3, clusters=str(table)))
        )
    )
    assert train | validation == set(NAMES)
    assert not {cluster[name] for name in train} & {cluster[name] for name in validation}
    assert 0.15 < len(validation) / len(NAMES) < 0.45


def test_the_accession_of_a_uniprot_header_is_found_in_the_table_of_mmseqs(tmp_path: Path) -> None:
    headers = [f"sp|P{number:05}|NAME_{number}" for number in range(60)]
    table = tmp_path / "clusters.tsv"
    table.write_text("".join(f"P{number - number % 3:05}\tP{number:05}\n" for number in range(60)))
    source = write(tmp_path / "x.fasta", headers)
    train, validation = prepare_split(
        [source], tmp_path / "two", Settings(ESM, split=Split(share=0.4, clusters=str(table)))
    )
    clusters = [{int(name.split("|")[1][1:]) // 3 for name in names(corpus)} for corpus in (train, validation)]
    assert len(clusters[0]) + len(clusters[1]) == 20
    assert not clusters[0] & clusters[1]


def test_the_names_of_a_list_go_to_validation(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = tmp_path / "names.txt"
    chosen.write_text("\n".join(["sequence9", "  sequence500\r", "", "sequence77", "sequence9"]))
    _, validation = prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(ids=str(chosen))))
    assert names(validation) == ["sequence9", "sequence77", "sequence500"]
    assert capsys.readouterr().err == ""


def test_names_of_a_list_that_no_sequence_has_are_told(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = tmp_path / "names.txt"
    chosen.write_text("sequence9\nelsewhere\nsequence77\nnowhere\nelsewhere\n")
    prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(ids=str(chosen))))
    assert capsys.readouterr().err == (
        f"pretrain: warning: 2 of 4 names of {chosen} are here; the first missing is 'elsewhere'\n"
    )


@pytest.mark.parametrize("length", [10, 50])
def test_a_name_that_ends_as_a_windows_does_is_found_in_a_list_as_it_stands(
    length: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*(f"a#{number}" for number in range(9)), "b", "sp|C|c#2", "sp|D|d#1", "e"]
    source, chosen = write(tmp_path / "x.fasta", given), tmp_path / "names.txt"
    chosen.write_text("a#7\nb\nsp|C|c#2\nD\n")
    sides = prepare_split(
        [source], tmp_path / "two", Settings(ESM, filters=Filters(windows=length), split=Split(ids=str(chosen)))
    )
    _, held = ({name if name in given else name.rpartition("#")[0] for name in names(side)} for side in sides)
    assert held == {"a#7", "b", "sp|C|c#2", "sp|D|d#1"}
    assert capsys.readouterr().err == ""


def test_duplicates_are_taken_out_before_the_split(source: Path, tmp_path: Path) -> None:
    text = source.read_text()
    source.write_text(text + text.replace("sequence", "again"))
    sides = prepare_split(
        [source], tmp_path / "two", Settings(ESM, filters=Filters(deduplicate=True), split=Split(share=0.3))
    )
    tokens = [bytes(corpus.tokens(i)) for corpus in sides for i in range(len(corpus))]
    assert len(tokens) == len(set(tokens))
    assert sides[0].skipped["duplicate"] >= 600


def test_the_windows_of_a_long_sequence_stay_on_one_side(source: Path, tmp_path: Path) -> None:
    sides = prepare_split(
        [source], tmp_path / "two", Settings(ESM, filters=Filters(windows=10), split=Split(share=0.3))
    )
    train, validation = ({name.partition("#")[0] for name in names(corpus)} for corpus in sides)
    assert sum(len(corpus) for corpus in sides) > 2 * len(NAMES)
    assert train | validation == set(NAMES)
    assert not train & validation


# --- any number of processes, continued after a kill ------------------------------------------------------------------


def test_the_two_corpora_are_the_same_for_any_number_of_processes(source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text() + ">bad\n1\n")
    made = [tmp_path / str(workers) for workers in (1, 2)]
    for workers, out in enumerate(made, 1):
        prepare_split(
            [source], out, Settings(ESM, filters=Filters(skip_bad=True), split=Split(share=0.2)), workers=workers
        )
    assert content(made[0]) == content(made[1])
    assert "skipped.tsv" in content(made[0])
    assert len(content(made[0])) > 10
    assert {path.name for path in tmp_path.iterdir()} == {"x.fasta", "1", "2"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_kill_while_the_sides_are_written_loses_nothing(
    workers: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_split([source], tmp_path / "whole", Settings(ESM, split=Split(share=0.2)))

    def run() -> None:
        write_rows, parent = split.write_rows, os.getpid()

        def write(file: Path, keep: np.ndarray, to: Path) -> str:
            if to.name == "shard-00004.arrow":
                os.kill(parent, signal.SIGKILL)
            return write_rows(file, keep, to)

        split.write_rows = write  # type: ignore[assignment]
        prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(share=0.2)), workers=workers)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    monkeypatch.setattr(shards, "write_shard", lambda *_: pytest.fail("tokenised again"))
    written, write_rows = [], split.write_rows
    monkeypatch.setattr(split, "write_rows", lambda *given: (written.append(given[2].name), write_rows(*given))[1])
    prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(share=0.2)), workers=1)
    assert content(tmp_path / "two") == content(tmp_path / "whole")
    if workers == 1:
        assert min(written) == "shard-00004.arrow"
    assert {path.name for path in tmp_path.iterdir()} == {"x.fasta", "whole", "two"}


def test_another_split_of_what_is_tokenised_already_begins_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError):
        prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(share=1e-9)))
    monkeypatch.setattr(shards, "write_shard", lambda *_: pytest.fail("tokenised again"))
    _, validation = prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(share=0.2)))
    assert 80 < len(validation) < 160


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "table", "message"),
    [
        (["--validation_share", "1"], "", "validation_share is 1.0; give a share between 0 and 1, such as 0.01"),
        (
            ["--validation_share", "1e-9"],
            "",
            "--validation_share 1e-09 leaves no sequence of 600 for validation; give another share or list",
        ),
        (
            ["--validation_ids", "TABLE"],
            "none\n",
            "--validation_ids TABLE leaves no sequence of 600 for validation; give another share or list",
        ),
        (["--validation_ids", "TABLE"], "\n \n", "TABLE: is empty; names of sequences, one a line, are expected"),
        (["--split_clusters", "TABLE"], "", "a split needs either --validation_share or --validation_ids"),
        (
            ["--split_clusters", "TABLE", "--validation_ids", "TABLE"],
            "",
            "--split_clusters goes with --validation_share; --validation_ids names every sequence itself",
        ),
        (
            ["--split_clusters", "TABLE", "--validation_share", "0.1"],
            "a\tsequence0\n",
            "TABLE: sequence 'sequence1' is in no cluster; cluster the sequences that are prepared, or split by their "
            "names, without --split_clusters",
        ),
        (
            ["--split_clusters", "TABLE", "--validation_share", "0.1"],
            "a\tb\n" * 60 + "c d\n",
            "TABLE:61: 1 columns; a cluster, a tab and a member of it are expected",
        ),
        (
            ["--split_clusters", "TABLE", "--validation_share", "0.5"],
            "".join(f"{cluster}\tb\n" for cluster in range(20)),
            "TABLE: 'b' is in two clusters; a sequence belongs to one",
        ),
        (
            ["--split_clusters", "TABLE", "--validation_share", "0.5"],
            "",
            "TABLE: is empty; lines of a cluster, a tab and a member are expected",
        ),
        (
            ["--validation_ids", "nowhere.txt"],
            "",
            "nowhere.txt: cannot be read (No such file or directory); check the file and its permissions",
        ),
    ],
)
def test_a_split_that_cannot_be_made_is_told_in_one_line(
    arguments: list[str],
    table: str,
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "table.tsv"
    path.write_text(table)
    given = [argument.replace("TABLE", str(path)) for argument in arguments]
    assert main(["prepare", str(source), "--out", str(tmp_path / "two"), *given]) == 2
    assert capsys.readouterr().err == f"pretrain: error: {message.replace('TABLE', str(path))}\n"
    assert not (tmp_path / "two").exists()


def test_a_list_that_is_not_there_shows_before_the_sources_are_read(source: Path, tmp_path: Path) -> None:
    source.write_text("no FASTA: this would be told first, if it were read")
    with pytest.raises(UserError, match=r"^nowhere"):
        prepare_split([source], tmp_path / "two", Settings(ESM, split=Split(ids="nowhere")))


def test_the_command_prints_both_and_a_directory_of_corpora_is_no_source(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "two"
    assert main(["prepare", str(source), "--out", str(out), "--validation_share", "0.1", "--max_length", "30"]) == 0
    train, validation, left = capsys.readouterr().out.splitlines()
    assert train.startswith(f"{out}/train: ")
    assert validation.startswith(f"{out}/validation: ")
    assert left.startswith("  left out     long ")
    assert main(["prepare", str(out), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == (
        f"pretrain: error: {out}: holds prepared corpora; name one of them: {out}/train, {out}/validation\n"
    )

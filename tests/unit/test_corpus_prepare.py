"""Preparing: on any number of processes the same corpus, continued after any end, with what was left out counted."""

import errno
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.corpus import duplicates, pieces, shards
from pretrain.corpus.journal import JOURNAL
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.shards import Filters
from pretrain.corpus.sources import SourceOptions
from pretrain.corpus.store import Corpus, verify
from pretrain.corpus.tokenizer import ProteinTokenizer, tokenizer_from_string, train_tokenizer
from pretrain.errors import CrashError, UserError

ESM = ProteinTokenizer()
BLOCKS = 12


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 250)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 500)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Proteins for about a dozen blocks, each sequence two or three times in all."""
    generator = random.Random(1)
    distinct = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randint(1, 60))) for _ in range(100)]
    sequences = [*distinct, *distinct, *distinct[:50]]
    generator.shuffle(sequences)
    path = tmp_path / "x.fasta"
    path.write_text("".join(f">{number}\n{residues}\n" for number, residues in enumerate(sequences)))
    return path


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def shards_of(corpus: Corpus) -> tuple[str, dict[str, bytes]]:
    """All but the manifest, which names the sources; but the fingerprint in it."""
    return corpus.fingerprint, {name: data for name, data in content(corpus.path).items() if name != "manifest.json"}


def sequences(corpus: Corpus) -> list[tuple[str, str]]:
    return [(corpus.id(i), "".join(ESM.tokens[t] for t in corpus.tokens(i)[1:-1].tolist())) for i in range(len(corpus))]


def records(fasta: Path) -> list[tuple[str, str]]:
    lines = fasta.read_text().splitlines()
    return [(name[1:], residues) for name, residues in zip(lines[::2], lines[1::2], strict=True)]


# --- any number of processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filters", [Filters(), Filters(5, 50, deduplicate=True, skip_bad=True)], ids=["all", "some"])
def test_the_corpus_is_the_same_for_any_number_of_processes(filters: Filters, source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text().replace("W", "1", 9))
    if not filters.skip_bad:
        source.write_text(source.read_text().replace("1", "W", 9).replace("1", "W"))
    made = [prepare([source], tmp_path / str(n), Settings(ESM, filters=filters), workers=n).path for n in (1, 2, 3)]
    assert len(content(made[0])) > 8
    assert content(made[0]) == content(made[1]) == content(made[2])
    assert verify(made[0])


def test_several_processes_take_part(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "processes"
    write_shard = shards.write_shard

    def watched(*arguments: Any) -> str:
        with written.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.01)
        return write_shard(*arguments)

    monkeypatch.setattr(shards, "write_shard", watched)
    corpus = prepare([source], tmp_path / "corpus", Settings(ESM), workers=2)
    processes = written.read_text().split()
    assert len(processes) == len(corpus.shards) >= BLOCKS
    assert len(set(processes)) == 2
    assert str(os.getpid()) not in processes
    assert sequences(corpus) == records(source)


def test_a_pipe_gives_the_corpus_that_a_file_gives(source: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.fasta"
    os.mkfifo(pipe)
    child = multiprocessing.get_context("fork").Process(target=lambda: pipe.write_bytes(source.read_bytes()))
    child.start()
    made = prepare([pipe], tmp_path / "1", Settings(ESM))
    child.join()
    assert shards_of(made) == shards_of(prepare([source], tmp_path / "2", Settings(ESM)))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_mistake_in_the_order_of_the_sources_is_told(workers: int, source: Path, tmp_path: Path) -> None:
    """Although the second source is read, in vain, while another process is still busy with the first."""
    text = source.read_text()
    source.write_text(text[: len(text) // 2].rpartition(">")[0] + ">bad\n1\n" + ">b\nMK\n" * 100)
    later = tmp_path / "y.fasta"
    later.write_bytes(b"\x1f\x8brubbish, rubbish")
    with pytest.raises(UserError, match="record 'bad' has '1' at position 1"):
        prepare([source, later], tmp_path / "corpus", Settings(ESM), workers=workers)


def test_a_worker_that_is_killed_is_told_and_the_same_command_continues(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(CrashError, match=r"^a worker process was killed, .* with fewer --workers$"):
            prepare([source], tmp_path / "corpus", Settings(ESM), workers=2)
    assert sequences(prepare([source], tmp_path / "corpus", Settings(ESM), workers=2)) == records(source)


# --- continued where it stopped ---------------------------------------------------------------------------------------


def stop_at(number: int, how: Callable[[Path], object]) -> Callable[..., str]:
    """A ``write_shard`` that stops at one block."""
    write_shard = shards.write_shard

    def write(file: Path, *rest: Any) -> str:
        if file.name == f"shard-{number:05d}.arrow":
            how(file)
        return write_shard(file, *rest)

    return write


def killed(source: Path, out: Path, number: int, workers: int) -> None:
    """Prepare, and be killed with SIGKILL when a block is about to be written."""

    def run() -> None:
        parent = os.getpid()
        shards.write_shard = stop_at(number, lambda _: (os.kill(parent, signal.SIGKILL), time.sleep(60)))  # type: ignore
        prepare([source], out, Settings(ESM, filters=Filters(deduplicate=True)), workers=workers)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are tokenised, with one worker."""
    names, write_shard = list[str](), shards.write_shard
    monkeypatch.setattr(
        shards, "write_shard", lambda file, *rest: (names.append(file.name), write_shard(file, *rest))[1]
    )
    return names


def continued(source: Path, out: Path) -> Path:
    return prepare([source], out, Settings(ESM, filters=Filters(deduplicate=True)), workers=1).path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_prepare_is_continued_where_it_stopped(
    workers: int, source: Path, tmp_path: Path, written: list[str]
) -> None:
    whole = content(continued(source, tmp_path / "whole"))
    blocks = len(written)
    out = tmp_path / "corpus"
    killed(source, out, 5, workers)
    assert not out.exists()
    written.clear()
    assert content(continued(source, out)) == whole
    assert len(written) <= blocks - (5 if workers == 1 else 2)
    assert "shard-00005.arrow" in written
    assert {file.name for file in tmp_path.iterdir()} == {"x.fasta", "whole", "corpus"}


def test_a_prepare_killed_while_duplicates_are_taken_out_is_continued(
    source: Path, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(continued(source, tmp_path / "whole"))
    written.clear()
    write_rows, calls = duplicates.write_rows, list[Path]()

    def fail_at_the_third(file: Path, *rest: Any) -> str:
        calls.append(file)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_rows(file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(duplicates, "write_rows", fail_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            continued(source, tmp_path / "corpus")
    written.clear()
    assert content(continued(source, tmp_path / "corpus")) == whole
    assert written == []


def change_the_first(source: Path, records: int) -> None:
    """Other sequences of the same lengths in the first records of a FASTA file."""
    lines = source.read_text().splitlines()
    lines[1 : 2 * records : 2] = ["W" * len(line) for line in lines[1 : 2 * records : 2]]
    source.write_text("\n".join(lines) + "\n")


def test_a_sequence_whose_first_copy_is_gone_when_prepare_is_continued_is_kept_where_it_comes_next(
    source: Path, tmp_path: Path, written: list[str]
) -> None:
    out, table = tmp_path / "corpus", tmp_path / "clusters.tsv"
    table.write_text("0\t0\n")
    with pytest.raises(UserError, match="are in no cluster"):  # when all duplicates were taken out
        prepare([source], out, Settings(ESM, filters=Filters(deduplicate=True), clusters=str(table)), workers=1)
    change_the_first(source, 20)
    whole = content(continued(source, tmp_path / "whole"))
    assert content(continued(source, out)) == whole


def test_finished_shards_that_were_damaged_since_are_made_again(
    source: Path, tmp_path: Path, written: list[str]
) -> None:
    whole = content(continued(source, tmp_path / "whole"))
    out = tmp_path / "corpus"
    killed(source, out, 5, 1)
    partial = tmp_path / ".corpus.partial"
    (partial / "shard-00001.arrow").write_bytes(b"half")
    (partial / "shard-00003.arrow").unlink()
    with (partial / JOURNAL).open("a") as journal:
        journal.write('{"number": 4, "inp')
    written.clear()
    assert content(continued(source, out)) == whole
    assert written[:3] == ["shard-00001.arrow", "shard-00003.arrow", "shard-00005.arrow"]


def test_blocks_that_changed_since_are_made_again(source: Path, tmp_path: Path, written: list[str]) -> None:
    out = tmp_path / "corpus"
    killed(source, out, 5, 1)
    text = source.read_text()
    source.write_text(text.replace(text.splitlines()[1], "A" * len(text.splitlines()[1]), 1))  # the same length
    whole = content(continued(source, tmp_path / "whole"))
    written.clear()
    assert content(continued(source, out)) == whole
    assert written[:2] == ["shard-00000.arrow", "shard-00005.arrow"]


def test_with_other_settings_everything_is_made_again(source: Path, tmp_path: Path, written: list[str]) -> None:
    killed(source, tmp_path / "corpus", 5, 1)
    corpus = prepare([source], tmp_path / "corpus", Settings(ESM, filters=Filters(min_length=10)), workers=1)
    assert len(written) == len(corpus.shards) >= BLOCKS
    assert sequences(corpus) == [(name, text) for name, text in records(source) if len(text) + 2 >= 10]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_with_the_path_and_what_is_done_stays(
    workers: int, source: Path, tmp_path: Path, written: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = content(continued(source, tmp_path / "whole"))
    blocks = len(written)
    out = tmp_path / "corpus"

    def full(file: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", stop_at(7, full))
        with pytest.raises(UserError) as caught:
            prepare([source], out, Settings(ESM, filters=Filters(deduplicate=True)), workers=workers)
    assert str(caught.value) == (
        f"{tmp_path}/.corpus.partial/shard-00007.arrow: No space left on device; make room and give the same command "
        "again: it continues where it stopped"
    )
    written.clear()
    assert content(continued(source, out)) == whole
    assert len(written) <= blocks - 7


def test_a_disk_that_is_really_full_leaves_no_half_shard(source: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the end of the disk: the write itself fails."""
    import resource

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match="File too large") as caught:
            prepare([source], tmp_path / "corpus", Settings(ESM), workers=1)
        assert caught.value.filename == str(tmp_path / ".corpus.partial" / "shard-00000.arrow")
        os._exit(7)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert {file.name for file in tmp_path.iterdir()} == {"x.fasta"}


def test_a_disk_that_is_full_when_prepare_is_continued_loses_nothing(
    source: Path, tmp_path: Path, written: list[str]
) -> None:
    import resource

    whole = content(continued(source, tmp_path / "whole"))
    blocks = len(written)
    out = tmp_path / "corpus"
    killed(source, out, 5, 1)

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(OSError, match="File too large"):
            continued(source, out)
        os._exit(7)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join(60)
    assert child.exitcode == 7
    written.clear()
    assert content(continued(source, out)) == whole
    assert len(written) <= blocks - 5


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_sequences_outside_of_the_lengths_are_left_out_and_counted(source: Path, tmp_path: Path) -> None:
    given = records(source)
    corpus = prepare([source], tmp_path / "corpus", Settings(ESM, filters=Filters(12, 42)))
    assert sequences(corpus) == [(name, text) for name, text in given if 12 <= len(text) + 2 <= 42]
    assert corpus.skipped == {
        "short": sum(len(text) + 2 < 12 for _, text in given),
        "long": sum(len(text) + 2 > 42 for _, text in given),
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_of_equal_sequences_the_first_is_kept(workers: int, source: Path, tmp_path: Path) -> None:
    source.write_text(source.read_text() + ">lower\nacac\n>upper\nACAC\n")
    given = records(source)
    expected: dict[str, str] = {}
    for name, text in given:
        expected.setdefault(text.upper(), name)
    corpus = prepare([source], tmp_path / "corpus", Settings(ESM, filters=Filters(deduplicate=True)), workers=workers)
    assert sequences(corpus) == [(name, text) for text, name in expected.items()]
    assert corpus.skipped == {"duplicate": len(given) - len(expected)}
    assert verify(corpus.path) == len(corpus.shards)


def test_duplicates_are_taken_out_of_nothing_too(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no sequence is left \(250 short\); "):
        prepare([source], tmp_path / "corpus", Settings(ESM, filters=Filters(min_length=100, deduplicate=True)))


def test_ids_may_repeat_they_are_names_and_no_keys(source: Path, tmp_path: Path) -> None:
    """As the numbers of lines do, where several files of text make a corpus."""
    source.write_text(">a\nMK\n>a\nMV\n>b\nMK\n>a\nMK\n")
    assert sequences(prepare([source], tmp_path / "corpus", Settings(ESM))) == [
        ("a", "MK"),
        ("a", "MV"),
        ("b", "MK"),
        ("a", "MK"),
    ]


def test_a_shard_of_nothing_but_duplicates_is_left_out(source: Path, tmp_path: Path) -> None:
    twice = prepare([source, source], tmp_path / "twice", Settings(ESM, filters=Filters(deduplicate=True)))
    once = prepare([source], tmp_path / "once", Settings(ESM, filters=Filters(deduplicate=True)))
    assert sequences(twice) == sequences(once)
    assert all(len(shard.ids) for shard in twice.shards)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_are_skipped_counted_and_listed(workers: int, source: Path, tmp_path: Path) -> None:
    given = records(source)
    table = tmp_path / "y.csv"
    table.write_text("id,text\na,MK\nb\nc,M1\n")
    source.write_text("rubbish\n" + source.read_text() + ">none\n>bad\nM!K\n>good\nMK\n")
    line = 2 + 2 * len(given)
    empty = tmp_path / "z.txt"
    empty.touch()
    corpus = prepare(
        [source, table, empty], tmp_path / "corpus", Settings(ESM, filters=Filters(skip_bad=True)), workers=workers
    )
    assert sequences(corpus) == [*given, ("good", "MK"), ("a", "MK")]
    assert corpus.skipped == {"bad": 6}
    allowed = "allowed: the letters A-Z, '-' and '.'; correct or remove it"
    assert (corpus.path / "skipped.tsv").read_text().splitlines() == [
        "source\tline\treason",
        f"{source}\t1\tnot FASTA: a header line that begins with '>' is expected, found 'rubbish'",
        f"{source}\t{line}\trecord 'none' has no sequence; remove its header or add the sequence",
        f"{source}\t{line + 1}\trecord 'bad' has '!' at position 2; {allowed}",
        f"{table}\t3\thas 1 fields, the header has 2; correct or remove it",
        f"{table}\t4\trecord 'c' has '1' at position 2; {allowed}",
        f"{empty}\t\tis empty; at least one sequence is needed",
    ]


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    text = Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\tb\nc \xff.txt"))
    text.write_bytes(b"MK")
    fasta = text.with_suffix(".fasta")
    fasta.write_bytes(b">a\nMK\n>b\n1\n")
    settings = Settings(ESM, SourceOptions(document="file"), Filters(skip_bad=True))
    corpus = prepare([text, fasta], tmp_path / "corpus", settings)
    assert [corpus.id(i) for i in range(2)] == ["a\tb\nc \ufffd.txt", "a"]
    assert (corpus.path / "skipped.tsv").read_text().splitlines()[1].split("\t")[:2] == [
        f"{tmp_path}/a b c \ufffd.fasta", "3"
    ]  # fmt: skip
    assert prepare([text, fasta], tmp_path / "corpus", settings).fingerprint == corpus.fingerprint


def test_a_text_that_its_tokenizer_makes_nothing_of_is_bad(tmp_path: Path) -> None:
    trained = json.loads(train_tokenizer([], 261).serialize())
    trained["normalizer"] = {"type": "Replace", "pattern": {"String": "-"}, "content": ""}
    tokenizer = tokenizer_from_string(json.dumps(trained), "x")
    (tmp_path / "x.txt").write_text("one\n---\ntwo\n")
    corpus = prepare([tmp_path / "x.txt"], tmp_path / "corpus", Settings(tokenizer, filters=Filters(skip_bad=True)))
    assert [corpus.id(i) for i in range(len(corpus))] == ["1", "3"]
    reason = "record '2' has nothing that becomes a token; correct or remove it"
    assert (corpus.path / "skipped.tsv").read_text().splitlines()[1:] == [f"{tmp_path / 'x.txt'}\t2\t{reason}"]


def test_what_changes_the_content_changes_the_fingerprint(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "x.txt"
    text.write_text("MK\n\nLA\nLA\n")
    made = [
        (source, SourceOptions(), Filters()),
        (source, SourceOptions(), Filters(min_length=10)),
        (source, SourceOptions(), Filters(max_length=30)),
        (source, SourceOptions(), Filters(deduplicate=True)),
        (text, SourceOptions(), Filters()),
        (text, SourceOptions(document="paragraph"), Filters(skip_bad=True)),
    ]
    corpora = [prepare([path], tmp_path / str(n), Settings(ESM, *how)) for n, (path, *how) in enumerate(made)]
    assert len({corpus.fingerprint for corpus in corpora}) == len(made)
    assert corpora[0].manifest["prepared"] == {
        "sources": [{"name": str(source), "kind": "fasta", "num_bytes": source.stat().st_size}],
        "kind": None, "document": "line", "text_column": None, "id_column": None, "min_length": None,
        "max_length": None, "deduplicate": False, "skip_bad": False, "windows": None,
            "skipped": {},
    }  # fmt: skip


# --- what is shown ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", kind())
        prepare([source], tmp_path / kind.__name__, Settings(ESM))
        shown[kind] = sys.stderr.getvalue()  # type: ignore[attr-defined]
    last = shown[Terminal].split("\r")[-1]
    assert "100%" in last
    assert "sequences/s" in last
    assert "00:00" in last
    assert not shown[io.StringIO]


def test_the_command_says_what_was_left_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source.write_text(">a\nMK\n>b\nMK\n>c\nM1\n>d\nMKLAA\n")
    out = tmp_path / "corpus"
    assert main(["prepare", str(source), "--out", str(out), "--deduplicate", "--skip_bad", "--max_length", "5"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 sequences, 4 tokens",
        f"  left out     bad 1  duplicate 1  long 1; the bad ones are listed in {out}/skipped.tsv",
    ]

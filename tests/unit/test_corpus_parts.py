"""Parts made by several machines, joined: the corpus that one machine makes."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.corpus import duplicates, parts, pieces, shards
from pretrain.corpus.parts import merge_parts, prepare_part
from pretrain.corpus.prepare import Settings, prepare, prepare_split
from pretrain.corpus.shards import Filters, Portion
from pretrain.corpus.split import Split
from pretrain.corpus.store import verify
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.errors import UserError

ESM = ProteinTokenizer()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 250)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 500)


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Two files for about a dozen blocks, with sequences that stand there twice and some that are bad."""
    generator = random.Random(1)
    distinct = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randint(1, 60))) for _ in range(150)]
    files = []
    for name, some in (("x", distinct[:100]), ("y", distinct[50:])):
        generator.shuffle(some)
        files.append(tmp_path / f"{name}.fasta")
        files[-1].write_text("".join(f">{name}{n}\n{residues}\n>bad\n1\n" for n, residues in enumerate(some)))
    return files


def content(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


SKIP = Filters(min_length=10, skip_bad=True)


def make(sources: list[Path], directory: Path, of: int = 3, first: int = 1) -> list[Path]:
    return [
        prepare_part(
            sources, directory / f"part{n}", Settings(ESM, filters=SKIP), Portion(n, of), workers=1 + n % 2
        ).path
        for n in range(first, of + 1)
    ]


@pytest.mark.parametrize("of", [1, 3, 50])
def test_the_parts_of_any_number_of_machines_join_to_the_corpus_of_one(
    of: int, sources: list[Path], tmp_path: Path
) -> None:
    whole = prepare(sources, tmp_path / "whole", Settings(ESM, filters=SKIP)).path
    made = make(sources, tmp_path, of)
    merge_parts(made[::-1], tmp_path / "merged")
    assert len(content(whole)) > 8
    assert content(tmp_path / "merged") == content(whole)


@pytest.mark.parametrize("deduplicated", [False, True])
@pytest.mark.parametrize("split", [None, Split(share=0.3)])
def test_duplicates_and_the_split_are_for_the_merge(
    deduplicated: bool, split: Split | None, sources: list[Path], tmp_path: Path
) -> None:
    filters = Filters(min_length=10, skip_bad=True, deduplicate=deduplicated)
    if split:
        prepare_split(sources, tmp_path / "whole", Settings(ESM, filters=filters, split=split))
    else:
        prepare(sources, tmp_path / "whole", Settings(ESM, filters=filters))
    made = make(sources, tmp_path)
    before = [content(path) for path in made]
    merge_parts(made, tmp_path / "merged", deduplicated, split)
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    assert [content(path) for path in made] == before  # linked, and none of them written to
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_shards_are_linked_and_copied_only_where_there_are_no_links(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(sources, tmp_path)
    merge_parts(made, tmp_path / "linked")
    for path in (tmp_path / "linked").glob("shard-*.arrow"):
        assert any(os.path.samefile(path, part / path.name) for part in made if (part / path.name).exists())

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    merge_parts(made, tmp_path / "copied")
    assert content(tmp_path / "copied") == content(tmp_path / "linked")
    shutil.rmtree(made[0])
    assert verify(tmp_path / "copied")


def test_each_machine_tokenises_its_own_blocks_only(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write_shard = [], shards.write_shard
    monkeypatch.setattr(
        shards, "write_shard", lambda file, *rest: (written.append(file.name), write_shard(file, *rest))[1]
    )
    for n in (1, 2, 3):
        written.clear()
        part = prepare_part(sources, tmp_path / str(n), Settings(ESM, filters=SKIP), Portion(n, 3), workers=1)
        assert written == [f"shard-{block:05d}.arrow" for block in range(n - 1, part.num_blocks, 3)]


def test_a_part_and_a_merge_that_were_ended_are_continued(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters = Filters(min_length=10, skip_bad=True, deduplicate=True)
    whole = prepare(sources, tmp_path / "whole", Settings(ESM, filters=filters)).path
    written, write_shard = [], shards.write_shard

    def stop_at_the_third(file: Path, *rest: Any) -> str:
        written.append(file.name)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_shard(file, *rest)

    monkeypatch.setattr(shards, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_part(sources, tmp_path / "part1", Settings(ESM, filters=SKIP), Portion(1, 3), workers=1)
    prepare_part(sources, tmp_path / "part1", Settings(ESM, filters=SKIP), Portion(1, 3), workers=1)
    assert len(written) == len(set(written)) + 1  # the one that was stopped, again
    monkeypatch.undo()
    small_blocks(monkeypatch)
    made = [tmp_path / "part1", *make(sources, tmp_path, first=2)]

    rows, write_rows = [], duplicates.write_rows

    def stop_at_the_second(file: Path, *rest: Any) -> str:
        rows.append(file.name)
        if len(rows) == 2:
            raise KeyboardInterrupt
        return write_rows(file, *rest)

    monkeypatch.setattr(duplicates, "write_rows", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        merge_parts(made, tmp_path / "merged", True, workers=1)
    merge_parts(made, tmp_path / "merged", True, workers=1)
    assert rows.count(rows[0]) == 1
    assert content(tmp_path / "merged") == content(whole)


def test_a_sequence_whose_first_copy_is_gone_when_a_merge_is_continued_is_kept_where_it_comes_next(
    sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    made = make(sources, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(parts, "finish", fail)  # when all duplicates were taken out
        with pytest.raises(KeyboardInterrupt):
            merge_parts(made, tmp_path / "merged", True, workers=1)
    lines = sources[0].read_text().splitlines()
    lines[1:40:4] = ["W" * len(line) for line in lines[1:40:4]]  # other sequences of the same lengths
    sources[0].write_text("\n".join(lines) + "\n")
    shutil.rmtree(made[0])
    prepare_part(sources, made[0], Settings(ESM, filters=SKIP), Portion(1, 3))
    merge_parts(made, tmp_path / "merged", True, workers=1)
    filters = Filters(min_length=10, skip_bad=True, deduplicate=True)
    assert content(tmp_path / "merged") == content(
        prepare(sources, tmp_path / "whole", Settings(ESM, filters=filters)).path
    )


# --- mistakes ---------------------------------------------------------------------------------------------------------


def edit(name: str, value: object) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        part = json.loads((path / "part.json").read_text())
        (path / "part.json").write_text(json.dumps({**part, name: value}))

    return act


def other_filters(path: Path) -> None:
    part = json.loads((path / "part.json").read_text())
    edit("settings", {**part["settings"], "min_length": 30})(path)


def neighbours(path: Path) -> None:
    """Name a shard of another part; there is one of that name here, too."""
    shutil.copy(path.parent / "part1" / "shard-00000.arrow", path)
    first, *rest = json.loads((path / "part.json").read_text())["entries"]
    edit("entries", [{**first, "file": "../part1/shard-00000.arrow", "num_sequences": 16}, *rest])(path)


DAMAGES: dict[str, tuple[Callable[[Path], object] | None, str]] = {
    "missing": (None, "1 of 3 parts missing: 2; prepare and give all of them"),
    "twice": (edit("number", 1), "{2}: is part 1 of 3, as {1}; give each part once"),
    "another number of parts": (
        edit("of", 4),
        "{2}: is part 2 of 4, {1} part 1 of 3; parts of one corpus have the same N in --shard I/N: prepare one of them "
        "again",
    ),
    "other settings": (
        other_filters,
        "{2}: was prepared with min_length 30, {1} with 10; prepare one of them again",
    ),
    "other sources": (
        edit("layout", "?"),
        "{2}: was made of other sources than {1} (14 blocks, 14), or they changed in between; prepare one of "
        "them again",
    ),
    "no part": (
        shutil.rmtree,
        "{2}/part.json: not found; --merge joins directories that `pretrain prepare --shard I/N` made",
    ),
    "damaged": (
        lambda path: (path / "part.json").write_text("{}"),
        "{2}: damaged part (KeyError: 'format_version'); prepare it again",
    ),
    "a shard of its neighbour": (
        neighbours,
        "{2}: part.json names the shard '../part1/shard-00000.arrow', which is not beside it; prepare it again",
    ),
    "another version": (edit("format_version", 2), "{2}: made by another version; prepare this part again"),
    "lost shard": (
        lambda path: (path / "shard-00001.arrow").unlink(),
        "{2}/shard-00001.arrow: cannot be read ([Errno 2] no such file: '{2}/shard-00001.arrow'); copy or prepare this "
        "part again",
    ),
    "shard of another part": (
        lambda path: shutil.copy(path.parent / "part1" / "shard-00000.arrow", path / "shard-00001.arrow"),
        "{2}/shard-00001.arrow: holds 16 sequences instead of 14; copy or prepare this part again",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_parts_that_do_not_belong_together_are_told_in_one_line(
    damage: str, sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    act, message = DAMAGES[damage]
    made = make(sources, tmp_path)
    if act:
        act(made[1])
    given = [str(path) for path in made if act or path.name != "part2"]
    assert main(["prepare", "--merge", *given, "--out", str(tmp_path / "merged")]) == 2
    told = capsys.readouterr().err.removeprefix("pretrain: error: ").rstrip("\n")
    assert told == message.format("", *made)
    assert not (tmp_path / "merged").exists()


def test_parts_of_sources_that_differ_do_not_join(sources: list[Path], tmp_path: Path) -> None:
    one = prepare_part(sources, tmp_path / "1", Settings(ESM, filters=SKIP), Portion(1, 2))
    two = prepare_part(sources[:1], tmp_path / "2", Settings(ESM, filters=SKIP), Portion(2, 2))
    with pytest.raises(UserError, match="was made of other sources than"):
        merge_parts([one.path, two.path], tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/3"], "--shard is 0/3; give I/N with I from 1 to N, such as 2/8"),
        (["--shard", "4/3"], "--shard is 4/3; give I/N with I from 1 to N, such as 2/8"),
        (["--shard", "3"], "--shard is 3; give I/N with I from 1 to N, such as 2/8"),
        (
            ["--shard", "1/3", "--deduplicate"],
            "--deduplicate compares all sequences, and a part has only its own; prepare the parts without it, and give "
            "it with --merge",
        ),
        (
            ["--shard", "1/3", "--validation_share", "0.1"],
            "a split is made when the parts are joined; give its options with --merge",
        ),
        (
            ["--merge", "--min_length", "3"],
            "--merge takes the parts as they are, with --deduplicate and a split only; give the other options when the "
            "parts are prepared",
        ),
        (
            ["--merge", "--shard", "1/3"],
            "--merge takes the parts as they are, with --deduplicate and a split only; give the other options when the "
            "parts are prepared",
        ),
    ],
)
def test_options_that_do_not_go_together_are_told_in_one_line(
    arguments: list[str],
    message: str,
    sources: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prepare", str(sources[0]), "--out", str(tmp_path / "out"), *arguments]) == 2
    assert capsys.readouterr().err == f"pretrain: error: {message}\n"
    assert not (tmp_path / "out").exists()


def test_a_part_is_no_corpus_and_no_source(
    sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "part"
    assert main(["prepare", str(sources[0]), "--out", str(out), "--shard", "2/3", "--skip_bad"]) == 0
    assert capsys.readouterr().out == f"{out}: part 2 of 3: 28 sequences of 2 blocks of 7\n"
    assert main(["prepare", str(out), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == (
        f"pretrain: error: {out}: is a part of a corpus; join all parts with `pretrain prepare --merge PART... --out "
        "DIR`\n"
    )
    assert parts.is_part(out)

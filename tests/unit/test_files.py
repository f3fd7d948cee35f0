"""Files are there whole or not at all; and what an error says is one line."""

import os
from pathlib import Path

import pytest

from pretrain.errors import UserError, one_line
from pretrain.files import append_line, atomic_file, new_directory, write_whole


def test_a_file_that_could_not_be_finished_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_whole(path, "before")
    with pytest.raises(TypeError), atomic_file(path, replace=True) as file:
        file.writelines(["half", None])  # type: ignore[list-item]
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


def test_of_two_commands_that_write_one_file_the_second_is_refused_and_the_first_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    with atomic_file(path) as first:
        first.write("first\n" * 10_000)
        with pytest.raises(UserError, match=r"scores.csv: process \d+ on .* is writing it"), atomic_file(path):
            pytest.fail("the second began to write")
        first.write("end\n")
    with pytest.raises(UserError, match=r"scores.csv: exists already"), atomic_file(path):
        pytest.fail("the file was to be replaced")
    assert path.read_text() == "first\n" * 10_000 + "end\n"
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_commands_that_make_one_directory_the_second_is_refused_and_the_first_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "export"
    with new_directory(out) as first:
        (first / "model").write_text("first")
        with pytest.raises(UserError, match=r"export: process \d+ on .* is writing it"), new_directory(out):
            pytest.fail("the second began to write")
    with pytest.raises(UserError, match=r"export: exists already"), new_directory(out):
        pytest.fail("the directory was to be replaced")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["export", "export/model"]


def test_what_a_killed_command_left_gives_way_to_the_next(tmp_path: Path) -> None:
    for name in (".file.lock", ".file.partial", ".directory.lock"):
        (tmp_path / name).write_text("process 1 on another machine")
    (tmp_path / ".directory.partial").mkdir()
    (tmp_path / ".directory.partial" / "half").write_text("half")
    write_whole(tmp_path / "file", "whole")
    with new_directory(tmp_path / "directory") as partial:
        (partial / "whole").write_text("whole")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["directory", "file", "whole"]


def test_a_directory_gets_its_name_when_the_disk_has_all_that_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def inodes(directory: Path) -> set[int]:
        return {path.stat().st_ino for path in (directory, *directory.rglob("*"))}

    def fsync(descriptor: int) -> None:
        if not (tmp_path / "out").exists():
            synced.add(os.fstat(descriptor).st_ino)

    synced = set[int]()
    monkeypatch.setattr(os, "fsync", fsync)
    with new_directory(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        for name in ("model", "deep/shard"):
            (partial / name).write_text("weights")
        (partial / "last").symlink_to("model")
    assert synced == inodes(tmp_path / "out")


@pytest.mark.parametrize("before", ["", "one\n", "one\nhal", "half"])
def test_a_line_is_added_after_the_last_whole_one(before: str, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(before)
    append_line(path, "né")
    assert path.read_text(encoding="utf-8") == before[: before.rfind("\n") + 1] + "né\n"
    append_line(tmp_path / "new", "one")
    assert (tmp_path / "new").read_text() == "one\n"


def test_what_an_error_says_is_one_short_line_and_never_nothing() -> None:
    assert one_line(ValueError("  a\n\tb  c")) == "a b c"
    assert one_line(ValueError("abcdef"), 3) == "abc"
    assert one_line(RuntimeError("")) == "RuntimeError"

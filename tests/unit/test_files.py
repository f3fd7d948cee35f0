"""Files are there whole or not at all; and what an error says is one line."""

from pathlib import Path

import pytest

from pretrain.errors import one_line
from pretrain.files import append_line, atomic_file, write_whole


def test_a_file_that_could_not_be_finished_leaves_the_one_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_whole(path, "before")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.writelines(["half", None])  # type: ignore[list-item]
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]


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

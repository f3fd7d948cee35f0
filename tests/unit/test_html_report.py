"""`pretrain inspect --html`: one page that needs nothing else, with the runs' own numbers."""

import errno
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pretrain.cli import main


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    paths = []
    for number, name in enumerate(("first", "<second>")):
        path = tmp_path / name
        path.mkdir()
        paths.append(path)
        model = {"learning_rate": 0.001 * (number + 1), "warmup_steps": 3}
        data = {"max_length": 64, **({"task": "binary"} if number else {})}
        settings = {"seed_everything": 0, "model": model, "data": data, "trainer": {"max_steps": 1000}}
        (path / "config.yaml").write_text(yaml.safe_dump(settings))
        rows = [(n, "train/loss", 3 - n / 1000) for n in range(1000)] + [(n, "lr-AdamW", 1e-3) for n in range(1000)]
        rows += [(n, "val/loss", 2.5 + number - n / 1000) for n in (499, 999)] + [(5, "train/loss", float("nan"))]
        lines = "".join(f"{step},{key},{value}\n" for step, key, value in sorted(rows))
        (path / "metrics.csv").write_text("step,name,value\n" + lines)
    # A finished fine-tuning run's "validation" holds its metrics, not named sets.
    (paths[1] / "result.json").write_text(json.dumps({"task": "binary", "validation": {"accuracy": 0.75}}))
    (paths[0] / "result.json").write_text(json.dumps({"val/loss": 2.0, "val/perplexity": 7.389, "tokens_seen": 12345}))
    return paths


class Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_runs_are_drawn_and_told_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["inspect", *map(str, runs), "--html", str(out)]) == 0
    page = out.read_text()
    parsed = Text()
    parsed.feed(page)
    assert parsed.tags.count("svg") == 3, "training loss, validation loss, learning rate"
    assert page.count("<polyline") == 6, "a line for each run"
    told = "|".join(filter(None, parsed.text))
    for expected in ("first|<second>", "validation perplexity|7.389|–", "tokens seen|12,345|–"):
        assert expected in told, expected
    assert "model.learning_rate|0.001|0.002" in told
    assert "warmup_steps" not in told, "the same in both"
    assert "nan" not in page.lower()
    assert len(page) < 60_000, "a thousand steps are reduced"


def test_losses_are_of_masked_tokens_in_pre_training_only(runs: list[Path], tmp_path: Path) -> None:
    for which, masked in ((runs[:1], True), (runs[1:], False), (runs, False)):
        out = tmp_path / f"{len(which)}{masked}.html"
        assert main(["inspect", *map(str, which), "--html", str(out)]) == 0
        assert ("mask" in out.read_text()) == masked


def test_a_page_that_cannot_be_finished_leaves_nothing(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    there = set(tmp_path.iterdir())
    assert main(["inspect", str(runs[0]), "--html", str(tmp_path / "x.html")]) == 2
    assert set(tmp_path.iterdir()) == there
    assert capsys.readouterr().err.startswith(f"pretrain: error: {tmp_path / 'x.html'}: No space left on device")


def test_a_page_in_the_place_of_a_directory_is_a_mistake(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "page.html"
    place.mkdir()
    assert main(["inspect", str(runs[0]), "--html", str(place)]) == 2
    assert capsys.readouterr().err.startswith(f"pretrain: error: {place}: Is a directory")


def test_the_page_needs_no_network_and_no_script(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["inspect", *map(str, runs), "--html", str(out)]) == 0
    assert not re.search(r"https?:|src=|<script|@import|url\(", out.read_text())


def test_a_page_is_written_anew_while_a_run_goes_on(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("earlier")
    assert main(["inspect", str(runs[0]), "--html", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert list(tmp_path.glob(".report*")) == []


def test_one_run_shows_all_its_settings(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["inspect", str(runs[0]), "--html", str(out)]) == 0
    assert "model.warmup_steps" in out.read_text()


def test_what_is_no_run_and_what_cannot_be_written_is_one_line(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        ([str(tmp_path), "--html", str(tmp_path / "x.html")], "no run (config.yaml is missing)"),
        ([str(runs[0]), "--html", str(runs[0] / "config.yaml" / "x.html")], "x.html: Not a directory; "),
        ([str(runs[0]), "--html", str(tmp_path / "x.csv")], "x.csv: the name must end in .html"),
        ([*map(str, runs), "--picture", str(tmp_path / "x.png")], "several runs with --html FILE"),
    ):
        assert main(["inspect", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not list(tmp_path.glob("*.html"))

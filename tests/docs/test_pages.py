"""The documentation does what it says: its commands run, its links lead somewhere, its error messages exist.

Blocks marked ```sh run as they stand: page by page, in order, each page in an empty folder of its own, offline.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "benchmarks").glob("*.md"), ROOT / "data/README.md"]
_SECONDS = {"tutorial": 1800}
"""For one block of a page that trains in earnest."""


def blocks(page: Path) -> list[str]:
    """The page's commands, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the commands that a page may call: `pretrain` and `python`, of this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    for name, command in {"pretrain": f"{sys.executable} -m pretrain", "python": sys.executable}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run_in_order_in_an_empty_folder(page: Path, programs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "",
    }
    for block in blocks(page):
        process = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS.get(page.stem, 300),
        )
        assert process.returncode == 0, f"{page.name}:\n{block}\n{process.stdout[-2000:]}\n{process.stderr[-2000:]}"


def made(page: Path) -> set[str]:
    """The runs, corpora and models that a page's commands begin, by their directories."""
    given = re.sub(r"\\\n\s*", "", "\n".join(blocks(page)))
    runs = re.findall(r"pretrain (?:fit|finetune) .*?--run (\S+)", given)
    unnamed = re.findall(r"pretrain (?:fit|finetune) -c (\w+)(?!.*--run )", given)
    out = re.findall(r"pretrain (?:prepare|export) .*?--out (\S+)", given)
    return {*runs, *out, *(f"runs/{name}" for name in unnamed)}


def test_whoever_follows_several_pages_in_one_folder_meets_no_run_of_another_page() -> None:
    owners: dict[str, list[str]] = {}
    for page in PAGES:
        for directory in made(page):
            owners.setdefault(directory, []).append(page.stem)
    assert len(owners) > 20
    assert {directory: pages for directory, pages in owners.items() if len(pages) > 1} == {}


def links(page: Path) -> Iterator[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    local = [link.partition("#")[0] for link in links(page) if "://" not in link and not link.startswith("#")]
    assert [link for link in local if not (page.parent / link).exists()] == []


def messages() -> list[str]:
    """Every text in the source, with … for what is filled in."""
    found = []
    for file in (ROOT / "pretrain").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(str(part) for part in parts))
    return found


def quoted() -> list[str]:
    """The messages that the troubleshooting page explains, as its headings quote them."""
    found = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) > 25
    return found


@pytest.mark.parametrize("message", quoted())
def test_every_error_that_the_page_explains_exists(message: str) -> None:
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    assert any(pattern.search(text) for text in messages())


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.slow
def test_the_drawings_show_the_code_as_it_is(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "drawings.py"), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    drawn = {path.name: path.read_text() for path in tmp_path.glob("*.svg")}
    assert drawn
    assert {name: (DOCS / "images" / name).read_text() for name in drawn} == drawn, "make drawings"

"""The package's surface: what it exports, what importing it costs, and how its command line answers."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pretrain
from pretrain.cli import main

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "transformers",
    "pytorch_lightning",
    "lightning_fabric",
    "numpy",
    "pyarrow",
    "tokenizers",
    "jaxtyping",
    "yaml",
)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that has imported nothing."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": path})


def imported(code: str, *arguments: str) -> tuple[str, set[str]]:
    """What code prints, and the heavy packages that are imported after it."""
    report = f"import sys; print('IMPORTED', *(name for name in {HEAVY!r} if name in sys.modules))"
    process = python(f"{code}\n{report}", *arguments)
    assert process.returncode == 0, process.stderr
    printed, _, names = process.stdout.rpartition("IMPORTED")
    return printed, set(names.split())


def command(*arguments: str) -> tuple[str, set[str]]:
    """The same for ``python -m pretrain``."""
    run = "import runpy\ntry: runpy.run_module('pretrain', run_name='__main__', alter_sys=True)"
    return imported(f"{run}\nexcept SystemExit as end: assert not end.code, end.code", *arguments)


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import pretrain; dir(pretrain); pretrain.__version__") == ("", set())


def test_help_imports_nothing_heavy_and_lists_every_command() -> None:
    printed, heavy = command("--help")
    assert not heavy
    for name in ("prepare", "tokenizer", "recipes", "plan", "fit", "inspect", "import", "export"):
        assert re.search(rf"^ +{name}\b", printed, re.MULTILINE), name


@pytest.mark.parametrize("name", ["prepare", "tokenizer", "inspect", "import", "export"])
def test_help_of_a_command_describes_its_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert f"usage: pretrain {name}" in capsys.readouterr().out


def test_version_is_printed_without_importing_anything_heavy() -> None:
    assert command("--version") == (f"pretrain {pretrain.__version__}\n", set())


def test_the_schedule_imports_torch_but_neither_lightning_nor_transformers() -> None:
    _, heavy = imported("from pretrain import InverseSqrtScheduler")
    assert not heavy & {"pytorch_lightning", "transformers", "pyarrow"}


@pytest.mark.parametrize("name", pretrain.__all__)
def test_every_exported_name_resolves_to_itself(name: str) -> None:
    value = getattr(pretrain, name)
    assert value.__name__ == name
    assert getattr(importlib.import_module(value.__module__), name) is value
    assert value.__doc__
    assert name in dir(pretrain)


def test_the_documented_names_are_exported() -> None:
    assert {"Encoder", "EncoderConfig", "InverseSqrtScheduler", "MLMDataModule", "MLMModule", "load"} <= set(
        pretrain.__all__
    )


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pretrain' has no attribute 'Encodr'"):
        pretrain.Encodr  # noqa: B018
    assert not hasattr(pretrain, "MLM")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "trian"),
        ([], "required"),
        (["export", "run"], "--out"),
        (["inspect", "run", "--colour"], "--colour"),
        (["tokenizer", "x.txt", "--out", "t.json", "--vocab_size", "many"], "many"),
        (["inspect", "/nowhere"], "/nowhere"),
        (["export", "/nowhere", "--out", "/nowhere/either"], "/nowhere"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_told_in_one_line_with_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pretrain: error: ")
    assert said in line


def test_an_unknown_command_ends_the_process_with_code_2() -> None:
    process = python("import runpy; runpy.run_module('pretrain', run_name='__main__', alter_sys=True)", "trian")
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1


def test_an_unknown_option_points_to_the_commands_own_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "x.fasta", "--out", "y", "--min_lenght", "3"]) == 2
    assert "unrecognized arguments: --min_lenght 3; see `pretrain prepare --help`" in capsys.readouterr().err

"""Recipes and sample data are found by name from any directory; what lies in the directory comes first."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from pretrain.cli import main
from pretrain.corpus.sources import SourceOptions, find_sources
from pretrain.errors import UserError
from pretrain.shipped import find_recipes, recipe_name, recipes, shipped
from pretrain.train.fit import build

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("quickstart", ["quickstart", "configs/quickstart.yaml"])
def test_a_recipe_is_found_by_name_from_any_directory(quickstart: str) -> None:
    found = find_recipes(["-c", quickstart, "--config=gpu"])
    assert found == ["-c", str(CONFIGS / "quickstart.yaml"), f"--config={CONFIGS / 'gpu.yaml'}"]


def test_a_name_with_an_ending_is_a_files() -> None:
    assert find_recipes(["-c", "quickstart.yaml"]) == ["-c", "quickstart.yaml"]


def test_a_file_of_the_name_is_preferred() -> None:
    for name in ("configs/quickstart.yaml", "quickstart"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("seed_everything: 0\n")
        assert find_recipes(["-c", name]) == ["-c", name]


def test_values_of_other_options_stay_as_they_are() -> None:
    given = ["--run", "quickstart", "--data.train", "gpu", "-c"]
    assert find_recipes(given) == given


def test_an_unknown_recipe_is_told_with_the_one_that_was_meant() -> None:
    with pytest.raises(UserError, match=r"esm2_8m: no such file, and no recipe.*did you mean esm2_8M\?"):
        find_recipes(["-c", "esm2_8m"])


def test_nothing_outside_what_ships_is_found() -> None:
    assert shipped("data/../pyproject.toml") is None
    assert shipped("pyproject.toml") is None
    assert shipped(str(CONFIGS / "quickstart.yaml")) is None


def test_the_quickstart_finds_its_data_from_any_directory_and_names_its_run_the_same() -> None:
    cli = build(["-c", "quickstart"])
    assert cli.run.directory == Path("runs/quickstart")
    assert cli.settings["data"]["train"] == "data/proteins/train.fasta.gz", (
        "a run's config holds no path of this machine"
    )
    (source,) = find_sources(cli.datamodule.train, SourceOptions())
    assert Path(source.name) == ROOT / "data/proteins/train.fasta.gz"


def test_data_in_the_directory_is_preferred_to_the_sample() -> None:
    own = Path("data/proteins/train.fasta.gz")
    own.parent.mkdir(parents=True)
    own.write_bytes(b"")
    assert [source.name for source in find_sources([own], SourceOptions())] == [str(own)]


def test_a_recipe_is_called_by_its_name_wherever_it_lies() -> None:
    assert recipe_name(CONFIGS / "gpu.yaml") == "gpu"
    assert recipe_name("mine/gpu.yaml") == "mine/gpu.yaml"


def test_every_recipe_is_listed_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    of_recipes, of_overlays = capsys.readouterr().out.split("\noverlays, given after a recipe:\n")
    assert all(line.split()[0] in ("compile", "ddp", "fsdp", "gpu", "wandb") for line in of_overlays.splitlines())
    listed = dict(line.split(maxsplit=1) for line in (of_recipes + of_overlays).splitlines())
    assert listed.keys() == {path.stem for path in CONFIGS.glob("*.yaml")}
    assert list(listed) == [name for name, _ in recipes()]
    sizes = [name for name in listed if name.startswith("esm2_")]
    assert sizes == sorted(sizes, key=lambda name: (name[-1] == "B", int(name[5:-1])))
    assert all(len(about) > 20 for about in listed.values())


def test_every_package_is_installed() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pretrain").rglob("*.py")}
    assert set(packages) == folders | {"pretrain.configs", "pretrain.data"}


def test_the_pinned_packages_run_on_the_oldest_python_that_is_promised() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = f"{pyproject['project']['requires-python'].removeprefix('>=')}.0"
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    for name, pin in pins.items():
        try:
            package = distribution(name)
        except PackageNotFoundError:  # the tests run with other versions than the pinned ones
            continue
        needs = package.metadata.get("Requires-Python")
        assert package.version != pin or not needs or oldest in SpecifierSet(needs), f"{name}=={pin} needs {needs}"

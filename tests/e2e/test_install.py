"""The source distribution builds a wheel, and what the wheel installs works from any directory."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("pretrain", "configs", "data", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")

pytestmark = pytest.mark.slow


def build(kind: str, source: Path, out: Path) -> Path:
    """A ``wheel`` or an ``sdist``, with the setuptools of this environment."""
    code = f"import sys; from setuptools.build_meta import build_{kind}; build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True)
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, from the source distribution, from a copy of the checkout."""
    place = tmp_path_factory.mktemp("build")
    checkout = place / "checkout"
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, checkout / part)
    with tarfile.open(build("sdist", checkout, place)) as archive:
        archive.extractall(place, filter="data")
    (unpacked,) = place.glob("pretrain_mlm-*/")
    return build("wheel", unpacked, place)


@pytest.fixture(scope="module")
def pretrain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, installed from the wheel into an environment of its own that borrows this one's dependencies."""
    environment = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin/python", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", wheel], check=True, env=outside())
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin/pretrain"


def outside() -> dict[str, str]:
    """The environment of who knows nothing of this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(*command: object, directory: Path) -> str:
    given = [str(part) for part in command]
    process = subprocess.run(given, cwd=directory, env=outside(), capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_wheel_holds_code_types_recipes_sample_data_and_licences(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"pretrain/{path.relative_to(ROOT)}" for path in (ROOT / "configs").glob("*.yaml")}
    expected |= {f"pretrain/{path.relative_to(ROOT)}" for path in (ROOT / "data").glob("*/*.gz")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "pretrain").rglob("*.py")}
    expected |= {"pretrain/py.typed", "pretrain/data/README.md"}
    (metadata,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    expected |= {f"{metadata}/licenses/LICENSE", f"{metadata}/licenses/NOTICE"}
    assert expected <= names
    assert {name.partition("/")[0] for name in names} == {"pretrain", metadata}, "nothing beside the package"
    assert not [name for name in names if name.endswith("make.py")], "what made the data is not installed"


def test_the_installed_command_trains_and_continues_in_an_empty_directory(pretrain: Path, tmp_path: Path) -> None:
    home = run(pretrain.parent / "python", "-c", "import pretrain; print(pretrain.__file__)", directory=tmp_path)
    assert Path(home.strip()).is_relative_to(pretrain.parents[1])
    assert run(pretrain, "--version", directory=tmp_path).startswith("pretrain ")
    assert "quickstart" in run(pretrain, "recipes", directory=tmp_path)
    few = ("--data.validation", "null", "--trainer.enable_progress_bar", "false", "--allow_change", "true")
    first = run(pretrain, "fit", "-c", "quickstart", *few, "--trainer.max_steps", 2, directory=tmp_path)
    assert "10,993 sequences" in first
    assert "continues after step 2 of 3" in run(
        pretrain, "fit", "-c", "configs/quickstart.yaml", *few, "--trainer.max_steps", 3, directory=tmp_path
    )
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_overlays_are_found_too(pretrain: Path, tmp_path: Path) -> None:
    assert "esm2_150M + gpu, on 8 x H100" in run(
        pretrain, "plan", "-c", "esm2_150M", "-c", "gpu", "--gpus", 8, directory=tmp_path
    )

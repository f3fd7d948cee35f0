"""The pins of requirements.lock can be installed wherever pyproject.toml says that the project can."""

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))


def test_every_pin_takes_the_oldest_python_that_the_project_takes() -> None:
    # Debian 12 has 3.11.2: a package that asks for 3.11.5 cannot be installed there.
    bound = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = f"{bound.removeprefix('>=')}.0"
    installed = [each for each in distributions() if PINS.get(each.name) == each.version.partition("+")[0]]
    if not installed:
        pytest.skip("none of the pins is installed here")
    wants = {each.name: each.metadata["Requires-Python"] or "" for each in installed}
    assert {name: python for name, python in wants.items() if not SpecifierSet(python).contains(oldest)} == {}

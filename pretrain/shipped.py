"""What ships with the project beside its code, found from any directory: the recipes and the sample corpora.

In a checkout they are the folders ``configs`` and ``data``; in an installation they lie inside the package.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.errors import UserError

_PACKAGE = Path(__file__).parent
_HOME = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
_CONFIGS, _DATA = "configs", "data"
OVERLAY = "Overlay: "
"""How the first line of an overlay begins."""


def shipped(name: str) -> Path | None:
    """The file or directory of this name, such as ``data/proteins/train.fasta.gz``, among what ships."""
    parts = Path(name).parts
    if parts[:1] not in ((_CONFIGS,), (_DATA,)) or ".." in parts:
        return None
    path = _HOME.joinpath(*parts)
    return path if path.exists() else None


def recipes() -> Iterator[tuple[str, str]]:
    """The name and the first line of every recipe, in order of name and size, and then of every overlay."""
    found = []
    for path in (_HOME / _CONFIGS).glob("*.yaml"):
        with path.open(encoding="utf-8") as file:
            found.append((path.stem, file.readline().removeprefix("#").strip()))
    yield from sorted(found, key=lambda recipe: (recipe[1].startswith(OVERLAY), *_by_size(recipe[0])))


def _by_size(name: str) -> tuple[str, float, str]:
    """Sorts esm2_35M before esm2_150M, and that before esm2_3B."""
    family, _, size = name.partition("_")
    number, scale = size[:-1], {"M": 1e6, "B": 1e9}.get(size[-1:])
    return (family, float(number) * scale, name) if scale and number.isdecimal() else (name, 0.0, name)


def find_recipes(arguments: Sequence[str]) -> list[str]:
    """Arguments in which every recipe that ``-c`` names has become the path of its file.

    A file of the name given is preferred, in whatever directory the command is given; then ``quickstart``, and
    ``configs/quickstart.yaml`` where that is not there, mean the recipe that ships.

    Raises:
        UserError: If a bare name is no recipe.
    """
    found = list(arguments)
    for place, argument in enumerate(found):
        option, equals, name = argument.partition("=")
        if option not in ("-c", "--config"):
            continue
        if equals:
            found[place] = f"{option}={_recipe(name)}"
        elif place + 1 < len(found):
            found[place + 1] = _recipe(found[place + 1])
    return found


def _recipe(name: str) -> str:
    if Path(name).is_file():
        return name
    if path := shipped(name):
        return str(path)
    if not name or "/" in name or Path(name).suffix:
        return name  # a file that is not there, which the parser says
    if path := shipped(f"{_CONFIGS}/{name}.yaml"):
        return str(path)
    close = difflib.get_close_matches(name, [known for known, _ in recipes()], n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"{name}: no such file, and no recipe of that name; {meant}`pretrain recipes` lists them")


def recipe_name(path: str | Path) -> str:
    """How a config file is called: a recipe that ships by its name, wherever it lies, another by its path."""
    inside = Path(path).is_absolute() and Path(path).parent == _HOME / _CONFIGS
    return Path(path).stem if inside else str(path)

"""What is wrong with a setting, in one line: what was given, what is allowed and which setting was probably meant."""

import difflib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.cli import LightningArgumentParser

from pretrain.train.hardware import other_precision

MISFIT = "Does not validate against any of the Union subtypes"  # begins jsonargparse's list of what else was tried

_INT, _FLOAT = "<class 'int'>", "<class 'float'>"
_WORDS = {
    _INT: "a whole number",
    _FLOAT: "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'tuple'>": "a list of the right length",
    "<class 'NoneType'>": "null",
    "tuple[float, float]": "a list of two numbers",
}
_CLASS = re.compile(r"(?:pretrain|pytorch_lightning|lightning_fabric|torch)\.[\w.]+")
_SHOWN = 6


def explain(message: str, parser: LightningArgumentParser) -> str:
    """A parser's message in one line, with what would do instead and where the settings are listed."""
    message = re.sub(r"NestedArg\(key='.*?', val='(.*)'\)$", r"\1", message)
    key = re.search(r'Parser key "([\w.]+)":', message)
    value = re.search(r"Got value: (.*)\Z", message, re.DOTALL) or re.search(r"Given value: (.*)", message)
    if key and value and key[1] == "trainer.precision":
        return other_precision(value[1])
    if key and MISFIT in message:
        said = _of_the_union(key[1], value[1] if value else "", message)
    elif key and value and (expected := re.search(r"Expected a (.*)\. Got value: ", message)):
        said = f"{key[1]} is {value[1]}; give {_words(expected[1])}"
    else:
        # What a link computes is a UserError's own line; jsonargparse puts its machinery before it.
        said = re.sub(r"^Call to compute_fn of link .* failed: ", "", " ".join(message.split()))
        said += _meant_by(said, parser)
    return f"{said}; `{parser.prog} --help` lists the settings"


def no_section(path: Path, parser: LightningArgumentParser) -> str | None:
    """What a config has in the place of a section; None if all is well. Defaults would silently take its place."""
    names = [key.split(".")[:-1] for key in list(parser.get_defaults().keys())]
    sections = {".".join(name[:end]) for name in names for end in range(1, len(name) + 1)}
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    waiting = list(config.items()) if isinstance(config, dict) else []
    for key, value in waiting:  # which grows
        if key in sections and not isinstance(value, dict):
            given = "empty" if value is None else f"{value}"
            return f"{path}: {key} is {given}; settings are expected below it, indented: give some, or leave it out"
        if key in sections:
            waiting += [(f"{key}.{name}", inner) for name, inner in value.items()]
    return None


def _of_the_union(key: str, given: str, message: str) -> str:
    """What is wrong with a setting of several types, where jsonargparse lists why it is none of them."""
    listed = re.search(r"Subtypes: \[(.*)\]$", message, re.MULTILINE)
    types = re.split(r", (?=<class|typing|tuple|collections|list)", listed[1] if listed else "")
    if all(kind in _WORDS or kind.startswith("typing.Literal") for kind in types):
        return f"{key} is {given}; give {_any_of(types)}"
    tried = re.findall(r"^ *- +(.*(?:\n {8,}.*)*)", message, re.MULTILINE)
    meant = [text for text in tried if not re.search(r"subclass of|NoneType|Expected a <class 'list'>", text)]
    reason = " ".join((meant or tried)[0].split())
    if reason.startswith(("Expected a path", "Expected a dot import path")):
        return f"{key} is {given}; {_classes(types, given)}"
    reason = re.sub(r"^Type .* expects a function or a callable class: ", "", reason)
    if inside := re.search(r"^Problem with given class_path '([\w.]+)': (.*)", reason):
        return f"{key}: {_inside(inside[1], inside[2])}"
    return f"{key}: {reason}"


def _any_of(types: list[str]) -> str:
    """What a person would call any of some types, their literal values first."""
    values = [value for kind in types for value in re.findall(r"[\w-]+", kind.partition("typing.Literal")[2])]
    literal = [f"one of {', '.join(dict.fromkeys(values))}"] if values else []
    words = [_WORDS[kind] for kind in types if kind in _WORDS and not (kind == _INT and _FLOAT in types)]
    return " or ".join(literal + words)


def _words(kind: str) -> str:
    """What a person would call a type."""
    if kind.startswith("typing.Literal"):
        return _any_of([kind])
    elements = re.fullmatch(r"tuple with (\d+) elements", kind)
    return f"a list of {elements[1]}" if elements else _WORDS.get(kind, kind)


def _classes(types: list[str], given: str) -> str:
    """Which classes a setting takes, of those that are loaded: one that is called much the same, or some of them."""
    of_results = re.sub(r"Callable\[\[.*?\], ", "", " ".join(types))
    bases = [pkgutil.resolve_name(name) for name in _CLASS.findall(of_results)]
    classes = {cls.__name__: cls for base in bases for cls in _below(base) if not cls.__name__.startswith("_")}
    if not classes:
        return f"give its {', '.join(inspect.signature(bases[0]).parameters)}, or null"
    if close := difflib.get_close_matches(given, classes, n=1):
        return f"did you mean {close[0]}?"
    nearest = sorted(cls.__name__ for cls in _below(bases[0]) if cls.__module__ != "pretrain.train.logging")
    return f"give a class, such as {', '.join(nearest[:_SHOWN])}, or its import path"


def _below(base: type[Any]) -> list[type[Any]]:
    """The classes that are derived from one, and can be made."""
    derived: list[type[Any]] = base.__subclasses__()
    return [found for cls in derived for found in (cls, *_below(cls)) if not inspect.isabstract(found)]


def _inside(path: str, reason: str) -> str:
    """What is wrong with a setting of a class that was given."""
    name = path.rpartition(".")[2]
    if unknown := re.search(r"Option '(.*)' is not accepted", reason):
        takes = ", ".join(inspect.signature(pkgutil.resolve_name(path)).parameters)
        return f"{name} has no '{unknown[1]}'; it takes {takes or 'nothing'}"
    if wrong := re.search(r'Parser key "([\w.]+)": Expected a (.*)\. Got value: (.*)', reason):
        return f"{name}'s {wrong[1]} is {wrong[3]}; give {_words(wrong[2])}"
    return f"{name}: {reason}"


def _meant_by(message: str, parser: LightningArgumentParser) -> str:
    """The setting that was probably meant by an unknown one, as the end of a message."""
    unknown = re.search(r"(?:'([\w.]+)' does not accept (?:option|nested key)|[Kk]ey|Option) '([\w.]+)'", message)
    option = re.search(r"[Uu]nrecognized arguments: --([\w.-]+)", message)
    if not (match := unknown or option):
        return ""
    given = ".".join(part for part in match.groups() if part).replace("-", "_")
    meant = _meant(given, list(parser.get_defaults().keys()))
    return f"; did you mean {'--' if option else ''}{meant}?" if meant else ""


def _meant(given: str, keys: list[str]) -> str | None:
    """The key that was probably meant by one that there is not: by its whole name, or what stands behind its dots."""
    last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    if given in last:
        return last[given]
    if close := difflib.get_close_matches(given, keys, n=1):
        return close[0]
    return last[close[0]] if (close := difflib.get_close_matches(given, last, n=1)) else None

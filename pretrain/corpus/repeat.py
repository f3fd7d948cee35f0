"""What was prepared before: the same again is ready, and anything else an error that names the difference."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.corpus.sources import Source
from pretrain.errors import UserError


def describe(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What is recorded of sources, to tell later whether others are meant; the size only of what can be read again."""
    return [
        {**source._asdict(), "num_bytes": Path(source.name).stat().st_size if source.is_regular_file else None}
        for source in sources
    ]


def check_repeated(
    out: Path | str, written: float, made: Mapping[str, Any], wanted: Mapping[str, Any], read: Iterable[str]
) -> None:
    """Make sure that what is at ``out`` is what would be made now.

    As `make` does, what is read is not compared with what it was: it has changed if its size has, or if it is newer.

    Args:
        out: The place, for messages.
        written: When it was finished, in seconds since 1970.
        made: With which sources and settings.
        wanted: The same, of this call.
        read: Local files that it reads.

    Raises:
        UserError: If not; names the first difference.
    """

    def refuse(difference: str) -> UserError:
        return UserError(f"{out}: exists already{difference}; choose another place, or remove it first")

    if made["tokenizer"] != wanted["tokenizer"]:
        raise refuse(f", prepared with another tokenizer ({made['tokenizer']} instead of {wanted['tokenizer']})")
    for name, value in wanted.items():
        if name != "sources" and made.get(name) != value:
            raise refuse(f", prepared with {name} {made.get(name)!r} instead of {value!r}")
    before, now = ({source["name"]: source for source in given["sources"]} for given in (made, wanted))
    for name in now:
        if name not in before:
            raise refuse(f", prepared without {name}")
    for name in before:
        if name not in now:
            raise refuse(f", prepared with {name}, too")
    if len(made["sources"]) != len(wanted["sources"]):
        raise refuse(f", prepared from {len(made['sources'])} sources instead of {len(wanted['sources'])}")
    if made["sources"] != wanted["sources"] and before == now:
        raise refuse(", prepared from the same sources in another order")
    for name, source in now.items():
        if source["num_bytes"] is None and "://" not in name:
            raise refuse(f", and {'standard input' if name == '-' else name} cannot be read again to compare")
        if source != before[name]:
            raise refuse(f", and {name} has changed: {_show(before[name])} then, {_show(source)} now")
    for name in read:
        if Path(name).is_file() and Path(name).stat().st_mtime > written:
            raise refuse(f", and {name} has changed since")


def _show(source: Mapping[str, Any]) -> str:
    return f"{source['kind']}, {source['num_bytes'] or 0:,} bytes"

"""Names of sequences: the forms that one goes by, and lists and tables of them, kept as hashes."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.counter import U64
from pretrain.corpus.sources import Source, Stream

_READ_BYTES = 2**22

_WINDOW = re.compile(r"#[0-9]+$")

_ACCESSION = {
    **dict.fromkeys(("cl", "sp", "tr", "gb", "ref", "pdb", "bbs", "lcl"), 1),
    **dict.fromkeys(("pir", "prf", "gnl", "pat"), 2),
    "gi": 3,
}
"""Which field it is in a name of fields between bars, by the first (MMseqs2, `Util::getFastaHeaderPosition`)."""


def window_name(name: str, number: int) -> str:
    """What the n-th window of a sequence is called, from 1 on."""
    return f"{name}#{number}"


def whole_name(name: str) -> str:
    """The sequence that a window is cut from; the name itself, if it is not that of a window."""
    return _WINDOW.sub("", name)


def accession(name: str) -> str:
    """What ``mmseqs`` writes for a name: P12345 for sp|P12345|NAME; the name itself, if it holds none."""
    fields = name.split("|")
    place = _ACCESSION.get(fields[0], 0)
    return fields[place] if 0 < place < len(fields) and fields[place] else name


def hash_names(names: Iterable[bytes]) -> U64:
    """64 bits of each: among a hundred million names two equal ones are not to be expected."""
    digests = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


class NameTable(NamedTuple):
    """The hashes of some names, ascending, shape [names], and what is known of each, the same shape."""

    hashes: U64
    values: NDArray[Any]

    def find(self, names: Sequence[str], has_windows: bool) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Of each name, whether it is in the table, and where: as it stands, or else by its accession.

        Args:
            names: What to look for.
            has_windows: Look for a window by the sequence that it is cut from, too.
        """
        found, place = self._find(names)
        for other_form in (accession, *((whole_name, lambda name: accession(whole_name(name))) if has_windows else ())):
            missing = [(number, names[number]) for number in np.flatnonzero(~found).tolist()]
            others = {number: other for number, name in missing if (other := other_form(name)) != name}
            if others:
                found[[*others]], place[[*others]] = self._find([*others.values()])
        return found, place

    def _find(self, names: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        hashes = hash_names(name.encode() for name in names)
        place = np.minimum(np.searchsorted(self.hashes, hashes), len(self.hashes) - 1)
        return self.hashes[place] == hashes, place


def read_lines(path: str) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a file, which may be compressed: a few megabytes at a time, with the number of the first.

    Raises:
        UserError: If it cannot be read.
    """
    line, rest = 1, b""
    with Stream(Source(path, "tsv")) as stream:
        while data := stream.read(_READ_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                yield line, [text.rstrip(b"\r") for text in lines]
                line += len(lines)
    if rest:
        yield line, [rest.rstrip(b"\r")]

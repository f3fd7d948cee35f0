"""Source files to records: FASTA, JSON lines and plain text (one document a line), each also gzipped."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from pretrain.errors import UserError


class Record(NamedTuple):
    """One sequence as read from a source.

    Attributes:
        id: Its name: the FASTA header's first word, the JSON object's ``id``, or the line's number.
        text: The sequence or document, as bytes.
        line: Where it begins in the file, from 1.
    """

    id: str
    text: bytes
    line: int


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, in its order, in memory one at a time.

    Raises:
        UserError: If the file is missing, empty, truncated or not what its name or first byte says; names file and
            line.
    """
    read = _READERS[kind(path)]
    count = 0
    try:
        with _open(path) as file:
            for record in read(path, file):
                count += 1
                yield record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip data after record {count} ({error}); fetch the file again") from error
    if not count:
        raise UserError(f"{path}: is empty; at least one sequence is needed")


def kind(path: Path) -> str:
    """What ``path`` holds, by its name: ``fasta``, ``jsonl`` or ``txt``.

    Raises:
        UserError: If there is no such file, or its name says nothing known.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; give a source file, or a corpus made by `pretrain prepare`")
    if path.is_dir():
        raise UserError(f"{path}: is a directory; name the files in it, or a single corpus made by `pretrain prepare`")
    suffixes = {suffix.lower() for suffix in path.suffixes}
    for name, known in _SUFFIXES.items():
        if suffixes & known:
            return name
    raise UserError(
        f"{path}: unknown kind of file; the name must end in .fasta, .fa, .faa, .fas (sequences), .jsonl "
        "(objects with a 'text') or .txt (one document a line), with or without .gz"
    )


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if gzipped else path.open("rb")


def _read_fasta(path: Path, file: IO[bytes]) -> Iterator[Record]:
    name, start, parts = "", 0, list[bytes]()

    def record() -> Record:
        if not (sequence := b"".join(parts)):
            raise UserError(f"{path}:{start}: record '{name}' has no sequence; remove its header or add the sequence")
        return Record(name, sequence, start)

    for number, raw in enumerate(file, 1):
        line = raw.strip()
        if line.startswith(b">"):
            if start:
                yield record()
            words = line[1:].split(None, 1)
            name = words[0].decode("utf-8", "replace") if words else ""
            start, parts = number, []
        elif start:
            parts.append(line)
        elif line:
            shown = line[:20].decode("utf-8", "replace")
            raise UserError(
                f"{path}:{number}: not FASTA: a header line that begins with '>' is expected, found {shown!r}"
            )
    if start:
        yield record()


def _read_json_lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for number, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            fields = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a JSON object on one line ({error})") from error
        text = fields.get("text") if isinstance(fields, dict) else None
        if not isinstance(text, str) or not text:
            raise UserError(f"{path}:{number}: an object with a non-empty string 'text' is expected")
        name = str(fields.get("id", number))
        try:
            name.encode()
            record = Record(name, text.encode(), number)
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}:{number}: 'id' or 'text' holds half a surrogate pair ({error}); valid Unicode is needed"
            ) from error
        yield record


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    for number, raw in enumerate(file, 1):
        if text := raw.strip():
            yield Record(str(number), text, number)


_SUFFIXES = {"fasta": {".fasta", ".fa", ".faa", ".fas"}, "jsonl": {".jsonl", ".ndjson"}, "txt": {".txt"}}
_READERS: dict[str, Callable[[Path, IO[bytes]], Iterator[Record]]] = {
    "fasta": _read_fasta,
    "jsonl": _read_json_lines,
    "txt": _read_lines,
}

"""What to read: the sources that the user names, found, told apart and opened. `readers` knows what is in them."""

import glob
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import pyarrow as pa
from typing_extensions import override

from pretrain.corpus.store import is_corpus
from pretrain.errors import UserError, one_line
from pretrain.shipped import shipped

_SUFFIXES = {
    "fasta": (".fasta", ".fa", ".faa", ".fas"),
    "txt": (".txt",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv",),
    "tsv": (".tsv", ".tab"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
KINDS = tuple(_SUFFIXES)
DOCUMENTS = ("line", "paragraph", "file")
_COMPRESSIONS = {"gzip": b"\x1f\x8b", "bz2": b"BZh", "zstd": b"\x28\xb5\x2f\xfd"}
_COMPRESSED = (".gz", ".bgz", ".bz2", ".zst")
_HUB = "hf://"
PART = "part.json"
"""In a directory that `pretrain prepare --shard` made."""


@dataclass(frozen=True)
class SourceOptions:
    """How sources are read.

    Attributes:
        kind: What they hold, one of `KINDS`; by default what their names end in says.
        document: What a document is in text: a ``line``, a ``paragraph`` (blank lines part them) or a ``file``.
        text_column: The column or JSON field that holds the sequences; by default the first of ``text``,
            ``sequence``, ``seq`` and ``content`` that there is.
        id_column: The one that names them; by default ``id`` where there is one, else they are numbered.

    Raises:
        UserError: If ``kind`` or ``document`` is none of those.
    """

    kind: str | None = None
    document: str = "line"
    text_column: str | None = None
    id_column: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (None, *KINDS):
            raise UserError(f"kind is '{self.kind}'; give one of {', '.join(KINDS)}")
        if self.document not in DOCUMENTS:
            raise UserError(f"document is '{self.document}'; give one of {', '.join(DOCUMENTS)}")


class Source(NamedTuple):
    """One file, stream or Hub dataset, and what it holds (one of `KINDS`, or ``hub``)."""

    name: str
    kind: str

    @override
    def __str__(self) -> str:
        return "standard input" if self.name == "-" else self.name

    @property
    def is_regular_file(self) -> bool:
        """Whether it can be read again: no pipe, no URL."""
        return os.path.isfile(self.name)


def find_sources(names: Sequence[str | Path], options: SourceOptions) -> list[Source]:
    """The files that the names stand for, in the order given; those of a pattern or a directory sorted.

    Args:
        names: Paths, patterns (``*``, ``**``), directories, fsspec URLs, ``hf://org/name[:config][@split]``, or ``-``.
        options: How they are read.

    Raises:
        UserError: If one is not there, or does not tell what it holds.
    """
    if not names:
        raise UserError("no source is given; name at least one file")
    return [source for name in map(str, names) for source in _find(name, options.kind)]


def _find(name: str, kind: str | None) -> Iterator[Source]:
    if name == "-":
        if kind is None:
            raise UserError(
                "standard input has no name that tells its kind; name it, as in `pretrain prepare - --kind fasta`: one "
                f"of {', '.join(KINDS)}"
            )
        yield Source(name, kind)
    elif name.startswith(_HUB) and not name.startswith(f"{_HUB}datasets/"):
        yield Source(name, "hub")
    elif "://" in name:
        yield from _find_remote(name, kind)
    elif os.path.isdir(name):
        yield from _find_in_directory(name, kind)
    elif os.path.exists(name):
        yield Source(name, kind or _kind(name))
    elif sample := shipped(name):
        yield from _find(str(sample), kind)
    elif glob.has_magic(name):
        matches = [path for path in _match(name) if not path.is_dir()]
        if not matches:
            raise UserError(f"{name}: no file matches this pattern")
        for match in matches:
            yield Source(str(match), kind or _kind(str(match)))
    else:
        raise UserError(f"{name}: no such file; give a source file, or a corpus made by `pretrain prepare`")


def _match(pattern: str) -> list[Path]:
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed])
    # Unlike `glob`, pathlib does not follow links to directories, which may be loops; but it matches hidden files.
    found = base.glob(os.path.join(*parts[fixed:]))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts[len(base.parts) :]))


def _find_in_directory(name: str, kind: str | None) -> Iterator[Source]:
    directory = Path(name)
    if is_corpus(directory):
        raise UserError(f"{name}: is a prepared corpus; it stands alone, and cannot be a source")
    if (directory / PART).is_file():
        raise UserError(
            f"{name}: is a part of a corpus; join all parts with `pretrain prepare --merge PART... --out DIR`"
        )
    if corpora := sorted(str(path.parent) for path in directory.glob("*/manifest.json") if is_corpus(path.parent)):
        raise UserError(f"{name}: holds prepared corpora; name one of them: {', '.join(corpora[:5])}")
    if (directory / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(path.parent.name for path in directory.glob("*/state.json")))
        raise UserError(f"{name}: holds several splits ({splits}); name one, as in {directory / 'train'}")
    if (directory / "state.json").is_file():
        try:
            state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
            files = [directory / Path(entry["filename"]).name for entry in state["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name}: damaged dataset directory (state.json: {error}); save it again") from error
        for file in files:
            if not file.is_file():
                raise UserError(f"{file}: no such file, but state.json beside it names it; save the dataset again")
            yield Source(str(file), "arrow")
        return
    found = False
    for parent, folders, files_here in os.walk(name):  # links to directories are not followed: they may be loops
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        for path in (os.path.join(parent, file) for file in sorted(files_here) if not file.startswith(".")):
            if kind or known_kind(path):
                if not os.path.exists(path):
                    raise UserError(f"{path}: a link to a file that is not there; remove it, or restore the file")
                found = True
                yield Source(path, kind or _kind(path))
    if not found:
        raise UserError(f"{name}: no source in this directory; {_ENDINGS}")


def _find_remote(name: str, kind: str | None) -> Iterator[Source]:
    import fsspec

    with _remote_errors(name):
        files, path = fsspec.core.url_to_fs(name)
        if "*" in path:  # a question mark may begin a query
            found = sorted(files.glob(path))
        elif not name.startswith("http") and files.isdir(path):
            found = [file for file in sorted(files.find(path)) if kind or known_kind(file)]
        else:
            yield Source(name, kind or _kind(name))
            return
        if not found:
            raise UserError(f"{name}: no source there; {_ENDINGS}")
        for remote in map(files.unstrip_protocol, found):
            yield Source(remote, kind or _kind(remote))


_ENDINGS = (
    "the name must end in .fasta, .fa, .faa, .fas (sequences), .txt (documents), .jsonl, .csv, .tsv, .parquet or "
    ".arrow (with a column 'text' or 'sequence'), with or without .gz, .bz2 or .zst; or name the kind, as in "
    "`pretrain prepare --kind fasta`"
)


def known_kind(name: str) -> str | None:
    """What the end of a name says that it holds, if anything."""
    name = name.lower().partition("?")[0] if "://" in name else name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return next((kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), None)


def _kind(name: str) -> str:
    if (kind := known_kind(name)) is None:
        raise UserError(f"{name}: unknown kind of file; {_ENDINGS}")
    return kind


def open_raw(source: Source) -> IO[bytes]:
    """Open a source's own bytes, once: so it may be a pipe.

    Raises:
        UserError: If it cannot be opened.
    """
    if source.name == "-":
        return sys.stdin.buffer
    if "://" in source.name:
        import fsspec

        with _remote_errors(source.name):
            return cast(IO[bytes], fsspec.open(source.name, "rb").open())
    try:
        return open(source.name, "rb")
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror}); check the file and its permissions") from error


def check_uncompressed(source: Source) -> None:
    """Refuse a table that is compressed as a whole, and so cannot be read from its end.

    Raises:
        UserError: If it is.
    """
    with Stream(source) as stream:
        if stream.compression:
            raise UserError(f"{source}: is compressed by {stream.compression} as a whole; decompress it first")


class Stream(io.RawIOBase):
    """A source's bytes, decompressed if its first bytes say that it is compressed (its name may be wrong).

    Attributes:
        position: Bytes of the source consumed so far, before decompression.
    """

    def __init__(self, source: Source) -> None:
        self.position = 0
        self._source = source
        self._raw = open_raw(source)
        self._ahead = b""
        head = b""
        while len(head) < 4 and (more := self._read_raw(4 - len(head))):
            head += more
        self.compression = next((name for name, magic in _COMPRESSIONS.items() if head.startswith(magic)), None)
        if self.compression:
            raw = pa.PythonFile(_Counted(self, head), mode="r")
            self._inflated = pa.CompressedInputStream(raw, self.compression)
        else:
            self._ahead = head
        self._ahead = self.read(max(3, len(head))).removeprefix(b"\xef\xbb\xbf")  # a mark that Windows programs write
        if self._ahead.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UserError(f"{source}: is UTF-16; convert it to UTF-8, as with `iconv -f UTF-16 -t UTF-8`")

    @override
    def read(self, size: int = -1) -> bytes:
        """Exactly ``size`` bytes, fewer only at the end: so what is read does not depend on how a pipe delivers it."""
        if size < 0:
            raise io.UnsupportedOperation("a source may be larger than memory; say how many bytes")
        parts, missing = [self._ahead[:size]], size - len(self._ahead)
        self._ahead = self._ahead[size:]
        try:
            while missing > 0 and (part := self._next(min(missing, 2**20))):
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            if not self.compression or error.errno is not None:
                raise
            raise UserError(
                f"{self._source}: damaged {self.compression} data ({error}); fetch the file again"
            ) from error
        return b"".join(parts)

    @override
    def readable(self) -> bool:
        return True

    def peek(self, size: int) -> bytes:
        """The next bytes, which stay to be read."""
        data = self.read(size)
        self._ahead = data + self._ahead
        return data

    def _next(self, size: int) -> bytes:
        return cast(bytes, self._inflated.read(size)) if self.compression else self._read_raw(size)

    def _read_raw(self, size: int) -> bytes:
        try:
            data = self._raw.read(size)
        except Exception as error:  # each protocol's library has exceptions of its own
            raise UserError(f"{self._source}: cannot be read ({one_line(error, 300)}); try again") from error
        self.position += len(data)
        return data

    @override
    def close(self) -> None:
        """Close the source; standard input stays open."""
        if not self.closed and self._source.name != "-":
            self._raw.close()
        super().close()


class _Counted(io.RawIOBase):
    """What a decompressor reads from: the source, with the bytes that were looked at put back."""

    def __init__(self, stream: Stream, head: bytes) -> None:
        self._stream, self._head = stream, head

    @override
    def readable(self) -> bool:
        return True

    @override
    def read(self, size: int = -1) -> bytes:
        head, self._head = self._head, b""
        return head or self._stream._read_raw(size)


@contextmanager
def _remote_errors(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # fsspec's http says so of a server that is down, too
        if cause and not isinstance(cause, FileNotFoundError) and getattr(cause, "status", None) not in (404, 410):
            raise UserError(
                f"{name}: cannot be opened ({one_line(cause, 300)}); check the address and the network"
            ) from error
        raise UserError(f"{name}: no such file; check the address") from error
    except Exception as error:  # each protocol's library has exceptions of its own
        raise UserError(
            f"{name}: cannot be opened ({one_line(error, 200)}); check the address and the network"
        ) from error


def open_hub(source: Source) -> Any:
    """The rows of ``hf://org/name[:config][@split]``, streamed by `datasets`; the split is ``train`` if not said.

    Raises:
        UserError: If there is no such dataset, configuration or split.
    """
    import datasets

    name, _, split = source.name.removeprefix(_HUB).partition("@")
    name, _, configuration = name.partition(":")
    with _remote_errors(source.name):
        return datasets.load_dataset(name, configuration or None, split=split or "train", streaming=True)

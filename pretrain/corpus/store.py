"""The corpus: tokenised sequences in Arrow shards; written once, then memory-mapped, never loaded whole.

corpus/
  manifest.json          counts, tokenizer, shards with their checksums, fingerprint, how it was prepared
  lengths.npy            the length of each sequence in tokens, in order
  shard-00000.arrow      one record batch: id, tokens in the smallest integer type that holds the vocabulary, and, where
                         the tokenizer knows words, a bit a token that says whether one begins there
  clusters.arrow         with `prepare --clusters`, the sequences of each cluster
  skipped.tsv            where `prepare --skip_bad` skipped records: source, line and reason
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from pretrain.corpus.tokenizer import Tokenizer, tokenizer_from_string
from pretrain.errors import UserError, one_line

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
LENGTHS = "lengths.npy"
REPORT = "skipped.tsv"
CLUSTERS = "clusters.arrow"


class Shard(NamedTuple):
    """One open shard: views into the mapped file."""

    ids: pa.StringArray
    offsets: NDArray[np.int64]
    tokens: NDArray[np.unsignedinteger]
    word_starts: NDArray[np.uint8] | None
    """Eight tokens a byte, the lowest bit first."""


class Clusters(NamedTuple):
    """Which sequences each cluster holds: those of cluster c are ``members[offsets[c]:offsets[c + 1]]``."""

    offsets: NDArray[np.int64]
    members: NDArray[np.unsignedinteger]


class Corpus:
    """An open corpus. Reads are zero-copy; a pickled corpus is its path, so loader workers share the mapped pages.

    Args:
        path: A directory that `pretrain prepare` made.

    Raises:
        UserError: If there is no corpus, or it is damaged or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._take_manifest(_read_manifest(self.path), str(self.path))
        try:
            self.shards = [open_shard(file) for file in _shard_files(self.path, self.manifest)]
            sizes = [len(shard.offsets) - 1 for shard in self.shards]
            if sizes != [shard["num_sequences"] for shard in self.manifest["shards"]] or sum(sizes) != len(self):
                raise UserError(
                    f"{self.path}: the shards do not hold the sequences that {MANIFEST} counts; prepare it again"
                )
            self._take_lengths(self.path / LENGTHS)
        except FileNotFoundError as error:
            raise UserError(f"{error.filename}: not found; {_WHAT_IT_IS}") from error
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise damaged(self.path, error) from error
        self._first = np.cumsum([0, *sizes])

    def _take_manifest(self, manifest: dict[str, Any], where: str) -> None:
        """Take from the manifest what it says about the whole corpus; ``where`` names it in messages."""
        try:
            self.manifest = manifest
            self.fingerprint: str = manifest["fingerprint"]
            self.num_sequences: int = manifest["num_sequences"]
            self.num_tokens: int = manifest["num_tokens"]
            self.prepared: dict[str, Any] = manifest["prepared"]
            self.tokenizer: Tokenizer = tokenizer_from_string(manifest["tokenizer"]["serialized"], where)
        except (KeyError, TypeError) as error:
            raise damaged(where, error) from error

    def _take_lengths(self, file: Path) -> None:
        """Map the lengths of all sequences; a plain ``ValueError`` says that the file is damaged."""
        try:
            self._lengths: NDArray[np.integer] = np.lib.format.open_memmap(file, mode="r").view(np.ndarray)
        except (ValueError, SyntaxError, TokenError) as error:  # the last two of NumPy's parser, for the header
            raise ValueError(f"{LENGTHS}: {one_line(error)}") from error
        if self._lengths.shape != (self.num_sequences,) or self._lengths.dtype.kind != "u":
            raise UserError(f"{self}: {LENGTHS} does not hold the sequences that {MANIFEST} counts; prepare it again")

    def __reduce__(self) -> tuple[type["Corpus"], tuple[Path]]:
        return Corpus, (self.path,)

    def __str__(self) -> str:
        return str(self.path)

    def __len__(self) -> int:
        return self.num_sequences

    @property
    def skipped(self) -> dict[str, int]:
        """Records that `prepare` left out, by the reason: ``short``, ``long``, ``bad``, ``duplicate``."""
        skipped: dict[str, int] = self.prepared.get("skipped", {})
        return skipped

    @property
    def components(self) -> "tuple[Corpus, ...]":
        """The corpora that this one is joined from; itself, where it is one."""
        return (self,)

    @property
    def num_clusters(self) -> int | None:
        """How many clusters the sequences are in, if the corpus was prepared with a table of them."""
        return self._clusters["num_clusters"] if self._clusters else None

    @property
    def clusters_fingerprint(self) -> str | None:
        """What the clusters are known by, if the corpus was prepared with a table of them."""
        return self._clusters["sha256"][:16] if self._clusters else None

    @property
    def _clusters(self) -> dict[str, Any] | None:
        recorded: dict[str, Any] | None = self.prepared.get("clusters")
        return recorded

    def clusters(self) -> Clusters:
        """The clusters, memory-mapped; only of a corpus that was prepared with a table of them.

        Raises:
            UserError: If the file is missing or damaged.
        """
        try:
            column = _open_batch(self.path / CLUSTERS).column("members")
        except (FileNotFoundError, pa.ArrowException) as error:
            raise damaged(self.path, error) from error
        offsets, members = (part.to_numpy(zero_copy_only=True) for part in (column.offsets, column.values))
        if len(members) != self.num_sequences:
            raise damaged(self.path, ValueError(f"{CLUSTERS} holds {len(members)} of {self.num_sequences} sequences"))
        return Clusters(offsets, members)

    def lengths(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Tokens in each of the sequences, ``<cls>`` and ``<eos>`` included; shape as ``indices``."""
        return self._lengths[np.asarray(indices, np.int64)].astype(np.int64)

    def tokens(self, index: int) -> NDArray[np.unsignedinteger]:
        """The ids of one sequence, with ``<cls>`` and ``<eos>``: a read-only view of the file."""
        shard, local = self._locate(index)
        return shard.tokens[shard.offsets[local] : shard.offsets[local + 1]]

    @property
    def has_words(self) -> bool:
        """Whether `word_starts` are known."""
        return all(shard.word_starts is not None for shard in self.shards)

    def word_starts(self, index: int) -> NDArray[np.bool_]:
        """For each token of one sequence whether a word begins there; only where `has_words`."""
        shard, local = self._locate(index)
        begin, end = shard.offsets[local : local + 2].tolist()
        assert shard.word_starts is not None
        packed = shard.word_starts[begin // 8 : -(-end // 8)]
        return np.unpackbits(packed, bitorder="little")[begin % 8 :][: end - begin].view(np.bool_)

    def id(self, index: int) -> str:
        """The name that the sequence had in its source."""
        shard, local = self._locate(index)
        return str(shard.ids[local].as_py())

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of a corpus of {self.num_sequences}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shard(number), index - int(self._first[number])

    def _shard(self, number: int) -> Shard:
        return self.shards[number]


def is_corpus(path: str | Path) -> bool:
    """Whether ``path`` is a prepared corpus, be it a damaged one, rather than a raw source."""
    try:
        manifest = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return True
    return isinstance(manifest, dict) and "format_version" in manifest  # other data, too, has manifests


def verify(path: Path) -> int:
    """Compare every shard with the manifest's checksum.

    Returns:
        The number of shards.

    Raises:
        UserError: If some are missing or damaged, which it names, or the manifest itself was changed.
    """
    manifest = _read_manifest(path)
    try:
        checksums = [shard["sha256"] for shard in manifest["shards"]]
        fingerprint = fingerprint_of(manifest["tokenizer"]["fingerprint"], checksums)
        if manifest["fingerprint"] != fingerprint:
            raise UserError(
                f"{path}: {MANIFEST} was changed: its fingerprint is {manifest['fingerprint']}, that of its shards "
                f"{fingerprint}; restore it, or prepare it again"
            )
        expected = dict(zip(_shard_files(path, manifest), checksums, strict=True))
        expected[path / LENGTHS] = manifest["lengths"]["sha256"]
        if clusters := manifest["prepared"].get("clusters"):
            expected[path / CLUSTERS] = clusters["sha256"]
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from error
    broken = []
    for file, checksum in expected.items():
        if not file.is_file():
            broken.append(f"{file.name} (missing)")
        elif file_checksum(file) != checksum:
            broken.append(f"{file.name} (another content)")
    if broken:
        raise UserError(
            f"{path}: {len(broken)} of {len(expected)} files broken: {', '.join(broken)}; copy the corpus again, or "
            "prepare it again"
        )
    return len(checksums)


def file_checksum(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fingerprint_of(tokenizer: str, checksums: Sequence[str]) -> str:
    """What a corpus is known by, from the fingerprint of its tokenizer and the checksums of its shards."""
    identity = {"format_version": FORMAT_VERSION, "tokenizer": tokenizer, "shards": list(checksums)}
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


_WHAT_IT_IS = "a corpus is a directory that `pretrain prepare` made"


def damaged(path: str | Path, error: Exception) -> UserError:
    """What is raised of a corpus that is not as it was written."""
    return UserError(f"{path}: damaged corpus ({type(error).__name__}: {error}); prepare it again")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{error.filename}: not found; {_WHAT_IT_IS}") from error
    return parse_manifest(content, path)


def parse_manifest(content: bytes, where: str | Path) -> dict[str, Any]:
    """The manifest of the corpus that is at ``where``, from the file's content.

    Raises:
        UserError: If it is damaged, or of another format.
    """
    try:
        manifest: dict[str, Any] = json.loads(content)
        version = manifest["format_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(where, error) from error
    if version != FORMAT_VERSION:
        raise UserError(f"{where}: corpus format {version}, this version reads {FORMAT_VERSION}; prepare it again")
    return manifest


def _shard_files(path: Path, manifest: dict[str, Any]) -> list[Path]:
    names = [shard["file"] for shard in manifest["shards"]]
    check_shard_names(names, path)
    return [path / name for name in names]


def check_shard_names(names: Iterable[str], where: str | Path, record: str = MANIFEST) -> None:
    """Make sure that shards are files beside the one that lists them.

    Args:
        names: What it calls them.
        where: The directory or address, for messages.
        record: The file that lists them.

    Raises:
        UserError: If one is elsewhere.
    """
    for name in names:
        if name != Path(name).name:
            raise UserError(f"{where}: {record} names the shard '{name}', which is not beside it; prepare it again")


def open_shard(file: Path) -> Shard:
    """Map a shard; nothing is read yet."""
    batch = _open_batch(file)
    column = batch.column("tokens")
    return Shard(
        ids=batch.column("id"),
        offsets=column.offsets.to_numpy(zero_copy_only=True),
        tokens=column.values.to_numpy(zero_copy_only=True),
        word_starts=np.frombuffer(batch.column("word_starts").values.buffers()[1], np.uint8)
        if "word_starts" in batch.schema.names
        else None,
    )


def _open_batch(file: Path) -> pa.RecordBatch:
    if not file.is_file():
        raise FileNotFoundError(2, "no such file", str(file))
    return pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)

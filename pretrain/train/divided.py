"""A checkpoint's tensors that are divided among processes: each writes its rows, as safetensors, beside the checkpoint.

step-000000500.ckpt                      all else; of divided tensors names and shapes, of the parts SHA-256
step-000000500.part-0-of-2.safetensors   the first process's rows of each divided tensor
step-000000500.part-1-of-2.safetensors

No process ever holds a whole tensor for it, neither to write nor to read, though each compares the checksums of all
parts before it trusts them. The checkpoint is written after its parts: as long as one
of them is missing, there is none. And rows are put together by their numbers, so any number of processes can read it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils._pytree import tree_map_only, tree_map_with_path

from pretrain.files import atomic_path

PARTS, DIVIDED = "parts", "divided_tensor"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
_PART = re.compile(r"[\w.-]+\.part-\d+-of-\d+\.safetensors")


@dataclass(frozen=True)
class OwnRows:
    """What this process holds of a tensor that is divided along its first dimension.

    Attributes:
        shape: The whole tensor's.
        rows: The process's rows, on the CPU; perhaps none.
    """

    shape: torch.Size
    rows: Tensor


@dataclass(frozen=True)
class DividedTensor:
    """A tensor whose rows lie in several files, read when they are asked for.

    Attributes:
        name: In each of the files.
        shape: The whole tensor's.
        parts: The files, opened, in the order of their rows.
    """

    name: str
    shape: torch.Size
    parts: Sequence[Any]

    def check(self) -> None:
        """Make sure that the files hold these rows.

        Raises:
            ValueError: If they do not.
        """
        shapes = [part.get_slice(self.name).get_shape() for part in self.parts]
        if [sum(rows for rows, *_ in shapes), *shapes[0][1:]] != list(self.shape):
            raise ValueError(f"the parts of {self.name} do not add up to shape {list(self.shape)[:4]}")

    def __getitem__(self, rows: slice) -> Tensor:
        """Some consecutive rows, from only those files that hold them."""
        begin, end, _ = rows.indices(self.shape[0])
        pieces, first = [], 0
        for part in self.parts:
            stored = part.get_slice(self.name)
            count = stored.get_shape()[0]
            if max(begin, first) < min(end, first + count):
                pieces.append(stored[max(begin - first, 0) : min(end - first, count)])
            first += count
        return torch.cat(pieces) if pieces else self.parts[0].get_slice(self.name)[:0]


def assemble(content: Any) -> Any:
    """Checkpoint content with each divided tensor put together."""
    return tree_map_only(DividedTensor, lambda tensor: tensor[:], content)


# --- writing ----------------------------------------------------------------------------------------------------------


def take_out(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A checkpoint's content, in which divided tensors are only named; and this process's rows of these."""
    own: dict[str, Tensor] = {}

    def take(path: Sequence[Any], value: Any) -> Any:
        if not isinstance(value, OwnRows):
            return value
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        own[name] = value.rows
        return {DIVIDED: name, "shape": list(value.shape)}

    content: dict[str, Any] = tree_map_with_path(take, checkpoint)
    return content, own


def part_name(checkpoint: Path, process: int, processes: int) -> str:
    """The name of a process's file beside a checkpoint."""
    return f"{checkpoint.stem}.part-{process}-of-{processes}.safetensors"


def write_part(path: Path, tensors: dict[str, Tensor]) -> bytes:
    """Write a process's rows, whole or not at all.

    By hand, since the library's ``save_file`` copies to a file of its own making that a killed process leaves behind,
    and hides what the disk said.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: If they cannot be written.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the first tensor begins at a multiple of eight
    digest = hashlib.sha256()
    with atomic_path(path, replace=True) as partial, partial.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text, *map(_bytes_of, tensors.values())):
            digest.update(piece)
            file.write(piece)
    return digest.digest()


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


# --- reading ----------------------------------------------------------------------------------------------------------


def put_in(checkpoint: dict[str, Any], directory: Path) -> dict[str, Any]:
    """A checkpoint's content with each divided tensor where it is named; a checkpoint without any as it is.

    Args:
        checkpoint: As `take_out` left it, and under ``PARTS`` the checksums by file name, in the order of the rows.
        directory: Where the parts lie.

    Raises:
        ValueError: If a part is missing, damaged or of something else.
    """
    if PARTS not in checkpoint:
        return checkpoint
    parts = [_open(directory, name, digest) for name, digest in checkpoint[PARTS].items()]

    def put(value: Any) -> Any:
        if not isinstance(value, dict):
            return [put(item) for item in value] if isinstance(value, list) else value
        if DIVIDED not in value:
            return {name: put(item) for name, item in value.items()}
        tensor = DividedTensor(value[DIVIDED], torch.Size(value["shape"]), parts)
        tensor.check()
        return tensor

    return {name: put(value) for name, value in checkpoint.items() if name != PARTS}


def _open(directory: Path, name: str, digest: str) -> Any:
    if not _PART.fullmatch(name):
        raise ValueError(f"{name[:60]!r} is no name of a part")
    try:
        with (directory / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"the checksum of {name} is wrong")
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing") from error
    return safe_open(directory / name, framework="pt")


# --- files ------------------------------------------------------------------------------------------------------------


def parts_of(checkpoint: Path) -> list[Path]:
    """The files beside a checkpoint that hold parts of its tensors, of whatever number of processes."""
    return sorted(checkpoint.parent.glob(f"{checkpoint.stem}.part-*.safetensors"))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint and then its parts, so that there is never one without them."""
    checkpoint.unlink(missing_ok=True)
    for part in parts_of(checkpoint):
        part.unlink(missing_ok=True)


def lost_parts(directory: Path) -> Iterator[Path]:
    """Parts without a checkpoint, of a process that was killed before that was written."""
    for part in directory.glob("*.part-*-of-*.safetensors"):
        if not (directory / f"{part.name.partition('.')[0]}.ckpt").exists():
            yield part

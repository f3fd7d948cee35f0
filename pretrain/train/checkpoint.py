"""Checkpoint files: whole or none, with a checksum, and nothing that has to be unpickled."""

import errno
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from io import BufferedRandom
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric.plugins import CheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from typing_extensions import override

from pretrain.errors import UserError, disk_is_full, one_line
from pretrain.files import atomic_path
from pretrain.model.contacts import ContactRegression
from pretrain.train.divided import assemble, put_in, remove

CHECKPOINTS, LAST, BEST = "checkpoints", "last.ckpt", "best.ckpt"
_NAMES = f"step-{'[0-9]' * 9}.ckpt"

FORMAT, FORMAT_VERSION = "pretrain_format", 1
CONTACTS = "contact_regression"

_SEAL_SIZE = 64
_ZIP_END_SIZE = 22  # of the record that ends an archive without a comment


def checkpoint_name(step: int) -> str:
    """What a run calls the checkpoint after a step; sorted by name, they are sorted by step."""
    return f"step-{step:09d}.ckpt"


def is_checkpoint_name(name: str) -> bool:
    """Whether it is one of `checkpoint_name`."""
    return fnmatchcase(name, _NAMES)


def step_of(name: str) -> int:
    """The step in a name of `checkpoint_name`."""
    return int(name.removeprefix("step-").removesuffix(".ckpt"))


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a directory, the oldest first; none where it does not exist."""
    return sorted(directory.glob(_NAMES))


class AtomicCheckpointIO(CheckpointIO):
    """A killed process or a full disk leaves the previous file as it was.

    Attributes:
        mapped: Whether what is loaded stays in the file, rather than in this process's memory.
    """

    mapped = False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        try:
            with atomic_path(path, replace=True) as partial, partial.open("w+b") as file:
                torch.save({**checkpoint, FORMAT: FORMAT_VERSION}, file)
                _seal(file)
        except RuntimeError as error:  # what torch makes of a write that the disk refused
            if not (isinstance(error.__context__, OSError) and disk_is_full(error.__context__)):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return cast(dict[str, Any], assemble(read_checkpoint(Path(path), self.mapped)))

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def snapshot(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy in host memory that no further step changes."""

    def copy(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu() if tensor.device.type != "cpu" else tensor.detach().clone()

    copied: dict[str, Any] = tree_map_only(Tensor, copy, checkpoint)
    return copied


def read_checkpoint(path: Path, mapped: bool = True) -> dict[str, Any]:
    """A checkpoint's content on the CPU. Tensors and plain values only: nothing is executed.

    Tensors that were divided among processes are `DividedTensor`; `assemble` puts them together.

    The checksum that ends the file is compared first, so a damaged file is refused rather than trained on. A file that
    was made to deceive is refused, too: one that claims to hold more than it does, or names code.

    Args:
        path: The file.
        mapped: Read tensors when they are touched, rather than now.

    Raises:
        UserError: If the file is missing, is no complete checkpoint of that kind, or is of a newer format.
    """
    try:
        _verify(path)
        _check_archive(path)
        # Mapped in any case: torch's other reader believes what a file says about the size of its tensors.
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(checkpoint, dict) or not {"state_dict", "global_step"} <= checkpoint.keys():
            raise ValueError("it has no state_dict and global_step")
        _check_content(checkpoint)
        if not mapped:
            checkpoint = tree_map_only(Tensor, Tensor.clone, checkpoint)
        checkpoint = put_in(checkpoint, path.resolve().parent)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint") from error
    except (
        Exception
    ) as error:  # torch.load raises whatever its readers meet: RuntimeError, UnpicklingError, EOFError ...
        reason = one_line(error, 120)
        raise UserError(f"{path}: not a complete checkpoint of tensors and plain values ({reason})") from error
    if (version := checkpoint.get(FORMAT, FORMAT_VERSION)) != FORMAT_VERSION:
        raise UserError(
            f"{path}: checkpoint format {version!r}, this version of pretrain reads {FORMAT_VERSION}; update it"
        )
    return checkpoint


def _check_archive(path: Path) -> None:
    """Refuse an archive that would unpack to more than its size: torch stores, and never compresses."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    stored = all(e.compress_type == zipfile.ZIP_STORED and e.file_size == e.compress_size for e in entries)
    if not stored or sum(e.file_size for e in entries) > path.stat().st_size:
        raise ValueError("it would unpack to more than its size")


def _check_content(checkpoint: dict[str, Any]) -> None:
    """Refuse tensors larger than what stands in the file, and hyper-parameters that Lightning would call as code."""
    for value in tree_leaves(checkpoint):
        if isinstance(value, Tensor) and (
            value.device.type != "cpu"
            or value.layout is not torch.strided
            or value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise ValueError(f"a tensor of shape {list(value.shape)[:4]} is larger than what is stored of it")
    parameters = checkpoint.get("hyper_parameters", {})
    for name in _keys(parameters):
        if name.startswith("_") or name == "class_path":
            raise ValueError(f"its hyper_parameters name code: {name[:40]!r}")


def _keys(value: Any) -> Iterator[str]:
    """The names in nested dictionaries and lists."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _keys(inner)


def _seal(file: BufferedRandom) -> None:
    """End a zip archive with the SHA-256 of all bytes before, as the archive's comment: readers of zip pass it over."""
    file.seek(-2, os.SEEK_END)
    file.write(_SEAL_SIZE.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(digest.encode())


def _verify(path: Path) -> None:
    """Compare a file with its seal; one without, written by somebody's own Trainer, is taken as it is.

    The checksums of zip itself are not enough: ``torch.load`` ignores them, and they leave the archive's directory out.
    (A bit flipped there can mark a tensor as a folder, and torch then returns memory that it has not written to.)
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _ZIP_END_SIZE))
        end = file.read()
        if end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0"):
            return
        file.seek(0)
        digest, left = hashlib.sha256(), size - _SEAL_SIZE
        while left > 0 and (part := file.read(min(left, 2**22))):
            digest.update(part)
            left -= len(part)
        if file.read() != digest.hexdigest().encode():
            raise ValueError("its checksum is wrong")


def newest_checkpoint(
    directory: Path,
    usable: Callable[[dict[str, Any]], bool] = lambda checkpoint: True,
    elsewhere: Sequence[str] = (),
    bring: Callable[[str, bool], None] = lambda name, replace: None,
) -> tuple[Path, dict[str, Any], list[str]] | None:
    """The newest readable and usable checkpoint of a directory: path, content, why damaged ones were passed over.

    Args:
        directory: Where they are.
        usable: Whether one that can be read will do.
        elsewhere: Names of those that can be brought.
        bring: Puts one of these into the directory; also in the place of a damaged one.

    Raises:
        UserError: If there are some, and none can be read.
    """
    problems: list[str] = []
    here = {path.name for path in checkpoints_in(directory)}
    for name in sorted(here.union(elsewhere), reverse=True):
        path = directory / name
        for brought, names in ((False, here), (True, elsewhere)):
            if name not in names:
                continue
            try:
                if brought:
                    bring(name, name in here)
                checkpoint = read_checkpoint(path)
                if usable(checkpoint):
                    return path, checkpoint, problems
                if brought:
                    remove(path)
                break
            except UserError as error:
                problems.append(str(error))
    if problems:
        raise UserError(f"{problems[0]}; no other checkpoint is left in {directory}: remove the run to start it again")
    return None


def data_state(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The data position in a checkpoint, which Lightning keeps under the name of the data module's class."""
    return next((state for name, state in checkpoint.items() if name.endswith("DataModule")), None)


def contacts_in(checkpoint: dict[str, Any]) -> ContactRegression | None:
    """The contact regression of the model that a run grew from, if it had one."""
    stored = checkpoint.get(CONTACTS)
    return stored and ContactRegression(stored["weight"], stored["bias"])

"""The run directory: what it holds, and where it stands.

runs/quickstart/
  config.yaml                 every setting, resolved
  checkpoints/                step-000000500.ckpt ..., last.ckpt links to the newest; under FSDP2 with parts beside it
  events.out.tfevents.*       TensorBoard
  metrics.csv                 the same figures as step,name,value
  ledger.csv                  what each step consumed, for `pretrain inspect --audit`
  starts.jsonl                one line a start: time, step, command, changes, versions, hardware, strategy, commit
  sick.jsonl                  steps that were skipped because of NaN or infinity, with their sequences, if there are any
  origin.json                 the run and the step that it branched off, where it did
  skips.jsonl                 stretches of the order that were left out after a loss spike, if there are any
  result.json                 the final figures, once the run is finished
  .lock                       held by the process that trains
"""

import json
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pretrain.errors import UserError, disk_is_full
from pretrain.files import append_line, link, write_whole
from pretrain.lock import Lock, locked
from pretrain.model.config import DROPOUT
from pretrain.train.changes import Change, changes_of_history, read_config
from pretrain.train.checkpoint import (
    BEST,
    CHECKPOINTS,
    LAST,
    checkpoints_in,
    data_state,
    newest_checkpoint,
    read_checkpoint,
)
from pretrain.train.divided import DividedTensor, lost_parts, remove
from pretrain.train.spikes import of_history, read_skips

if TYPE_CHECKING:
    from pretrain.train.mirror import Mirror

CONFIG, STARTS, RESULT = "config.yaml", "starts.jsonl", "result.json"
LEDGER, SICK, ORIGIN, LOCK = "ledger.csv", "sick.jsonl", "origin.json", ".lock"

_PACKAGES = ("torch", "pytorch-lightning", "transformers", "numpy", "pyarrow", "tokenizers")


class Run:
    """A run directory, new or to be continued.

    Args:
        directory: Where it is, or will be.
        checkpoint: Its checkpoint to begin with, rather than the newest.
        mirror: Its remote copy, where the newest may be.

    Raises:
        UserError: If the directory holds something else, no checkpoint in it can be read, or the given one is not of
            the run's history any more.
    """

    def __init__(self, directory: Path, checkpoint: Path | None = None, mirror: "Mirror | None" = None) -> None:
        self.directory, self.mirror = directory, mirror
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: is a file; a run is a directory: choose another with --run")
        self.config: dict[str, Any] | None = None
        if (directory / CONFIG).is_file():
            self.config = read_config(directory / CONFIG)
        elif directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise UserError(f"{directory}: holds files but no {CONFIG}, so it is no run; choose another with --run")
        self._files = self._checkpoint_files()
        self._lock: Lock | None = None
        self.skips = read_skips(directory)
        newest: tuple[Path, dict[str, Any], list[str]] | None
        if checkpoint:
            newest = checkpoint, read_checkpoint(checkpoint), []
            if not of_history(self.skips)(newest[1]):
                raise UserError(f"{checkpoint}: was taken back after a loss spike; give an earlier one")
        else:
            remote = mirror.reachable_checkpoints() if mirror else []
            bring = mirror.bring if mirror else lambda name, replace: None
            newest = newest_checkpoint(directory / CHECKPOINTS, of_history(self.skips), remote, bring)
            if mirror:
                self._files = self._checkpoint_files()
        if newest is None and self.origin:
            raise UserError(
                f"{directory}: has branched off {self.origin}, and holds no checkpoint any more; restore one, or "
                "branch again into another directory"
            )
        self.checkpoint: Path | None = newest[0] if newest else None
        self.step: int = newest[1]["global_step"] if newest else 0
        self.data_state: dict[str, Any] | None = data_state(newest[1]) if newest else None
        self.hyper_parameters: dict[str, Any] = newest[1].get("hyper_parameters", {}) if newest else {}
        self.problems = newest[2] if newest else []
        self._content = _outline(newest[1]) if newest else {}

    def _take_back(self) -> None:
        """Remove the checkpoints of steps that a skip has taken back."""
        directory = self.directory / CHECKPOINTS
        newer = [p for p in checkpoints_in(directory) if not self.checkpoint or p.name > self.checkpoint.name]
        for path in newer:
            with suppress(UserError):  # one that cannot be read may be of a later history
                if not of_history(self.skips)(read_checkpoint(path)):
                    remove(path)
        if newer and self.checkpoint:
            link(directory / LAST, self.checkpoint.name)
        for name in (LAST, BEST):
            if not (directory / name).exists():
                (directory / name).unlink(missing_ok=True)

    def begin_at(self, origin: "Run") -> None:
        """Begin with another run's settings and checkpoint; for a run that has none of its own."""
        self.config, self.checkpoint, self.step = origin.config, origin.checkpoint, origin.step
        self.data_state, self._content = origin.data_state, origin._content
        self.hyper_parameters, self.problems = origin.hyper_parameters, origin.problems
        self.skips = [skip for skip in origin.skips if skip.step <= origin.step]

    def branched(self) -> None:
        """Take the checkpoint that the branch has by now for its own, rather than that of its origin."""
        if self.checkpoint:
            self.checkpoint = self.directory / CHECKPOINTS / self.checkpoint.name
        self._files = self._checkpoint_files()

    def _checkpoint_files(self) -> list[str]:
        return [path.name for path in checkpoints_in(self.directory / CHECKPOINTS)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the run for as long as this lasts; makes the directory.

        Raises:
            UserError: If another process trains here, or has since this one looked at the checkpoints.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                self._lock = stack.enter_context(locked(self.directory / LOCK))
            except BlockingIOError as error:
                raise UserError(
                    f"{self.directory}: {error.strerror} trains in this directory; stop it first, or choose another "
                    "with --run"
                ) from error
            if self._checkpoint_files() != self._files:
                raise UserError(f"{self.directory}: another process has trained here meanwhile; give the command again")
            for path in (self.directory / CHECKPOINTS).glob(".step-*.partial"):  # of a process that was killed
                path.unlink()
            for path in lost_parts(self.directory / CHECKPOINTS):
                path.unlink()
            if self.skips:
                self._take_back()
            try:
                yield
            except OSError as error:  # a write to an open file fails without its name
                if error.filename is not None or not disk_is_full(error):
                    raise
                raise OSError(error.errno, error.strerror, str(self.directory)) from error

    def check_in_place(self) -> None:
        """Make sure that the directory is still there, on the process that holds its lock.

        Raises:
            UserError: If it was removed, or another one stands in its place: nothing is written there.
        """
        if self._lock and not self._lock.in_place():
            raise UserError(
                f"{self.directory}: was removed or replaced while training; the run ends here, since what it wrote is "
                "gone: restore the directory and give the same command, or start again"
            )

    @property
    def origin(self) -> str | None:
        """Where it branched off, for people."""
        try:
            origin = json.loads((self.directory / ORIGIN).read_text(encoding="utf-8"))
            return f"{origin['run']}, after step {origin['step']}"
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def result(self) -> dict[str, Any] | None:
        """The final figures, if the run has finished."""
        path = self.directory / RESULT
        if not path.is_file():
            return None
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # damaged: it is made again
            return None
        return cast(dict[str, Any], tree_map(lambda value: math.nan if value is None else value, result))

    def check(self, config: dict[str, Any], allow_change: bool, defaults: dict[str, Any]) -> list[Change]:
        """Compare the settings with those that the run was started with; see `changes_of_history`.

        The train corpus is identity by content, which the data module verifies against the checkpoint.
        """
        if self.config is None or self.checkpoint is None:  # nothing is trained yet
            return []
        return changes_of_history(str(self.directory), self.config, config, allow_change, defaults)

    def check_weights(self, weights: Mapping[str, Tensor], encoder: dict[str, Any]) -> None:
        """Make sure that the newest checkpoint is one of this model, and holds what training continues from.

        Args:
            weights: The module's.
            encoder: The encoder's settings.

        Raises:
            UserError: If it is not, with the first setting or tensor that differs.
        """
        if self.checkpoint is None:
            return
        remedy = "remove this file to continue from the one before, or choose another directory with --run"
        needed = {"optimizer_states", "lr_schedulers", "loops"}
        if not any(name.endswith("DataModule") for name in self._content):
            needed.add("MLMDataModule")
        if missing := needed - self._content.keys():
            raise UserError(
                f"{self.checkpoint}: holds no {', '.join(sorted(missing))}, so a run cannot continue from it; {remedy}"
            )
        theirs = self._content["encoder"]
        shape = {name: value for name, value in encoder.items() if name not in DROPOUT}
        differing = [f"{k} {theirs.get(k)!r}, not {v!r}" for k, v in shape.items() if theirs.get(k) != v]
        ours, saved = _shapes(weights), self._content["weights"]
        for name in sorted(ours.keys() | saved.keys()):
            if ours.get(name) != saved.get(name):
                differing.append(f"{name} {saved.get(name)}, not {ours.get(name)}")
        if differing:
            raise UserError(f"{self.checkpoint}: is of another model ({differing[0]}); {remedy}")

    def record_start(self, config_text: str, changes: list[Change], execution: dict[str, Any]) -> None:
        """Write the config, and a line about this start, what runs and the environment it runs in."""
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(self.directory / CONFIG, config_text, replace=True)
        (self.directory / RESULT).unlink(missing_ok=True)
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "step": self.step,
            "command": shlex.join(sys.argv),
            "changes": [change._asdict() for change in changes],
            "python": platform.python_version(),
            "packages": {name: version(name) for name in _PACKAGES},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            **execution,
            "git_commit": _git_commit(),
        }
        append_line(self.directory / STARTS, json.dumps(start))

    def record_result(self, result: dict[str, Any]) -> None:
        """Write the final figures; one that is not defined as null, since JSON knows no NaN."""
        plain = tree_map(lambda value: None if isinstance(value, float) and not math.isfinite(value) else value, result)
        write_whole(self.directory / RESULT, json.dumps(plain, indent=1, allow_nan=False) + "\n", replace=True)


def _outline(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, and of which model: names and shapes, no numbers."""
    encoder = checkpoint.get("hyper_parameters", {}).get("encoder")
    return {
        **dict.fromkeys(checkpoint),
        "encoder": encoder if isinstance(encoder, dict) else {},
        "weights": _shapes(checkpoint["state_dict"]),
    }


def _shapes(weights: Mapping[str, Any]) -> dict[str, list[int] | None]:
    return {
        name: list(value.shape) if isinstance(value, Tensor | DividedTensor) else None
        for name, value in weights.items()
    }


def _git_commit() -> str | None:
    """The commit of the checkout that this package is in; none where it is installed, be it inside of another one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

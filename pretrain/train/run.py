"""The run directory: what it holds, which settings a continued run may change, and where it stands.

runs/quickstart/
  config.yaml                 every setting, resolved
  checkpoints/                step-000000500.ckpt ..., last.ckpt links to the newest
  events.out.tfevents.*       TensorBoard
  metrics.csv                 the same figures as step,name,value
  ledger.csv                  what each step consumed, for `pretrain inspect --audit`
  starts.jsonl                one line a start: time, step, command, changes, versions, hardware, strategy, commit
  sick.jsonl                  steps that were skipped because of NaN or infinity, with their sequences, if there are any
  result.json                 the final figures, once the run is finished
  .lock                       held by the process that trains
"""

import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.errors import UserError
from pretrain.train.checkpoint import newest_checkpoint

CONFIG, CHECKPOINTS, STARTS, RESULT = "config.yaml", "checkpoints", "starts.jsonl", "result.json"
LEDGER, SICK, LOCK = "ledger.csv", "sick.jsonl", ".lock"

_IDENTITY = (
    "seed_everything",
    "model.encoder.",
    "model.initialize_from",  # the directory is not read again, but what the run grew from cannot change
    "data.tokenizer",
    "data.max_length",
    "data.global_batch_tokens",
    "data.task",
    "model.from_scratch",
    "model.pooling",
    "model.tune",
    "model.last_layers",
    "model.lora_rank",
)
_HISTORY = (
    "model.",
    "data.mlm_probability",
    "data.mask_replace_prob",
    "data.random_replace_prob",
    "trainer.max_steps",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.precision",
)
_FREE = ("model.compile", "model.activation_checkpointing")
_PACKAGES = ("torch", "pytorch-lightning", "transformers", "numpy", "pyarrow", "tokenizers")


class Run:
    """A run directory, new or to be continued.

    Args:
        directory: Where it is, or will be.

    Raises:
        UserError: If the directory holds something else, or no checkpoint in it can be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if directory.exists() and not directory.is_dir():
            raise UserError(f"{directory}: is a file; a run is a directory: choose another with --run")
        self.config: dict[str, Any] | None = None
        if (directory / CONFIG).is_file():
            self.config = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
        elif directory.is_dir() and any(not path.name.startswith(".") for path in directory.iterdir()):
            raise UserError(f"{directory}: holds files but no {CONFIG}, so it is no run; choose another with --run")
        self._files = self._checkpoint_files()
        newest = newest_checkpoint(directory / CHECKPOINTS)
        self.checkpoint: Path | None = newest[0] if newest else None
        self.step: int = newest[1]["global_step"] if newest else 0
        self.data_state: dict[str, Any] | None = data_state(newest[1]) if newest else None
        self.hyper_parameters: dict[str, Any] = newest[1].get("hyper_parameters", {}) if newest else {}
        self.problems = newest[2] if newest else []

    def _checkpoint_files(self) -> list[str]:
        return sorted(path.name for path in (self.directory / CHECKPOINTS).glob("step-*.ckpt"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out of the run for as long as this lasts; makes the directory.

        The lock is the process's own and ends with it, however it ends. (A POSIX lock: one by ``flock`` would pass to
        the loader workers, which outlive a killed parent by some seconds.)

        Raises:
            UserError: If another process trains here, or has since this one looked at the checkpoints.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise UserError(
                    f"{self.directory}: {owner} trains in this directory; stop it first, or choose another with --run"
                ) from error
            if self._checkpoint_files() != self._files:
                raise UserError(f"{self.directory}: another process has trained here meanwhile; give the command again")
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            yield

    @property
    def result(self) -> dict[str, Any] | None:
        """The final figures, if the run has finished."""
        path = self.directory / RESULT
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result

    def check(self, config: dict[str, Any], allow_change: bool) -> list[str]:
        """Compare the settings with those that the run was started with.

        Settings are of three classes: *identity* (the model's shape and first weights, the data, the seed: no change),
        *history* (what the training does: a change must be allowed) and *free* (processes, workers, accumulation,
        logging, how it is computed). The train corpus is identity by content, which the data module verifies against
        the checkpoint.

        Returns:
            The changes of history, for the record.

        Raises:
            UserError: On a change that is not possible, or not allowed.
        """
        nothing_trained = self.config is None or self.checkpoint is None
        changes = [] if nothing_trained else list(_differences(self.config or {}, config))
        history: list[str] = []
        for name, was, now in changes:
            what = f"{name}: {was!r} -> {now!r}"
            if name.startswith(_IDENTITY):
                raise UserError(
                    f"{self.directory}: was started with {name} {was!r}, this config has {now!r}: that would be "
                    "another run; choose another directory with --run, or restore the setting"
                )
            if name.startswith(_HISTORY) and name not in _FREE:
                history.append(what)
        if history and not allow_change:
            raise UserError(
                f"{self.directory}: was started with other settings ({'; '.join(history)}); add --allow_change true to "
                "continue with the new ones, or choose another directory with --run"
            )
        return history

    def record_start(
        self, config: dict[str, Any], config_text: str, changes: list[str], execution: dict[str, Any]
    ) -> None:
        """Write the config, and a line about this start, what runs and the environment it runs in."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / CONFIG
        partial = path.with_name(f".{CONFIG}.partial")
        partial.write_text(config_text, encoding="utf-8")
        partial.rename(path)
        (self.directory / RESULT).unlink(missing_ok=True)
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "step": self.step,
            "command": shlex.join(sys.argv),
            "changes": changes,
            "python": platform.python_version(),
            "packages": {name: version(name) for name in _PACKAGES},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            **execution,
            "git_commit": _git_commit(),
        }
        with (self.directory / STARTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(start) + "\n")

    def record_result(self, result: dict[str, Any]) -> None:
        """Write the final figures."""
        partial = self.directory / f".{RESULT}.partial"
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.rename(self.directory / RESULT)


def data_state(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The data position in a checkpoint, which Lightning keeps under the name of the data module's class."""
    return next((state for name, state in checkpoint.items() if name.endswith("DataModule")), None)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Any:
    for name in sorted({*old, *new}):
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}", was, now


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None

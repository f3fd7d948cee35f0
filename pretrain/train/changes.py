"""Which of its settings a continued run may change."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from typing_extensions import override

from pretrain.errors import UserError, one_line
from pretrain.model.config import DROPOUT

_IDENTITY = (
    "seed_everything",
    "model.encoder",
    "model.optimizer",
    "model.decay",  # which parameters form a group: the optimizer's state is by groups
    "model.initialize_from",  # the directory is not read again, but what the run grew from cannot change
    "data.tokenizer",
    "data.max_length",
    "data.long_sequences",
    "data.global_batch_tokens",
    "data.batch_warmup",
    "data.task",
    "data.pair_order",
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
    "data.mask_unit",
    "data.mask_draws",
    "data.random_replace_prob",
    "data.mean_span_length",
    "data.validation",  # by which the best checkpoint is chosen, and from which a plateau or an early stop is decided
    "trainer.max_steps",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "trainer.precision",
)
_DROPOUT = tuple(f"model.encoder.{name}" for name in DROPOUT)  # says how to train, not what
_FREE = (
    "model.compile",
    "model.activation_checkpointing",
    "model.flash_attention",
    "model.cpu_kernels",
    "data.validation_pack_tokens",
)


_PRECISIONS = {"None": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


class Change(NamedTuple):
    """A setting that is another one than before."""

    name: str
    was: Any
    now: Any

    @override
    def __str__(self) -> str:
        return f"{self.name}: {self.was!r} -> {self.now!r}"


def changes_of_history(
    run: str, old: dict[str, Any], new: dict[str, Any], allowed: bool, defaults: dict[str, Any]
) -> list[Change]:
    """Compare a run's settings with other ones.

    Settings are of three classes: *identity* (the model's shape and first weights, the data, the seed: no change),
    *history* (what the training does: a change must be allowed) and *free* (processes, workers, accumulation, logging,
    how it is computed).

    Args:
        run: What it is called in messages.
        old: The settings that it was started with; one that is not there, since an older version did not know it, had
            its default.
        new: The other ones.
        allowed: Whether history may change.
        defaults: Of all settings.

    Returns:
        The changes of history, for the record.

    Raises:
        UserError: On a change that is not possible, or not allowed.
    """
    history: list[Change] = []
    for change in _differences(old, new, defaults):
        name, was, now = change
        if name == "trainer.precision" and precision_name(was) == precision_name(now):
            continue
        if name.startswith(_IDENTITY) and name not in _DROPOUT:
            raise UserError(
                f"{run}: was started with {name} {was!r}, this config has {now!r}: that would be another run; choose "
                "another directory with --run, or restore the setting"
            )
        if name.startswith(_HISTORY) and name not in _FREE:
            history.append(change)
    if history and not allowed:
        told = "; ".join(map(str, history))
        raise UserError(
            f"{run}: was started with other settings ({told}); add --allow_change to continue with the new ones, or "
            "choose another directory with --run"
        )
    return history


def precision_name(precision: str | int | None) -> str:
    """What Lightning calls a precision that has several names."""
    return _PRECISIONS.get(str(precision), str(precision))


def _differences(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any], prefix: str = ""
) -> Iterator[Change]:
    for name in sorted({*old, *new}):
        default = defaults.get(name)
        was, now = old.get(name, default), new.get(name)
        reordered = prefix + name == "data.validation" and _names(was) != _names(now)  # the first one counts
        if isinstance(was, dict) and isinstance(now, dict) and not reordered:
            yield from _differences(was, now, default if isinstance(default, dict) else {}, f"{prefix}{name}.")
        elif was != now or reordered:
            yield Change(f"{prefix}{name}", was, now)


def is_fine_tuning(config: dict[str, Any]) -> bool:
    """Whether settings are those of a fine-tuning run."""
    return "task" in (config.get("data") or {})


def _names(value: Any) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def yaml_error(path: Path) -> str | None:
    """Why a file is no YAML, with the line; None if it is."""
    try:
        yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{path}{line}: not YAML ({error.problem})"
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        return f"{path}: not YAML ({one_line(error, 120)})"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """The settings that a run's directory holds.

    Raises:
        UserError: If the file is damaged, or holds something else.
    """
    problem = yaml_error(path)
    config = None if problem else yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not all(isinstance(config.get(k), dict) for k in ("model", "data", "trainer")):
        raise UserError(
            f"{problem or f'{path}: not the settings of a run'}; restore it: `pretrain fit -c CONFIG --print_config` "
            "prints what belongs there"
        )
    return config

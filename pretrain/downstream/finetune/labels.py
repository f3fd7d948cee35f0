"""Labels: from what a table holds to the numbers that a loss compares with, and what they mean."""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.counter import Int64
from pretrain.corpus.padding import IGNORED
from pretrain.downstream.finetune.table import Row
from pretrain.errors import UserError

Task = Literal["regression", "binary", "multiclass", "multilabel", "token"]


@dataclass(frozen=True)
class LabelSpec:
    """What labels mean; a checkpoint carries it, so that predictions are in the user's words.

    Attributes:
        task: ``regression``: a number for each sequence; ``binary`` and ``multiclass``: one class of two, or of
            several; ``multilabel``: any number of classes; ``token``: a class for each residue.
        classes: Names of the classes, in the order of the outputs; the second of two is the positive one.
        mean: Mean of the training labels of a regression; the head's output 0.
        std: Their standard deviation; a step of 1 of the head's output.
        separator: What stands between the labels of a multilabel row.
    """

    task: Task
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    separator: str = ";"

    @property
    def described(self) -> str:
        """The task, and of two classes which is the positive one, for people."""
        return f"{self.task} (positive: {self.classes[1]})" if self.task == "binary" else self.task

    @property
    def num_outputs(self) -> int:
        """Outputs of the head, for each sequence or residue."""
        return len(self.classes) or 1

    def plain(self) -> dict[str, Any]:
        """Plain values, for a checkpoint; `from_plain` reads them."""
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "LabelSpec":
        """The reverse of `plain`."""
        return cls(**{**values, "classes": tuple(values["classes"])})


@dataclass(frozen=True)
class Labels:
    """The labels of a corpus, by the index of the sequence.

    Attributes:
        values: Of a regression [N] floats, of classes [N] integers, of several labels [N, K] zeros and ones; of
            residues the integers of all sequences end to end, `IGNORED` where there is none.
        offsets: Of residues, where each sequence's begin in ``values``, and their number last; [N + 1].
    """

    values: NDArray[Any]
    offsets: Int64 | None = None

    @property
    def fingerprint(self) -> str:
        """Sixteen digits that differ wherever a label does."""
        return hashlib.sha256(self.values.tobytes()).hexdigest()[:16]

    def counts(self, num_classes: int) -> NDArray[np.int64]:
        """How often each class occurs."""
        if self.values.ndim == 2:
            return cast(NDArray[np.int64], self.values.sum(0).astype(np.int64))
        return np.bincount(self.values[self.values >= 0], minlength=num_classes)


def learn_spec(
    task: Task, rows: Sequence[Row], separator: str, mask_label: str | None, positive: str | None = None
) -> LabelSpec:
    """What the labels of the training rows mean: the classes that occur, or mean and spread.

    Raises:
        UserError: If a label is missing or of the wrong kind, or there are too few classes; names file and row. Also if
            none is ``positive``.
    """
    if task == "regression":
        numbers = np.array([_number(row) for row in rows])
        if numbers.min() == numbers.max():
            raise UserError(
                f"{_file(rows)}: every training label is {numbers[0]:g}; there is nothing to learn from them"
            )
        return LabelSpec(task, (), float(numbers.mean()), float(numbers.std()))
    found: set[str | None] = set()
    for row in rows:
        found.update(_names(row, task, separator))
    classes = _in_order([name for name in found if name and name != mask_label])
    allowed = {"binary": (2, 2), "multiclass": (2, 10_000), "multilabel": (1, 10_000), "token": (2, 10_000)}
    fewest, most = allowed[task]
    if not fewest <= len(classes) <= most:
        shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        remedy = "a binary task has exactly 2" if task == "binary" else f"at least {fewest} are needed"
        if task == "binary" and len(classes) > 2:
            remedy += "; for more, set data.task to multiclass, for numbers to regression"
        raise UserError(f"{_file(rows)}: the training labels have {len(classes)} classes ({shown}); {remedy}")
    if positive is not None:
        if positive not in classes:
            raise UserError(f"data.positive_class is {positive!r}; the training labels are {' and '.join(classes)}")
        classes = tuple(sorted(classes, key=lambda name: name == positive))
    return LabelSpec(task, classes, separator=separator)


def _in_order(classes: list[str]) -> tuple[str, ...]:
    """By name; if all are whole numbers, by value."""
    whole = all(re.fullmatch("-?[0-9]{1,18}", name) for name in classes)
    return tuple(sorted(classes, key=lambda name: (int(name) if whole else 0, name)))


def encode_labels(
    spec: LabelSpec, rows: Sequence[Row], lengths: Sequence[int], separator: str, mask: str | None
) -> Labels:
    """The labels of rows as numbers.

    Args:
        spec: What they mean.
        rows: The rows.
        lengths: Residues of each sequence, for labels by residue.
        separator: What parts the labels of a multilabel row.
        mask: The label of a residue that has none, beside null.

    Raises:
        UserError: On a label that is missing, of the wrong kind or length, or none of the classes.
    """
    if spec.task == "regression":
        if len(rows) < 2:
            raise UserError(f"{rows[0].where}: is the only row of its split; how well numbers agree takes at least two")
        return Labels(np.array([_number(row) for row in rows], np.float32))
    number: dict[str | None, int] = {name: i for i, name in enumerate(spec.classes)}
    if spec.task == "token":
        number |= {None: IGNORED, mask: IGNORED}
    encoded: list[list[int]] = []
    for row, length in zip(rows, lengths, strict=True):
        names = _names(row, spec.task, separator)
        if spec.task == "token" and len(names) != length:
            raise UserError(
                f"{row.where}: record '{row.id}' has {length} residues but {len(names)} labels; give one letter for "
                "each residue (with data.mask_label for those without a label)"
            )
        if spec.task == "token" and all(name in (None, mask) for name in names):
            raise UserError(f"{row.where}: record '{row.id}' has no residue with a label; remove the row")
        for name in names:
            if name not in number:
                raise UserError(
                    f"{row.where}: record '{row.id}' has the class {name!r}, which no training row has (they have "
                    f"{', '.join(spec.classes[:8])}{', ...' if len(spec.classes) > 8 else ''}); add training rows of "
                    "it, or remove this one"
                )
        encoded.append([number[name] for name in names])
    if spec.task == "multilabel":
        values = np.zeros((len(rows), len(spec.classes)), np.float32)
        for i, ones in enumerate(encoded):
            values[i, ones] = 1
        return Labels(values)
    flat = np.array([value for values in encoded for value in values], np.int64)
    return Labels(flat, np.cumsum([0, *map(len, encoded)]) if spec.task == "token" else None)


def _file(rows: Sequence[Row]) -> str:
    return rows[0].where.rpartition(":")[0]


def _missing(row: Row) -> UserError:
    return UserError(f"{row.where}: record '{row.id}' has no label; fill it in or remove the row")


def _number(row: Row) -> float:
    if row.label is None or (isinstance(row.label, str) and not row.label.strip()):
        raise _missing(row)
    try:
        number = float(row.label)
    except (TypeError, ValueError):
        raise UserError(
            f"{row.where}: record '{row.id}' has the label {row.label!r}, which is no number; regression needs "
            "numbers (for classes, set data.task)"
        ) from None
    if not math.isfinite(number):
        raise UserError(f"{row.where}: record '{row.id}' has the label {number}; give a finite number or remove it")
    return number


def _names(row: Row, task: Task, separator: str) -> Sequence[str | None]:
    """The classes that a row's label names: one, several, or one for each residue, None where there is none."""
    label = row.label
    if isinstance(label, str) and not label.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in label):
        shown = label.encode("utf-8", "surrogateescape")
        raise UserError(f"{row.where}: record '{row.id}' has the label {shown!r}, which is no UTF-8; convert the file")
    if task == "multilabel":
        if label is None:
            raise _missing(row)
        names = label if isinstance(label, list) else label.split(separator) if isinstance(label, str) else [label]
        return [name for name in (_name(row, each) for each in names) if name]  # none of the classes is an answer, too
    if label is None or label == [] or (isinstance(label, str) and not label.strip()):
        raise _missing(row)
    if task == "token":
        if not isinstance(label, str | list):
            raise UserError(
                f"{row.where}: record '{row.id}' has the label {label!r}; give a string, a letter a residue"
            )
        return label if isinstance(label, str) else [None if each is None else _name(row, each) for each in label]
    if isinstance(label, list | dict):
        raise UserError(
            f"{row.where}: record '{row.id}' has several labels ({label}); a {task} task has one a row: set data.task "
            "to multilabel or token"
        )
    return [_name(row, label)]


def _name(row: Row, label: Any) -> str:
    """The class that a string or a number names."""
    if label is None or isinstance(label, list | dict) or (isinstance(label, float) and not math.isfinite(label)):
        raise UserError(f"{row.where}: record '{row.id}' has the label {label!r}; give a class or remove the row")
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    return str(label).strip()

"""How good predictions are, with intervals by the bootstrap over sequences.

Every figure is one of how often each sequence counts, so that a thousand samples are evaluated together: once each for
the value, and as often as it was drawn for an interval.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.corpus.batch import Batch
from pretrain.corpus.counter import Int64
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.ranks import Float64, Ranks, centred, pearson, varies

BOOTSTRAP_SAMPLES = 1000
_BLOCK = 2**18
"""Weights of sequences that exist at a time."""

Figures = Callable[[Float64], dict[str, Float64]]
"""From how often each sequence counts, [S, N], to figures by name, [S]; NaN where one is not defined."""


@dataclass(frozen=True)
class Answers:
    """A head's outputs beside the labels.

    Attributes:
        indices: The sequences, [N].
        counts: How many targets each has, [N]; their outputs lie end to end.
        outputs: [M, K], as `head_outputs` gives them, on the CPU.
        targets: [M] or [M, K].
    """

    indices: Int64
    counts: Int64
    outputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, batch: Batch, outputs: Tensor) -> "Answers":
        """Those of one batch."""
        return cls(batch.pack.indices, batch.pack.targets, outputs.detach().cpu(), batch.targets.cpu())

    @classmethod
    def join(cls, parts: Iterable["Answers"]) -> "Answers":
        """All parts as one, in the order of the sequences: the same however they were shared out."""
        several = list(parts)
        whole = cls(
            np.concatenate([part.indices for part in several]),
            np.concatenate([part.counts for part in several]),
            torch.cat([part.outputs for part in several]),
            torch.cat([part.targets for part in several]),
        )
        return whole.take(np.argsort(whole.indices))

    def take(self, rows: Int64) -> "Answers":
        """Those of some sequences, by their places here."""
        if len(self.outputs) == len(self.indices) and (self.counts == 1).all():
            places = rows
        else:
            first = np.cumsum(self.counts) - self.counts
            counts = self.counts[rows]
            begins = np.repeat(first[rows] - (np.cumsum(counts) - counts), counts)
            places = begins + np.arange(counts.sum())
        here = torch.from_numpy(places)
        return Answers(self.indices[rows], self.counts[rows], self.outputs[here], self.targets[here])


def predictions(spec: LabelSpec, outputs: Tensor) -> Tensor:
    """Outputs as predictions: values in the labels' own units [M], or probabilities of the classes [M, K]."""
    if spec.task == "regression":
        return outputs[:, 0] * spec.std + spec.mean
    return outputs.sigmoid() if spec.task == "multilabel" else outputs.softmax(-1)


def metrics(spec: LabelSpec, answers: Answers) -> dict[str, float]:
    """Every metric of the task; NaN where one is not defined, and all of them where an output is not finite.

    Regression: ``spearman``, ``pearson``, ``r2``, ``rmse``. Classes: ``accuracy``, ``mcc`` (Matthews' correlation),
    ``f1`` and ``auroc`` (macro-averaged). Residues: no ``auroc``; the accuracy is ``q3`` with three classes,
    ``q8`` with eight.
    """
    once = np.ones((1, len(answers.indices)))
    return {name: float(values[0]) for name, values in _figures(spec, answers)(once).items()}


def bootstrap(spec: LabelSpec, answers: Answers, samples: int = BOOTSTRAP_SAMPLES) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the metrics (Efron 1979), sequences drawn with replacement.

    Residues of a sequence stay together: they are not independent. A sample on which a metric is not defined, for want
    of a class, is left out of its interval.
    """
    generator, figures, size = np.random.default_rng(0), _figures(spec, answers), len(answers.indices)
    counts = (np.bincount(generator.integers(size, size=size), minlength=size) for _ in range(samples))
    parts = []
    while drawn := list(islice(counts, max(1, _BLOCK // size))):
        parts.append(figures(np.stack(drawn, dtype=np.float64)))
    return {name: _middle(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def _middle(values: Float64) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    low, high = np.quantile(defined, [0.025, 0.975]).tolist() if len(defined) else (float("nan"), float("nan"))
    return low, high


def main_metric(spec: LabelSpec) -> str:
    """The one figure that stands for a task."""
    return "spearman" if spec.task == "regression" else "f1" if spec.task == "multilabel" else "mcc"


def f1_scores(right: NDArray[Any], claimed: NDArray[Any], true: NDArray[Any]) -> Float64:
    """F1 from counts of what was rightly claimed, was claimed, and is true; NaN where nothing was, and nothing is."""
    return _ratio(2 * right, claimed + true)


def _figures(spec: LabelSpec, answers: Answers) -> Figures:
    finite = answers.outputs.isfinite()
    predicted = predictions(spec, answers.outputs.double().where(finite, 0)).numpy()  # or large ones become all equal
    targets = answers.targets.numpy()
    if spec.task == "regression":
        figures = _of_numbers(predicted.astype(np.float64), targets.astype(np.float64))
    else:
        figures = _of_classes(spec, answers.counts, predicted, targets)
    if finite.all():
        return figures
    return lambda weights: dict.fromkeys(figures(weights), np.full(len(weights), np.nan))


def _of_numbers(predicted: Float64, targets: Float64) -> Figures:
    ranks = Ranks(predicted), Ranks(targets)
    errors = (predicted - targets) ** 2

    def figures(weights: Float64) -> dict[str, Float64]:
        residual, spread = weights @ errors, (weights * centred(targets, weights) ** 2).sum(1)
        return {
            "spearman": pearson(ranks[0](weights), ranks[1](weights), weights),
            "pearson": pearson(predicted, targets, weights),
            "r2": 1 - _ratio(residual, np.where(varies(targets, weights), spread, 0)),
            "rmse": np.sqrt(residual / weights.sum(1)),
        }

    return figures


def _of_classes(spec: LabelSpec, counts: Int64, predicted: NDArray[Any], targets: NDArray[Any]) -> Figures:
    several, classes = spec.task == "multilabel", np.arange(len(spec.classes))
    claimed = predicted > 0.5 if several else predicted.argmax(1)[:, None] == classes
    true = targets > 0.5 if several else targets[:, None] == classes
    tables = [_by_sequence(table, counts) for table in (claimed & true, claimed, true)]
    decisions = counts * (len(classes) if several else 1)
    scored = classes[1:] if spec.task == "binary" else classes  # of two, the second is the positive one
    accuracy = f"q{len(classes)}" if spec.task == "token" and len(classes) in (3, 8) else "accuracy"
    aurocs = [] if spec.task == "token" else [_auroc(predicted[:, k], true[:, k]) for k in scored]

    def figures(weights: Float64) -> dict[str, Float64]:
        right, claimed, true = (weights @ table for table in tables)  # [S, K]
        total = weights @ decisions
        f1 = _mean(f1_scores(right, claimed, true)[:, scored])
        if several:  # each decision is one of two: that a sequence has the class, or has it not
            yes, claims, truths = right.sum(1), claimed.sum(1), true.sum(1)
            right = np.stack([total - claims - truths + yes, yes], axis=1)
            claimed, true = (np.stack([total - ones, ones], axis=1) for ones in (claims, truths))
        found = {accuracy: _ratio(right.sum(1), total), "mcc": _mcc(right.sum(1), claimed, true), "f1": f1}
        if aurocs:
            found["auroc"] = _mean(np.stack([auroc(weights) for auroc in aurocs], axis=1))
        return found

    return figures


def _by_sequence(table: NDArray[np.bool_], counts: Int64) -> Float64:
    """How many of a sequence's targets have each class, [N, K], from whether each of all targets has it, [M, K]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    columns = [np.bincount(owner[column], minlength=len(counts)) for column in table.T]
    return np.stack(columns, axis=1, dtype=np.float64)


def _mcc(right: Float64, claimed: Float64, true: Float64) -> Float64:
    """Matthews' correlation [S] of how many decisions are right [S], claim and have each class [S, K] (Gorodkin 2004).

    It is 0 where all are predicted to be of one class, or are, as scikit-learn has it.
    """
    total = true.sum(1)
    spread = (total**2 - (true**2).sum(1)) * (total**2 - (claimed**2).sum(1))
    covariance = right * total - (true * claimed).sum(1)
    correlation: Float64 = np.divide(covariance, np.sqrt(spread), out=np.zeros(len(total)), where=spread > 0)
    return correlation


def _auroc(scores: NDArray[np.floating], positive: NDArray[np.bool_]) -> Callable[[Float64], Float64]:
    """The area under the ROC curve, from the positives' ranks (Mann and Whitney 1947); NaN for want of a class."""
    ranks = Ranks(scores, of=scores[positive])

    def auroc(weights: Float64) -> Float64:
        ours = weights[:, positive]
        count = ours.sum(1)
        above = (ours * ranks(weights)).sum(1) - count * (count + 1) / 2
        return _ratio(above, count * (weights.sum(1) - count))

    return auroc


def _mean(values: Float64) -> Float64:
    """Over those classes [S, K] for which a figure is defined."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(1), defined.sum(1))


def _ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Float64:
    """NaN where it would be by zero."""
    ratio: Float64 = np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator > 0)
    return ratio

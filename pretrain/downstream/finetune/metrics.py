"""How good predictions are, by torchmetrics, with intervals by the bootstrap over sequences."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional import classification, regression

from pretrain.corpus.batch import Batch
from pretrain.corpus.counter import Int64
from pretrain.downstream.finetune.labels import LabelSpec

BOOTSTRAP_SAMPLES = 1000


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
        """Those of some sequences, by their places here; one may be taken repeatedly."""
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
    """Every metric of the task.

    Regression: ``spearman``, ``pearson``, ``r2``, ``rmse``. Classes: ``accuracy``, ``mcc`` (Matthews' correlation),
    ``f1`` and ``auroc`` (macro-averaged). Residues: no ``auroc``; the accuracy is ``q3`` with three classes,
    ``q8`` with eight.
    """
    predicted, targets = predictions(spec, answers.outputs), answers.targets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchmetrics tells of classes that a small set has not
        return {name: float(metric(predicted, targets)) for name, metric in _metrics_of(spec).items()}


def bootstrap(spec: LabelSpec, answers: Answers, samples: int = BOOTSTRAP_SAMPLES) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the metrics (Efron 1979), sequences drawn with replacement.

    Residues of a sequence stay together: they are not independent. A sample on which a metric is not defined, for want
    of a class, is left out of its interval.
    """
    generator = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {}
    for _ in range(samples):
        rows = generator.integers(len(answers.indices), size=len(answers.indices))
        for name, value in metrics(spec, answers.take(rows)).items():
            drawn.setdefault(name, []).append(value)
    return {name: _middle([value for value in values if value == value]) for name, values in drawn.items()}


def _middle(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975]).tolist() if values else (float("nan"), float("nan"))
    return low, high


def main_metric(spec: LabelSpec) -> str:
    """The one figure that stands for a task."""
    return "spearman" if spec.task == "regression" else "f1" if spec.task == "multilabel" else "mcc"


def _metrics_of(spec: LabelSpec) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    classes = len(spec.classes)
    if spec.task == "regression":
        return {
            "spearman": regression.spearman_corrcoef,
            "pearson": regression.pearson_corrcoef,
            "r2": regression.r2_score,
            "rmse": lambda p, t: regression.mean_squared_error(p, t, squared=False),
        }
    if spec.task == "multilabel":
        return {
            "accuracy": lambda p, t: classification.multilabel_accuracy(p, t.long(), classes, average="micro"),
            "mcc": lambda p, t: _mcc(classification.multilabel_confusion_matrix(p, t.long(), classes).sum(0)),
            "f1": lambda p, t: classification.multilabel_f1_score(p, t.long(), classes),
            "auroc": lambda p, t: _auroc(p, t.bool()),
        }
    if spec.task == "binary":
        return {
            "accuracy": lambda p, t: classification.binary_accuracy(p[:, 1], t),
            "mcc": lambda p, t: _mcc(classification.binary_confusion_matrix(p[:, 1], t)),
            "f1": lambda p, t: classification.binary_f1_score(p[:, 1], t),
            "auroc": lambda p, t: _auroc(p[:, 1:], t[:, None] == 1),
        }
    accuracy = f"q{classes}" if spec.task == "token" and classes in (3, 8) else "accuracy"
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        accuracy: lambda p, t: classification.multiclass_accuracy(p, t, classes, average="micro"),
        "mcc": lambda p, t: _mcc(classification.multiclass_confusion_matrix(p, t, classes)),
        "f1": lambda p, t: classification.multiclass_f1_score(p, t, classes, average="macro"),
    }
    if spec.task != "token":
        found["auroc"] = lambda p, t: _auroc(p, t[:, None] == torch.arange(classes))
    return found


def _mcc(confusion: Tensor) -> Tensor:
    """Matthews' correlation of a confusion matrix, true classes by predicted ones (Gorodkin 2004).

    It is 0 where all are predicted to be of one class, or are, as scikit-learn has it; torchmetrics takes other numbers
    there, up to nearly 1.
    """
    counts = confusion.double()
    total, true, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    spread = (total**2 - true.square().sum()) * (total**2 - predicted.square().sum())
    covariance = counts.trace() * total - (true * predicted).sum()
    return (covariance / spread.sqrt() if spread > 0 else torch.zeros(())).float()


def _auroc(predicted: Tensor, positive: Tensor) -> Tensor:
    """Mean over the classes [M, K] that some targets have and others have not: it is not defined for the rest.

    torchmetrics takes 0 for these, which would pull the intervals of small test splits down.
    """
    share = positive.float().mean(0)
    defined = torch.nonzero((share > 0) & (share < 1))[:, 0]
    scores, truth = predicted[:, defined], positive[:, defined].long()
    if not len(defined):
        return torch.tensor(torch.nan)
    if len(defined) == 1:  # which torchmetrics calls binary
        return classification.binary_auroc(scores[:, 0], truth[:, 0])
    return classification.multilabel_auroc(scores, truth, len(defined))

"""Contact regressions: fitted on structures, kept in files, and how well they predict.

As Rao et al. 2020 do it: L1-regularised logistic regression on a few structures (they take 20), residues at least 6
apart, and the precision of the L, L/2 and L/5 most probable pairs, by range.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.structures import MIN_SEPARATION, Structure
from pretrain.errors import UserError, how_to_install
from pretrain.files import atomic_path
from pretrain.model.contacts import ContactRegression, pair_features
from pretrain.model.encoder import check_finite
from pretrain.model.hf import contacts_from_hf, contacts_to_hf

RANGES = {"short": (MIN_SEPARATION, 11), "medium": (12, 23), "long": (24, None)}
"""Separations in the sequence, both included."""
TOPS = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}
"""The precision among the best L divided by that."""
CHANCE = "chance"
OLDER = "of the model that training began with; attention has changed since"
"""What is said of the regression that a run took over."""
Precisions = dict[str, dict[str, float]]
"""By range, then by `TOPS` and `CHANCE`."""
_STRENGTH = 0.15
"""scikit-learn's ``C``; the paper's number."""


def fit_regression(model: PretrainedEncoder, structures: Sequence[Structure]) -> ContactRegression:
    """A regression that reads contacts from a model's attention, fitted on structures.

    All pairs' features are in memory, with liblinear's copy 24 bytes a pair and attention map: for 20 chains of 200
    residues 1 GB under ESM-2 8M, 6 GB under 650M.

    Raises:
        UserError: If the structures hold no contact, the model's attention is not finite, or scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        missing = "regressions are fitted by scikit-learn, which is missing"
        raise UserError(f"{missing}: {how_to_install('contacts')}") from error
    labels = contact_labels(structures)
    features = np.empty((len(labels), model.config.num_hidden_layers * model.config.num_attention_heads))
    row = 0
    for ids, structure in _encoded(model, structures):
        first, second = (torch.from_numpy(places) for places in structure.pairs)
        features[row : row + len(first)] = check_finite(pair_features(model, ids, first, second)).numpy()
        row += len(first)
    # Its own random numbers, so that a training run that asks for it draws the same as one that does not.
    regression = LogisticRegression(C=_STRENGTH, l1_ratio=1.0, solver="liblinear", max_iter=1000, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it had not converged: what it found is what is evaluated
        regression.fit(features, labels)
    return ContactRegression(
        torch.from_numpy(regression.coef_[0]).float(), torch.tensor(float(regression.intercept_[0]))
    )


def contact_labels(structures: Sequence[Structure]) -> NDArray[np.bool_]:
    """What a regression is to tell apart: whether each pair touches, structure by structure.

    Raises:
        UserError: If all pairs are alike.
    """
    labels = np.concatenate([structure.contacts() for structure in structures])
    if not labels.any() or labels.all():
        raise UserError(
            f"of {len(labels):,} pairs in the structures to fit on, {'all' if labels.any() else 'none'} touch; give "
            "more structures"
        )
    return labels


def _encoded(model: PretrainedEncoder, structures: Sequence[Structure]) -> list[tuple[Tensor, Structure]]:
    return [(model.lay_out([model.encode(s.sequence, s.id)])[0], s) for s in structures]


def precisions(structures: Sequence[Structure], maps: Sequence[NDArray[np.float32]]) -> Precisions:
    """How many of the most probable pairs are contacts: by range, then by `TOPS`; means over the structures.

    Args:
        structures: What is true. Pairs without coordinates are not asked about; L counts all residues.
        maps: What was predicted.

    Returns:
        Also, under `CHANCE`, the share of contacts among all pairs: what a guess would reach. A range that no structure
        is long enough for is left out.
    """
    return means([precisions_of(structure, predicted) for structure, predicted in zip(structures, maps, strict=True)])


def precisions_of(structure: Structure, predicted: NDArray[np.float32]) -> Precisions:
    """As `precisions`, of one structure."""
    first, second = structure.pairs
    contacts, probabilities = structure.contacts(), predicted[first, second]
    found: Precisions = {}
    for name, (low, high) in RANGES.items():
        here = (second - first >= low) & (second - first <= (high or len(predicted)))
        if here.any():
            found[name] = {
                top: _precision(probabilities[here], contacts[here], max(1, len(predicted) // part))
                for top, part in TOPS.items()
            }
            found[name][CHANCE] = float(contacts[here].mean())
    return found


def means(found: Sequence[Precisions]) -> Precisions:
    """The means of `precisions_of` over the structures that are long enough for a range."""
    by_range = {name: [figures[name] for figures in found if name in figures] for name in RANGES}
    return {
        name: {top: float(np.mean([figures[top] for figures in of_range])) for top in (*TOPS, CHANCE)}
        for name, of_range in by_range.items()
        if of_range
    }


def _precision(probabilities: NDArray[np.float32], contacts: NDArray[np.bool_], best: int) -> float:
    """The share of contacts among the ``best`` most probable pairs; of equally probable ones, what chance takes."""
    best = min(best, len(probabilities))
    least = np.partition(probabilities, -best)[-best]
    above, tied = probabilities > least, probabilities == least
    hits = contacts[above].sum() + (best - above.sum()) * contacts[tied].mean()
    return float(hits / best)


def write_regression(regression: ContactRegression, file: Path, about: Mapping[str, object]) -> None:
    """Write a regression as safetensors, under transformers' names for its contact head, and ``about`` as metadata."""
    from safetensors.torch import save

    content = save(contacts_to_hf(regression), {name: json.dumps(value) for name, value in about.items()})
    with atomic_path(file) as partial:
        partial.write_bytes(content)


def read_regression(file: Path) -> ContactRegression:
    """What `write_regression` wrote, or the contact head in a model's safetensors.

    Raises:
        UserError: If there is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        regression = contacts_from_hf(load_file(file))
    except (SafetensorError, OSError) as error:
        reason = "not found" if not file.exists() else f"no safetensors file ({error})"
        raise UserError(f"{file}: {reason}; give what `pretrain contacts --save_regression` wrote") from error
    if regression is None:
        raise UserError(f"{file}: holds no contact regression; give what `pretrain contacts --save_regression` wrote")
    return regression

"""`pretrain score`: the effects of variants without training on any (Meier et al. 2021).

Each method gives a variant one number, higher for what the model finds more natural:

- masked-marginals: the sum over the substitutions of log p(new) - log p(old), with that place of the wild type masked;
- wildtype-marginals: the same with nothing masked: one pass for all variants of a wild type;
- pseudo-perplexity: the mean of log p(residue) over the variant itself, each residue masked in turn: minus the
  logarithm of the pseudo-perplexity (Salazar et al. 2020). One pass a residue and variant; insertions and deletions
  have one, too.

As in facebookresearch/esm's ``examples/variant-prediction``, probabilities are over the whole vocabulary, and several
substitutions are taken one by one and added up.
"""

import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.downstream import ranks
from pretrain.downstream.load import load_masked_lm, use_device
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.records import long_lines
from pretrain.downstream.variants import MEASURED_COLUMN, Variant, VariantColumns, VariantTable, read_variants
from pretrain.errors import UserError
from pretrain.files import atomic_file, refuse_existing

_BLOCK_TOKENS = 2**18
"""Masked copies that exist at a time."""


def score(
    path: Path,
    table: Path,
    out: Path,
    methods: Sequence[str] = ("masked-marginals",),
    wild_type: str | None = None,
    columns: VariantColumns | None = None,
    first_residue: int = 1,
    device: str | None = None,
) -> str:
    """Score the variants of a CSV file into a copy of it with a column for each method.

    On a GPU the blocks compute in bfloat16, the head in float32.

    Args:
        path: The model: a run, a checkpoint or a transformers directory, of proteins.
        table: See `read_variants`.
        out: The CSV file to write.
        methods: Of `METHODS`, each once.
        wild_type: The wild-type sequence; by default the table says it.
        columns: What the table's columns are called, where that is not as usual.
        first_residue: The number that the table gives the wild type's first residue.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.

    Returns:
        What was written, and Spearman's rank correlation where the table has measured effects, for people.

    Raises:
        UserError: If ``out`` exists, a row does not fit its wild type, or the model is none of proteins.
    """
    if unknown := [method for method in methods if method not in METHODS]:
        raise UserError(f"method is '{unknown[0]}'; give one of {', '.join(METHODS)}")
    if twice := [method for number, method in enumerate(methods) if method in methods[:number]]:
        raise UserError(f"method {twice[0]} is named twice; name each once")
    refuse_existing(out)
    marginals = any(method != "pseudo-perplexity" for method in methods)
    variants = read_variants(table, wild_type, columns or VariantColumns(), first_residue, marginals)
    names = [COLUMNS[method] for method in methods]
    if taken := [name for name in names if name in variants.header]:
        raise UserError(f"{table}: has a column '{taken[0]}' already; rename it, so that nothing is overwritten")
    model = load_masked_lm(path).to(use_device(device))
    if not isinstance(model.tokenizer, ProteinTokenizer):
        raise UserError(f"{path}: is a model of text; variants are scored by models of proteins")
    scores = [METHODS[method](model, variants.rows, progress=sys.stderr.isatty()) for method in methods]
    with atomic_file(out) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*variants.header, *names])
        for variant, *values in zip(variants.rows, *scores, strict=True):
            writer.writerow([*variant.fields.values(), *(f"{value:.6f}" for value in values)])
    told = f"{out}: {len(variants.rows):,} variants scored by {path}"
    long = long_lines((len(variant.mutated) + 2 for variant in variants.rows), model.max_length)
    return "\n".join([told, *long, *_agreement(variants, methods, scores)])


def _masked_marginals(
    model: PretrainedEncoder, variants: Sequence[Variant], progress: bool = False
) -> NDArray[np.float64]:
    def look(ids: NDArray[np.int64], places: list[int]) -> NDArray[np.float32]:
        tasks = [(ids, place) for place in places]
        return np.concatenate(list(_masked(model, tasks, len(tasks), "masked marginals" if progress else None)))

    return _marginals(model, variants, look)


def _wildtype_marginals(
    model: PretrainedEncoder, variants: Sequence[Variant], progress: bool = False
) -> NDArray[np.float64]:
    return _marginals(model, variants, lambda ids, places: model.log_probabilities([ids], [places])[0])


def _marginals(
    model: PretrainedEncoder,
    variants: Sequence[Variant],
    look: Callable[[NDArray[np.int64], list[int]], NDArray[np.float32]],
) -> NDArray[np.float64]:
    """``look`` gives log probabilities at places of a wild type, [places, V]: asked once for each wild type."""
    places: dict[str, set[int]] = {}
    for variant in variants:
        places.setdefault(variant.wild_type, set()).update(place for place, _ in variant.substitutions)
    tables: dict[tuple[str, int], NDArray[np.float32]] = {}
    for wild_type, here in places.items():
        if here:
            ordered = sorted(here)
            rows = look(_ids(model, wild_type), [place + 1 for place in ordered])  # behind <cls>
            tables |= {(wild_type, place): row for place, row in zip(ordered, rows, strict=True)}
    letter = {token: number for number, token in enumerate(model.tokenizer.tokens)}
    result = np.zeros(len(variants))
    for number, variant in enumerate(variants):
        for place, new in variant.substitutions:
            row = tables[variant.wild_type, place]
            result[number] += float(row[letter[new]]) - float(row[letter[variant.wild_type[place]]])
    return result


def _pseudo_perplexity(
    model: PretrainedEncoder, variants: Sequence[Variant], progress: bool = False
) -> NDArray[np.float64]:
    encoded = {variant.mutated: _ids(model, variant.mutated) for variant in variants}
    tasks = ((ids, place) for ids in encoded.values() for place in range(1, len(ids) - 1))
    count = sum(len(ids) - 2 for ids in encoded.values())
    rows = _masked(model, tasks, count, "pseudo-perplexity" if progress else None)
    means = {
        mutated: float(np.mean([next(rows)[0, ids[place]] for place in range(1, len(ids) - 1)], dtype=np.float64))
        for mutated, ids in encoded.items()
    }
    return np.array([means[variant.mutated] for variant in variants])


def _masked(
    model: PretrainedEncoder, tasks: Iterable[tuple[NDArray[np.int64], int]], count: int, what: str | None
) -> Iterator[NDArray[np.float32]]:
    """For each sequence and place, the log probabilities at that place while it alone is masked, [1, V].

    ``what`` is shown before the progress bar; None for no bar.
    """
    copies: list[NDArray[np.int64]] = []
    places: list[list[int]] = []
    size = 0
    with tqdm(total=count, desc=what, unit=" masks", disable=what is None) as bar:
        for ids, place in tasks:
            if size + len(ids) > _BLOCK_TOKENS and copies:
                yield from model.log_probabilities(copies, places)
                bar.update(len(copies))
                copies, places, size = [], [], 0
            masked = ids.copy()
            masked[place] = model.tokenizer.mask_token_id
            copies.append(masked)
            places.append([place])
            size += len(ids)
        yield from model.log_probabilities(copies, places)
        bar.update(len(copies))


def _ids(model: PretrainedEncoder, sequence: str) -> NDArray[np.int64]:
    return model.encode(sequence, "the sequence").astype(np.int64)


METHODS: dict[str, Callable[..., NDArray[np.float64]]] = {
    "masked-marginals": _masked_marginals,
    "wildtype-marginals": _wildtype_marginals,
    "pseudo-perplexity": _pseudo_perplexity,
}

COLUMNS = {
    "masked-marginals": "masked_marginals",
    "wildtype-marginals": "wildtype_marginals",
    "pseudo-perplexity": "mean_pseudo_log_likelihood",
}


def spearman(variants: Sequence[Variant], scores: NDArray[np.float64]) -> float | None:
    """Rank correlation of scores with what was measured, where it was; None if either side is all equal."""
    known = [number for number, variant in enumerate(variants) if variant.measured is not None]
    found = ranks.spearman(scores[known], np.array([variants[number].measured for number in known], np.float64))
    return None if math.isnan(found) else found


def _agreement(variants: VariantTable, methods: Sequence[str], scores: Sequence[NDArray[np.float64]]) -> list[str]:
    """Spearman's rank correlation of each method with what was measured, for people."""
    if variants.measured_column is None:
        return [f"  no column {MEASURED_COLUMN}: no correlation"]
    known = sum(variant.measured is not None for variant in variants.rows)
    lines = []
    for method, values in zip(methods, scores, strict=True) if known > 1 else ():
        found = spearman(variants.rows, values)
        shown = "undefined, as all are equal" if found is None else f"{found:.3f}"
        lines.append(f"  {method:20} Spearman {shown} with {variants.measured_column}  ({known:,} variants)")
    return lines

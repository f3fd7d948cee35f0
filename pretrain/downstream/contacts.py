"""`pretrain contacts`: which residues touch, read from attention; where structures say it, how often that is right."""

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pretrain.corpus.sources import SourceOptions, find_sources
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.downstream.contact_regression import (
    CHANCE,
    OLDER,
    RANGES,
    TOPS,
    Precisions,
    fit_regression,
    means,
    precisions_of,
    read_regression,
    write_regression,
)
from pretrain.downstream.embedding_files import Array, write_npz_arrays, write_safetensors_arrays
from pretrain.downstream.load import load, use_device
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.records import long_lines, read_tokens
from pretrain.downstream.structures import MIN_SEPARATION, Structure, read_structures
from pretrain.errors import UserError
from pretrain.files import atomic_path, check_suffix, refuse_existing
from pretrain.model.contacts import ContactRegression
from pretrain.train.picture import PICTURE_SUFFIX, drawing

_PANELS = 6
"""Maps in a picture."""


class _Protein(NamedTuple):
    """What a map is predicted for: its name, its tokens, and its structure where there is one."""

    id: str
    ids: NDArray[np.integer]
    structure: Structure | None


def contacts(
    path: Path,
    sources: Sequence[str] = (),
    out: Path | None = None,
    structures: Sequence[Path] = (),
    fit_on: Sequence[Path] = (),
    regression_file: Path | None = None,
    save_to: Path | None = None,
    picture: Path | None = None,
    source_options: SourceOptions | None = None,
    device: str | None = None,
) -> str:
    """Predict contact maps of sequences, or of structures, which also tell how often the prediction is right.

    Args:
        path: The model: a run, a checkpoint or a transformers directory, of proteins.
        sources: Sequences, as for `pretrain.corpus.prepare.prepare`.
        out: The ``.npz``, ``.safetensors`` or ``.csv`` file to write: a map for each sequence, under its name; as CSV
            the pairs at least 6 apart, the most probable first.
        structures: PDB and mmCIF files, or directories of them, to predict for and compare with.
        fit_on: Structures to fit the regression on.
        regression_file: A regression that was fitted earlier; by default the model's own.
        save_to: The ``.safetensors`` file to keep the regression in.
        picture: The ``.png`` file to draw the first maps into; it is replaced.
        source_options: How ``sources`` are read.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.

    Returns:
        What was written, and the precision where structures tell it, for people.

    Raises:
        UserError: If there is nothing to do, a file exists, something cannot be read, or there is no regression.
    """
    if not (sources or structures or save_to):
        raise UserError("nothing to predict; give sequences, --structures, or --fit and --save_regression")
    if (out or picture) and not (sources or structures):
        raise UserError("no sequence to predict for; give SOURCE or --structures")
    if sources and not (out or picture):
        raise UserError("nowhere to write the maps; give --out FILE or --picture PNG")
    if fit_on and regression_file:
        raise UserError("a regression is either fitted or read; give --fit or --regression")
    if out and out.suffix not in _WRITERS:
        raise UserError(f"{out}: the name must end in one of {', '.join(_WRITERS)}, which says what is written")
    if save_to:
        check_suffix(save_to, ".safetensors")
    if picture:
        check_suffix(picture, PICTURE_SUFFIX)
    if out and out == save_to:
        raise UserError(f"{out}: is given for the maps and for the regression; choose another name for one of them")
    for file in (out, save_to):
        if file:
            refuse_existing(file)
    model = load(path).to(use_device(device))
    if not isinstance(model.tokenizer, ProteinTokenizer):
        raise UserError(f"{path}: is a model of text; contacts are read from models of proteins")
    if not (fit_on or regression_file or model.contacts):
        raise UserError(
            f"{path}: has no contact regression; fit one on structures by --fit, or give one with --regression"
        )
    known, training = read_structures(structures), read_structures(fit_on)
    proteins = [*_of_sources(model, sources, source_options), *_of_structures(model, known)]
    _check_names(proteins)
    regression, origin = _regression(model, path, training, regression_file, save_to is not None)
    lines = []
    bar = tqdm(total=len(proteins), desc="contacts", unit=" sequences", disable=None)
    kept: dict[str, NDArray[np.float32]] = {}
    found: list[Precisions] = []

    def predict(protein: _Protein) -> NDArray[np.float32]:
        if protein.id in kept:
            return kept[protein.id]
        predicted = np.asarray(regression.predict(model, model.lay_out([protein.ids])[0]).cpu().numpy())
        if protein.structure:
            found.append(precisions_of(protein.structure, predicted))
        bar.update()
        return predicted

    with bar:
        for protein in proteins[:_PANELS] if picture else ():  # what is looked at twice
            kept[protein.id] = predict(protein)
        if picture:  # may be drawn again, so it comes before what may not be written again
            _draw(picture, [(protein, kept[protein.id]) for protein in proteins[:_PANELS]])
            lines.append(f"{picture}: {min(len(proteins), _PANELS)} of {len(proteins):,} maps")
        if out:
            with atomic_path(out) as partial_file:
                _WRITERS[out.suffix](partial_file, proteins, predict)
            lines.append(f"{out}: maps of {len(proteins):,} sequences by {path}; {origin}")
        else:
            for protein in proteins:
                if protein.structure:
                    predict(protein)
    if save_to:
        about = {"model": str(path), "structures": [s.id for s in training]}
        write_regression(regression, save_to, about)
        lines.append(f"{save_to}: {origin}")
    lines += long_lines((len(protein.ids) for protein in proteins), model.max_length)
    if regression is model.contacts and model.contacts_are_older:
        lines.append(f"  its own regression is {OLDER}; fit one to it as it is by --fit")
    if known:
        lines += _precision_lines(means(found), len(known))
        if both := {s.sequence for s in known} & {s.sequence for s in training}:
            lines.append(f"  {len(both):,} of these sequences are among those fitted on: the figures flatter")
    return "\n".join(lines)


def _regression(
    model: PretrainedEncoder, path: Path, training: Sequence[Structure], file: Path | None, save: bool
) -> tuple[ContactRegression, str]:
    """What to predict with, and where it is from."""
    if training:
        regression = fit_regression(model, training)
        used = int(regression.weight.count_nonzero())
        if save and not used:
            raise UserError(
                f"{path}: its attention tells nothing of contacts yet (every weight came out as 0), so there is no "
                "regression to keep; fit on more structures, or train longer"
            )
        maps = f"{used} of {len(regression.weight)} attention maps"
        return regression, f"regression over {maps}, fitted on {len(training)} chains"
    if file:
        regression = read_regression(file)
        regression.check(model.config, str(file))
        return regression, f"regression of {file}"
    assert model.contacts
    return model.contacts, "the model's own regression"


def _of_sources(model: PretrainedEncoder, sources: Sequence[str], options: SourceOptions | None) -> Iterator[_Protein]:
    options = options or SourceOptions()
    found = find_sources(sources, options) if sources else []
    for record in read_tokens(found, model.tokenizer, options, None, crop=False):
        yield _Protein(record.id, record.ids, None)


def _of_structures(model: PretrainedEncoder, structures: Sequence[Structure]) -> Iterator[_Protein]:
    for structure in structures:
        yield _Protein(structure.id, model.encode(structure.sequence, structure.id), structure)


def _check_names(proteins: Sequence[_Protein]) -> None:
    """Maps are found by name, so each must have its own."""
    seen = set()
    for protein in proteins:
        if protein.id in seen:
            raise UserError(f"two sequences are called '{protein.id}'; give each a name of its own")
        seen.add(protein.id)


Predict = Callable[[_Protein], NDArray[np.float32]]


def _arrays(proteins: Sequence[_Protein], predict: Predict) -> list[Array]:
    """A map for each protein, made when it is written."""

    def chunks(protein: _Protein) -> Iterator[NDArray[np.float32]]:
        yield predict(protein)

    return [
        Array(protein.id, np.dtype(np.float32), (len(protein.ids) - 2,) * 2, partial(chunks, protein))
        for protein in proteins
    ]


def _write_npz(file: Path, proteins: Sequence[_Protein], predict: Predict) -> None:
    write_npz_arrays(file, _arrays(proteins, predict))


def _write_safetensors(file: Path, proteins: Sequence[_Protein], predict: Predict) -> None:
    write_safetensors_arrays(file, _arrays(proteins, predict), {})


def _write_csv(file: Path, proteins: Sequence[_Protein], predict: Predict) -> None:
    """Residues are numbered from 1."""
    with file.open("w", encoding="utf-8", newline="") as sink:
        writer = csv.writer(sink, lineterminator="\n")
        writer.writerow(("id", "i", "j", "probability"))
        for protein in proteins:
            predicted = predict(protein)
            first, second = np.triu_indices(len(predicted), MIN_SEPARATION)
            probabilities = predicted[first, second]
            for pair in np.argsort(-probabilities, kind="stable"):
                writer.writerow((protein.id, first[pair] + 1, second[pair] + 1, f"{probabilities[pair]:.6g}"))


_WRITERS = {".npz": _write_npz, ".safetensors": _write_safetensors, ".csv": _write_csv}


def _precision_lines(figures: Precisions, count: int) -> list[str]:
    lines = [
        f"  {'separation':18}" + "".join(f"{name:>8}" for name in (*TOPS, CHANCE)) + f"   (means of {count} chains)"
    ]
    for name, values in figures.items():
        low, high = RANGES[name]
        span = f"{name}, {low} to {high}" if high else f"{name}, {low} on"
        lines.append(f"  {span:18}" + "".join(f"{value:8.3f}" for value in values.values()))
    return lines


def _draw(file: Path, maps: Sequence[tuple[_Protein, NDArray[np.float32]]]) -> None:
    """Predicted maps; of a structure, what is true below the diagonal and what is predicted above it."""
    columns = min(len(maps), 3)
    rows = -(-len(maps) // columns)
    with drawing(file, (1 + 4 * columns, 4 * rows), rows, columns) as plots:
        for plot, (protein, predicted) in zip(plots, maps, strict=False):
            length = len(predicted)
            first, second = np.indices((length, length))
            shown = np.where(abs(first - second) >= MIN_SEPARATION, predicted, np.nan)
            title = f"{protein.id}, {length} residues"
            if protein.structure:
                shown[np.tril_indices(length)] = np.nan
                i, j = protein.structure.pairs
                touching = protein.structure.contacts()
                plot.plot(i[touching] + 1, j[touching] + 1, ".", color="black", markersize=2)
                title += "\nbelow the diagonal: the structure's contacts"
            image = plot.imshow(
                shown, cmap="Blues", vmin=0, vmax=1, extent=(0.5, length + 0.5, length + 0.5, 0.5), interpolation="none"
            )
            plot.set_title(title, fontsize=9)
            plot.figure.colorbar(image, ax=plot, shrink=0.8, label="probability of a contact")
        for plot in plots[len(maps) :]:
            plot.set_axis_off()

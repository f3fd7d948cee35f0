"""`pretrain predict`: a fine-tuned model's answers for new sequences, in a table."""

import csv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain.corpus.sources import SourceOptions, find_sources
from pretrain.downstream.finetune.labels import Labels, LabelSpec
from pretrain.downstream.finetune.metrics import Answers, predictions
from pretrain.downstream.finetune.model import FineTuned, load_fine_tuned
from pretrain.downstream.finetune.packs import InMemoryCorpus, Labelled, evaluation_batches
from pretrain.downstream.finetune.pairs import Tokens, encode
from pretrain.downstream.finetune.table import Columns, read_pairs
from pretrain.downstream.load import use_device
from pretrain.downstream.records import read_tokens
from pretrain.errors import UserError
from pretrain.files import atomic_path, refuse_existing

_WINDOW = 2048
"""Sequences that are in memory and packed together at a time."""


def predict(
    run: Path,
    source: str,
    out: Path,
    options: SourceOptions | None = None,
    pack_tokens: int = 16_384,
    device: str | None = None,
    pair_column: str | None = None,
) -> str:
    """Predict for every sequence of a source, in its order; for every pair of a table, where the model takes pairs.

    Regression: ``id, prediction``. Classes: the class, then the probability of each, ``p(class)``; of several labels
    those above one half, parted as the training labels were. Residues: a string of classes, a letter each where the
    classes are letters.

    Args:
        run: A fine-tuning run (its best checkpoint), or a checkpoint.
        source: Sequences, in any form that `pretrain prepare` reads.
        out: A ``.csv`` or ``.parquet`` file to write: whole, or not at all.
        options: How the source is read.
        pack_tokens: Tokens in a forward pass.
        device: ``cpu`` or ``cuda``; by default the GPU, where there is one.
        pair_column: The column of the second sequence of a pair; see `FineTuneDataModule`.

    Returns:
        What was written, for people.

    Raises:
        UserError: If there is no model or source, a sequence cannot be read, or ``out`` cannot be written.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"{out}: give a name that ends in .csv or .parquet")
    refuse_existing(out)
    if pack_tokens < 1:
        raise UserError(f"pack_tokens is {pack_tokens}; give 1 or more")
    model = load_fine_tuned(run)
    place = use_device(device)
    read = _read(source, options or SourceOptions(), pair_column, model)
    count = truncated = 0
    with atomic_path(out) as partial:
        with _TABLES[out.suffix](partial) as write, tqdm(unit=" sequences", disable=None) as bar:
            while window := list(islice(read, _WINDOW)):
                names, sequences = map(list, zip(*window, strict=True))
                write(_columns(model.spec, names, _answers(model, sequences, pack_tokens, place)))
                count += len(window)
                if model.spec.task != "token":
                    truncated += sum(len(sequence) > model.max_length for sequence in sequences)
                bar.update(len(window))
        if not count:
            raise UserError(f"{source}: holds no row; at least one is needed")
    cut = f"; of {truncated:,} no more than {model.max_length:,} tokens were seen" if truncated else ""
    return f"{out}: {count:,} predictions by {run}, after step {model.step}{cut}"


def _read(
    source: str, options: SourceOptions, pair_column: str | None, model: FineTuned
) -> Iterator[tuple[str, Tokens]]:
    """The name and the tokens of each sequence or pair."""
    tokenizer = model.encoder.tokenizer
    if (order := model.pair_order) is not None:
        columns = Columns(text=options.text_column, id=options.id_column, pair=pair_column)
        return ((row.id, encode(row, tokenizer, order)) for row in read_pairs(source, columns, options.kind))
    if pair_column is not None:
        raise UserError(f"pair_column is '{pair_column}', but the model takes single sequences; leave it out")
    records = read_tokens(find_sources([source], options), tokenizer, options, None, crop=False)
    return ((record.id, record.ids) for record in records)


def _answers(model: FineTuned, sequences: list[Tokens], pack_tokens: int, device: torch.device) -> Answers:
    labels = Labels(np.zeros(len(sequences)))  # none is known; where each residue has one, say how many there are
    if model.spec.task == "token":
        bounds = np.cumsum([0, *(len(sequence) - 2 for sequence in sequences)])
        labels = Labels(np.zeros(bounds[-1], np.int64), bounds)
    data = Labelled(InMemoryCorpus(sequences, model.encoder.tokenizer), labels)
    batches = evaluation_batches(data, model.max_length, pack_tokens, model.pair_order)
    return Answers.join(model.answers(batches, device))


def _columns(spec: LabelSpec, names: list[str], answers: Answers) -> dict[str, list[Any]]:
    predicted = predictions(spec, answers.outputs)
    columns: dict[str, list[Any]] = {"id": names}
    if spec.task == "regression":
        return {**columns, "prediction": predicted.tolist()}
    if spec.task == "token":
        joint = "" if all(len(name) == 1 for name in spec.classes) else " "
        best = [spec.classes[i] for i in predicted.argmax(-1).tolist()]
        ends = np.cumsum(answers.counts)
        strings = [joint.join(best[end - n : end]) for end, n in zip(ends, answers.counts, strict=True)]
        return {**columns, "prediction": strings}
    if spec.task == "multilabel":
        chosen = [
            spec.separator.join(name for name, yes in zip(spec.classes, row, strict=True) if yes)
            for row in (predicted > 0.5).tolist()
        ]
    else:
        chosen = [spec.classes[i] for i in predicted.argmax(-1).tolist()]
    shares = {f"p({name})": predicted[:, i].tolist() for i, name in enumerate(spec.classes)}
    return {**columns, "prediction": chosen, **shares}


Write = Callable[[dict[str, list[Any]]], None]


@contextmanager
def _csv_table(path: Path) -> Iterator[Write]:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")

        def write(columns: dict[str, list[Any]]) -> None:
            if not file.tell():
                writer.writerow(columns)
            rows = zip(*columns.values(), strict=True)
            writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)

        yield write


@contextmanager
def _parquet_table(path: Path) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: Any = None
    with ExitStack() as stack:

        def write(columns: dict[str, list[Any]]) -> None:
            nonlocal writer
            table = pa.table(columns)
            writer = writer or stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)

        yield write


_TABLES = {".csv": _csv_table, ".parquet": _parquet_table}

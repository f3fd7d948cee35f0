"""`pretrain predict`: a fine-tuned model's answers for new sequences, in a table."""

import csv
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from pretrain.corpus.packing import Pack, Position
from pretrain.corpus.readers import Record, read_records
from pretrain.corpus.sources import SourceOptions
from pretrain.corpus.tokenizer import InvalidSymbolError, Tokenizer
from pretrain.downstream.finetune.data import LabelledBatch
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.metrics import Answers, predictions
from pretrain.downstream.finetune.model import FineTuned, load_fine_tuned
from pretrain.downstream.load import choose_device
from pretrain.errors import UserError

_WINDOW = 2048
"""Sequences that are sorted by length and packed together; what is in memory at a time."""


def predict(
    run: Path,
    source: str,
    out: Path,
    options: SourceOptions | None = None,
    pack_tokens: int = 16_384,
    device: str | None = None,
) -> str:
    """Predict for every sequence of a source, in its order.

    Regression: ``id, prediction``. Classes: the class, then the probability of each, ``p(class)``; of several labels
    those above one half, parted by ``;``. Residues: a string of classes, a letter each where the classes are letters.

    Args:
        run: A fine-tuning run (its best checkpoint), or a checkpoint.
        source: Sequences, in any form that `pretrain prepare` reads.
        out: A ``.csv`` or ``.parquet`` file to write: whole, or not at all.
        options: How the source is read.
        pack_tokens: Tokens in a forward pass.
        device: ``cpu`` or ``cuda``; by default the GPU, where there is one.

    Returns:
        What was written, for people.

    Raises:
        UserError: If there is no model or source, a sequence cannot be read, or ``out`` cannot be written.
    """
    if out.suffix not in (".csv", ".parquet"):
        raise UserError(f"{out}: give a name that ends in .csv or .parquet")
    if out.exists():
        raise UserError(f"{out}: exists already; choose another name, or remove it first")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}; make it first")
    if pack_tokens < 1:
        raise UserError(f"pack_tokens is {pack_tokens}; give 1 or more")
    model = load_fine_tuned(run)
    place = choose_device(device)
    records = read_records(source, options)
    count = truncated = 0
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _TABLES[out.suffix](partial) as table, tqdm(unit=" sequences", disable=None) as bar:
            while window := list(islice(records, _WINDOW)):
                sequences = [_encode(record, source, model.tokenizer) for record in window]
                answers = _answers(model, sequences, pack_tokens, place)
                table.write(_columns(model.spec, window, answers))
                count += len(window)
                if model.spec.task != "token":
                    truncated += sum(len(sequence) > model.max_length for sequence in sequences)
                bar.update(len(window))
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    cut = f"; of {truncated:,} only the first {model.max_length - 2:,} residues were seen" if truncated else ""
    return f"{out}: {count:,} predictions by {run}, after step {model.step}{cut}"


def _encode(record: Record, source: str, tokenizer: Tokenizer) -> NDArray[np.unsignedinteger]:
    try:
        return tokenizer.encode(record.text)
    except InvalidSymbolError as error:
        raise UserError(
            f"{source}:{record.line}: record '{record.id}' has {error.symbol} at position {error.position}; allowed: "
            f"{error.allowed}"
        ) from error


def _answers(
    model: FineTuned, sequences: list[NDArray[np.unsignedinteger]], pack_tokens: int, device: torch.device
) -> Answers:
    packs = _packs(model, sequences, pack_tokens)
    return Answers.join(model.answers((_batch(model, sequences, pack) for pack in packs), device))


def _packs(model: FineTuned, sequences: list[NDArray[np.unsignedinteger]], pack_tokens: int) -> Iterator[Pack]:
    """Whole sequences of similar length, as many as fit into a pack; at least one."""
    residues = model.spec.task == "token"
    lengths = np.array([len(s) if residues else min(len(s), model.max_length) for s in sequences])
    order = np.argsort(lengths, kind="stable")
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[begin : end + 1]].sum() > pack_tokens:
            rows = order[begin:end]
            size = lengths[rows]
            zeros = np.zeros_like(rows)
            targets = size - 2 if residues else np.ones_like(rows)
            yield Pack(rows, zeros, zeros, size, size - 2, targets, int(targets.sum()), Position())
            begin = end


def _batch(model: FineTuned, sequences: list[NDArray[np.unsignedinteger]], pack: Pack) -> LabelledBatch:
    bounds = np.concatenate([[0], np.cumsum(pack.lengths)])
    pieces = zip(pack.indices.tolist(), pack.lengths.tolist(), strict=True)
    tokens = np.concatenate([sequences[index][:length] for index, length in pieces]).astype(np.int64)
    tokens[bounds[1:] - 1] = model.tokenizer.eos_token_id  # also of what was truncated
    positions = bounds[:-1]
    if model.spec.task == "token":
        residue = np.ones(len(tokens), bool)
        residue[bounds[:-1]] = residue[bounds[1:] - 1] = False
        (positions,) = np.nonzero(residue)
    return LabelledBatch(
        input_ids=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        target_positions=torch.from_numpy(positions),
        targets=torch.zeros(len(positions)),
        max_seqlen=int(pack.lengths.max()),
        pack=pack,
    )


def _columns(spec: LabelSpec, records: Iterable[Record], answers: Answers) -> dict[str, list[Any]]:
    predicted = predictions(spec, answers.outputs)
    columns: dict[str, list[Any]] = {"id": [record.id for record in records]}
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
            ";".join(name for name, yes in zip(spec.classes, row, strict=True) if yes)
            for row in (predicted > 0.5).tolist()
        ]
    else:
        chosen = [spec.classes[i] for i in predicted.argmax(-1).tolist()]
    shares = {f"p({name})": predicted[:, i].tolist() for i, name in enumerate(spec.classes)}
    return {**columns, "prediction": chosen, **shares}


class _Table(Protocol):
    def __init__(self, path: Path) -> None: ...
    def write(self, columns: dict[str, list[Any]]) -> None: ...
    def __enter__(self) -> "_Table": ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class _Csv:
    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._empty = True

    def write(self, columns: dict[str, list[Any]]) -> None:
        if self._empty:
            self._writer.writerow(columns)
            self._empty = False
        rows = zip(*columns.values(), strict=True)
        self._writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)

    def __enter__(self) -> "_Csv":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Parquet:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def write(self, columns: dict[str, list[Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table(columns)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()


_TABLES: dict[str, type[_Table]] = {".csv": _Csv, ".parquet": _Parquet}

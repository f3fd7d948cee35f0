"""`FineTuneDataModule`: labelled files to packs whose targets are labels."""

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.order import Order
from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.packing import Int64, Pack, StepPlanner, validation_packs
from pretrain.corpus.prepare import open_or_store
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import InvalidSymbolError, ProteinTokenizer, Tokenizer
from pretrain.downstream.finetune.labels import IGNORED, Labels, LabelSpec, Task, encode, learn_spec
from pretrain.downstream.finetune.table import Columns, Row, read_rows
from pretrain.errors import UserError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
"""What a split column may hold."""


class Labelled(NamedTuple):
    """One split: its sequences, and their labels by the same index."""

    corpus: Corpus
    labels: Labels


class LabelPlanner(StepPlanner):
    """Plans for labels: one target a sequence, or one a residue that has a label.

    A sequence with one label shows its beginning where it is too long, as transformers' truncation does; one with a
    label for each residue shows a random window, a new one in each epoch.

    Args:
        data: The sequences and their labels.
        order: The order of the sequences.
        max_length: Tokens in a crop, at most.
    """

    def __init__(self, data: Labelled, order: Order, max_length: int) -> None:
        super().__init__(data.corpus, order, max_length)
        self.labels = data.labels
        if data.labels.offsets is not None:
            self._counts = np.concatenate([[0], np.cumsum(data.labels.values != IGNORED)])

    @override
    def crop_starts(self, epochs: Int64, indices: Int64, room: Int64) -> Int64:
        if self.labels.offsets is None:
            return np.zeros_like(room)
        return super().crop_starts(epochs, indices, room)

    @override
    def target_counts(self, epochs: Int64, indices: Int64, starts: Int64, lengths: Int64, maskable: Int64) -> Int64:
        if self.labels.offsets is None:
            return np.ones_like(indices)
        first = self.labels.offsets[indices] + np.maximum(starts - 1, 0)  # the first token, <cls>, is no residue
        counts: Int64 = self._counts[first + maskable] - self._counts[first]
        return counts


@dataclass
class LabelledBatch(Batch):
    """One pack whose targets are labels.

    Attributes:
        target_positions: Places in the pack, ascending: of each sequence's ``<cls>``, or of the residues with labels.
        targets: The label of each of them: [M] numbers or classes, or [M, K] zeros and ones.
    """

    targets: Tensor


class LabelledDataset(Dataset[Batch]):
    """A pure function from a pack's description to its batch.

    Args:
        data: The sequences and their labels.
    """

    def __init__(self, data: Labelled) -> None:
        self.corpus, self.labels = data

    def __getitem__(self, pack: Pack) -> LabelledBatch:
        crops = list(zip(pack.indices.tolist(), pack.starts.tolist(), pack.lengths.tolist(), strict=True))
        cu_seqlens = np.concatenate([[0], np.cumsum(pack.lengths)])
        pieces = [self.corpus.tokens(index)[start : start + length] for index, start, length in crops]
        tokens = np.concatenate(pieces).astype(np.int64)
        if (offsets := self.labels.offsets) is None:
            positions = cu_seqlens[:-1]
            tokens[cu_seqlens[1:] - 1] = self.corpus.tokenizer.eos_token_id  # also of what was truncated
            targets = self.labels.values[pack.indices]
        else:
            labels = np.full(len(tokens), IGNORED)
            for (index, start, _), begin, residues in zip(crops, cu_seqlens, pack.maskable, strict=False):
                first = offsets[index] + max(start - 1, 0)
                begin += start == 0
                labels[begin : begin + residues] = self.labels.values[first : first + residues]
            (positions,) = np.nonzero(labels != IGNORED)
            targets = labels[positions]
        return LabelledBatch(
            input_ids=torch.from_numpy(tokens),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            target_positions=torch.from_numpy(positions),
            targets=torch.from_numpy(targets),
            max_seqlen=int(pack.lengths.max()),
            pack=pack,
        )


class FineTuneDataModule(PackedDataModule):
    """Packed, labelled batches, in any ``pl.Trainer`` that sets ``max_steps``.

    Order, packs, resume and processes are those of pre-training: what a step sees depends on the seed and on how many
    sequences were consumed.

    Args:
        train: A labelled file: CSV, TSV, JSON lines, Parquet, or FASTA with ``label=...`` in its headers. It may hold
            all splits, if it has a ``split_column`` and neither ``validation`` nor ``test`` is given.
        validation: A labelled file; without it there is no validation.
        test: A labelled file, evaluated once, when the run is finished.
        labels: A table with ids and labels (and splits), where ``train`` holds none.
        task: What the labels are.
        label_column: Column, JSON field or key in a FASTA header that holds the label.
        text_column: The same of the sequence; by default ``text``, ``sequence``, ``seq`` or ``content``.
        id_column: The same of the name; by default ``id`` where there is one, else the line.
        split_column: The same of the split: ``train``, ``validation`` or ``test``.
        label_separator: What parts the labels of a multilabel row.
        mask_label: The letter of a residue that has no label, such as one that is not resolved.
        tokenizer: ``esm``, or a ``tokenizer.json``, or a directory that holds one: the model's.
        max_length: Tokens of a sequence that one step sees, ``<cls>`` and ``<eos>`` included.
        global_batch_tokens: Tokens in an optimizer step, over all processes and micro-batches.
        validation_pack_tokens: Tokens in a forward pass of validation.
        attention_cost: See `MLMDataModule`.
        num_workers: Processes that load ahead of training.
        seed: Seed of order and crops.

    Attributes:
        spec: After `setup`, what the labels mean.
        splits: After `setup`, the data of each split.

    Raises:
        UserError: On settings that cannot work, with the values that would.
    """

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        test: str | None = None,
        labels: str | None = None,
        task: Task = "multiclass",
        label_column: str = "label",
        text_column: str | None = None,
        id_column: str | None = None,
        split_column: str = "split",
        label_separator: str = ";",
        mask_label: str | None = None,
        tokenizer: str = "esm",
        max_length: int = 1024,
        global_batch_tokens: int = 16_384,
        validation_pack_tokens: int = 16_384,
        attention_cost: float = 0.0005,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train,
            validation,
            tokenizer,
            max_length,
            global_batch_tokens,
            validation_pack_tokens,
            attention_cost,
            num_workers,
            seed,
        )
        if task == "token" and not isinstance(self.tokenizer, ProteinTokenizer):
            raise UserError(
                "data.task is token, a label for each residue, but data.tokenizer joins letters to words; give a "
                "protein model, or another task"
            )
        if mask_label is not None and (task != "token" or not mask_label):
            raise UserError(f"data.mask_label is {mask_label!r} but data.task is {task}; only residues have one")
        self.test = [test] if test else []
        self.labels = labels
        self.task: Task = task
        split = None if validation or test else split_column
        self._columns = Columns(label_column, text_column, id_column, split)
        self._separator, self._mask = label_separator, mask_label

    @override
    def open(self) -> None:
        if hasattr(self, "spec"):
            return
        rows = self._rows()
        tokens = {split: [_encode(row, self.tokenizer) for row in rows[split]] for split in rows}
        self.spec: LabelSpec = learn_spec(self.task, rows["train"], self._separator, self._mask)
        self.splits: dict[str, Labelled] = {}
        for split, its_rows in rows.items():
            residues = [len(sequence) - 2 for sequence in tokens[split]]
            labels = encode(self.spec, its_rows, residues, self._separator, self._mask)
            corpus = open_or_store([row.id for row in its_rows], tokens[split], self.tokenizer)
            self.splits[split] = Labelled(corpus, labels)
        self.train_corpus = self.splits["train"].corpus
        self.validation_corpus = self.splits["validation"].corpus if "validation" in self.splits else None
        _warn_of_copies(rows)

    def _rows(self) -> dict[str, list[Row]]:
        """The rows of each split that there is."""
        files = {"train": self.train, "validation": self.validation, "test": self.test}
        rows = {
            split: [row for path in paths for row in read_rows(path, self._columns, self.labels)]
            for split, paths in files.items()
            if paths
        }
        if not any(row.split is not None for row in rows["train"]) or len(rows) > 1:
            return rows
        divided: dict[str, list[Row]] = {"train": []}
        for row in rows["train"]:
            split = SPLITS.get(str(row.split).strip().lower())
            if split is None:
                raise UserError(
                    f"{row.where}: record '{row.id}' has {row.split!r} in '{self._columns.split}'; allowed: "
                    f"{', '.join(SPLITS)}"
                )
            divided.setdefault(split, []).append(row)
        if not divided["train"]:
            raise UserError(f"{self.train[0]}: no row has 'train' in '{self._columns.split}'; at least one is needed")
        return divided

    @override
    def train_planner(self) -> LabelPlanner:
        order = Order(len(self.train_corpus), self.seed)
        return LabelPlanner(self.splits["train"], order, self.max_length)

    @override
    def validation_planner(self) -> LabelPlanner:
        return self.evaluation_planner("validation")

    def evaluation_planner(self, split: str) -> LabelPlanner:
        """What plans a whole split once; residues are all evaluated, so their sequences are not cropped."""
        data = self.splits[split]
        longest = int(data.corpus.lengths(np.arange(len(data.corpus))).max())
        max_length = self.max_length if data.labels.offsets is None else longest
        return LabelPlanner(data, Order(len(data.corpus), 0), max_length)

    @override
    def dataset(self, planner: StepPlanner, pack_tokens: float) -> Dataset[Batch]:
        assert isinstance(planner, LabelPlanner)
        return LabelledDataset(Labelled(planner.corpus, planner.labels))

    def batches(self, split: str) -> list[Batch]:
        """A whole split as batches, in one process."""
        planner = self.evaluation_planner(split)
        (packs,) = validation_packs(planner, self.validation_pack_tokens, 1)
        dataset = self.dataset(planner, 0.0)
        return [dataset[pack] for pack in packs]

    @override
    def identity(self) -> dict[str, Any]:
        labels = self.splits["train"].labels.fingerprint
        return {**super().identity(), "labels": labels, "classes": list(self.spec.classes)}


def _encode(row: Row, tokenizer: Tokenizer) -> np.ndarray:
    try:
        return tokenizer.encode(row.sequence)
    except InvalidSymbolError as error:
        raise UserError(
            f"{row.where}: record '{row.id}' has {error.symbol} at position {error.position}; allowed: {error.allowed}"
        ) from error


def _warn_of_copies(rows: dict[str, list[Row]]) -> None:
    """Say how many held-out sequences stand in train, too: they would be remembered rather than understood."""
    seen = {row.sequence for row in rows["train"]}
    for split in ("validation", "test"):
        if copies := [row for row in rows.get(split, []) if row.sequence in seen]:
            print(
                f"pretrain: warning: {len(copies)} of {len(rows[split])} sequences of {split} are in train, too (the "
                f"first at {copies[0].where}): the figures will be better than for new sequences",
                file=sys.stderr,
                flush=True,
            )

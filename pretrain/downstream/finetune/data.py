"""`FineTuneDataModule`: labelled files to packs whose targets are labels."""

import sys
from typing import Any

from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from pretrain.corpus.opening import open_or_store
from pretrain.corpus.order import Order
from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.packing import StepPlanner
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.downstream.finetune.labels import LabelSpec, Task, encode_labels, learn_spec
from pretrain.downstream.finetune.packs import (
    Labelled,
    LabelledBatch,
    LabelledDataset,
    LabelPlanner,
    dataset_of,
    evaluation_batches,
    evaluation_planner,
)
from pretrain.downstream.finetune.pairs import SHORTEST_PAIR, PairOrder, Tokens, encode, split_pair
from pretrain.downstream.finetune.table import Columns, Row, read_rows
from pretrain.errors import UserError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
"""What a split column may hold."""


class FineTuneDataModule(PackedDataModule):
    """Packed, labelled batches, in any ``pl.Trainer`` that sets ``max_steps``.

    Order, packs, resume and processes are those of pre-training: what a step sees depends on the seed and on how many
    sequences were consumed.

    Args:
        train: A labelled file: CSV, TSV, JSON lines, Parquet, or FASTA with ``label=...`` in its headers. It may hold
            all splits, if neither ``validation`` nor ``test`` is given; beside those none of the three may hold a row
            that is marked as one of another split.
        validation: A labelled file; without it there is no validation.
        test: A labelled file, evaluated once, when the run is finished.
        labels: A table with ids and labels (and splits), where ``train`` holds none.
        task: What the labels are.
        label_column: Column, JSON field or key in a FASTA header that holds the label; by default ``label``. The usual
            names of this and the following ones may be in upper case.
        text_column: The same of the sequence; by default ``text``, ``sequence``, ``seq`` or ``content``.
        id_column: The same of the name; by default ``id`` where there is one, else the line.
        split_column: The same of the split, ``train``, ``validation`` or ``test``; by default ``split``, where there is
            one.
        pair_column: The same of a second sequence, for labels of pairs; by default ``sequence_b`` beside ``sequence_a``
            and its like (``seq1``, ``protein_A``, ``text_1``), where there is no column for a single sequence.
        pair_order: ``given``: the order of a pair has a meaning. ``any``: it has none, as where two proteins interact:
            training shows either at random, a new one in each epoch; everything else the same one for both.
        positive_class: Of two classes the one whose F1 and AUROC are told; by default the second by name.
        label_separator: What parts the labels of a multilabel row.
        mask_label: The label of a residue that has none, such as one that is not resolved: a letter, or where labels
            are lists any string (null has the same meaning there).
        tokenizer: ``esm``, or a ``tokenizer.json``, or a directory that holds one: the model's.
        max_length: Tokens of a sequence that one step sees, ``<cls>`` and ``<eos>`` included.
        global_batch_tokens: Tokens in an optimizer step, over all processes and micro-batches.
        validation_pack_tokens: Tokens in a forward pass of validation.
        attention_cost: Cost of attending to one token relative to a token's linear layers, for packs of equal cost;
            about ``1 / (6 * hidden_size)``.
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
        label_column: str | None = None,
        text_column: str | None = None,
        id_column: str | None = None,
        split_column: str | None = None,
        pair_column: str | None = None,
        pair_order: PairOrder = "given",
        positive_class: str | int | None = None,
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
        if positive_class is not None and task != "binary":
            raise UserError(f"data.positive_class is {positive_class!r} but data.task is {task}; only binary has one")
        if not label_separator:
            raise UserError("data.label_separator is empty; give what stands between two labels, such as ';'")
        if label_separator != ";" and task != "multilabel":
            raise UserError(
                f"data.label_separator is {label_separator!r} but data.task is {task}; only multilabel rows have "
                "labels to separate: leave it out"
            )
        self.test = [test] if test else []
        self.labels = labels
        self.task: Task = task
        if split_column is not None and (validation or test):
            raise UserError(
                f"data.split_column is '{split_column}', but data.validation or data.test is given; splits are rows of "
                "one file or files of their own: leave one of the two out"
            )
        self._columns = Columns(label_column, text_column, id_column, split_column, pair_column)
        self._pair_order: PairOrder = pair_order
        self._separator, self._mask = label_separator, mask_label
        self._positive = None if positive_class is None else str(positive_class)

    @override
    def open(self) -> None:
        if hasattr(self, "spec"):
            return
        rows = self._rows()
        self.pair_order = self._check_pairs(rows)  # None where rows are single sequences
        tokens = {split: [encode(row, self.tokenizer, self._pair_order) for row in rows[split]] for split in rows}
        self.spec: LabelSpec = learn_spec(self.task, rows["train"], self._separator, self._mask, self._positive)
        self.splits: dict[str, Labelled] = {}
        for split, its_rows in rows.items():
            residues = [len(sequence) - 2 for sequence in tokens[split]]
            labels = encode_labels(self.spec, its_rows, residues, self._separator, self._mask)
            corpus = open_or_store([row.id for row in its_rows], tokens[split], self.tokenizer)
            self.splits[split] = Labelled(corpus, labels)
        self.train_corpus = self.splits["train"].corpus
        self.validation_corpus = self.splits["validation"].corpus if "validation" in self.splits else None
        _warn_of_copies(rows, tokens, self.pair_order)

    def _rows(self) -> dict[str, list[Row]]:
        """The rows of each split that there is."""
        files = {"train": self.train, "validation": self.validation, "test": self.test}
        rows = {
            split: [row for path in paths for row in read_rows(path, self._columns, self.labels)]
            for split, paths in files.items()
            if paths
        }
        if len(rows) > 1:
            for role, its_rows in rows.items():
                if row := next((row for row in its_rows if row.split is not None and _split(row) != role), None):
                    raise UserError(
                        f"{row.where}: record '{row.id}' has the split {row.split!r}, but as data.{role} all of "
                        f"{files[role][0]} is taken, beside files for other splits; leave "
                        "data.validation and data.test out if one file holds all splits, else remove such rows"
                    )
            return rows
        if self._columns.split is None and all(row.split is None for row in rows["train"]):
            return rows
        divided: dict[str, list[Row]] = {"train": []}
        for row in rows["train"]:
            split = _split(row)
            if split is None:
                raise UserError(
                    f"{row.where}: record '{row.id}' has the split {row.split!r}; allowed: {', '.join(SPLITS)}"
                )
            divided.setdefault(split, []).append(row)
        if not divided["train"]:
            raise UserError(f"{self.train[0]}: no row has the split 'train'; at least one is needed")
        return divided

    def _check_pairs(self, rows: dict[str, list[Row]]) -> PairOrder | None:
        """The order of the pairs, where rows hold pairs, as all do or none."""
        pairs = rows["train"][0].second is not None
        for row in (row for split in rows.values() for row in split):
            if (row.second is not None) != pairs:
                raise UserError(
                    f"{row.where}: record '{row.id}' is {'no' if pairs else 'a'} pair, unlike the rows before"
                )
        if not pairs:
            if self._pair_order != "given":
                raise UserError(
                    f"data.pair_order is '{self._pair_order}', but {self.train[0]} has one sequence a row; name the "
                    "column of the other with data.pair_column, or leave data.pair_order out"
                )
            return None
        if self.task == "token":
            raise UserError("data.task is token, a label for each residue; a pair has one label: give another task")
        if self.max_length < SHORTEST_PAIR:
            raise UserError(f"data.max_length is {self.max_length}; a pair has at least {SHORTEST_PAIR} tokens")
        return self._pair_order

    @override
    def train_planner(self) -> LabelPlanner:
        order = Order(len(self.train_corpus), self.seed)
        swap_seed = self.seed if self.pair_order == "any" else None
        return LabelPlanner(self.splits["train"], order, self.max_length, swap_seed)

    @override
    def validation_planner(self) -> LabelPlanner:
        return evaluation_planner(self.splits["validation"], self.max_length)

    @override
    def dataset(self, planner: StepPlanner, pack_tokens: float) -> LabelledDataset:
        assert isinstance(planner, LabelPlanner)
        return dataset_of(planner, self.pair_order)

    def batches(self, split: str) -> list[LabelledBatch]:
        """A whole split as batches, in one process."""
        data = self.splits[split]
        return list(evaluation_batches(data, self.max_length, self.validation_pack_tokens, self.pair_order))

    @override
    def identity(self) -> dict[str, Any]:
        labels = self.splits["train"].labels.fingerprint
        return {
            **super().identity(),
            "labels": labels,
            "classes": list(self.spec.classes),
            "pair_order": self.pair_order,
        }


def _split(row: Row) -> str | None:
    return SPLITS.get(str(row.split).strip().lower())


@rank_zero_only
def _warn_of_copies(rows: dict[str, list[Row]], tokens: dict[str, list[Tokens]], pair_order: PairOrder | None) -> None:
    """Say what of the held-out data was seen before: it would be remembered rather than understood."""
    contents = {split: [_content(each, pair_order) for each in tokens[split]] for split in rows}
    for split, other in (("validation", "train"), ("test", "train"), ("test", "validation")):
        here, seen = contents.get(split, []), set(contents.get(other, []))
        parts = {part for content in seen for part in content}
        copies = [row for row, content in zip(rows.get(split, []), here, strict=True) if content in seen]
        shared = [sum(part in parts for part in content) for content in here if content not in seen]
        if pair_order is not None and (copies or (other == "train" and any(shared))):
            # Of pairs it matters, too, whether one or both of the sequences are known (Park and Marcotte 2012).
            found = (
                f"of {len(here)} pairs of {split} {len(copies)} are in {other}, too; of {shared.count(2)} more both "
                f"sequences are, of {shared.count(1)} one"
            )
        elif copies:
            found = (
                f"{len(copies)} of {len(here)} sequences of {split} are in {other}, too (the first at "
                f"{copies[0].where})"
            )
        else:
            continue
        message = f"pretrain: warning: {found}: the figures will be better than for new sequences"
        print(message, file=sys.stderr, flush=True)


def _content(tokens: Tokens, pair_order: PairOrder | None) -> tuple[bytes, ...]:
    """What two rows have in common if one is a copy of the other."""
    parts = (tokens,) if pair_order is None else split_pair(tokens)
    content = tuple(part.tobytes() for part in parts)
    return tuple(sorted(content)) if pair_order == "any" else content

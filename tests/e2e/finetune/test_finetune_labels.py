"""Labelled files: every kind, and every mistake in one line."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelled import finetune, label, read_csv, sequences
from pytorch_lightning.utilities import rank_zero_only

from pretrain.corpus.padding import IGNORED
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.model import load_fine_tuned

GOOD = "id,sequence,label,split\na,MKV,1,train\nb,MKL,0,train\nc,MKA,1,test\n"


def table(name: str, content: str) -> str:
    Path(name).write_text(content, errors="surrogateescape")
    return name


def parquet(labels: list[Any]) -> str:
    pq.write_table(pa.table({"sequence": ["MKV", "MKL"], "label": labels}), "t.parquet")
    return "t.parquet"


def compressed(name: str) -> str:
    Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    return f"{name}.gz"


TOKENS = {"data__task": "token"}
NUMBERS = {"data__task": "regression"}
MANY = {"data__task": "multilabel"}
MISTAKES: dict[str, tuple[Callable[[], str], dict[str, Any], list[str]]] = {
    "label missing": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMKL,\n"), {}, ["t.csv:3: record '3' has no label; fill it in"]
    ),
    "no sequence": (
        lambda: table("t.jsonl", '{"sequence": 3, "label": 1}\n'), {},
        ["t.jsonl:1: 'sequence' is 3; a sequence is expected there"],
    ),
    "compressed Parquet": (lambda: compressed(parquet([1, 2])), {}, ["t.parquet.gz: is compressed by gzip as a whole"]),
    "label is null": (lambda: parquet([1, None]), {}, ["t.parquet:2: record '2' has no label"]),
    "no label column": (
        lambda: table("t.csv", "sequence,stable\nMKV,1\n"), {}, ["t.csv: no column 'label'; it has sequence, stable"]
    ),
    "no sequence column": (
        lambda: table("t.csv", "protein,label\nMKV,1\n"), {}, ["no column 'text' or 'sequence'", "protein, label"]
    ),
    "not a number": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMKL,high\n"), NUMBERS,
        ["t.csv:3: record '3' has the label 'high', which is no number"],
    ),
    "NaN": (lambda: table("t.csv", "sequence,label\nMKV,1\nMKL,nan\n"), NUMBERS, ["t.csv:3", "label nan; give"]),
    "NaN in Parquet": (lambda: parquet([1.0, float("nan")]), NUMBERS, ["t.parquet:2", "label nan"]),
    "one number": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMKL,1.0\n"), NUMBERS, ["t.csv: every training label is 1; there"]
    ),
    "one sequence to test numbers on": (
        lambda: table("t.csv", "sequence,label,split\nMKV,1,train\nMKL,2,train\nMKA,2,test\n"), NUMBERS,
        ["t.csv:4: is the only row of its split"],
    ),
    "one class": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMKL,1\n"), {}, ["t.csv: the training labels have 1 classes (1)"]
    ),
    "three classes in a binary task": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMKL,2\nMKA,3\n"), {}, ["have 3 classes (1, 2, 3)", "multiclass"]
    ),
    "a class seen only in test": (
        lambda: table("t.csv", GOOD + "d,MKT,2,test\n"), {},
        ["t.csv:5: record 'd' has the class '2', which no training row has (they have 0, 1)"],
    ),
    "empty sequence": (
        lambda: table("t.csv", "sequence,label\nMKV,1\n,0\n"), {}, ["t.csv:3: record '3' has nothing in 'sequence'"]
    ),
    "lengths differ": (
        lambda: table("t.csv", "sequence,label\nMKV,HHE\nMKL,HH\n"), TOKENS,
        ["t.csv:3: record '3' has 3 residues but 2 labels"],
    ),
    "a multilabel that is NaN": (
        lambda: table("t.jsonl", '{"text": "MKV", "label": NaN}\n'), MANY, ["t.jsonl:1: record '1' has the label nan"]
    ),
    "a null among several labels": (
        lambda: table("t.jsonl", '{"text": "MKV", "label": ["a", null]}\n'), MANY, ["t.jsonl:1", "the label None; give"]
    ),
    "a multilabel that is an object": (
        lambda: table("t.jsonl", '{"text": "MKV", "label": {"a": 1}}\n'), MANY, ["t.jsonl:1", "label {'a': 1}; give"]
    ),
    "a list in a list": (
        lambda: table("t.jsonl", '{"text": "MK", "label": ["H", ["E"]]}\n'), TOKENS, ["t.jsonl:1", "label ['E']; give"]
    ),
    "no residue with a label, in a list": (
        lambda: table("t.jsonl", '{"text": "MK", "label": ["H", "E"]}\n{"text": "MK", "label": [null, null]}\n'),
        TOKENS, ["t.jsonl:2: record '2' has no residue with a label"],
    ),
    "no residue with a label": (
        lambda: table("t.csv", "sequence,label,split\nMKV,HE-,train\nMKL,---,test\n"),
        {**TOKENS, "data__mask_label": "-"}, ["t.csv:3: record '3' has no residue with a label"],
    ),
    "letter seen only in test": (
        lambda: table("t.csv", "sequence,label,split\nMKV,HHE,train\nMKL,HHC,test\n"), TOKENS, ["t.csv:3", "class 'C'"]
    ),
    "unknown residue": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMK1,0\n"), {}, ["t.csv:3: record '3' has '1' at position 3"]
    ),
    "unknown split": (
        lambda: table("t.csv", GOOD + "d,MKT,1,holdout\n"), {}, ["t.csv:5: record 'd' has the split 'holdout'"]
    ),
    "no such split column": (
        lambda: table("t.csv", GOOD), {"data__split_column": "fold"}, ["t.csv: no column 'fold'; it has id, sequence"]
    ),
    "a FASTA header without the split": (
        lambda: table("t.fasta", ">a label=1 fold=train\nMKV\n>b label=0\nMKL\n"), {"data__split_column": "fold"},
        ["t.fasta:3: no column 'fold'"],
    ),
    "a split that is null": (
        lambda: table("t.jsonl", '{"text": "MK", "label": 1, "fold": null}\n'), {"data__split_column": "fold"},
        ["t.jsonl:1: record '1' has the split None"],
    ),
    "a split column neither in the file nor beside": (
        lambda: table("t.fasta", ">a\nMKV\n"), {"data__labels": "labels.csv", "data__split_column": "fold"},
        ["no column 'fold'"],
    ),
    "a split column and files": (
        lambda: table("t.csv", GOOD), {"data__split_column": "split", "data__test": "other.csv"},
        ["data.split_column is 'split', but data.validation or data.test is given"],
    ),
    "rows of the test split beside a test file": (
        lambda: table("t.csv", GOOD), {"data__test": "other.csv"},
        ["t.csv:4: record 'c' has the split 'test'", "leave data.validation and data.test out"],
    ),
    "rows of the train split in a validation file": (
        lambda: table("t.csv", "sequence,label\nMKL,1\nMK,0\n"), {"data__validation": "splits.csv"},
        ["splits.csv:2: record 'a' has the split 'train', but as data.validation all of splits.csv is taken"],
    ),
    "a test file for validation": (
        lambda: table("t.csv", "sequence,label\nMKL,1\nMK,0\n"), {"data__validation": "test.csv"},
        ["test.csv:2: record 'c' has the split 'test'"],
    ),
    "rows of the test split beside a validation file, by a table of labels": (
        lambda: table("t.fasta", ">c\nMKA\n"), {"data__labels": "splits.csv", "data__validation": "other.csv"},
        ["t.fasta:1: record 'c' has the split 'test'"],
    ),
    "a quote that is not closed": (
        lambda: table("t.csv", 'sequence,label\nMKV,1\n"MKL,0\n'), {}, ["t.csv:3: not CSV (unexpected end of data)"]
    ),
    "fields missing, after a field with line ends": (
        lambda: table("t.csv", 'note,sequence,label\n"two\nlines",MKV,1\nMKL,0\n'), {},
        ["t.csv:4: has 2 fields, the header has 3"],
    ),
    "several labels in a row": (
        lambda: table("t.jsonl", '{"sequence": "MKV", "label": ["1", "0"]}\n'), {}, ["t.jsonl:1", "has several labels"]
    ),
    "broken JSON": (lambda: table("t.jsonl", '{"sequence": "MKV", "label": 1}\n{"seq'), {}, ["t.jsonl:2: not a JSON"]),
    "FASTA without a label": (
        lambda: table("t.fasta", ">a label=1\nMKV\n>b\nMKL\n"), {}, ["t.fasta:3: no column 'label'"]
    ),
    "no row in the table of labels": (
        lambda: table("t.fasta", ">a\nMKV\n>b\nMKL\n"), {"data__labels": "labels.csv"},
        ["t.fasta:3: record 'b' has no row in labels.csv"],
    ),
    "a label in another encoding": (
        lambda: table("t.csv", "sequence,label\nMKV,caf\udce9\nMKL,tea\n"), {}, ["t.csv:2: record '2'", "is no UTF-8"]
    ),
    "a lone stop": (
        lambda: table("t.csv", "sequence,label\nMKV,1\n*,0\n"), {}, ["t.csv:3: record '3' has nothing that becomes a"]
    ),
    "nothing beside": (
        lambda: table("t.csv", "seq1,seq2,label\nMKV,MA,1\nMKL,,0\n"), {}, ["t.csv:3: record '3' has nothing in 'seq2'"]
    ),
    "unknown residue beside": (
        lambda: table("t.csv", "seq1,seq2,label\nMKV,MA,1\nMKL,M1,0\n"), {},
        ["t.csv:3: record '3', in its second sequence, has '1' at position 2"],
    ),
    "pairs and single sequences": (
        lambda: table(
            "t.jsonl", '{"seq1": "MK", "seq2": "A", "label": 1}\n{"sequence": "MK", "label": 0}\n'
        ), {}, ["t.jsonl:2: record '2' is no pair, unlike the rows before"],
    ),
    "labels of residues of pairs": (
        lambda: table("t.csv", "seq1,seq2,label\nMKV,MA,HHE\n"), TOKENS, ["data.task is token", "a pair has one label"]
    ),
    "no such column beside": (
        lambda: table("t.csv", GOOD), {"data__pair_column": "mate"}, ["no column 'mate'; it has id, sequence, label"]
    ),
    "a column beside itself": (
        lambda: table("t.csv", GOOD), {"data__pair_column": "sequence"}, ["'sequence' is paired with itself"]
    ),
    "an order of no pairs": (
        lambda: table("t.csv", GOOD), {"data__pair_order": "any"}, ["data.pair_order is 'any', but t.csv has one"]
    ),
    "no room for a pair": (
        lambda: table("t.csv", "seq1,seq2,label\nM,A,1\nA,M,0\n"), {"data__max_length": 4}, ["at least 5 tokens"]
    ),
    "a space in a sequence": (
        lambda: table("t.csv", "sequence,label\nMKV,1\n MK,0\n"), {}, ["t.csv:3: record '3' has ' ' at position 1"]
    ),
    "half a surrogate pair in a sequence": (
        lambda: table("t.jsonl", '{"sequence": "MKV", "label": 1}\n{"sequence": "MK\\ud83d", "label": 0}\n'), {},
        ["t.jsonl:2: holds half a surrogate pair"],
    ),
    "half a surrogate pair in a label": (
        lambda: table("t.jsonl", '{"sequence": "MKV", "label": "\\ud83d"}\n'), {},
        ["t.jsonl:1: holds half a surrogate pair"],
    ),
    "no JSON object": (lambda: table("t.jsonl", '["MKV", 1]\n'), {}, ["t.jsonl:1: not a JSON object"]),
    "a header without a sequence": (
        lambda: table("t.fasta", ">a label=1\n>b label=0\nMKV\n"), {}, ["t.fasta:1: record 'a' has no sequence"]
    ),
    "a column twice": (lambda: table("t.csv", "seq,label,label\nM,1,1\n"), {}, ["t.csv:1: column 'label' stands"]),
    "no rows": (lambda: table("t.csv", "sequence,label\n"), {}, ["t.csv: holds no row"]),
    "no file": (lambda: "missing.csv", {}, ["missing.csv: no such file"]),
    "a model with another alphabet": (
        lambda: table("t.csv", GOOD), {"data__tokenizer": "words.json"}, ["'esm' (33 ids)", "another alphabet"]
    ),
    "early stopping without validation": (lambda: table("t.csv", GOOD), {"early_stopping": 2}, ["a validation split"]),
    "mask for whole sequences": (lambda: table("t.csv", GOOD), {"data__mask_label": "?"}, ["data.task is binary"]),
    "pooling of residues": (
        lambda: table("t.csv", "sequence,label\nMKV,HHE\n"), {**TOKENS, "model__pooling": "mean"},
        ["model.pooling is mean but data.task is token"],
    ),
    "class weights of numbers": (
        lambda: table("t.csv", "seq,label\nMKV,1\nMKL,2\n"), {**NUMBERS, "model__class_weights": "balanced"},
        ["model.class_weights is balanced but data.task is regression"],
    ),
    "a separator of one label": (
        lambda: table("t.csv", GOOD), {"data__label_separator": "|"}, ["data.label_separator is '|' but", "binary"]
    ),
    "no separator": (
        lambda: table("t.csv", GOOD), {**MANY, "data__label_separator": ""}, ["data.label_separator is empty; give"]
    ),
    "unknown task": (
        lambda: table("t.csv", GOOD), {"data__task": "rank"}, ["data.task is rank; give one of regression, binary"]
    ),
    "too many blocks": (
        lambda: table("t.csv", GOOD), {"model__tune": "last", "model__last_layers": 3}, ["the model has 2: give 1 to 2"]
    ),
    "blocks of a run that trains all": (
        lambda: table("t.csv", GOOD), {"model__last_layers": 2},
        ["model.last_layers is 2 but model.tune is full", "--model.tune last"],
    ),
    "a rank of a run that trains blocks": (
        lambda: table("t.csv", GOOD), {"model__tune": "last", "model__lora_rank": 4},
        ["model.lora_rank is 4 but model.tune is last", "--model.tune lora"],
    ),
    "a scale of a frozen encoder": (
        lambda: table("t.csv", GOOD), {"model__tune": "frozen", "model__lora_alpha": 4.0},
        ["model.lora_alpha is 4.0 but model.tune is frozen", "--model.tune lora"],
    ),
    "low rank parts that count nothing": (
        lambda: table("t.csv", GOOD), {"model__tune": "lora", "model__lora_alpha": 0.0},
        ["model.lora_alpha is 0.0; give a number above 0"],
    ),
    "a positive class of several": (
        lambda: table("t.csv", GOOD), {**MANY, "data__positive_class": "a"}, ["'a' but data.task is multilabel"]
    ),
    "a positive class that no row has": (
        lambda: table("t.csv", GOOD), {"data__positive_class": "yes"}, ["data.positive_class is 'yes'", "are 0 and 1"]
    ),
    "warmup longer than the run": (
        lambda: table("t.csv", GOOD), {"model__warmup_steps": 8}, ["warmup_steps is 8 of 8 steps"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing_behind(
    case: str, pretrained: Path, config: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from pretrain.corpus.tokenizer import train_tokenizer

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    build, overrides, expected = MISTAKES[case]
    table("labels.csv", "id,label\na,1\n")
    table("splits.csv", GOOD)
    table("other.csv", "id,sequence,label\na,MKVL,1\n")
    table("test.csv", "id,sequence,label,split\nc,MKA,1,test\n")
    if "words.json" in overrides.values():
        table("words.json", train_tokenizer(["some text"], 300).serialize())
    path = config(**{"data__train": build(), **overrides})
    before = sorted(Path().iterdir())
    assert finetune("-c", path, "--from", pretrained) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: error: ")]
    assert all(part in line for part in expected), line
    assert sorted(Path().iterdir()) == before


def test_a_csv_with_quotes_commas_and_line_ends_is_read(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text('note,sequence,label\n"said ""hm"", then\nleft",MKV,"cell, outer"\nplain,MKL,inner\n')
    run = tmp_path / "run"
    given = config(data__train=str(path), trainer__max_steps=4)
    assert finetune("-c", given, "--from", pretrained, "--run", run) == 0
    assert load_fine_tuned(run).spec.classes == ("cell, outer", "inner")


def test_every_kind_of_file_gives_the_same_labels(tmp_path: Path) -> None:
    rows = [{"id": f"s{i}", "sequence": s, "label": label("binary", s)} for i, s in enumerate(sequences(8, 1))]
    files = {
        name: tmp_path / f"t.{name}"
        for name in ("csv", "tsv", "jsonl", "parquet", "bytes.parquet", "fasta", "bare.fasta")
    }
    for name, mark in (("csv", ","), ("tsv", "\t")):
        lines = [mark.join(row.values()) for row in rows]
        files[name].write_text("\n".join([mark.join(rows[0]), *lines]) + "\n")
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), files["parquet"])
    of_bytes = [{**row, "sequence": row["sequence"].encode()} for row in rows]
    pq.write_table(pa.Table.from_pylist(of_bytes), files["bytes.parquet"])
    headed = (f">{r['id']} label={r['label']}\n{r['sequence'][:5]}\n{r['sequence'][5:]}\n" for r in rows)
    files["fasta"].write_text("".join(headed))
    files["bare.fasta"].write_text("".join(f">{r['id']}\n{r['sequence']}\n" for r in rows))
    read = []
    for name, path in files.items():
        labels = str(files["csv"]) if name == "bare.fasta" else None
        data = FineTuneDataModule(str(path), labels=labels, task="binary", max_length=64, global_batch_tokens=512)
        data.setup("fit")
        read.append((data.train_corpus.fingerprint, data.splits["train"].labels.fingerprint, data.spec))
    assert len(set(read)) == 1


def test_a_number_is_one_class_however_it_is_written_and_null_is_no_label_of_a_residue(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": "MKV", "label": each}) + "\n" for each in (3, 3.0, [3, "a"], "3;a")))
    data = FineTuneDataModule(str(path), task="multilabel")
    data.open()
    assert data.spec.classes == ("3", "a")
    assert data.splits["train"].labels.values.tolist() == [[1, 0], [1, 0], [1, 1], [1, 1]]
    path.write_text(json.dumps({"text": "MKVL", "label": ["H", None, "E", "-"]}))
    data = FineTuneDataModule(str(path), task="token", mask_label="-")
    data.open()
    assert data.spec.classes == ("E", "H")
    assert data.splits["train"].labels.values.tolist() == [1, IGNORED, 0, IGNORED]


def test_classes_that_are_whole_numbers_stand_in_their_order_and_others_by_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    for labels, expected in (
        (range(12), tuple(map(str, range(12)))),
        (("10", "-1", "9"), ("-1", "9", "10")),
        (("10", "9", "1.5"), ("1.5", "10", "9")),
        (("10", "9", "x"), ("10", "9", "x")),
    ):
        path.write_text("sequence,label\n" + "".join(f"MKV,{label}\n" for label in labels))
        data = FineTuneDataModule(str(path), task="multiclass")
        data.open()
        assert data.spec.classes == expected
        assert [expected[i] for i in data.splits["train"].labels.values] == [str(label) for label in labels]


@pytest.mark.parametrize(
    ("positive", "classes"), [(None, ("in", "out")), ("out", ("in", "out")), ("in", ("out", "in"))]
)
def test_the_positive_class_is_the_second_by_name_or_the_one_that_is_named(
    positive: str | None, classes: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("sequence,label\nMKV,out\nMKL,in\n")
    data = FineTuneDataModule(str(path), task="binary", positive_class=positive)
    data.open()
    assert data.spec.classes == classes
    assert data.spec.described == f"binary (positive: {classes[1]})"


def test_columns_are_found_in_upper_case_as_prepare_finds_them(tmp_path: Path) -> None:
    from pretrain.corpus.readers import read_records
    from pretrain.downstream.finetune.table import Columns, read_rows

    files = [tmp_path / name for name in ("t.csv", "t.tsv", "t.parquet", "t.jsonl")]
    content = "Id,Sequence,LABEL,Split\na,MKV,1,train\nb,MKL,0,test\n"
    files[0].write_text(content)
    files[1].write_text(content.replace(",", "\t").replace("\n", "\r\n"))
    rows = read_csv(files[0])
    pq.write_table(pa.Table.from_pylist(rows), files[2])
    files[3].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in files:
        found = read_rows(str(path), Columns())
        assert [row[1:5] for row in found] == [("a", b"MKV", "1", "train"), ("b", b"MKL", "0", "test")], path
        assert [record[:2] for record in read_records(path)] == [row[1:3] for row in found]
    files[0].write_text("PROTEIN_A,Protein_B,Label\nMKV,MA,1\n")
    (pair,) = read_rows(str(files[0]), Columns())
    assert (pair.sequence, pair.second) == (b"MKV", b"MA")


def test_a_header_says_neither_name_nor_sequence_by_its_fields(tmp_path: Path) -> None:
    from pretrain.downstream.finetune.table import Columns, read_rows

    (tmp_path / "t.fasta").write_bytes(b'>a label="in it" text=no seq=no ID=7\rMK\rV\r')
    (row,) = read_rows(str(tmp_path / "t.fasta"), Columns())
    assert (row.id, row.sequence, row.label) == ("a", b"MKV", "in it")


def test_splits_are_rows_by_their_column_or_files_of_their_own(tmp_path: Path) -> None:
    def sizes(train: str, **given: Any) -> dict[str, int]:
        data = FineTuneDataModule(str(tmp_path / train), task="binary", **given)
        data.setup("fit")
        return {split: len(its.corpus) for split, its in data.splits.items()}

    (tmp_path / "t.csv").write_text(GOOD)
    (tmp_path / "fold.csv").write_text(GOOD.replace("split", "fold"))
    (tmp_path / "train.csv").write_text(GOOD.replace("c,MKA,1,test\n", ""))
    (tmp_path / "t.fasta").write_text(">a\nMKV\n>b\nMKL\n>c\nMKA\n")
    divided = {"train": 2, "test": 1}
    assert sizes("t.csv") == divided
    assert sizes("fold.csv") == {"train": 3}
    assert sizes("fold.csv", split_column="fold") == divided
    assert sizes("t.fasta", labels=str(tmp_path / "fold.csv"), split_column="fold") == divided
    assert sizes("train.csv", test=str(tmp_path / "fold.csv")) == {"train": 2, "test": 3}
    (tmp_path / "test.csv").write_text("id,sequence,label,split\nc,MKA,1,Test\n")
    assert sizes("train.csv", test=str(tmp_path / "test.csv")) == divided


@pytest.mark.parametrize(("rank", "times"), [(0, 1), (1, 0)])
def test_copies_between_train_and_test_are_told_by_one_process(
    rank: int, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(GOOD + "d,MKV,1,test\n")
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    FineTuneDataModule(str(path)).open()
    assert capsys.readouterr().err.count("1 of 2 sequences of test are in train, too") == times


def test_a_copy_is_one_however_it_is_written_also_between_validation_and_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(GOOD + "d,mkv*,1,test\ne,MKT,1,val\nf,mkt,1,test\n")
    FineTuneDataModule(str(path)).open()
    told = capsys.readouterr().err
    assert f"1 of 3 sequences of test are in train, too (the first at {path}:5)" in told
    assert f"1 of 3 sequences of test are in validation, too (the first at {path}:7)" in told
    assert "of validation are" not in told

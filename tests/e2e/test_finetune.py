"""`pretrain finetune`: the pre-training path with labels; errors, resume, and what a run leaves."""

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from test_resume import equal, figures

from pretrain import load
from pretrain.cli import main
from pretrain.downstream.finetune.model import load_fine_tuned
from pretrain.train.checkpoint import read_checkpoint

SLOW = pytest.mark.slow


def sequences(count: int, seed: int) -> list[str]:
    """Each with a taste for some residues, which is what there is to learn."""
    generator = random.Random(seed)
    letters = ("LLLLLAGVIM", "KKKKKERDSN")
    return ["".join(generator.choices(letters[i % 2], k=generator.randint(5, 90))) for i in range(count)]


def label(task: str, sequence: str) -> str:
    greasy = sequence.count("L") / len(sequence)
    if task == "regression":
        return f"{3 + 20 * greasy:.4f}"
    if task == "multilabel":
        return ";".join(name for name, yes in (("greasy", greasy > 0.2), ("long", len(sequence) > 45)) if yes)
    if task == "token":
        return "".join("?" if i % 7 == 3 else "H" if residue in "LK" else "E" for i, residue in enumerate(sequence))
    return "in" if greasy > 0.2 else "out"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Path:
    directory = tmp_path_factory.mktemp("pretrained")
    assert main(["fit", "-c", str(write_tiny(directory)), "--run", str(directory / "run")]) == 0
    return directory / "run"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV for each task, with all splits."""
    directory = tmp_path_factory.mktemp("tables")
    for task in ("regression", "binary", "multilabel", "token"):
        with (directory / f"{task}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["id", "sequence", "label", "split"])
            for i, sequence in enumerate(sequences(90, 0)):
                split = "test" if i >= 70 else "val" if i >= 50 else "train"
                writer.writerow([f"s{i}", sequence, label(task, sequence), split])
    return directory


@pytest.fixture
def config(tmp_path: Path, tables: Path) -> Callable[..., Path]:
    """Writes a config of a tiny fine-tuning run; keyword arguments override, with ``__`` for the dots."""

    def write(task: str = "binary", **overrides: object) -> Path:
        content: dict[str, Any] = {
            "seed_everything": 3,
            "model": {"learning_rate": 1e-2, "warmup_steps": 3},
            "data": {
                "train": str(tables / f"{task}.csv"),
                "task": task,
                "max_length": 64,
                "global_batch_tokens": 512,
                "validation_pack_tokens": 700,
            },
            "trainer": {"accelerator": "cpu", "max_steps": 8, "enable_progress_bar": False},
            "validate_every_n_steps": 4,
            "checkpoint": {"every_n_steps": 3},
        }
        if task == "token":
            content["data"]["mask_label"] = "?"
        for name, value in overrides.items():
            parent, _, last = name.rpartition("__")
            (content.setdefault(parent, {}) if parent else content)[last] = value
        path = tmp_path / "finetune.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def finetune(*arguments: object) -> int:
    return main(["finetune", *map(str, arguments)])


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def states(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    return state


@pytest.mark.parametrize(
    "task", ["regression", pytest.param("binary", marks=SLOW), pytest.param("multilabel", marks=SLOW), "token"]
)
def test_a_run_learns_tells_of_its_test_split_predicts_and_is_inspected(
    task: str, pretrained: Path, config: Callable[..., Path], tables: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    steps = {"trainer__max_steps": 30, "checkpoint__every_n_steps": 10, "validate_every_n_steps": 10}
    path = config(task, **steps)
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    result = json.loads((run / "result.json").read_text())
    metric = {"regression": "spearman", "multilabel": "auroc"}.get(task, "mcc")
    figure = result["test"][metric]
    assert figure["value"] > 0.6
    low, high = figure["interval"]
    assert low <= figure["value"] <= high
    assert (run / "test.png").stat().st_size > 1000
    told = capsys.readouterr().out
    assert f"{metric:10}" in told

    for suffix in ("csv", "parquet"):
        out = tmp_path / f"predictions.{suffix}"
        assert main(["predict", str(run), str(tables / f"{task}.csv"), "--out", str(out), "--pack_tokens", "300"]) == 0
    rows = read_csv(tmp_path / "predictions.csv")
    truth = read_csv(tables / f"{task}.csv")
    assert [row["id"] for row in rows] == [row["id"] for row in truth]
    assert pq.read_table(tmp_path / "predictions.parquet").column_names == list(rows[0])
    held_out = [i for i, row in enumerate(truth) if row["split"] == "test"]
    if task == "binary":
        right = np.mean([rows[i]["prediction"] == truth[i]["label"] for i in held_out])
        assert right == pytest.approx(result["test"]["accuracy"]["value"])
    if task == "token":
        assert [len(row["prediction"]) for row in rows] == [len(row["sequence"]) for row in truth]
        pairs = [
            p == t for i in held_out for p, t in zip(rows[i]["prediction"], truth[i]["label"], strict=True) if t != "?"
        ]
        assert np.mean(pairs) == pytest.approx(result["test"]["accuracy"]["value"])
    if task == "regression":
        errors = [float(rows[i]["prediction"]) - float(truth[i]["label"]) for i in held_out]
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(result["test"]["rmse"]["value"], rel=1e-4)

    capsys.readouterr()
    assert main(["inspect", str(run), "--picture", str(tmp_path / "curves.png")]) == 0
    assert metric in capsys.readouterr().out
    assert main(["inspect", str(run), "--audit"]) == 0
    assert "consumed exactly once" in capsys.readouterr().out
    assert load(run).config == load(pretrained).config
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    assert "finished already" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_killed_and_continued_run_has_the_bits_of_an_uninterrupted_one(
    pretrained: Path, config: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    given = ("-c", config("token", model__tune="lora", trainer__accumulate_grad_batches=2), "--from", source, "--run")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert fit(*given, straight, command="finetune") == 0
    kill = ["--trainer.callbacks+=kill.Kill", "--trainer.callbacks.moment=batch_end", "--trainer.callbacks.number=9"]
    assert fit(*given, broken, *kill, command="finetune") == -9
    shutil.rmtree(source)  # the run holds all that it needs
    assert fit(*given, broken, command="finetune") == 0
    one, other = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (straight, broken))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "FineTuneDataModule"):
        assert equal(one[name], other[name]), name
    assert figures(straight) == figures(broken)
    assert json.loads((straight / "result.json").read_text()) == json.loads((broken / "result.json").read_text())


@SLOW
def test_losses_and_metrics_do_not_depend_on_processes_and_micro_batches(
    pretrained: Path, config: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    given = ("-c", config("binary", model__pooling="attention"), "--from", pretrained, "--run")
    assert fit(*given, tmp_path / "one", command="finetune") == 0
    accumulated = (tmp_path / "four", "--trainer.accumulate_grad_batches", 4)
    assert fit(*given, *accumulated, command="finetune") == 0
    two = (tmp_path / "two", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    assert fit(*given, *two, processes=2, command="finetune") == 0
    one = {key: value for key, value in figures(tmp_path / "one").items() if key[1].startswith(("train/loss", "val/"))}
    for other in ("four", "two"):
        theirs = figures(tmp_path / other)
        assert {key: theirs[key] for key in one} == pytest.approx(one, rel=2e-4, abs=1e-5)


def test_early_stopping_ends_a_run_which_is_then_finished(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    # A learning rate of next to nothing: no validation is better than the first by more than rounding.
    path = config(trainer__max_steps=40, early_stopping=1, validate_every_n_steps=2, model__learning_rate=1e-30)
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    result = json.loads((run / "result.json").read_text())
    assert result["stopped_early"]
    assert result["steps"] < 40
    capsys.readouterr()
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    assert "finished already" in capsys.readouterr().out


def test_the_test_split_is_looked_at_once(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, longer = tmp_path / "run", ("--trainer.max_steps", 12, "--allow_change", "true")
    assert finetune("-c", config(), "--from", pretrained, "--run", run) == 0
    assert finetune("-c", config(), "--from", pretrained, "--run", run, *longer) == 2
    assert "the test split was looked at after step 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({"tune": "full"}, ("embedding", "blocks.0", "blocks.1", "norm")),
        ({"tune": "frozen"}, ()),
        ({"tune": "last", "last_layers": 1}, ("blocks.1", "norm")),
        ({"tune": "lora"}, ("blocks.0", "blocks.1")),
    ],
)
def test_what_is_tuned_moves_and_nothing_else(
    settings: dict[str, Any], moves: tuple[str, ...], pretrained: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = config(**{f"model__{name}": value for name, value in settings.items()})
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    before, after = load(pretrained).state_dict(), load(run).state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {move for move in moves if any(name.startswith(f"{move}.") for name in moved)} == set(moves)
    assert all(name.startswith(tuple(f"{move}." for move in moves)) for name in moved)


def test_from_scratch_takes_the_shape_alone(pretrained: Path, config: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = config(model__from_scratch=True, model__tune="frozen")
    assert finetune("-c", path, "--from", pretrained, "--run", run) == 0
    before, after = load(pretrained), load(run)
    assert before.config == after.config
    assert not torch.equal(before.embedding.weight, after.embedding.weight)


@pytest.mark.parametrize("task", ["regression", "binary", pytest.param("multilabel", marks=SLOW), "token"])
def test_an_export_computes_what_transformers_computes(
    task: str, pretrained: Path, config: Callable[..., Path], tables: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    run, out = tmp_path / "run", tmp_path / "export"
    assert finetune("-c", config(task, model__tune="lora"), "--from", pretrained, "--run", run) == 0
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert main(["predict", str(run), str(tables / f"{task}.csv"), "--out", str(tmp_path / "ours.parquet")]) == 0
    ours = pq.read_table(tmp_path / "ours.parquet").to_pylist()
    texts = [row["sequence"] for row in read_csv(tables / f"{task}.csv")]
    short = [i for i, text in enumerate(texts) if len(text) <= 62][:16]
    tokenizer = AutoTokenizer.from_pretrained(out)
    auto = AutoModelForTokenClassification if task == "token" else AutoModelForSequenceClassification
    model = auto.from_pretrained(out).eval()
    inputs = tokenizer([texts[i] for i in short], return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    if task == "token":
        best = logits.argmax(-1)
        for row, i in zip(best, short, strict=True):
            named = "".join(model.config.id2label[int(k)] for k in row[1 : 1 + len(texts[i])])
            assert named == ours[i]["prediction"]
        return
    if task == "regression":
        theirs, mine = logits[:, 0], [ours[i]["prediction"] for i in short]
    else:
        name = model.config.id2label[1]
        mine = [ours[i][f"p({name})"] for i in short]
        theirs = (logits.sigmoid() if task == "multilabel" else logits.softmax(-1))[:, 1]
    torch.testing.assert_close(theirs, torch.tensor(mine), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_told_in_one_line(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert finetune("-c", config(model__pooling="mean"), "--from", pretrained, "--run", run) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "the head pools by mean" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["predict", str(pretrained), str(tmp_path), "--out", str(tmp_path / "p.csv")]) == 2
    assert "was pre-trained, not fine-tuned" in capsys.readouterr().err


@SLOW
def test_a_transformers_directory_can_be_fine_tuned_and_a_fine_tuned_run_again(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path
) -> None:
    assert main(["export", str(pretrained), "--out", str(tmp_path / "hf")]) == 0
    runs = tmp_path / "run", tmp_path / "from_hf"
    for run, source in zip(runs, (pretrained, tmp_path / "hf"), strict=True):
        assert finetune("-c", config(), "--from", source, "--run", run) == 0
    assert equal(states(runs[0]), states(runs[1]))
    assert finetune("-c", config("regression"), "--from", runs[0], "--run", tmp_path / "again") == 0
    assert load_fine_tuned(tmp_path / "again").spec.task == "regression"


GOOD = "id,sequence,label,split\na,MKV,1,train\nb,MKL,0,train\nc,MKA,1,test\n"


def table(name: str, content: str) -> str:
    Path(name).write_text(content)
    return name


def parquet(labels: list[Any]) -> str:
    pq.write_table(pa.table({"sequence": ["MKV", "MKL"], "label": labels}), "t.parquet")
    return "t.parquet"


TOKENS = {"data__task": "token"}
NUMBERS = {"data__task": "regression"}
MISTAKES: dict[str, tuple[Callable[[], str], dict[str, Any], list[str]]] = {
    "label missing": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMKL,\n"), {}, ["t.csv:3: record '3' has no label; fill it in"]
    ),
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
    "letter seen only in test": (
        lambda: table("t.csv", "sequence,label,split\nMKV,HHE,train\nMKL,HHC,test\n"), TOKENS, ["t.csv:3", "class 'C'"]
    ),
    "unknown residue": (
        lambda: table("t.csv", "sequence,label\nMKV,1\nMK1,0\n"), {}, ["t.csv:3: record '3' has '1' at position 3"]
    ),
    "unknown split": (
        lambda: table("t.csv", GOOD + "d,MKT,1,holdout\n"), {}, ["t.csv:5: record 'd' has 'holdout' in 'split'"]
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
    "no rows": (lambda: table("t.csv", "sequence,label\n"), {}, ["t.csv: holds no row"]),
    "no file": (lambda: "missing.csv", {}, ["missing.csv: no such file"]),
    "a model with another alphabet": (
        lambda: table("t.csv", GOOD), {"data__tokenizer": "words.json"}, ["'esm' (33 ids)", "another alphabet"]
    ),
    "early stopping without validation": (lambda: table("t.csv", GOOD), {"early_stopping": 2}, ["a validation split"]),
    "mask for whole sequences": (lambda: table("t.csv", GOOD), {"data__mask_label": "?"}, ["data.task is binary"]),
    "too many blocks": (
        lambda: table("t.csv", GOOD), {"model__tune": "last", "model__last_layers": 3}, ["the model has 2: give 1 to 2"]
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
    from pretrain.downstream.finetune.data import FineTuneDataModule

    rows = [{"id": f"s{i}", "sequence": s, "label": label("binary", s)} for i, s in enumerate(sequences(8, 1))]
    files = {name: tmp_path / f"t.{name}" for name in ("csv", "tsv", "jsonl", "parquet", "fasta", "bare.fasta")}
    for name, mark in (("csv", ","), ("tsv", "\t")):
        lines = [mark.join(row.values()) for row in rows]
        files[name].write_text("\n".join([mark.join(rows[0]), *lines]) + "\n")
    files["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), files["parquet"])
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


def test_copies_between_train_and_test_are_told(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(GOOD + "d,MKV,1,test\n")
    given = config(data__train=str(path), trainer__max_steps=4)
    assert finetune("-c", given, "--from", pretrained, "--run", tmp_path / "run") == 0
    assert "1 of 2 sequences of test are in train, too" in capsys.readouterr().err


def test_the_recipe_that_ships_builds_a_run_on_the_data_that_ship(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pretrain.downstream.finetune.command import build

    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    cli = build(["-c", "configs/finetune_localisation.yaml", "--from", str(pretrained), "--run", str(tmp_path / "run")])
    cli.data.setup("fit")
    assert {split: len(part.corpus) for split, part in cli.data.splits.items()} == {
        "train": 1932, "validation": 359, "test": 780
    }  # fmt: skip
    assert len(cli.data.spec.classes) == 6
    assert not (tmp_path / "run").exists()


def test_pretraining_that_was_fine_tuned_is_refused_as_a_run_of_the_other_kind(
    pretrained: Path, config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A config and a run of two kinds are told apart before anything is trained."""
    assert finetune("-c", config(), "--from", pretrained, "--run", pretrained) == 2
    assert "was started with" in capsys.readouterr().err

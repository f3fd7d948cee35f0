"""`pretrain finetune` on pairs of sequences: learned, continued, predicted, exported."""

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from labelled import finetune, read_csv, sequences
from test_resume import equal, figures

from pretrain.cli import main
from pretrain.train.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of pairs whose label is a sum over both: neither of the two is enough to know it."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    generator = random.Random(0)
    some = [sequence[:40] for sequence in sequences(120, 2)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "sequence_a", "sequence_b", "label", "split"])
        for i in range(240):
            one, two = generator.sample(some, 2)
            greasy = sum(sequence.count("L") / len(sequence) for sequence in (one, two))
            writer.writerow(
                [f"p{i}", one, two, f"{greasy:.4f}", "test" if i >= 200 else "val" if i >= 180 else "train"]
            )
    return path


def test_a_run_on_pairs_learns_from_both_and_predicts_them_in_either_order(
    pretrained: Path, config: Callable[..., Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = {"data__train": str(pairs), "data__pair_order": "any", "data__max_length": 96}
    given |= {"data__global_batch_tokens": 1024, "trainer__max_steps": 40, "model__pooling": "mean"}
    assert finetune("-c", config("regression", **given), "--from", pretrained, "--run", run) == 0
    assert "pairs in either order: 180 train, 20 validation, 40 test" in capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    table = read_csv(pairs)
    truth = np.array([float(row["label"]) for row in table[200:]])
    for column in ("sequence_a", "sequence_b"):  # to know all of one of the two is not enough
        alone = [row[column].count("L") / len(row[column]) for row in table[200:]]
        assert result["test"]["pearson"]["value"] > np.corrcoef(alone, truth)[0, 1] + 0.1

    mirrored = tmp_path / "mirrored"
    mirrored.write_text(pairs.read_text().replace("sequence_a,sequence_b", "other,sequence"))
    assert main(["predict", str(run), str(pairs), "--out", str(tmp_path / "one.csv"), "--pack_tokens", "300"]) == 0
    given_names = ("--pair_column", "other", "--text_column", "sequence", "--kind", "csv")
    assert main(["predict", str(run), str(mirrored), "--out", str(tmp_path / "two.csv"), *given_names]) == 0
    one, two = read_csv(tmp_path / "one.csv"), read_csv(tmp_path / "two.csv")
    assert [row["id"] for row in one] == [row["id"] for row in two] == [f"p{i}" for i in range(240)]
    ours = torch.tensor([float(row["prediction"]) for row in one])
    torch.testing.assert_close(ours, torch.tensor([float(row["prediction"]) for row in two]), rtol=1e-4, atol=1e-5)
    rmse = np.sqrt(np.mean((ours[200:].numpy() - truth) ** 2))
    assert rmse == pytest.approx(result["test"]["rmse"]["value"], rel=1e-3)
    assert main(["inspect", str(run), "--audit"]) == 0


def test_a_run_on_pairs_that_was_killed_continues_to_the_same_bits(
    pretrained: Path, config: Callable[..., Path], fit: Callable[..., int], pairs: Path, tmp_path: Path
) -> None:
    settings = {"data__train": str(pairs), "data__pair_order": "any", "data__max_length": 48}
    given = ("-c", config("regression", **settings, model__pooling="attention"), "--from", pretrained, "--run")
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert fit(*given, straight, command="finetune") == 0
    kill = ["--trainer.callbacks+=kill.Kill", "--trainer.callbacks.moment=batch_end", "--trainer.callbacks.number=5"]
    assert fit(*given, broken, *kill, command="finetune") == -9
    assert fit(*given, broken, command="finetune") == 0
    one, other = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (straight, broken))
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "FineTuneDataModule"):
        assert equal(one[name], other[name]), name
    assert figures(straight) == figures(broken)


def test_another_order_of_pairs_is_another_run(
    pretrained: Path, config: Callable[..., Path], pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = {"data__train": str(pairs), "trainer__max_steps": 4}
    assert finetune("-c", config("regression", **given), "--from", pretrained, "--run", run) == 0
    changed = config("regression", **{**given, "data__pair_order": "any"})
    assert finetune("-c", changed, "--from", pretrained, "--run", run) == 2
    assert "pair_order" in capsys.readouterr().err


def test_what_pairs_share_with_train_is_told_and_a_single_sequence_is_no_pair(
    pretrained: Path, config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.csv"
    rows = ["MK,LV,1,train", "MA,LL,0,train", "LV,MK,1,test", "LL,MK,0,test", "MK,CC,0,test", "C,CC,0,test"]
    path.write_text("\n".join(["seq1,seq2,label,split", *rows]) + "\n")
    given = {"data__train": str(path), "trainer__max_steps": 4}
    for order, copies, both in (("given", 0, 2), ("any", 1, 1)):
        settings = config(**given, data__pair_order=order)
        assert finetune("-c", settings, "--from", pretrained, "--run", tmp_path / order) == 0
        expected = f"of 4 pairs of test {copies} are in train, too; of {both} more both sequences are, of 1 one"
        assert expected in capsys.readouterr().err
    table = tmp_path / "new.csv"
    out = tmp_path / "out.parquet"
    for content, said in (
        ("sequence\nMKV\n", "has one sequence a row, the model takes pairs"),
        ("a,b\n", "holds no row"),
    ):
        table.write_text(content)
        assert main(["predict", str(tmp_path / "any"), str(table), "--out", str(out)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{table}: {said}" in line
        assert not out.exists()


def test_an_export_takes_two_sequences_as_transformers_tokenizes_them(
    pretrained: Path, config: Callable[..., Path], pairs: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run, out = tmp_path / "run", tmp_path / "export"
    given = config("regression", data__train=str(pairs), data__max_length=48)
    assert finetune("-c", given, "--from", pretrained, "--run", run) == 0
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert main(["predict", str(run), str(pairs), "--out", str(tmp_path / "ours.parquet")]) == 0
    ours = torch.tensor(pq.read_table(tmp_path / "ours.parquet")["prediction"].to_pylist()[:24])
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSequenceClassification.from_pretrained(out)
    rows = read_csv(pairs)[:24]
    both = [row["sequence_a"] for row in rows], [row["sequence_b"] for row in rows]
    assert max(len(a) + len(b) for a, b in zip(*both, strict=True)) + 3 > 48  # some are cut
    inputs = tokenizer(*both, truncation="longest_first", max_length=48, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(**inputs).logits[:, 0]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert 'tokenizer("MKTAYIAKQRQISFVKSHFSRQ", "' in (out / "README.md").read_text()

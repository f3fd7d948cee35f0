"""A fine-tuned run as transformers loads it, and back."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from labelled import finetune, read_csv
from test_resume import equal

from pretrain.cli import main
from pretrain.corpus.tokenizer import ProteinTokenizer, Tokenizer, train_tokenizer
from pretrain.downstream import hf_files
from pretrain.downstream.finetune.export import model_card
from pretrain.downstream.finetune.head import build_head
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.model import FineTuned, load_fine_tuned
from pretrain.downstream.finetune.pairs import PairOrder
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.model.config import EncoderConfig
from pretrain.train.checkpoint import read_checkpoint

SLOW = pytest.mark.slow
ESM = ProteinTokenizer()


def states(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]
    return state


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


def test_an_export_is_readable_by_whoever_reads_its_config_in_shards_and_without_bars(
    pretrained: Path,
    config: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, out = tmp_path / "run", tmp_path / "export"
    assert finetune("-c", config(), "--from", pretrained, "--run", run) == 0
    result = json.loads((run / "result.json").read_text())
    for figure in result["test"].values():
        figure.update(value=None, interval=[None, None])  # as of a test split of one class
    (run / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(hf_files, "SHARD_SIZE", "10KB")
    capfd.readouterr()
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert capfd.readouterr().err == ""
    assert len(list(out.glob("model-*.safetensors"))) > 2
    card = (out / "README.md").read_text()
    assert "\n# run\n" in card  # the run's name, as of a pre-trained one
    assert card.count("| undefined |") == len(result["test"]) > 0
    assert {file.stat().st_mode for file in out.iterdir()} == {(out / "config.json").stat().st_mode}


def tuned(tokenizer: Tokenizer = ESM, pair_order: PairOrder | None = None) -> FineTuned:
    shape = EncoderConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    spec, encoder = LabelSpec("binary", ("no", "yes")), PretrainedEncoder(shape, lambda: tokenizer, 64)
    return FineTuned(encoder, build_head(shape, spec, "cls"), spec, 64, pair_order, 3)


@pytest.mark.parametrize(
    ("model", "start"),
    [
        ({"initialize_from": "/home/alice/runs/a", "from_scratch": False}, "`a` (full)"),
        ({"initialize_from": "/home/alice/runs/a", "from_scratch": True}, "random weights (full)"),
        ({"initialize_from": None, "from_scratch": False}, "random weights (full)"),
    ],
)
def test_a_card_names_what_was_fine_tuned_and_not_where_it_lay(model: dict[str, Any], start: str) -> None:
    card = model_card(tuned(), {"model": {**model, "tune": "full"}, "data": {"train": "labels.csv"}}, {}, "x")
    assert f"| Fine-tuned from | {start} |" in card
    assert "| Task | binary (positive: yes): no, yes |" in card


def test_a_card_tells_undefined_figures_and_an_example_of_its_kind() -> None:
    settings = {"model": {"initialize_from": None, "from_scratch": True, "tune": "full"}, "data": {"train": "x.csv"}}
    nothing = {"value": math.nan, "interval": [math.nan, math.nan]}
    test = {"auroc": nothing, "mcc": {"value": 0.5, "interval": [0.25, 0.75]}}
    card = model_card(tuned(train_tokenizer(["It is."], 262), "any"), settings, {"test": test}, "x")
    assert "| Test auroc | undefined |" in card
    assert "| Test mcc | 0.500 (95 % interval 0.250 to 0.750) |" in card
    assert 'tokenizer("The state of the union is strong.", "It is."' in card
    assert 'tokenizer("MKTAYIAKQRQISFVKSHFSRQ", return_tensors' in model_card(tuned(), settings, {}, "x")


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

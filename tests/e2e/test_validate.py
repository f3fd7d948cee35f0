"""`pretrain validate`: the figures of a run's validation, of any model and any sequences."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import EsmForMaskedLM

from pretrain.cli import main
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.datamodule import validation_planner
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.packing import validation_packs
from pretrain.corpus.tokenizer import ProteinTokenizer


def validate(out: Path, *arguments: object) -> dict[str, Any]:
    assert main(["validate", *map(str, arguments), "--out", str(out)]) == 0
    told: dict[str, Any] = json.loads(out.read_text())
    return told


@pytest.mark.parametrize("long_sequences", ["crop", "split"])
def test_what_a_run_found_last_comes_out_again(
    long_sequences: str, tiny: Callable[..., Path], fit: Callable[..., int], proteins: Path, tmp_path: Path
) -> None:
    sets = {"data__validation": {"all": str(proteins), "again": [str(proteins)]}}
    short = {"data__max_length": 40, "data__long_sequences": long_sequences}
    run = tmp_path / "run"
    assert fit("-c", tiny(trainer__max_steps=3, **sets, **short), "--run", run) == 0
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    in_the_run = json.loads((run / "result.json").read_text())["validation"]["all"]
    how = ("--long_sequences", long_sequences)
    told = [
        validate(tmp_path / "run.json", run)["validation"]["again"],
        validate(tmp_path / "checkpoint.json", run / "checkpoints" / "last.ckpt")["validation"]["again"],
        validate(tmp_path / "exported.json", tmp_path / "exported", proteins, *how)["validation"][""],
    ]
    for found in told:
        for figure in ("sequences", "targets", "accuracy"):
            assert found[figure] == in_the_run[figure]
        assert found["loss"] == pytest.approx(in_the_run["loss"], abs=1e-5)
        assert found["by_token"]["A"]["targets"] == in_the_run["by_token"]["A"]["targets"]


def test_the_loss_is_that_of_transformers(protein_model: Path, proteins: Path, tmp_path: Path) -> None:
    found = validate(tmp_path / "found.json", protein_model, proteins, "--max_length", 30)["validation"][""]
    reference = EsmForMaskedLM.from_pretrained(protein_model).eval()
    corpus = open_or_prepare([proteins], ProteinTokenizer())
    planner = validation_planner(corpus, ProteinTokenizer(), 30)
    (packs,) = validation_packs(planner, 1000, 1)
    losses = []
    for batch in map(PackDataset(corpus, planner.masking).__getitem__, packs):
        for begin, end in batch.cu_seqlens.unfold(0, 2, 1).tolist():
            assert end - begin <= 30
            mine = (batch.target_positions >= begin) & (batch.target_positions < end)
            with torch.inference_mode():
                logits = reference(batch.input_ids[None, begin:end]).logits[0, batch.target_positions[mine] - begin]
            losses.append(F.cross_entropy(logits, batch.targets[mine], reduction="none"))
    expected = torch.cat(losses)
    assert found["targets"] == len(expected) > 100
    assert found["loss"] == pytest.approx(float(expected.mean()), abs=1e-5)


def test_texts_are_told_without_a_table_of_their_tokens(
    text_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("The state of the union is strong.\n" * 20)
    found = validate(tmp_path / "found.json", text_model, source)["validation"][""]
    assert found["sequences"] == 20
    assert "by_token" not in found
    assert f"text.txt: 20 sequences, {found['targets']:,} masked positions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{model}"], "names no validation set of its own; give the sequences"),
        (["{model}", "nowhere.fasta"], "nowhere.fasta: no such file"),
        (["{model}", "{proteins}", "--max_length", "2"], "max_length is 2; give at least 3"),
        (["{model}", "{proteins}", "--long_sequences", "whole"], "long_sequences is 'whole'; give crop or split"),
        (["{model}", "{proteins}", "--out", "{model}/config.json"], "exists already"),
        (["{model}", "{proteins}", "--out", "figures.txt"], "figures.txt: the name must end in .json"),
        (["{proteins}"], "proteins.fasta: is a file of sequences (fasta), no model; the model is named first"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, protein_model: Path, proteins: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(model=protein_model, proteins=proteins) for argument in arguments]
    assert main(["validate", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line

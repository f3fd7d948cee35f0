"""The model card of an export: what it states, and what it keeps to itself."""

import gzip
import json
import re
from pathlib import Path

import pytest
import yaml
from exported import STEPS

import pretrain
from pretrain.downstream.card import data_name, model_card
from pretrain.downstream.export import export
from pretrain.shipped import shipped
from pretrain.train.changes import Change


def test_the_card_states_data_steps_loss_and_licence(finished_run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    result = json.loads((finished_run / "result.json").read_text())
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "other"  # of data that is not the project's own nothing is claimed
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "fill-mask"
    assert "# run" in card
    assert re.search(rf"\| Optimizer steps \| {STEPS} of .*600 tokens, crops of 100 \|", card)
    assert f"| {result['tokens_seen']:,} (" in card
    assert "| Training data | `proteins.fasta` |" in card
    assert str(finished_run.parent) not in card
    loss, perplexity = result["val/loss"], result["val/perplexity"]
    assert re.search(rf"\| Validation loss \| {loss:.4f}.*perplexity {perplexity:.3f}", card)
    assert "The licence of the training data decides" in card
    assert f"{sum(p.numel() for p in pretrain.load(finished_run).parameters()):,}" in card


def test_the_card_of_an_earlier_checkpoint_does_not_claim_the_final_loss(finished_run: Path, tmp_path: Path) -> None:
    export(finished_run / "checkpoints" / "step-000000002.ckpt", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "| Optimizer steps | 2 of " in card
    assert "| Validation loss | not measured at this step |" in card
    assert "Tokens seen" not in card


@pytest.mark.parametrize(
    ("train_sources", "licence"),
    [
        ("data/proteins/train.fasta.gz", "cc-by-4.0"),
        (str(shipped("data/proteins/train.fasta.gz")), "cc-by-4.0"),
        ("{copy}/data/proteins/train.fasta.gz", "cc-by-4.0"),
        ("{own}/data/proteins/train.fasta.gz", "other"),
        ("/somewhere/data/proteins/train.fasta.gz", "other"),
        (["data/proteins/train.fasta.gz", "own.fasta"], "other"),
        ("mydata/proteins/train.fasta.gz", "other"),
        ("data/proteins/private.fasta", "other"),
    ],
)
def test_the_card_claims_uniprots_licence_for_the_data_that_ships_only(
    finished_run: Path, tmp_path: Path, train_sources: str | list[str], licence: str
) -> None:
    sample = shipped("data/proteins/train.fasta.gz")
    assert sample
    for place, content in (("copy", sample.read_bytes()), ("own", gzip.compress(b">secret\nMKT\n"))):
        (tmp_path / place / "data/proteins").mkdir(parents=True)
        (tmp_path / place / "data/proteins/train.fasta.gz").write_bytes(content)
    settings = yaml.safe_load((finished_run / "config.yaml").read_text())
    if isinstance(train_sources, str):
        train_sources = train_sources.format(copy=tmp_path / "copy", own=tmp_path / "own")
    settings["data"]["train"] = train_sources
    card = model_card(pretrain.load(finished_run), {"global_step": 4}, settings, {}, "x")
    assert yaml.safe_load(card.split("---")[1])["license"] == licence
    assert ("UniProt" in card) == (licence == "cc-by-4.0")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("data/proteins/train.fasta.gz", "data/proteins/train.fasta.gz"),
        (str(shipped("data/localisation/localisation.csv.gz")), "data/localisation/localisation.csv.gz"),
        ("/home/me/secret project/labels.csv", "labels.csv"),
        ("/home/me/corpora/train/", "train"),
        ("s3://my-bucket/corpora/train", "train"),
        ("https://somewhere.org/files/labels.csv?signature=1234", "labels.csv"),
        ("hf://datasets/org/proteins", "hf://datasets/org/proteins"),
        ("-", "-"),
    ],
)
def test_a_card_calls_data_by_their_name_and_does_not_tell_where_they_lie(source: str, name: str) -> None:
    assert data_name(source) == name


def test_the_card_of_a_mixture_with_a_range_of_shares_names_both(finished_run: Path) -> None:
    settings = yaml.safe_load((finished_run / "config.yaml").read_text())
    settings["data"] |= {"train": {"a.fasta": 3, "corpora/b": 1}, "mlm_probability": [0.1, 0.3], "mask_unit": "span"}
    card = model_card(pretrain.load(finished_run), {"global_step": 4}, settings, {}, "x")
    assert "| Training data | `a.fasta`, `b` |" in card
    assert "| Masking | 10% to 30% of tokens |" in card
    assert yaml.safe_load(card.split("```yaml")[1].split("```")[0])["data"]["mask_unit"] == "span"


def test_the_card_shows_the_curves_and_the_recipe(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "](curves.png)" in card
    assert (exported / "curves.png").read_bytes().startswith(b"\x89PNG")
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert recipe["model"]["learning_rate"] == 1e-2
    assert recipe["data"]["global_batch_tokens"] == 600
    assert "Settings were changed" not in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/alice/esm2", "esm2"),
        ("runs/a/", "a"),
        (".", "."),
        ("/home/alice/a/checkpoints/last.ckpt", "a/checkpoints/last.ckpt"),
    ],
)
def test_the_card_tells_nothing_of_the_machine(finished_run: Path, source: str, shown: str) -> None:
    settings = yaml.safe_load((finished_run / "config.yaml").read_text())
    settings["model"] |= {"initialize_from": source, "compile": True}
    card = model_card(pretrain.load(finished_run), {"global_step": 4}, settings, {}, "x")
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])["model"]
    assert recipe["initialize_from"] == shown
    assert {"encoder", "learning_rate", "betas"} <= recipe.keys()
    assert not {"cpu_kernels", "flash_attention", "compile", "activation_checkpointing"} & recipe.keys()
    assert "/home" not in card.replace(settings["data"]["train"], "")


def test_the_card_tells_each_change_of_settings_with_its_step(copied_run: Path, tmp_path: Path) -> None:
    """And the card of a checkpoint before a change tells the settings that it was trained with."""
    changes = [Change("model.learning_rate", 0.02, 0.01), Change("trainer.gradient_clip_val", None, 1.0)]
    starts = [{"step": 2, "changes": [change._asdict() for change in changes]}]
    with (copied_run / "starts.jsonl").open("a") as file:
        file.writelines(json.dumps(start) + "\n" for start in starts)
    export(copied_run, tmp_path / "after")
    card = (tmp_path / "after" / "README.md").read_text()
    assert "- after step 2: `model.learning_rate: 0.02 -> 0.01`\n" in card
    assert "- after step 2: `trainer.gradient_clip_val: None -> 1.0`\n" in card
    assert "| Peak learning rate | 0.01," in card
    export(copied_run / "checkpoints" / "step-000000002.ckpt", tmp_path / "before")
    card = (tmp_path / "before" / "README.md").read_text()
    assert "after step" not in card
    assert "| Peak learning rate | 0.02," in card

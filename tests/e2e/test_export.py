"""`pretrain export` and `pretrain.load`: what a run becomes, and that nothing in it can run code."""

import gzip
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.models.esm.configuration_esm import get_default_vocab_list

import pretrain
from pretrain.cli import main
from pretrain.corpus.tokenizer import ESM_ALPHABET, ProteinTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from pretrain.downstream import export as export_module
from pretrain.downstream import hf_files
from pretrain.downstream.card import data_name, model_card
from pretrain.downstream.contact_regression import write_regression
from pretrain.downstream.export import export
from pretrain.errors import UserError
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder
from pretrain.shipped import shipped
from pretrain.train.changes import Change

STEPS = 4
DOCUMENTS = ["The state of the union is strong.", "  Two  spaces, a\ttab and café — naïve?", "日本語 and 🧬 emoji", "x"]
PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "L", "ACDEFGHIKLMNPQRSTVWY" * 3, "MXBUZO.-K"]


def train(home: Path, data: dict[str, object]) -> Path:
    """A finished run of a tiny encoder, with sharp enough weights for differences to show."""
    config = {
        "seed_everything": 1,
        "model": {
            "encoder": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2},
            "learning_rate": 1e-2,
            "warmup_steps": 1,
        },
        "data": {"max_length": 100, "global_batch_tokens": 600, **data},
        "trainer": {"accelerator": "cpu", "max_steps": STEPS, "enable_progress_bar": False},
        "validate_every_n_steps": STEPS,
        "checkpoint": {"every_n_steps": 2},
    }
    (home / "tiny.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PRETRAIN_CACHE", str(home / "cache"))
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning's CLI calls
        assert main(["fit", "-c", str(home / "tiny.yaml"), "--run", str(home / "run")]) == 0
    return home / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on proteins."""
    home = tmp_path_factory.mktemp("protein")
    generator = random.Random(0)
    with (home / "proteins.fasta").open("w") as file:
        for number in range(60):
            file.write(f">{number}\n{''.join(generator.choices('LAGVSERTIDPKQNFYMHWC', k=generator.randint(5, 90)))}\n")
    return train(home, {"train": str(home / "proteins.fasta"), "validation": str(home / "proteins.fasta")})


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The run's export, by the command line."""
    out = run.parent / "exported"
    assert main(["export", str(run), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text with a byte-level BPE tokenizer."""
    home = tmp_path_factory.mktemp("text")
    (home / "tokenizer.json").write_text(train_tokenizer(DOCUMENTS * 3, 300).serialize())
    (home / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS * 12))
    documents = str(home / "documents.jsonl")
    return train(home, {"train": documents, "validation": documents, "tokenizer": str(home / "tokenizer.json")})


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run, to be changed."""
    return shutil.copytree(run, tmp_path / "copy", symlinks=True)


@torch.no_grad()
def logits(encoder: Encoder, input_ids: Tensor) -> Tensor:
    return encoder(input_ids, torch.tensor([0, len(input_ids)], dtype=torch.int32))


def one_line_error(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    assert main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pretrain: error: ")
    return line


# What transformers makes of it


def test_the_alphabet_is_esms_in_esms_order() -> None:
    """By transformers' own list: an export is only as right as the ids that were trained on."""
    assert get_default_vocab_list() == ESM_ALPHABET


def test_transformers_tokenizes_proteins_as_the_corpus_does(exported: Path) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(exported), ProteinTokenizer()
    for sequence in [*PROTEINS, "".join(token for token in ESM_ALPHABET if len(token) == 1)]:
        assert theirs(sequence).input_ids == ours.encode(sequence.encode()).tolist()
    roles = ("cls", "pad", "eos", "unk", "mask")
    assert [getattr(theirs, f"{role}_token_id") for role in roles] == [0, 1, 2, 3, 32]
    assert [getattr(ours, f"{role}_token_id") for role in roles] == [0, 1, 2, 3, 32]
    assert theirs("MK<mask>L").input_ids == [0, 20, 15, 32, 4, 2]
    assert len(theirs) == ours.vocab_size == 33
    assert theirs.model_max_length == 100
    batch = theirs(["MKL", "M"], padding=True)
    assert batch.input_ids == [[0, 20, 15, 4, 2], [0, 20, 2, 1, 1]]
    assert batch.attention_mask == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


@torch.no_grad()
def test_transformers_logits_of_a_padded_batch_equal_the_runs(run: Path, exported: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForMaskedLM.from_pretrained(exported)
    assert not model.training
    batch = tokenizer([*PROTEINS, "MK<mask>AY<mask><mask>K", "<mask>"], padding=True, return_tensors="pt")
    theirs, encoder = model(**batch).logits, pretrain.load(run)
    for row, length in zip(range(len(theirs)), batch.attention_mask.sum(1).tolist(), strict=True):
        ours = logits(encoder, batch.input_ids[row, :length])
        torch.testing.assert_close(theirs[row, :length], ours, rtol=0, atol=1e-5 * max(1.0, float(ours.abs().max())))


def test_the_exported_config_says_what_the_encoder_is(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    expected = {
        "architectures": ["EsmForMaskedLM"],
        "model_type": "esm",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 33,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "mask_token_id": 32,
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
        "position_embedding_type": "rotary",
        "tie_word_embeddings": True,
    }
    assert {name: config.get(name) for name in expected} == expected
    assert "auto_map" not in config  # no code comes with the model
    assert config["max_position_embeddings"] >= 102


def test_an_export_holds_safetensors_only_under_published_names(exported: Path) -> None:
    """The names of facebook/esm2_*; transformers 5 by itself writes TensorFlow's (gamma, beta) and a literal ``*``."""
    names = {path.name for path in exported.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt", "README.md"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".txt", ".md", ".png"}
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1  # weights are not for their owner alone
    state = load_file(exported / "model.safetensors")
    layer = "esm.encoder.layer.1"
    assert {f"{layer}.attention.LayerNorm.weight", f"{layer}.LayerNorm.bias", "lm_head.dense.bias"} <= state.keys()
    assert not [name for name in state if "*" in name or name.endswith(("gamma", "beta"))]
    assert not any(tensor.any() for name, tensor in state.items() if "contact_head" in name)


def test_a_text_run_exports_with_its_tokenizer(text_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    report = export(text_run, out)
    assert str(out) in report
    theirs, ours = AutoTokenizer.from_pretrained(out), load_tokenizer(text_run.parent / "tokenizer.json")
    for document in DOCUMENTS:
        ids = theirs(document).input_ids
        assert ids == ours.encode(document.encode()).tolist()
        assert theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == document
    for role in ("cls", "pad", "eos", "unk", "mask"):
        assert getattr(theirs, f"{role}_token_id") == getattr(ours, f"{role}_token_id")
    masked = theirs("The state of the <mask> is", return_tensors="pt")
    assert int((masked.input_ids == ours.mask_token_id).sum()) == 1
    assert len(theirs) == ours.vocab_size
    with torch.no_grad():
        logits_there = AutoModelForMaskedLM.from_pretrained(out)(**masked).logits[0]
    torch.testing.assert_close(logits_there, logits(pretrain.load(out), masked.input_ids[0]), rtol=0, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "license: other" in card
    assert "protein" not in card


def test_load_tokenizer_reads_the_exported_text_tokenizer_back(text_run: Path, tmp_path: Path) -> None:
    """So that an export can be the start of another run."""
    export(text_run, tmp_path / "exported")
    again, ours = load_tokenizer(tmp_path / "exported"), load_tokenizer(text_run.parent / "tokenizer.json")
    assert again.tokens == ours.tokens
    for document in [*DOCUMENTS, "a <mask> written out"]:
        assert again.encode(document.encode()).tolist() == ours.encode(document.encode()).tolist()


# The model card


def test_the_card_states_data_steps_loss_and_licence(run: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    result = json.loads((run / "result.json").read_text())
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "other"  # of data that is not the project's own nothing is claimed
    assert header["library_name"] == "transformers"
    assert header["pipeline_tag"] == "fill-mask"
    assert "# run" in card
    assert re.search(rf"\| Optimizer steps \| {STEPS} of .*600 tokens, crops of 100 \|", card)
    assert f"| {result['tokens_seen']:,} (" in card
    assert "| Training data | `proteins.fasta` |" in card
    assert str(run.parent) not in card
    loss, perplexity = result["val/loss"], result["val/perplexity"]
    assert re.search(rf"\| Validation loss \| {loss:.4f}.*perplexity {perplexity:.3f}", card)
    assert "The licence of the training data decides" in card
    assert f"{sum(p.numel() for p in pretrain.load(run).parameters()):,}" in card


def test_the_card_of_an_earlier_checkpoint_does_not_claim_the_final_loss(run: Path, tmp_path: Path) -> None:
    export(run / "checkpoints" / "step-000000002.ckpt", tmp_path / "exported")
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
    run: Path, tmp_path: Path, train_sources: str | list[str], licence: str
) -> None:
    sample = shipped("data/proteins/train.fasta.gz")
    assert sample
    for place, content in (("copy", sample.read_bytes()), ("own", gzip.compress(b">secret\nMKT\n"))):
        (tmp_path / place / "data/proteins").mkdir(parents=True)
        (tmp_path / place / "data/proteins/train.fasta.gz").write_bytes(content)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    if isinstance(train_sources, str):
        train_sources = train_sources.format(copy=tmp_path / "copy", own=tmp_path / "own")
    settings["data"]["train"] = train_sources
    card = model_card(pretrain.load(run), {"global_step": 4}, settings, {}, "x")
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


def test_the_card_of_a_mixture_with_a_range_of_shares_names_both(run: Path) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"train": {"a.fasta": 3, "corpora/b": 1}, "mlm_probability": [0.1, 0.3], "mask_unit": "span"}
    card = model_card(pretrain.load(run), {"global_step": 4}, settings, {}, "x")
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
def test_the_card_tells_nothing_of_the_machine(run: Path, source: str, shown: str) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["model"] |= {"initialize_from": source, "compile": True}
    card = model_card(pretrain.load(run), {"global_step": 4}, settings, {}, "x")
    recipe = yaml.safe_load(card.split("```yaml")[1].split("```")[0])["model"]
    assert recipe["initialize_from"] == shown
    assert {"encoder", "learning_rate", "betas"} <= recipe.keys()
    assert not {"cpu_kernels", "flash_attention", "compile", "activation_checkpointing"} & recipe.keys()
    assert "/home" not in card.replace(settings["data"]["train"], "")


def test_the_card_tells_each_change_of_settings_with_its_step(copy: Path, tmp_path: Path) -> None:
    """And the card of a checkpoint before a change tells the settings that it was trained with."""
    changes = [Change("model.learning_rate", 0.02, 0.01), Change("trainer.gradient_clip_val", None, 1.0)]
    starts = [{"step": 2, "changes": [change._asdict() for change in changes]}]
    with (copy / "starts.jsonl").open("a") as file:
        file.writelines(json.dumps(start) + "\n" for start in starts)
    export(copy, tmp_path / "after")
    card = (tmp_path / "after" / "README.md").read_text()
    assert "- after step 2: `model.learning_rate: 0.02 -> 0.01`\n" in card
    assert "- after step 2: `trainer.gradient_clip_val: None -> 1.0`\n" in card
    assert "| Peak learning rate | 0.01," in card
    export(copy / "checkpoints" / "step-000000002.ckpt", tmp_path / "before")
    card = (tmp_path / "before" / "README.md").read_text()
    assert "after step" not in card
    assert "| Peak learning rate | 0.02," in card


def test_a_large_model_is_written_in_shards_that_everything_reads(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_files, "SHARD_SIZE", "10KB")
    export(run, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    input_ids = torch.tensor([0, 20, 15, 32, 4, 2])
    whole, ours = (logits(pretrain.load(place), input_ids) for place in (exported, tmp_path / "sharded"))
    assert torch.equal(ours, whole)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "sharded")(input_ids[None]).logits[0]
    torch.testing.assert_close(theirs, whole, rtol=0, atol=1e-5)


def test_a_run_given_as_the_current_directory_keeps_its_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    export(Path("."), tmp_path / "one")
    assert "# run\n" in (tmp_path / "one" / "README.md").read_text()
    monkeypatch.chdir(run / "checkpoints")
    export(Path("last.ckpt"), tmp_path / "two")
    assert "# run\n" in (tmp_path / "two" / "README.md").read_text()


# Loading


def test_run_checkpoint_and_export_load_as_the_same_encoder(run: Path, exported: Path) -> None:
    input_ids = torch.tensor([0, 20, 15, 32, 4, 5, 32, 6, 2])
    places = [
        run,
        run / "checkpoints" / "last.ckpt",
        run / f"checkpoints/step-{STEPS:09d}.ckpt",
        exported,
        str(exported),
    ]
    encoders = [pretrain.load(place) for place in places]
    assert not any(encoder.training for encoder in encoders)
    first, *others = (logits(encoder, input_ids) for encoder in encoders)
    assert all(torch.equal(first, other) for other in others)
    earlier = pretrain.load(run / "checkpoints" / "step-000000002.ckpt")
    assert not torch.equal(first, logits(earlier, input_ids))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "not found"),
        (lambda path: path.mkdir(), "holds neither"),
        (lambda path: path.write_text("x"), "not a complete checkpoint"),
        (lambda path: torch.save({"state_dict": {}, "global_step": 1}, path), "not one of a run"),
    ],
    ids=["nothing", "an empty directory", "another file", "another model"],
)
def test_loading_what_is_no_model_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "place")
    with pytest.raises(UserError, match=said) as raised:
        pretrain.load(tmp_path / "place")
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "place") in str(raised.value)


# Mistakes leave nothing


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[Path]:
    """A directory in which a command must not leave anything."""
    place = tmp_path / "untouched"
    place.mkdir()
    yield place
    assert sorted(place.rglob("*")) == []


def test_a_missing_run_is_one_line_and_leaves_nothing(untouched: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = one_line_error(["export", str(untouched / "run"), "--out", str(untouched / "a" / "b")], capfd)
    assert f"{untouched / 'run'}: not found" in line


def test_a_run_without_a_checkpoint_is_one_line_and_leaves_nothing(
    copy: Path, untouched: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints")
    assert "holds neither" in one_line_error(["export", str(copy), "--out", str(untouched / "out")], capfd)


def test_a_checkpoint_without_its_run_is_one_line_and_leaves_nothing(
    copy: Path, untouched: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copy / "config.yaml").unlink()
    checkpoint = copy / "checkpoints" / "last.ckpt"
    assert "config.yaml" in one_line_error(["export", str(checkpoint), "--out", str(untouched / "out")], capfd)


def test_an_existing_directory_is_not_written_into(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "exists already" in one_line_error(["export", str(run), "--out", str(tmp_path / "out")], capfd)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_export_that_fails_half_way_leaves_nothing(
    run: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        assert (untouched / ".out.partial" / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "verify", fail)
    with pytest.raises(OSError, match="No space"):
        export(run, untouched / "out")


@pytest.mark.parametrize(
    ("tensor", "what"), [("lm_head.bias", "logits"), ("esm.contact_head.regression.bias", "contacts")]
)
def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, what: str
) -> None:
    write = export_module.write_model

    def write_wrongly(encoder: Encoder, tokenizer: Tokenizer, max_length: int, out: Path, *contacts: Any) -> None:
        write(encoder, tokenizer, max_length, out, *contacts)
        tensors = load_file(out / "model.safetensors")
        tensors[tensor] += 0.1
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export_module, "write_model", write_wrongly)
    write_regression(ContactRegression(torch.ones(4), torch.zeros(())), tmp_path / "regression", {})
    with pytest.raises(RuntimeError, match=f"exported {what} differ"):
        export(run, untouched / "out", tmp_path / "regression")


# Nothing is unpickled


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def with_torch(content: dict[str, object], path: Path) -> None:
    torch.save(content, path)


def with_torchs_old_format(content: dict[str, object], path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def with_pickle(content: dict[str, object], path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("plant", [with_torch, with_torchs_old_format, with_pickle])
def test_a_planted_pickle_is_refused_and_does_not_run(
    copy: Path,
    tmp_path: Path,
    untouched: Path,
    capfd: pytest.CaptureFixture[str],
    plant: Callable[[dict[str, object], Path], None],
) -> None:
    planted = copy / "checkpoints" / "step-999999999.ckpt"
    whole = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)
    plant({**whole, "hparams_name": Evil(tmp_path / "executed")}, planted)
    line = one_line_error(["export", str(planted), "--out", str(untouched / "out")], capfd)
    assert "not a complete checkpoint of tensors and plain values" in line
    with pytest.raises(UserError, match="plain values"):
        pretrain.load(planted)
    # A run passes over it, to the newest checkpoint that can be read.
    assert torch.equal(pretrain.load(copy).head.bias, whole["state_dict"]["encoder.head.bias"])
    assert not (tmp_path / "executed").exists()
    # The plant works: had anybody unpickled the file, there would be a directory now.
    torch.load(planted, weights_only=False) if plant is not with_pickle else pickle.loads(planted.read_bytes())
    assert (tmp_path / "executed").exists()

"""`pretrain export` and `pretrain.load`: what a run becomes."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import STEPS, train
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.models.esm.configuration_esm import get_default_vocab_list

import pretrain
from pretrain.cli import main
from pretrain.corpus.tokenizer import ESM_ALPHABET, ProteinTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from pretrain.downstream import export as export_module
from pretrain.downstream import hf_files
from pretrain.downstream.contact_regression import write_regression
from pretrain.downstream.export import export
from pretrain.errors import UserError
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder

DOCUMENTS = ["The state of the union is strong.", "  Two  spaces, a\ttab and café — naïve?", "日本語 and 🧬 emoji", "x"]
PROTEINS = ["MKTAYIAKQRQISFVKSHFSRQ", "L", "ACDEFGHIKLMNPQRSTVWY" * 3, "MXBUZO.-K"]


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on text with a byte-level BPE tokenizer."""
    home = tmp_path_factory.mktemp("text")
    (home / "tokenizer.json").write_text(train_tokenizer(DOCUMENTS * 3, 300).serialize())
    (home / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS * 12))
    documents = str(home / "documents.jsonl")
    return train(home, {"train": documents, "validation": documents, "tokenizer": str(home / "tokenizer.json")})


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
def test_transformers_logits_of_a_padded_batch_equal_the_runs(finished_run: Path, exported: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForMaskedLM.from_pretrained(exported)
    assert not model.training
    batch = tokenizer([*PROTEINS, "MK<mask>AY<mask><mask>K", "<mask>"], padding=True, return_tensors="pt")
    theirs, encoder = model(**batch).logits, pretrain.load(finished_run)
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


def test_a_large_model_is_written_in_shards_that_everything_reads(
    finished_run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_files, "SHARD_SIZE", "10KB")
    export(finished_run, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    input_ids = torch.tensor([0, 20, 15, 32, 4, 2])
    whole, ours = (logits(pretrain.load(place), input_ids) for place in (exported, tmp_path / "sharded"))
    assert torch.equal(ours, whole)
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "sharded")(input_ids[None]).logits[0]
    torch.testing.assert_close(theirs, whole, rtol=0, atol=1e-5)


def test_a_run_given_as_the_current_directory_keeps_its_name(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_run)
    export(Path("."), tmp_path / "one")
    assert "# run\n" in (tmp_path / "one" / "README.md").read_text()
    monkeypatch.chdir(finished_run / "checkpoints")
    export(Path("last.ckpt"), tmp_path / "two")
    assert "# run\n" in (tmp_path / "two" / "README.md").read_text()


# Loading


def test_run_checkpoint_and_export_load_as_the_same_encoder(finished_run: Path, exported: Path) -> None:
    input_ids = torch.tensor([0, 20, 15, 32, 4, 5, 32, 6, 2])
    places = [
        finished_run,
        finished_run / "checkpoints" / "last.ckpt",
        finished_run / f"checkpoints/step-{STEPS:09d}.ckpt",
        exported,
        str(exported),
    ]
    encoders = [pretrain.load(place) for place in places]
    assert not any(encoder.training for encoder in encoders)
    first, *others = (logits(encoder, input_ids) for encoder in encoders)
    assert all(torch.equal(first, other) for other in others)
    earlier = pretrain.load(finished_run / "checkpoints" / "step-000000002.ckpt")
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
    copied_run: Path, untouched: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied_run / "checkpoints")
    assert "holds neither" in one_line_error(["export", str(copied_run), "--out", str(untouched / "out")], capfd)


def test_a_checkpoint_without_its_run_is_one_line_and_leaves_nothing(
    copied_run: Path, untouched: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copied_run / "config.yaml").unlink()
    checkpoint = copied_run / "checkpoints" / "last.ckpt"
    assert "config.yaml" in one_line_error(["export", str(checkpoint), "--out", str(untouched / "out")], capfd)


def test_an_existing_directory_is_not_written_into(
    finished_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "exists already" in one_line_error(["export", str(finished_run), "--out", str(tmp_path / "out")], capfd)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_an_export_that_fails_half_way_leaves_nothing(
    finished_run: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        assert (untouched / ".out.partial" / "model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "verify", fail)
    with pytest.raises(OSError, match="No space"):
        export(finished_run, untouched / "out")


@pytest.mark.parametrize(
    ("tensor", "what"), [("lm_head.bias", "logits"), ("esm.contact_head.regression.bias", "contacts")]
)
def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(
    finished_run: Path, tmp_path: Path, untouched: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, what: str
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
        export(finished_run, untouched / "out", tmp_path / "regression")

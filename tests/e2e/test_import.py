"""`pretrain import`: what transformers saved comes in, is trained further, and goes back, with not a bit lost."""

import fnmatch
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    EsmConfig,
    EsmForMaskedLM,
    EsmForSequenceClassification,
    EsmForTokenClassification,
    EsmModel,
)

import pretrain
from pretrain.cli import main
from pretrain.corpus.tokenizer import ESM_ALPHABET, ProteinTokenizer, Tokenizer, train_tokenizer
from pretrain.downstream.import_model import import_model
from pretrain.downstream.tokenizer_files import write_tokenizer
from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.hf import to_hf_config
from pretrain.train.checkpoint import read_checkpoint

SHAPE = EncoderConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=40)
INV_FREQ = "esm.rotary_embeddings.inv_freq"
SENTENCES = ["The state of the union is strong.", "Two  spaces, and a café", "x"]
ONCE = ("--trainer.max_steps", 1, "--model.learning_rate", 0)


def save(
    out: Path, kind: type = EsmForMaskedLM, tokenizer: Tokenizer | None = None, change: object = None, **options: object
) -> Path:
    """A model of random weights as transformers saves it, with rotary frequencies rounded as in published models."""
    tokenizer = tokenizer or ProteinTokenizer()
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "pad_token_id", "mask_token_id")}
    torch.manual_seed(4)
    model = kind(EsmConfig(**{**to_hf_config(SHAPE), **ids, "num_labels": 5, **(change or {})}))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2)
    trunk = model if isinstance(model, EsmModel) else model.esm
    trunk.rotary_embeddings.inv_freq.copy_((1.1 * trunk.rotary_embeddings.inv_freq).half().float())
    model.save_pretrained(out, **{"save_original_format": False, **options})
    write_tokenizer(tokenizer, 1024, out)
    return out


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``EsmForMaskedLM``, as on the Hub."""
    return save(tmp_path_factory.mktemp("hub") / "published")


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(published, tmp_path / "copy")


def weights(directory: Path) -> dict[str, Tensor]:
    """A model's tensors."""
    return load_file(directory / "model.safetensors")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def same_tokenizer(one: Path, other: Path, examples: list[str]) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(one), AutoTokenizer.from_pretrained(other)
    assert ours.get_vocab() == theirs.get_vocab()
    assert type(ours) is type(theirs)
    roles = ("cls", "pad", "eos", "sep", "unk", "mask", "bos")
    assert [getattr(ours, f"{role}_token") for role in roles] == [getattr(theirs, f"{role}_token") for role in roles]
    assert ours.all_special_ids == theirs.all_special_ids
    batch = ours(examples, padding=True)
    assert batch == theirs(examples, padding=True)


# There and back


def test_a_model_that_is_imported_trained_and_exported_comes_back_bit_for_bit(
    published: Path, tmp_path: Path, tiny: Callable[..., Path], fit: Callable[..., int], capfd: pytest.CaptureFixture
) -> None:
    """One step at learning rate 0. The stored rotary frequencies are not those that would be computed."""
    stored = weights(published)
    assert (stored[INV_FREQ] - pretrain.Encoder(SHAPE).inv_freq).abs().max() > 1e-3
    imported, run, out = tmp_path / "imported", tmp_path / "run", tmp_path / "exported"
    assert main(["import", str(published), "--out", str(imported)]) == 0
    printed = capfd.readouterr().out
    assert "brought   embedding, 3 blocks, final layer norm, masked-LM head, contact head, stored rotary" in printed
    assert "missing   nothing\n" in printed
    assert "left out  nothing\n" in printed
    assert f"next      pretrain fit -c esm2_8M -c {imported}/fit.yaml --data.train FILE" in printed
    assert fit("-c", tiny(), "-c", imported / "fit.yaml", "--run", run, *ONCE) == 0
    assert main(["export", str(run), "--out", str(out)]) == 0
    for directory in (imported, out):
        same(weights(directory), stored)
        same_tokenizer(directory, published, ["MKTAYIAKQR", "M<mask>XBUZO.-"])
        theirs, ours = (json.loads((place / "config.json").read_text()) for place in (published, directory))
        special = ("pad_token_id", "mask_token_id", "vocab_size", "token_dropout", "position_embedding_type")
        assert {name: ours[name] for name in special} == {name: theirs[name] for name in special}
    input_ids = torch.tensor([[0, 20, 15, 32, 4, 2]])
    with torch.no_grad():
        first, last = (AutoModelForMaskedLM.from_pretrained(place)(input_ids).logits for place in (published, out))
    assert torch.equal(first, last)


def test_a_text_model_comes_back_with_its_tokenizer(
    tmp_path: Path, tiny: Callable[..., Path], fit: Callable[..., int]
) -> None:
    tokenizer = train_tokenizer(SENTENCES * 3, 300)
    original = save(tmp_path / "original", tokenizer=tokenizer, change={"token_dropout": False})
    report = import_model(str(original), tmp_path / "imported")
    assert f"tokenizer text, {tokenizer.vocab_size} ids" in report
    assert "pretrain fit -c bert_base -c " in report
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES * 20))
    config = tiny(data__train=str(tmp_path / "text.jsonl"), data__validation=None, data__tokenizer="none.json")
    assert fit("-c", config, "-c", tmp_path / "imported" / "fit.yaml", "--run", tmp_path / "run", *ONCE) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 0
    same(weights(tmp_path / "exported"), weights(original))
    same_tokenizer(tmp_path / "exported", original, [*SENTENCES, "a <mask> b"])


# A trunk alone


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        (EsmModel, "pooler"),
        (EsmForSequenceClassification, "classifier"),
        (EsmForTokenClassification, "classifier"),
    ],
)
def test_a_model_without_masked_lm_head_gets_a_new_one(kind: type, left_out: str, tmp_path: Path) -> None:
    trunk = save(tmp_path / "trunk", kind)
    report = import_model(str(trunk), tmp_path / "a")
    assert "missing   masked-LM head: initialised, seed 0\n" in report
    assert f"left out  {left_out}\n" in report
    import_model(str(trunk), tmp_path / "b", seed=0)
    import_model(str(trunk), tmp_path / "c", seed=1)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    same(a, b)
    assert not torch.equal(a["lm_head.dense.weight"], c["lm_head.dense.weight"])
    stored = {
        f"esm.{name.removeprefix('esm.')}": tensor for name, tensor in load_file(trunk / "model.safetensors").items()
    }
    for name, tensor in a.items():
        if not name.startswith("lm_head."):
            assert torch.equal(tensor, stored[name]), name
    assert abs(float(a["lm_head.dense.weight"].std()) - 0.02) < 0.002
    assert not any(a[f"lm_head.{name}"].any() for name in ("bias", "dense.bias", "layer_norm.bias"))
    assert bool((a["lm_head.layer_norm.weight"] == 1).all())
    with pytest.raises(UserError, match=f"trunk: is {kind.__name__} without masked-LM head; give .*`pretrain import`"):
        pretrain.load(trunk)


def test_half_a_head_is_refused(copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["lm_head.dense.bias"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"no tensor 'lm_head\.dense\.bias'"):
        import_model(str(copy), tmp_path / "out")


# Where it comes from


def test_shards_are_read_as_one_file(published: Path, tmp_path: Path) -> None:
    sharded = save(tmp_path / "sharded", max_shard_size="20KB")
    assert not (sharded / "model.safetensors").exists()
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    import_model(str(sharded), tmp_path / "imported")
    same(weights(tmp_path / "imported"), weights(published))
    same(pretrain.load(sharded).state_dict(), pretrain.load(published).state_dict())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    missing = sorted(set(index["weight_map"].values()))[1]
    (sharded / missing).rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match=f"has no {missing}"):
        pretrain.load(sharded)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not name files beside it"):
        pretrain.load(sharded)


def test_half_precision_is_widened_and_said(published: Path, tmp_path: Path) -> None:
    AutoModelForMaskedLM.from_pretrained(published, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    write_tokenizer(ProteinTokenizer(), 1024, tmp_path / "half")
    assert "stored    in bfloat16; written in float32" in import_model(str(tmp_path / "half"), tmp_path / "out")
    stored = weights(tmp_path / "half")
    same(weights(tmp_path / "out"), {name: tensor.float() for name, tensor in stored.items()})


def test_a_name_on_the_hub_downloads_neither_pickles_nor_code(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = shutil.copytree(published, tmp_path / "repository")
    for name in ("pytorch_model.bin", "modeling_esm.py", "tf_model.h5", "training_args.bin"):
        (repository / name).write_text("not to be read")

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "someone/esm2_tiny"
        for path in repository.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                assert path.suffix in (".json", ".safetensors", ".txt")
                (tmp_path / "snapshot").mkdir(exist_ok=True)
                shutil.copy(path, tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert "someone/esm2_tiny" in import_model("someone/esm2_tiny", tmp_path / "out")
    same(weights(tmp_path / "out"), weights(published))


# Continuing from it


def test_a_run_starts_from_the_imported_weights_and_resumes_without_them(
    published: Path, tmp_path: Path, tiny: Callable[..., Path], fit: Callable[..., int], capfd: pytest.CaptureFixture
) -> None:
    import_model(str(published), tmp_path / "imported")
    overlay = shutil.copy(tmp_path / "imported" / "fit.yaml", tmp_path / "kept.yaml")
    arguments = ("-c", tiny(trainer__max_steps=4, checkpoint__every_n_steps=2), "-c", overlay)
    assert fit(*arguments, "--run", tmp_path / "whole") == 0
    assert fit(*arguments, "--run", tmp_path / "parts", "--trainer.max_steps", 2) == 0
    shutil.rmtree(tmp_path / "imported")
    assert fit(*arguments, "--run", tmp_path / "parts", "--allow_change", "true") == 0
    whole, parts = (read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    same(parts["state_dict"], whole["state_dict"])
    start = pretrain.load(published).state_dict()
    changed = {name: (whole["state_dict"][f"encoder.{name}"] - tensor).abs().max() for name, tensor in start.items()}
    assert 0 < max(changed.values()) < 0.1  # moved by four steps of 1e-2 at most, not drawn anew
    other = ("--run", tmp_path / "parts", "--model.initialize_from", tmp_path / "other", "--allow_change", "true")
    assert main(["fit", *map(str, (*arguments, *other))]) == 2
    assert "model.initialize_from" in capfd.readouterr().err


def test_the_overlay_names_absolute_places_and_the_whole_shape(published: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    import_model(str(published), Path("imported"))
    settings = yaml.safe_load((tmp_path / "imported" / "fit.yaml").read_text())
    assert settings["model"]["initialize_from"] == str(tmp_path / "imported")
    (tmp_path / "imported" / "model.safetensors").unlink()  # a plan needs no weights
    assert main(["plan", "-c", "quickstart", "-c", str(tmp_path / "imported" / "fit.yaml")]) == 0
    assert settings["data"]["tokenizer"] == "esm"
    assert EncoderConfig(**settings["model"]["encoder"]) == SHAPE


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("--model.encoder.num_hidden_layers", 2), "num_hidden_layers 3, model.encoder has 2"),
        (("--model.encoder.token_dropout", "false"), "token_dropout True, model.encoder has False"),
        (("--model.encoder.rope_theta", 500), "rope_theta 10000.0, model.encoder has 500.0"),
        (("--model.initialize_from", "nowhere"), "nowhere has no config.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_another_shape_is_refused_before_anything_is_written(
    override: tuple[object, ...],
    said: str,
    published: Path,
    tmp_path: Path,
    tiny: Callable[..., Path],
    capfd: pytest.CaptureFixture,
) -> None:
    import_model(str(published), tmp_path / "imported")
    arguments = ("-c", tiny(), "-c", tmp_path / "imported" / "fit.yaml", "--run", tmp_path / "run", *override)
    assert main(["fit", *map(str, arguments)]) == 2
    assert said in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


# Mistakes leave nothing


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_tokenizer(directory: Path) -> None:
    (directory / "vocab.txt").unlink()
    rewrite(directory / "config.json", vocab_list=None)


DAMAGES = {
    "no tokenizer": (without_tokenizer, "has no tokenizer"),
    "another alphabet": (
        lambda d: (d / "vocab.txt").write_text("\n".join(sorted(ESM_ALPHABET))),
        "not ESM's 33 in ESM's order",
    ),
    "a padded vocabulary": (lambda d: rewrite(d / "config.json", vocab_size=64), "vocab_size 64, its tokenizer 33"),
    "another padding id": (lambda d: rewrite(d / "config.json", pad_token_id=0), "pad_token_id 0, its tokenizer 1"),
    "another mask token": (
        lambda d: rewrite(d / "tokenizer_config.json", mask_token="X"),
        "mask_token is 'X'; only '<mask>'",
    ),
    "another model": (lambda d: rewrite(d / "config.json", model_type="bert"), "model_type is 'bert'"),
    "a length in words": (
        lambda d: rewrite(d / "config.json", max_position_embeddings="66"),
        "max_position_embeddings is '66' in the model's config; a whole number from 5 on is needed",
    ),
    "no length": (lambda d: rewrite(d / "config.json", max_position_embeddings=2), "max_position_embeddings is 2"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: not found"),
    "pickled weights": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "has no model.safetensors; save the model with save_pretrained (pickled weights are not read)",
    ),
    "fewer layers": (lambda d: rewrite(d / "config.json", num_hidden_layers=2), "tensors of 3 layers"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_brought_is_refused_in_one_line(
    damage: str, copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    change, said = DAMAGES[damage]
    change(copy)
    (tmp_path / "place").mkdir()
    assert main(["import", str(copy), "--out", str(tmp_path / "place" / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("pretrain: error: ")
    assert said in line
    assert list((tmp_path / "place").iterdir()) == []
    if "length" in damage:
        with pytest.raises(UserError, match="max_position_embeddings is"):
            pretrain.load(copy)


@pytest.mark.parametrize("name", ["someone/no-such-model", "/no/such/place", "./no-such-place", "a/b/c"])
def test_an_unknown_name_is_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Offline, as the tests are: nothing can be asked."""
    assert main(["import", name, "--out", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"pretrain: error: {name}: no such directory")


def test_an_existing_directory_is_left_alone(published: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(["import", str(published), "--out", str(tmp_path / "out")]) == 2
    assert "exists already" in capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]

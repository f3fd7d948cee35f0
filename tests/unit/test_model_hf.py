"""To and from transformers: nothing lost, nothing computed, nothing misread."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM

import pretrain
from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.hf import from_hf, from_hf_config, to_hf, to_hf_config

CONFIG = EncoderConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
MODEL_LEVEL = "esm.rotary_embeddings.inv_freq"
PER_LAYER = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"


def esm(**changes: object) -> dict[str, object]:
    """A published ESM-2 model's config.json (facebook/esm2_t6_8M_UR50D), with changes."""
    config = {
        "architectures": ["EsmForMaskedLM"],
        "emb_layer_norm_before": False,
        "hidden_act": "gelu",
        "hidden_size": 320,
        "intermediate_size": 1280,
        "is_folding_model": False,
        "layer_norm_eps": 1e-05,
        "mask_token_id": 32,
        "max_position_embeddings": 1026,
        "model_type": "esm",
        "num_attention_heads": 20,
        "num_hidden_layers": 6,
        "pad_token_id": 1,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "vocab_size": 33,
    }
    return {**config, **changes}


def randomised(config: EncoderConfig = CONFIG) -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder(config)
    for parameter in encoder.parameters():
        parameter.data.normal_(0, 0.2)
    return encoder.eval()


def saved(encoder: Encoder, out: Path, old_names: bool = False) -> None:
    """The encoder as a directory that transformers wrote."""
    model = EsmForMaskedLM(EsmConfig(**to_hf_config(encoder.config)))
    model.load_state_dict(to_hf(encoder.state_dict()), strict=False)
    model.eval().save_pretrained(out, save_original_format=old_names)


def rewritten(out: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Change the tensors of a saved model."""
    state = load_file(out / "model.safetensors")
    save_file(change(state), out / "model.safetensors", metadata={"format": "pt"})


def logits(encoder: Encoder) -> Tensor:
    input_ids = torch.tensor([0, 5, 32, 7, 8, 9, 32, 2])
    with torch.no_grad():
        return encoder(input_ids, torch.tensor([0, 8], dtype=torch.int32))


def test_a_state_dict_comes_back_from_transformers_names_bit_for_bit() -> None:
    state = randomised().state_dict()
    back = from_hf(to_hf(state), CONFIG)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in state.items())


def test_transformers_has_a_place_for_every_tensor_and_no_parameter_of_its_own_but_the_contact_head() -> None:
    theirs = EsmForMaskedLM(EsmConfig(**to_hf_config(CONFIG))).state_dict()
    ours = to_hf(randomised().state_dict())
    assert {name for name in theirs if "contact_head" not in name} == set(ours)
    assert all(theirs[name].shape == tensor.shape for name, tensor in ours.items())


def test_a_config_comes_back_from_transformers_names_unchanged() -> None:
    config = EncoderConfig(16, 3, 2, 24, 40, 3, 7, False, 1e-6, 500.0, 0.05)
    assert from_hf_config(EsmConfig(**to_hf_config(config)).to_dict()) == config


def test_a_published_config_is_its_named_size() -> None:
    assert from_hf_config(esm()) == EncoderConfig.named("8M")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"position_embedding_type": None}, "position_embedding_type is None"),
        ({"emb_layer_norm_before": True}, "emb_layer_norm_before is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"token_dropout": None}, "token_dropout"),
        ({"layer_norm_eps": None}, "layer_norm_eps"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_a_config_of_another_function_is_refused_by_name(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        from_hf_config(esm(**change))
    assert "\n" not in str(raised.value)


def test_a_missing_tensor_is_refused_by_name() -> None:
    state = to_hf(randomised().state_dict())
    for name in (
        "esm.encoder.layer.1.attention.self.key.bias",
        "lm_head.layer_norm.weight",
        "esm.encoder.layer.0.LayerNorm.bias",
    ):
        with pytest.raises(UserError, match=name):
            from_hf({key: value for key, value in state.items() if key != name}, CONFIG)


def test_heads_without_use_are_left_out() -> None:
    state = randomised().state_dict()
    extra = {"esm.contact_head.regression.weight": torch.zeros(1, 4), "esm.pooler.dense.weight": torch.zeros(24, 24)}
    assert from_hf({**to_hf(state), **extra}, CONFIG).keys() == state.keys()


def test_stored_rotary_frequencies_are_kept() -> None:
    """Converted ESM-2 models carry frequencies rounded to fp16: they belong to the function."""
    state = to_hf(randomised().state_dict())
    rounded = state.pop(MODEL_LEVEL).half().float()
    assert not torch.equal(rounded, Encoder(CONFIG).inv_freq)
    assert torch.equal(from_hf({**state, MODEL_LEVEL: rounded}, CONFIG)["inv_freq"], rounded)
    per_layer = {PER_LAYER.format(layer): rounded for layer in range(2)}
    assert torch.equal(from_hf({**state, **per_layer}, CONFIG)["inv_freq"], rounded)
    both = {MODEL_LEVEL: 2 * rounded, **state, **per_layer}
    assert torch.equal(from_hf(both, CONFIG)["inv_freq"], 2 * rounded)  # the newer name wins
    assert "inv_freq" not in from_hf(state, CONFIG)


@pytest.mark.parametrize("place", ["model", "layer", "nowhere"])
def test_load_computes_what_transformers_computes_with_the_same_file(tmp_path: Path, place: str) -> None:
    saved(randomised(), tmp_path)

    def move(state: dict[str, Tensor]) -> dict[str, Tensor]:
        inv_freq = 1.3 * state.pop(MODEL_LEVEL)
        names = {"model": [MODEL_LEVEL], "layer": [PER_LAYER.format(layer) for layer in range(2)], "nowhere": []}[place]
        return {**state, **{name: inv_freq.clone() for name in names}}

    rewritten(tmp_path, move)
    ours = logits(pretrain.load(tmp_path))
    assert (ours - logits(randomised())).abs().max() > 1e-3 or place == "nowhere"
    reference = EsmForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = reference(torch.tensor([[0, 5, 32, 7, 8, 9, 32, 2]])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_saved_under_transformers_older_names_loads(tmp_path: Path) -> None:
    """What ``save_pretrained`` does by default with a model that was built, not loaded (transformers 5)."""
    encoder = randomised()
    encoder.inv_freq *= 1.3  # not what a model without stored frequencies would compute
    saved(encoder, tmp_path, old_names=True)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert PER_LAYER.format("*") in names
    assert "esm.encoder.layer.0.LayerNorm.gamma" in names
    loaded = pretrain.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in encoder.state_dict().items())


def test_weights_stored_in_half_precision_load_as_fp32(tmp_path: Path) -> None:
    encoder = randomised()
    saved(encoder, tmp_path)
    rewritten(tmp_path, lambda state: {name: tensor.half() for name, tensor in state.items()})
    loaded = pretrain.load(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    assert torch.equal(loaded.head.dense.weight, encoder.head.dense.weight.half().float())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda out: (out / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda out: (out / "model.safetensors").write_bytes(b"\x10" * 100), "damaged model"),
        (lambda out: (out / "config.json").write_text("{"), "damaged model"),
        (lambda out: (out / "config.json").write_text(json.dumps({"model_type": "bert"})), "model_type is 'bert'"),
        (lambda out: rewritten(out, lambda state: dict(list(state.items())[:-3])), "has no tensor"),
        (lambda out: rewritten(out, lambda state: {**state, "lm_head.bias": torch.zeros(34)}), "head.bias"),
    ],
    ids=["no weights", "garbage", "no JSON", "another model", "missing tensors", "another shape"],
)
def test_a_damaged_directory_is_refused_in_one_line(tmp_path: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    saved(randomised(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said) as raised:
        pretrain.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_initial_weights_are_those_of_bert() -> None:
    """Normal with deviation 0.02, biases zero, layer norms one, the padding embedding zero."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4))
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            parameter = parameter.detach()
            values = (
                parameter[[i for i in range(len(parameter)) if i != 1]] if name == "embedding.weight" else parameter
            )
            # Thousands of draws: the sample's deviation lies within 5 % of 0.02, its mean within 0.001 of zero.
            assert abs(float(values.std()) - 0.02) < 0.001, name
            assert abs(float(values.mean())) < 0.001, name
    assert not encoder.embedding.weight[1].any()


def test_the_padding_embedding_of_another_vocabulary_is_zero() -> None:
    encoder = Encoder(EncoderConfig(8, 1, 2, vocab_size=50, pad_token_id=7, initializer_range=0.5))
    assert not encoder.embedding.weight[7].any()
    assert encoder.embedding.weight[1].all()
    assert 0.4 < encoder.blocks[0].qkv.weight.std().item() < 0.6  # type: ignore[union-attr]

"""To and from transformers' ``EsmForMaskedLM``: the same tensors under other names, nothing computed."""

import re
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import UserError
from pretrain.model.config import DROPOUT, EncoderConfig
from pretrain.model.contacts import ContactRegression

_NAMES = {
    "embedding.weight": "esm.embeddings.word_embeddings.weight",
    "inv_freq": "esm.rotary_embeddings.inv_freq",
    "norm.weight": "esm.encoder.emb_layer_norm_after.weight",
    "norm.bias": "esm.encoder.emb_layer_norm_after.bias",
    "head.dense.weight": "lm_head.dense.weight",
    "head.dense.bias": "lm_head.dense.bias",
    "head.norm.weight": "lm_head.layer_norm.weight",
    "head.norm.bias": "lm_head.layer_norm.bias",
    "head.bias": "lm_head.bias",
}
_BLOCK_NAMES = {
    "attention_norm": "attention.LayerNorm",
    "out": "attention.output.dense",
    "ffn_norm": "LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
DECODER = "lm_head.decoder.weight"
"""The head's output matrix: the embedding, under a second name."""
CONTACT_WEIGHT, CONTACT_BIAS = (f"esm.contact_head.regression.{kind}" for kind in ("weight", "bias"))
_QKV = ("query", "key", "value")
_OLDER_NAMES = {
    r"^esm\.encoder\.layer\.[0*]\.attention\.self\.rotary_embeddings\.inv_freq$": _NAMES["inv_freq"],
    r"LayerNorm\.gamma$": "LayerNorm.weight",
    r"LayerNorm\.beta$": "LayerNorm.bias",
}
_NO_WEIGHT = r"\.attention\.self\.rotary_embeddings\.inv_freq$|\.position_ids$"
"""Further layers' copies of the frequencies, and a buffer of constants."""


def to_hf_config(config: EncoderConfig, **special: Any) -> dict[str, Any]:
    """Arguments of transformers' ``EsmConfig``; ``special`` adds what the encoder does not know (such as token ids)."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
        "mask_token_id": config.mask_token_id,
        "token_dropout": config.token_dropout,
        "layer_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,
        "initializer_range": config.initializer_range,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        **{name: getattr(config, name) for name in DROPOUT},
        **special,
    }


def from_hf_config(config: dict[str, Any]) -> EncoderConfig:
    """The encoder that computes what ``EsmForMaskedLM`` with this config computes.

    Raises:
        UserError: If the config describes another function than ESM-2's.
    """
    needed: dict[str, tuple[Any, ...]] = {
        "model_type": ("esm",),
        "position_embedding_type": ("rotary",),
        "emb_layer_norm_before": (False, None),
        "tie_word_embeddings": (True, None),
        "is_decoder": (False, None),
    }
    for name, allowed in needed.items():
        if (value := config.get(name)) not in allowed:
            raise UserError(
                f"{name} is {value!r} in the model's config; only ESM-2 models ({name} {allowed[0]!r}) can be read"
            )
    ours = {field: config[field] for field in EncoderConfig.__dataclass_fields__ if config.get(field) is not None}
    # Two have the same defaults here and there, dropout does not change the function; any other would be a guess.
    known = {"rope_theta", "initializer_range", *DROPOUT}
    if missing := EncoderConfig.__dataclass_fields__.keys() - ours.keys() - known:
        names = ", ".join(sorted(missing))
        raise UserError(f"{names} is missing in the model's config; give the config.json that was saved with it")
    try:
        return EncoderConfig(**ours)
    except TypeError as error:
        raise UserError(f"a size in the model's config is no number ({error}); give the one saved with it") from error


def max_length_of(config: dict[str, Any]) -> int | None:
    """Tokens of the longest sequences that a model takes, ``<cls>`` and ``<eos>`` included; None if it does not say.

    Raises:
        UserError: If it is no number, or too small for a single token between these.
    """
    name = "max_position_embeddings"  # transformers' ESM counts positions from the padding id on, hence the two
    value = config.get(name)
    if value is not None and (type(value) is not int or value < 5):
        raise UserError(f"{name} is {value!r} in the model's config; a whole number from 5 on is needed")
    return value and value - 2


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An `Encoder`'s state dict under transformers' names."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _NAMES:
            renamed[_NAMES[name]] = tensor
            continue
        _, layer, module, kind = name.split(".")
        prefix = f"esm.encoder.layer.{layer}"
        if module == "qkv":
            for part, piece in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"{prefix}.attention.self.{part}.{kind}"] = piece.contiguous()
        else:
            renamed[f"{prefix}.{_BLOCK_NAMES[module]}.{kind}"] = tensor
    renamed[DECODER] = renamed[_NAMES["embedding.weight"]]
    return renamed


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors under the names of a published ``EsmForMaskedLM``.

    Stored rotary frequencies are kept, also those that older versions stored once a layer: converted ESM-2 models
    carry rounded ones, which belong to the function. transformers 5 saves a model that it has not loaded under those
    older names, with a literal ``*`` for the layer and layer norms in TensorFlow's words: these are read, too. An
    ``EsmModel`` that was saved by itself lacks the prefix.
    """
    if not any(name.startswith("esm.") for name in state):
        state = {f"esm.{name}": tensor for name, tensor in state.items()}
    for pattern, name in _OLDER_NAMES.items():
        renamed = {re.sub(pattern, name, old): tensor for old, tensor in state.items()}
        state = {**renamed, **{new: tensor for new, tensor in state.items() if new in renamed}}
    return {name: tensor for name, tensor in state.items() if not re.search(_NO_WEIGHT, name)}


def from_hf(state: dict[str, Tensor], config: EncoderConfig) -> dict[str, Tensor]:
    """The reverse of `to_hf`, under any of the names that `published_names` knows.

    What an `Encoder` has no use for (pooler, contact head) is left out; see `contacts_from_hf`.

    Raises:
        UserError: If a tensor is missing, or one has no place in an encoder of this config.
    """
    state = published_names(state)
    embedding, decoder = state.get(_NAMES["embedding.weight"]), state.get(DECODER)
    if decoder is not None and embedding is not None and not torch.equal(decoder, embedding):
        raise UserError(f"the model's {DECODER} differs from its embedding; only tied models can be read")
    layer_names = re.compile(r"esm\.encoder\.layer\.(\d+)\.")
    deepest = max((int(match[1]) for name in state if (match := layer_names.match(name))), default=0)
    if deepest >= config.num_hidden_layers:
        raise UserError(
            f"the model has tensors of {deepest + 1} layers, its config says num_hidden_layers "
            f"{config.num_hidden_layers}; give the config.json that was saved with it"
        )
    ours: dict[str, Tensor] = {}
    try:
        for name, theirs in _NAMES.items():
            if name == "inv_freq" and theirs not in state:
                continue
            ours[name] = state[theirs]
        for layer in range(config.num_hidden_layers):
            theirs, mine = f"esm.encoder.layer.{layer}", f"blocks.{layer}"
            for kind in ("weight", "bias"):
                for name, module in _BLOCK_NAMES.items():
                    ours[f"{mine}.{name}.{kind}"] = state[f"{theirs}.{module}.{kind}"]
                parts = [state[f"{theirs}.attention.self.{part}.{kind}"] for part in _QKV]
                ours[f"{mine}.qkv.{kind}"] = torch.cat(parts)
    except KeyError as error:
        raise UserError(
            f"the model has no tensor {error}; a complete EsmForMaskedLM is needed (`pretrain import` gives a model "
            "without masked-LM head a new one)"
        ) from error
    return ours


def contacts_to_hf(contacts: ContactRegression) -> dict[str, Tensor]:
    """The tensors of transformers' contact head."""
    return {CONTACT_WEIGHT: contacts.weight[None].contiguous(), CONTACT_BIAS: contacts.bias[None].contiguous()}


def contacts_from_hf(state: dict[str, Tensor]) -> ContactRegression | None:
    """The reverse of `contacts_to_hf`, under any of the names that `published_names` knows.

    None if there is no contact head, or one of zeros, which is what `pretrain export` writes where none was fitted.
    """
    state = published_names(state)
    weight, bias = state.get(CONTACT_WEIGHT), state.get(CONTACT_BIAS)
    if weight is None or bias is None or not bool(weight.any()):
        return None
    return ContactRegression(weight.float().reshape(-1), bias.float().reshape(()))

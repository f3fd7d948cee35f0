"""What exports have in common: transformers' config, its files, and the proof that they compute the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from pretrain.corpus.tokenizer import ESM_ALPHABET, Tokenizer
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder
from pretrain.model.hf import contacts_to_hf, to_hf, to_hf_config

SHARD_SIZE = "5GB"
"""The largest safetensors file, as the Hub likes them."""
_LONGEST_PROBE = 256


def hf_config(encoder: Encoder, tokenizer: Tokenizer, max_length: int, **others: Any) -> Any:
    """An encoder's ``EsmConfig``; ``others`` are further arguments."""
    from transformers import EsmConfig

    special = {
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "max_position_embeddings": max_length + 2,  # transformers' ESM counts positions from the padding id on
        "vocab_list": list(tokenizer.tokens) if tokenizer.tokens == ESM_ALPHABET else None,
    }
    return EsmConfig(**to_hf_config(encoder.config, **special), **others)


def hf_state(encoder: Encoder, contacts: ContactRegression | None = None) -> dict[str, Tensor]:
    """The tensors of ``EsmForMaskedLM``; where no contact regression was fitted, zeros rather than a random one."""
    maps = encoder.config.num_hidden_layers * encoder.config.num_attention_heads
    contacts = contacts or ContactRegression(torch.zeros(maps), torch.zeros(()))
    return {**to_hf(encoder.state_dict()), **contacts_to_hf(contacts)}


def save_hf(model: Any, out: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, or its shards and their index, into the directory ``out``."""
    # Under the names that the model itself and every published ESM-2 have, not those of TensorFlow's times.
    with _without_bars():
        model.save_pretrained(out, save_original_format=False, max_shard_size=SHARD_SIZE)
    for file in out.glob("*.safetensors"):  # written for the owner alone: whoever may read the config may read it, too
        file.chmod((out / "config.json").stat().st_mode)


def load_hf(auto_class: Any, out: Path) -> Any:
    """The model of a directory, in eval mode, by a class of transformers'."""
    with _without_bars():
        return auto_class.from_pretrained(out).eval()


def probe(tokenizer: Tokenizer, max_length: int) -> Int[Tensor, " T"]:
    """A random sequence to compare models on, the same each time; a seventh of it is masked."""
    generator = torch.Generator().manual_seed(0)
    length = min(max_length, _LONGEST_PROBE)
    choice = torch.randint(len(tokenizer.replacement_ids), (length,), generator=generator)
    input_ids = torch.from_numpy(tokenizer.replacement_ids)[choice]
    input_ids[0], input_ids[-1] = tokenizer.cls_token_id, tokenizer.eos_token_id
    input_ids[5::7] = tokenizer.mask_token_id
    return input_ids


def check_equal(ours: Tensor, theirs: Tensor, what: str) -> float:
    """The largest difference.

    Raises:
        RuntimeError: If it is no rounding error.
    """
    difference = float((ours - theirs).abs().max())
    if not difference < 1e-3 * max(1.0, float(ours.abs().max())):
        raise RuntimeError(f"exported {what} differ from the run's by {difference}: this is a bug, please report it")
    return difference


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing progress bars of what takes a moment."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

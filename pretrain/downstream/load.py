"""`pretrain.load`: a trained encoder from a run, a checkpoint or a transformers directory."""

from pathlib import Path
from typing import Any

from pretrain.corpus.tokenizer import ESM_ALPHABET, ProteinTokenizer, Tokenizer, load_tokenizer, tokenizer_from_string
from pretrain.downstream.finetune.lora import merge_lora
from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.hf import from_hf_config
from pretrain.train.checkpoint import newest_checkpoint, read_checkpoint
from pretrain.train.pretrained import load_tensors, read_config, read_tensors
from pretrain.train.run import CHECKPOINTS, data_state


def load(path: str | Path) -> Encoder:
    """An `Encoder` in eval mode, on the CPU.

    Args:
        path: A run directory (its newest checkpoint), a ``.ckpt`` file, or a directory that transformers' or
            `pretrain export`'s ``save_pretrained`` wrote (``config.json`` and safetensors, in one file or in shards).

    Raises:
        UserError: If there is no model at ``path``, or one of another kind than ESM-2.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return _from_transformers(path)
    return encoder_of(checkpoint_of(path), path)


def checkpoint_of(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, or of a run's newest readable checkpoint."""
    if path.is_file():
        return read_checkpoint(path)
    if not path.exists():
        raise UserError(f"{path}: not found; give a run directory, a .ckpt file or a transformers directory")
    newest = newest_checkpoint(path / CHECKPOINTS)
    if newest is None:
        raise UserError(
            f"{path}: holds neither {CHECKPOINTS}/step-*.ckpt nor config.json; give a run or a transformers directory"
        )
    return newest[1]


def tokenizer_of(path: str | Path) -> Tokenizer | None:
    """The tokenizer that a model was trained with, where that is on record: a run's, or a transformers directory's.

    Raises:
        UserError: If there is no model at ``path``, or its vocabulary is one that cannot be read.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        state = data_state(checkpoint_of(path))
        return tokenizer_from_string(state["tokenizer"], str(path)) if state else None
    if (path / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(path)
        return ProteinTokenizer() if tokenizer.tokens == ESM_ALPHABET else tokenizer
    if (path / "vocab.txt").is_file():
        tokens = tuple((path / "vocab.txt").read_text(encoding="utf-8", errors="replace").split())
        if tokens != ESM_ALPHABET:
            raise UserError(
                f"{path / 'vocab.txt'}: {len(tokens)} tokens, and not ESM's 33 in ESM's order: another alphabet; give "
                "a model with that one, or with a tokenizer.json"
            )
        return ProteinTokenizer()
    return None


def encoder_of(checkpoint: dict[str, Any], source: Path) -> Encoder:
    """The encoder of a checkpoint, pre-trained or fine-tuned, in eval mode. ``source`` is named in errors."""
    try:
        encoder = Encoder(EncoderConfig(**checkpoint["hyper_parameters"]["encoder"]))
        prefix = "encoder."
        lora_scale = checkpoint["hyper_parameters"].get("fine_tuning", {}).get("lora_scale")
        state = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        encoder.load_state_dict(merge_lora(state, lora_scale))
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: the checkpoint is not one of a run ({reason})") from error
    return encoder.eval()


def _from_transformers(path: Path) -> Encoder:
    encoder = Encoder(from_hf_config(read_config(path)))
    load_tensors(encoder, read_tensors(path), path)
    return encoder.eval()

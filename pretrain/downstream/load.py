"""`pretrain.load`: a trained encoder from a run, a checkpoint or a transformers directory."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from pretrain.corpus.sources import known_kind
from pretrain.corpus.tokenizer import Tokenizer, tokenizer_from_string
from pretrain.downstream.finetune.lora import merge_lora
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.tokenizer_files import check_special_tokens, read_tokenizer
from pretrain.errors import UserError, one_line
from pretrain.model.allocator import keep_freed_memory
from pretrain.model.config import EncoderConfig
from pretrain.model.hf import contacts_from_hf, from_hf_config, max_length_of
from pretrain.train.changes import read_config as read_settings
from pretrain.train.checkpoint import BEST, CHECKPOINTS, contacts_in, data_state, newest_checkpoint, read_checkpoint
from pretrain.train.divided import assemble
from pretrain.train.pretrained import HF_CONFIG, load_tensors, read_config, read_tensors
from pretrain.train.run import CONFIG
from pretrain.train.spikes import of_history, read_skips


def load(path: str | Path) -> PretrainedEncoder:
    """An `Encoder` in eval mode, on the CPU, with its tokenizer: it takes packed ids, and `embed` takes strings.

    Args:
        path: A run directory (its newest checkpoint; of a fine-tuning run the best, or the newest where nothing was
            validated), a ``.ckpt`` file, or a directory that transformers' or `pretrain export`'s ``save_pretrained``
            wrote (``config.json`` and safetensors, in one file or in shards).

    Raises:
        UserError: If there is no model at ``path``, or one of another kind than ESM-2.
    """
    path = Path(path)
    if (path / HF_CONFIG).is_file():
        stored, tensors = read_config(path), read_tensors(path)
        config = from_hf_config(stored)
        config.check_size(sum(tensor.numel() for tensor in tensors.values()))
        if not any(name.startswith("lm_head.") for name in tensors):
            kinds = stored.get("architectures")
            raise UserError(
                f"{path}: is {kinds[0] if isinstance(kinds, list) and kinds else 'a model'} without masked-LM head; "
                "give the run that it was exported from, or the pre-trained model (`pretrain import` gives a model "
                "without head a new one)"
            )
        model = PretrainedEncoder(config, partial(_tokenizer_of_directory, path), max_length_of(stored))
        load_tensors(model, tensors, path)
        if contacts := contacts_from_hf(tensors):
            contacts.check(config, str(path))
            model.contacts = contacts
        return model.eval()
    return encoder_of(checkpoint_of(path), path)


def load_masked_lm(path: Path) -> PretrainedEncoder:
    """As `load`, for what the masked-LM head says.

    Raises:
        UserError: Also if the model was fine-tuned, by which the head is left behind.
    """
    model = load(path)
    if model.fine_tuned:
        settings = settings_of(path).get("model", {})
        start = None if settings.get("from_scratch") else settings.get("initialize_from")
        raise UserError(
            f"{path}: was fine-tuned: its masked-LM head no longer fits; give the pre-trained model"
            + (f" ({start})" if start else "")
        )
    return model


def _tokenizer_of_directory(path: Path) -> Tokenizer:
    stored = read_config(path)
    tokenizer = read_tokenizer(path, stored)
    check_special_tokens(path, from_hf_config(stored), tokenizer)
    return tokenizer


def _tokenizer_of_run(serialized: str | None, source: str) -> Tokenizer:
    if serialized is None:
        raise UserError(f"{source}: trained without MLMDataModule, so it holds no tokenizer; give it ids instead")
    return tokenizer_from_string(serialized, source)


def settings_of(path: Path) -> dict[str, Any]:
    """The settings of a run, or of a checkpoint's run; empty for what is none."""
    config = (path if path.is_dir() else path.absolute().parent.parent) / CONFIG
    return read_settings(config) if config.is_file() else {}


def checkpoint_of(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, or of a run's newest readable one that it has not taken back.

    Of a fine-tuning run it is the best, where one was validated.
    """
    checkpoint = _read(path)
    return {**checkpoint, "state_dict": assemble(checkpoint["state_dict"])}


def _read(path: Path) -> dict[str, Any]:
    if path.is_file() and (kind := known_kind(path.name)):
        raise UserError(f"{path}: is a file of sequences ({kind}), no model; the model is named first")
    if path.is_file():
        return read_checkpoint(path)
    if not path.exists():
        raise UserError(f"{path}: not found; give a run directory, a .ckpt file or a transformers directory")
    skips = read_skips(path)
    usable = of_history(skips)
    newest = newest_checkpoint(path / CHECKPOINTS, usable)
    if newest is None and skips:
        raise UserError(f"{path}: goes back to its first step after a loss spike; continue it first")
    if newest is None:
        raise UserError(
            f"{path}: holds neither {CHECKPOINTS}/step-*.ckpt nor config.json; give a run or a transformers directory"
        )
    file, checkpoint, _ = newest
    best = path / CHECKPOINTS / BEST
    if is_fine_tuned(checkpoint) and best.exists() and not best.samefile(file):
        found = read_checkpoint(best)
        return found if usable(found) else checkpoint
    return checkpoint


def is_fine_tuned(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint is one of a fine-tuning run."""
    return "fine_tuning" in checkpoint.get("hyper_parameters", {})


def encoder_of(checkpoint: dict[str, Any], source: Path) -> PretrainedEncoder:
    """The encoder of a checkpoint, pre-trained or fine-tuned, in eval mode. ``source`` is named in errors."""
    data = data_state(checkpoint) or {}
    find_tokenizer = partial(_tokenizer_of_run, data.get("tokenizer"), str(source))
    try:
        config = EncoderConfig(**checkpoint["hyper_parameters"]["encoder"])
        config.check_size(sum(value.numel() for value in checkpoint["state_dict"].values()))
        encoder = PretrainedEncoder(config, find_tokenizer, data.get("max_length"))
        prefix = "encoder."
        lora_scale = checkpoint["hyper_parameters"].get("fine_tuning", {}).get("lora_scale")
        state = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        encoder.load_state_dict(merge_lora(state, lora_scale))
        encoder.fine_tuned = is_fine_tuned(checkpoint)
        if contacts := contacts_in(checkpoint):
            contacts.check(config, str(source))
            encoder.contacts = contacts
            encoder.contacts_are_older = checkpoint["global_step"] > 0
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source}: the checkpoint is not one of a run ({one_line(error, 200)})") from error
    return encoder.eval()


def use_device(name: str | None) -> torch.device:
    """The device that this process is to compute on, by its name, or a GPU if there is one.

    On a CPU the process keeps the memory that it frees from now on; see `keep_freed_memory`.

    Raises:
        UserError: If there is no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"device is '{name}'; give cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but PyTorch sees no GPU here; give --device cpu")
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    return device

"""`pretrain.load`: a trained encoder from a run, a checkpoint or a transformers directory."""

from pathlib import Path
from typing import Any

from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.model.hf import from_hf_config
from pretrain.train.checkpoint import newest_checkpoint, read_checkpoint
from pretrain.train.pretrained import load_tensors, read_config, read_tensors
from pretrain.train.run import CHECKPOINTS


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


def encoder_of(checkpoint: dict[str, Any], source: Path) -> Encoder:
    """The encoder of an `MLMModule` checkpoint, in eval mode. ``source`` is named in errors."""
    try:
        config = EncoderConfig(**checkpoint["hyper_parameters"]["encoder"])
        config.check_size(sum(value.numel() for value in checkpoint["state_dict"].values()))
        encoder = Encoder(config)
        prefix = "encoder."
        state = {
            name.removeprefix(prefix): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith(prefix)
        }
        encoder.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: the checkpoint is not one of an MLMModule ({reason})") from error
    return encoder.eval()


def _from_transformers(path: Path) -> Encoder:
    config, tensors = from_hf_config(read_config(path)), read_tensors(path)
    config.check_size(sum(tensor.numel() for tensor in tensors.values()))
    encoder = Encoder(config)
    load_tensors(encoder, tensors, path)
    return encoder.eval()

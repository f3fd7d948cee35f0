"""A transformers directory's encoder: what `pretrain.load` opens, and what a run may start from."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import UserError, one_line
from pretrain.model.config import DROPOUT
from pretrain.model.contacts import ContactRegression
from pretrain.model.encoder import Encoder
from pretrain.model.hf import contacts_from_hf, from_hf, from_hf_config

HF_CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``config.json``.

    Raises:
        UserError: If there is none, or it is no JSON object.
    """
    return read_json(directory / HF_CONFIG)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` lists.

    Raises:
        UserError: If there are neither, a shard is missing, or one is damaged. Pickled weights are never read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [WEIGHTS]
    if not (directory / WEIGHTS).is_file() and (directory / INDEX).is_file():
        shards = read_json(directory / INDEX).get("weight_map")
        if not isinstance(shards, dict) or any(not isinstance(f, str) or Path(f).name != f for f in shards.values()):
            raise UserError(f"{directory / INDEX}: damaged model (weight_map does not name files beside it)")
        files = sorted(set(shards.values()))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not (directory / file).is_file():
            raise UserError(
                f"{directory}: has no {file}; save the model with save_pretrained (pickled weights are not read)"
            )
        try:
            tensors.update(load_file(directory / file))
        except SafetensorError as error:
            raise UserError(f"{directory / file}: damaged model ({error})") from error
    return tensors


def load_tensors(encoder: Encoder, tensors: dict[str, Tensor], directory: Path) -> None:
    """Fill an encoder with tensors under transformers' names; ``directory`` is named in errors.

    Raises:
        UserError: If a tensor is missing, or has another shape than the encoder.
    """
    # Ours computes rotary frequencies where the file has none (transformers' older versions did the same).
    state = {"inv_freq": encoder.inv_freq, **from_hf(tensors, encoder.config)}
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{directory}: the tensors do not fit {HF_CONFIG} ({one_line(error)})") from error


def load_initial_weights(encoder: Encoder, directory: Path) -> ContactRegression | None:
    """Give an encoder a transformers directory's weights.

    Returns:
        The directory's contact head, if it has one.

    Raises:
        UserError: If there is no model, or it computes another function than the encoder's config says.
    """
    if not (directory / HF_CONFIG).is_file():
        raise UserError(
            f"model.initialize_from: {directory} has no {HF_CONFIG}; give a directory that `pretrain import` or "
            "save_pretrained wrote"
        )
    ours, theirs = asdict(encoder.config), asdict(from_hf_config(read_config(directory)))
    for name, value in ours.items():
        # Those have no say over weights that exist.
        if name not in ("initializer_range", *DROPOUT) and value != theirs[name]:
            raise UserError(
                f"model.initialize_from: {directory} has {name} {theirs[name]!r}, model.encoder has {value!r}; the "
                "fit.yaml that `pretrain import` writes sets them to agree"
            )
    tensors = read_tensors(directory)
    load_tensors(encoder, tensors, directory)
    return contacts_from_hf(tensors)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in one of the directory's files; a `UserError` if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError as error:
        raise UserError(f"{path}: not found; give a directory that save_pretrained wrote") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged model ({error})") from error
    return content

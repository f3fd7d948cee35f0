"""Pre-train ESM-style masked language models on protein or text sequences.

The names below are imported on first use, so that ``import pretrain`` costs nothing: neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Encoder": "pretrain.model.encoder",
    "EncoderConfig": "pretrain.model.config",
    "InverseSqrtScheduler": "pretrain.train.schedule",
    "MLMDataModule": "pretrain.corpus.datamodule",
    "MLMModule": "pretrain.train.module",
    "load": "pretrain.downstream.load",
}
__all__ = ["Encoder", "EncoderConfig", "InverseSqrtScheduler", "MLMDataModule", "MLMModule", "load"]

if TYPE_CHECKING:
    from pretrain.corpus.datamodule import MLMDataModule
    from pretrain.downstream.load import load
    from pretrain.model.config import EncoderConfig
    from pretrain.model.encoder import Encoder
    from pretrain.train.module import MLMModule
    from pretrain.train.schedule import InverseSqrtScheduler


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

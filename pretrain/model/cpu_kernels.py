"""Whose kernels compute on a CPU: torch's, or the project's own (`cpu_attention`, `cpu_linear`)."""

import importlib.util
import sys
from typing import Literal

import torch

from pretrain.errors import UserError

CPUKernels = Literal["auto", "torch", "LLVM"]
"""``LLVM`` are the project's own, and ``auto`` means those where they run."""

_LARGEST_HEAD = 128


def use_llvm(kernels: CPUKernels, head_size: int) -> bool:
    """Whether the project's own kernels are to be called on a CPU.

    Args:
        kernels: What is asked for.
        head_size: Dimensions of an attention head.

    Raises:
        UserError: If they are asked for by name and do not run here; with what is missing.
    """
    if kernels == "torch":
        return False
    missing = _missing(head_size)
    if missing and kernels == "LLVM":
        raise UserError(f"CPU kernels LLVM cannot be used: {missing}; or leave the choice: --model.cpu_kernels auto")
    return not missing


def _missing(head_size: int) -> str:
    if importlib.util.find_spec("llvmlite") is None:
        return "llvmlite, which compiles them, is not installed: pip install 'pretrain-mlm[cpu]'"
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "they need Linux and a CPU with AVX-512"
    if head_size > _LARGEST_HEAD:
        return f"heads of {head_size} dimensions are too large, {_LARGEST_HEAD} are the most"
    return ""

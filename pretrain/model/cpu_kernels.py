"""Whose kernels compute on a CPU: torch's, or the project's own (`cpu_linear`, `cpu_rotary`, `cpu_attention`)."""

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.errors import UserError, how_to_install

CPUKernels = Literal["auto", "torch", "LLVM"]
"""``LLVM`` are the project's own, and ``auto`` means those where they run and are faster."""

_LARGEST_HEAD = 128
_OLDEST_LLVMLITE = (0, 50)


class ByLLVM(NamedTuple):
    """What the project's own kernels are to compute on a CPU."""

    attention: bool
    products: bool


def by_llvm(kernels: CPUKernels, head_size: int) -> ByLLVM:
    """What the project's own kernels are to compute on a CPU.

    Torch leaves products to MKL, which is the faster one on Intel's CPUs, and does not use AVX-512 on others.

    Args:
        kernels: What is asked for.
        head_size: Dimensions of an attention head.

    Raises:
        UserError: If they are asked for by name and do not run here; see `require_llvm`.
    """
    if kernels == "LLVM":
        require_llvm(head_size)
        return ByLLVM(attention=True, products=True)
    runs = kernels == "auto" and not _missing(head_size)
    return ByLLVM(attention=runs, products=runs and not _of_intel())


def require_llvm(head_size: int) -> None:
    """Refuse the project's own kernels where they do not run.

    Raises:
        UserError: With what is missing.
    """
    if missing := _missing(head_size):
        raise UserError(f"CPU kernels LLVM cannot be used: {missing}; or leave the choice: --model.cpu_kernels auto")


def takes(*tensors: Tensor) -> bool:
    """Whether the project's own kernels can compute with these: plain ones, in float32 on a CPU, not being compiled.

    A subclass, such as a fake tensor or a divided one, has no memory to read from, or not all of it.
    """
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors
    )


def has_avx512() -> bool:
    """Whether torch uses AVX-512 here: the CPU has it, and ``ATEN_CPU_CAPABILITY`` asks for nothing older."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _of_intel() -> bool:
    return "GenuineIntel" in Path("/proc/cpuinfo").read_text()


def _missing(head_size: int) -> str:
    if importlib.util.find_spec("llvmlite") is None:
        return f"llvmlite, which compiles them, is not installed: {how_to_install('cpu')}"
    if tuple(map(int, version("llvmlite").split(".")[:2])) < _OLDEST_LLVMLITE:
        return f"llvmlite {version('llvmlite')} is too old: {how_to_install('cpu')}"
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "they need Linux and a CPU with AVX2"
    if head_size > _LARGEST_HEAD:
        return f"heads of {head_size} dimensions are too large, {_LARGEST_HEAD} are the most"
    return ""

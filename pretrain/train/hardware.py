"""Whether the machine can run what is asked of it, before anything is written; and what to do when it cannot."""

import importlib.util
from typing import Any

import pytorch_lightning as pl
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from pretrain.corpus.packed import PackedDataModule
from pretrain.errors import UserError, one_line
from pretrain.model.attention import NO_DROPOUT, activate_flash_attention
from pretrain.model.cpu_kernels import require_llvm
from pretrain.train.step import StepModule

_OLDEST_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16, and with the flash kernels behind varlen_attn


def check_hardware(trainer: pl.Trainer, module: StepModule, data: PackedDataModule) -> None:
    """Refuse what could only fail later, or run slowly without a word.

    Raises:
        UserError: With what the machine has, what is needed and what to do.
    """
    if module.compile_blocks and not data.static_shapes:
        raise UserError(
            "model.compile needs packs of the same shape in every step, or each new shape is compiled anew; "
            "add --data.static_shapes true (configs/compile.yaml sets both)"
        )
    if trainer.precision not in ("32-true", "bf16-mixed"):
        # In 16 bits a small update of a weight is lost; and float16 needs gradients in a scale of their own, under
        # which they would be clipped by another norm.
        raise UserError(other_precision(trainer.precision))
    device = trainer.strategy.root_device
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"the accelerator is {device.type}, which has neither attention over packs nor float64; give "
            "--trainer.accelerator cpu, or train on an NVIDIA GPU"
        )
    if device.type == "cpu":
        if module.flash_attention != "FA2":
            raise UserError(
                f"model.flash_attention is {module.flash_attention}, whose kernels are for GPUs; leave it out on a CPU"
            )
        if module.cpu_kernels == "LLVM":
            _check_cpu_kernels(trainer, module)
        return
    if module.cpu_kernels == "LLVM":
        raise UserError("model.cpu_kernels is LLVM, whose kernels are for CPUs; leave it out on a GPU")
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        raise UserError(
            f"{name} has compute capability {'.'.join(map(str, capability))}; attention over packs and bfloat16 need "
            "8.0 (Ampere) or newer: choose another GPU, or --trainer.accelerator cpu"
        )
    if module.encoder.config.attention_probs_dropout_prob:
        raise UserError(f"{name}: {NO_DROPOUT}")
    if trainer.precision != "bf16-mixed":
        raise UserError(
            f"trainer.precision is {trainer.precision}; attention over packs on CUDA computes in bfloat16: "
            "add -c configs/gpu.yaml, or --trainer.precision bf16-mixed"
        )
    if importlib.util.find_spec("torch.nn.attention.varlen") is None or not _has_flash_attention():
        raise UserError(
            f"torch {torch.__version__} is built without varlen_attn or its flash kernels, which attention over packs "
            "needs on a GPU; install torch 2.11 or newer for CUDA from pytorch.org, or --trainer.accelerator cpu"
        )
    if module.flash_attention == "FA3" and capability != (9, 0):
        raise UserError(
            f"model.flash_attention is FA3, which is for GPUs of compute capability 9.0 (H100, H200); {name} has "
            f"{'.'.join(map(str, capability))}: leave it out"
        )
    if module.flash_attention == "FA3":
        activate_flash_attention("FA3")  # as `configure_model` will; here, nothing is written yet
    config = module.encoder.config
    if config.head_dim % 8 or config.head_dim > 256:
        raise UserError(
            f"model.encoder has heads of {config.head_dim} dimensions; on a GPU they must be a multiple of 8, at most "
            f"256: give another num_attention_heads (or hidden_size {config.hidden_size})"
        )


def other_precision(precision: object) -> str:
    """What to do about a precision that is not trained in."""
    return f"trainer.precision is {precision}; weights are kept in float32: give bf16-mixed, or 32-true (CPU)"


def _check_cpu_kernels(trainer: pl.Trainer, module: StepModule) -> None:
    config = module.encoder.config
    require_llvm(config.head_dim)
    if trainer.precision != "32-true" or config.attention_probs_dropout_prob:
        raise UserError(
            "model.cpu_kernels is LLVM, whose kernels compute in float32 and drop no attention weights; give "
            "--trainer.precision 32-true and attention_probs_dropout_prob 0, or leave it out"
        )
    if module.compile_blocks:
        raise UserError("model.cpu_kernels is LLVM, but model.compile leaves no kernels but torch's: give one of them")


def _has_flash_attention() -> bool:
    return bool(torch.backends.cuda.is_flash_attention_available())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out, in torch's allocator or in a library that asks for its own."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("CUDA" in text or "CUBLAS" in text)
        and ("out of memory" in text or "ALLOC_FAILED" in text)
    )


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether the machine's own memory ran out, in Python or in torch's allocator."""
    return isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)


def out_of_memory(trainer: pl.Trainer, module: StepModule, data: PackedDataModule) -> str:
    """What to do about a pack that the GPU cannot hold: only what is not done already, and works."""
    if not module.training:  # the Trainer itself has forgotten by now what it did
        return (
            f"a pack of about {data.validation_pack_tokens:,} tokens of the validation does not fit into the GPU's "
            "memory; give a smaller --data.validation_pack_tokens"
        )
    packs = trainer.world_size * trainer.accumulate_grad_batches
    remedies = []
    smallest = data.batch_warmup.first if data.batch_warmup else data.global_batch_tokens
    if 2 * packs * data.max_length <= smallest:
        remedies += [
            f"make packs smaller with --trainer.accumulate_grad_batches {2 * trainer.accumulate_grad_batches} (the "
            "step stays the same)"
        ]
    if not module.encoder.activation_checkpointing:
        remedies += ["add --model.activation_checkpointing true"]
    if trainer.world_size == 1:
        remedies += ["train on several GPUs, with -c configs/fsdp.yaml"]
    elif module.device_mesh is None:
        remedies += ["shard the model: -c configs/fsdp.yaml"]
    remedies += [f"give a smaller --data.max_length than {data.max_length}"] if not remedies else []
    return (
        f"a pack of about {data.global_batch_tokens // packs:,} tokens does not fit into the GPU's memory; "
        f"{', or '.join(remedies)}; `pretrain plan` says what fits"
    )


def compile_failure(error: BaseException) -> str | None:
    """Why ``torch.compile`` failed, if that is what an exception reports; in one line."""
    chain: list[Any] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    rooms = ("torch._dynamo", "torch._inductor", "triton")
    if not any(type(link).__module__.startswith(rooms) for link in chain):
        return None
    if any(isinstance(link, FailOnRecompileLimitHit) for link in chain):
        return "packs of too many different shapes"
    return one_line(error, 200)

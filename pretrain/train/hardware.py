"""Whether the machine can run what is asked of it, before anything is written; and what to do when it cannot."""

import pytorch_lightning as pl
import torch

from pretrain.corpus.packed import PackedDataModule
from pretrain.errors import UserError
from pretrain.model.attention import NO_DROPOUT
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
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        raise UserError(
            f"{name} has compute capability {'.'.join(map(str, capability))}; attention over packs and bfloat16 need "
            "8.0 (Ampere) or newer: choose another GPU, or --trainer.accelerator cpu"
        )
    if module.encoder.config.attention_probs_dropout_prob:
        raise UserError(f"{name}: {NO_DROPOUT}")
    if trainer.precision not in ("bf16-mixed", "bf16-true", "16-mixed", "16-true"):
        raise UserError(
            f"trainer.precision is {trainer.precision}; attention over packs on CUDA computes in bfloat16 or float16: "
            "add -c configs/gpu.yaml, or --trainer.precision bf16-mixed"
        )


def out_of_memory(trainer: pl.Trainer, data: PackedDataModule) -> str:
    """What to do about a pack that the GPU cannot hold."""
    packs = trainer.world_size * trainer.accumulate_grad_batches
    return (
        f"a pack of about {data.global_batch_tokens // packs:,} tokens does not fit into the GPU's memory; make packs "
        f"smaller with --trainer.accumulate_grad_batches {2 * trainer.accumulate_grad_batches} (the step stays the "
        "same), or add --model.activation_checkpointing true, or shard the model: -c configs/fsdp.yaml"
    )

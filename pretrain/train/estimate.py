"""The arithmetic of a run: tokens, FLOPs, memory and hours, and what makes one fit that does not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from pretrain.corpus.packing import BatchWarmup
from pretrain.train.memory import GIB, TrainingMemory
from pretrain.train.throughput import GPUS

_MOST_GPUS = 4096  # what is tried, when a model does not fit


@dataclass(frozen=True)
class Plan:
    """What a run does, and on what.

    Attributes:
        memory: What a GPU must hold.
        gpu: Its name in `GPUS`.
        mfu: Assumed share of its datasheet rate.
        max_steps: Optimizer steps of the run.
        step_tokens: Tokens of a step.
        accumulate_grad_batches: Packs of a step on each GPU.
        max_length: Tokens of the longest sequence.
        mean_length: Tokens of a sequence, for the cost of attention.
        batch_warmup: How the steps grow to ``step_tokens``, if they do.
    """

    memory: TrainingMemory
    gpu: str
    mfu: float
    max_steps: int
    step_tokens: int
    accumulate_grad_batches: int
    max_length: int
    mean_length: int
    batch_warmup: BatchWarmup | None = None

    @property
    def flops_per_token(self) -> float:
        """FLOPs of training per token, forward and backward, where every sequence has the mean length."""
        targets = np.array([self.memory.target_share * self.mean_length])
        return self.memory.encoder.config.training_flops([self.mean_length], targets) / self.mean_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        if self.batch_warmup:
            return self.batch_warmup.consumed(self.max_steps, self.step_tokens)
        return self.max_steps * self.step_tokens

    @property
    def pack_tokens(self) -> int:
        """Tokens of a pack, rounded up."""
        return -(-self.step_tokens // (self.memory.gpus * self.accumulate_grad_batches))

    @property
    def capacity(self) -> float:
        """Bytes of the GPU's memory."""
        return GPUS[self.gpu].memory * GIB

    @property
    def fits(self) -> bool:
        """Whether the GPU can hold what the config asks for."""
        return self.memory.total(self.pack_tokens) <= self.capacity

    @property
    def largest_pack(self) -> int:
        """Tokens in the largest pack that fits; 0 if none does."""
        return self.memory.largest_pack(self.capacity)

    @property
    def fewest_packs(self) -> int | None:
        """The smallest ``accumulate_grad_batches`` that fits; None if none does, or packs would be too small."""
        if not self.largest_pack:
            return None
        packs = -(-self.step_tokens // (self.memory.gpus * self.largest_pack))
        return packs if self.step_tokens >= packs * self.memory.gpus * self.max_length else None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together, at the assumed utilisation."""
        return self.memory.gpus * GPUS[self.gpu].bf16_flops * self.mfu / self.flops_per_token

    @property
    def hours(self) -> float:
        """Hours of the whole run."""
        return self.tokens / self.tokens_per_second / 3600

    def remedy(self) -> str:
        """What makes a run fit that does not, the least change first."""
        for options, other in self._alternatives():
            if packs := other.fewest_packs:
                gpus = other.memory.gpus
                too_many = gpus * self.accumulate_grad_batches * self.max_length > self.step_tokens
                if too_many or packs > self.accumulate_grad_batches:
                    options = [*options, f"--trainer.accumulate_grad_batches {packs}"]
                return " ".join(options) + (f" on {gpus:,} GPUs" if gpus > self.memory.gpus else "")
        return f"a GPU with more memory, or a larger data.global_batch_tokens: not even {_MOST_GPUS:,} GPUs are enough"

    def _alternatives(self) -> Iterator[tuple[list[str], "Plan"]]:
        recompute, shard = "--model.activation_checkpointing true", "-c configs/fsdp.yaml"
        yield [], self
        yield [recompute], replace(self, memory=replace(self.memory, activation_checkpointing=True))
        if self.memory.gpus > 1:
            sharded = replace(self.memory, sharded=True)
            yield [shard], replace(self, memory=sharded)
            yield [shard, recompute], replace(self, memory=replace(sharded, activation_checkpointing=True))
        gpus = 2 * self.memory.gpus
        while gpus <= _MOST_GPUS:
            memory = replace(self.memory, gpus=gpus, sharded=True, activation_checkpointing=True)
            yield [shard, recompute], replace(self, memory=memory)
            gpus *= 2

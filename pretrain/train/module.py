"""`MLMModule`: the masked-language-model training step, in any ``pl.Trainer``."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.model.config import EncoderConfig
from pretrain.model.contacts import ContactRegression
from pretrain.model.cpu_kernels import CPUKernels
from pretrain.model.encoder import Encoder
from pretrain.train.checkpoint import CONTACTS, contacts_in
from pretrain.train.optim import build_optimizer
from pretrain.train.pretrained import load_initial_weights
from pretrain.train.schedule import InverseSqrtScheduler, Schedule, ShapedScheduler
from pretrain.train.step import StepModule
from pretrain.train.validation import Findings, Tally, prefixes


class MLMModule(StepModule):
    """An ESM-2 encoder, trained to predict masked tokens; by default with AdamW and an inverse-square-root schedule.

    The defaults are ESM-2's (Lin et al. 2023, supplementary A.2), with ESM-1b's schedule.

    Args:
        encoder: The encoder's shape.
        learning_rate: Peak learning rate.
        warmup_steps: Optimizer steps until the peak; not for a scheduler of torch's own, which starts as it is set to.
        warmup_init_lr: Learning rate before the first step.
        schedule: What follows the warmup; inverse square root if not given. `LinearDecay`, `CosineDecay`, `Constant`
            or `WarmupStableDecay`, which end with the run; or any of ``torch.optim.lr_scheduler`` that is made from an
            optimizer, stepped at every optimizer step. (``ReduceLROnPlateau`` is stepped at every validation.)
        optimizer: ``adamw``; or ``muon`` for the blocks' and the head's matrices, with AdamW for all else.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay.
        decay: What decays: ``all`` parameters, or the ``matrices`` only.
        scheduler_name: Name that the learning rate is logged under; Lightning's own (``lr-AdamW``) if not given.
        activation_checkpointing: Compute blocks again for their gradients rather than keep them: a third more work for
            a fraction of the memory.
        compile: Compile the blocks by ``torch.compile``; needs ``data.static_shapes``, or each new shape is compiled.
        flash_attention: Whose kernels attention on a GPU calls: ``FA2`` are torch's own; ``FA3`` those of the package
            ``flash_attn_interface``, for Hopper (H100, H200), where it is installed.
        cpu_kernels: Whose kernels compute matrix products and attention on a CPU: ``LLVM`` are the project's, for
            AVX-512 or AVX2 and float32, compiled at the start by llvmlite (the extra ``cpu``); ``auto`` means those
            where they run and are faster (products: not on Intel's CPUs), and torch's elsewhere.
        initialize_from: A directory with ``config.json`` and safetensors, as `pretrain import` or transformers'
            ``save_pretrained`` writes it, whose weights training starts from instead of random ones; its shape must be
            ``encoder``'s.

    Attributes:
        contacts: The contact regression of the model that training started from: not trained, only handed on.
        findings: What the last validation found, by the name of the set ("" where it has none).
        sample: The first pack of the last validation, and what was predicted at its targets.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        learning_rate: float = 4e-4,
        warmup_steps: int = 2000,
        warmup_init_lr: float = 0.0,
        schedule: Schedule | Callable[[Optimizer], LRScheduler] | None = None,
        optimizer: Literal["adamw", "muon"] = "adamw",
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decay: Literal["all", "matrices"] = "all",
        scheduler_name: str | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        flash_attention: Literal["FA2", "FA3"] = "FA2",
        cpu_kernels: CPUKernels = "auto",
        initialize_from: str | None = None,
    ) -> None:
        if isinstance(encoder, dict):  # from a checkpoint, by Lightning's load_from_checkpoint
            encoder = EncoderConfig(**encoder)
        super().__init__(Encoder(encoder), activation_checkpointing, compile, scheduler_name)
        self.flash_attention = flash_attention
        self.cpu_kernels = cpu_kernels
        self.initialized_from = initialize_from
        self.contacts: ContactRegression | None = None
        if initialize_from is not None:
            self.contacts = load_initial_weights(self.encoder, Path(initialize_from))
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.warmup_init_lr = warmup_init_lr
        self.schedule = schedule
        self.optimizer_name = optimizer
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.decay = decay
        # Plain values only, so that checkpoints load with weights_only=True: without the schedule, without the first
        # weights, which the checkpoint's take the place of, and without what says how it is computed, not what.
        self.hparams.update(
            encoder=asdict(encoder),
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            warmup_init_lr=warmup_init_lr,
            optimizer=optimizer,
            betas=tuple(betas),
            eps=eps,
            weight_decay=weight_decay,
            decay=decay,
            scheduler_name=scheduler_name,
        )
        self.findings: dict[str, Findings] = {}
        self.sample: tuple[Batch, Tensor] | None = None

    @override
    def build_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        settings = (self.learning_rate, self.betas, self.eps, self.weight_decay, self.decay)
        optimizer = build_optimizer(self, self.optimizer_name, *settings)
        warmup, begin = self.warmup_steps, self.warmup_init_lr
        if self.schedule is None:
            return optimizer, InverseSqrtScheduler(optimizer, warmup, warmup_init_lr=begin)
        if isinstance(self.schedule, Schedule):
            total = self.max_steps or 0
            return optimizer, ShapedScheduler(optimizer, self.schedule, warmup, total, warmup_init_lr=begin)
        return optimizer, self.schedule(optimizer)

    @override
    def batch_loss(self, batch: Batch) -> Tensor:
        return self.encoder.loss(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
        )

    @override
    def train_figures(self, loss: Tensor) -> dict[str, Tensor]:
        return {"train/loss": loss, "train/perplexity": loss.exp()}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the contact regression: where it came from may be gone by the time that it is exported."""
        if self.contacts is not None:
            checkpoint[CONTACTS] = {"weight": self.contacts.weight, "bias": self.contacts.bias}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.contacts = contacts_in(checkpoint)

    @override
    def on_validation_epoch_start(self) -> None:
        self._tallies: list[Tally] = []

    @override
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add up what is found in a pack of a validation set."""
        losses, predictions = self.encoder.score(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
        )
        if dataloader_idx == len(self._tallies):
            self._tallies.append(Tally(self.encoder.config.vocab_size))
        self._tallies[dataloader_idx].add(batch, losses, predictions)
        if batch_idx == dataloader_idx == 0:
            self.sample = batch, predictions

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the means over all targets of all processes: exact, however the packs were divided.

        Those of the first set are ``val/loss``, ...; where sets have names, ``val/<name>/loss``, ... of each.
        """
        given = getattr(self.trainer, "datamodule", None)
        data = given if isinstance(given, MLMDataModule) else None
        names = list(data.validation_sets) if data else ["", *map(str, range(1, len(self._tallies)))]
        self.findings = {name: tally.collect(self.trainer) for name, tally in zip(names, self._tallies, strict=True)}
        figures: dict[str, Any] = {}
        for number, (name, found) in enumerate(self.findings.items()):
            loss = found.loss
            values = {"loss": loss, "perplexity": loss.exp(), "accuracy": found.accuracy}
            for prefix in prefixes(name, first=number == 0):
                figures |= {f"{prefix}/{figure}": value for figure, value in values.items()}
        if data and isinstance(data.tokenizer, ProteinTokenizer):
            by_class = self.findings[names[0]].class_accuracies(data.tokenizer.tokens)
            figures |= {f"val/accuracy/{name}": value for name, value in by_class.items()}
        self.log_dict(figures)

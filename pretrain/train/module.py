"""`MLMModule`: the masked-language-model training step, in any ``pl.Trainer``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from pretrain.corpus.batch import Batch
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.train.optim import build_adamw
from pretrain.train.pretrained import load_initial_weights
from pretrain.train.schedule import InverseSqrtScheduler
from pretrain.train.sharding import shard


class MLMModule(pl.LightningModule):
    """An ESM-2 encoder, trained to predict masked tokens with AdamW and an inverse-square-root schedule.

    The defaults are ESM-2's (Lin et al. 2023, supplementary A.2), with ESM-1b's schedule.

    Args:
        encoder: The encoder's shape.
        learning_rate: Peak learning rate.
        warmup_steps: Optimizer steps until the peak.
        warmup_init_lr: Learning rate before the first step.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay.
        decay: What decays: ``all`` parameters, or the ``matrices`` only.
        scheduler_name: Name that the learning rate is logged under; Lightning's own (``lr-AdamW``) if not given.
        activation_checkpointing: See `Encoder`.
        compile: Compile the blocks by ``torch.compile``; needs ``data.static_shapes``, or each new shape is compiled.
        initialize_from: A directory with ``config.json`` and safetensors, as `pretrain import` or transformers'
            ``save_pretrained`` writes it, whose weights training starts from instead of random ones; its shape must be
            ``encoder``'s.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        learning_rate: float = 4e-4,
        warmup_steps: int = 2000,
        warmup_init_lr: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        decay: Literal["all", "matrices"] = "all",
        scheduler_name: str | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
        initialize_from: str | None = None,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(encoder)
        self.initialized_from = initialize_from
        if initialize_from is not None:
            load_initial_weights(self.encoder, Path(initialize_from))
        self.encoder.activation_checkpointing = activation_checkpointing
        self.compile_blocks = compile
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.warmup_init_lr = warmup_init_lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.decay = decay
        self.scheduler_name = scheduler_name
        # Plain values only, so that checkpoints load with weights_only=True. The encoder's shape is what a checkpoint
        # must tell to be loaded; the rest comes from the run's config.
        self.hparams["encoder"] = asdict(encoder)
        self._train_loss = _RunningLoss()
        self._validation_loss = _RunningLoss()
        self._grad_norm: Tensor | float = 0.0
        self.sick = torch.zeros(())  # 1 where the last step was skipped because its loss or gradient was not finite

    def configure_model(self) -> None:
        """Compile the blocks, if asked to; divide the encoder among the processes, where the strategy does so (FSDP2).

        Lightning may ask repeatedly. The blocks are alike, so one compilation a shape serves all but the last.
        """
        if self.compile_blocks:
            # A few shapes each for training and validation, with and without rows; beyond that, torch would quietly
            # run uncompiled.
            torch._dynamo.config.recompile_limit = 32
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            for block in self.encoder.blocks:
                block.compile(dynamic=False)
        if self.device_mesh is not None:
            shard(self.encoder, self.device_mesh, self.trainer.precision)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, and the schedule stepped at every optimizer step."""
        optimizer, scheduler = self._build_optimizer()
        # Without "interval": "step" Lightning steps a schedule once an epoch, and the learning rate looks frozen.
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": self.scheduler_name},
        }

    def _build_optimizer(self) -> tuple[AdamW, InverseSqrtScheduler]:
        optimizer = build_adamw(self, self.learning_rate, self.betas, self.eps, self.weight_decay, self.decay)
        return optimizer, InverseSqrtScheduler(optimizer, self.warmup_steps, warmup_init_lr=self.warmup_init_lr)

    def on_train_start(self) -> None:
        """Forget a window that an earlier run left unfinished: it is computed again from its start."""
        self._train_loss.reset()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the step's loss.

        Its sum over targets is divided by the targets of the *whole* step, so that the gradient does not depend on how
        the step was split; Lightning divides by the micro-batches and DDP by the processes, which is undone here.
        """
        loss, correct = self._loss(batch)
        self._train_loss.add(loss, correct, batch)
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
        # Zero, or NaN where the loss is NaN or infinite: then so is every gradient, on all processes, whatever the
        # backward pass makes of it, and the step is skipped.
        nothing = loss.detach() * 0
        return loss * (shares / max(1, batch.pack.step_targets) + nothing)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer is set to, and keep the norm of the whole gradient before clipping for the log."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._grad_norm = norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if gradient_clip_val and gradient_clip_algorithm == "value":
            clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self._skip_if_sick(optimizer)

    def _skip_if_sick(self, optimizer: Optimizer) -> None:
        """Keep NaN and infinity from weights and moments, without a look at the device.

        Fused optimizers leave everything as it is where ``found_inf`` is 1 (it is the gradient scaler's way in).
        """
        sick = 1.0 - torch.as_tensor(self._grad_norm).isfinite().float()
        if self.trainer.world_size > 1:  # the gradients are the same everywhere, but for a process's own faults
            sick = self.trainer.strategy.reduce(sick, reduce_op="max")
        self.sick = sick
        optimizer.found_inf = sick  # type: ignore[attr-defined]

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the step's figures, once, when its last micro-batch is done."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        loss, _ = self._train_loss.collect(self.trainer)
        after = batch.pack.after
        figures = {
            "train/loss": loss,
            "train/perplexity": loss.exp(),
            "train/grad_norm": self._grad_norm,
            "data/epoch": after.epochs,
            "data/tokens_seen": float(after.tokens),
        }
        self.log_dict(figures)

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._validation_loss.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up a validation pack's loss and its correct predictions."""
        loss, correct = self._loss(batch)
        self._validation_loss.add(loss, correct, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all targets of all processes: exact, however the packs were divided."""
        loss, accuracy = self._validation_loss.collect(self.trainer)
        self.log_dict({"val/loss": loss, "val/perplexity": loss.exp(), "val/accuracy": accuracy})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let training continue at the checkpoint's step, whatever the accumulation was, under this module's settings.

        Lightning restores counters of micro-batches, which mean something else when ``accumulate_grad_batches``
        differs, and counts a window that was cut short. They follow from the step. It also restores the optimizer's
        hyper-parameters over those that were configured; the configured ones win (whether a run may change them is not
        this module's business).
        """
        if "loops" in checkpoint:
            checkpoint["loops"]["fit_loop"] = _fit_loop_at(
                checkpoint["global_step"], self.trainer.accumulate_grad_batches, checkpoint["loops"]["fit_loop"]
            )
        if checkpoint.get("optimizer_states"):
            self._apply_settings(checkpoint)

    def _apply_settings(self, checkpoint: dict[str, Any]) -> None:
        optimizer, scheduler = self._build_optimizer()
        steps = checkpoint["lr_schedulers"][0]["last_epoch"]
        rates = [base * factor(steps) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        saved_groups = checkpoint["optimizer_states"][0]["param_groups"]
        for saved, group, rate in zip(saved_groups, optimizer.param_groups, rates, strict=True):
            saved.update({name: value for name, value in group.items() if name != "params"}, lr=rate)
        checkpoint["lr_schedulers"][0].update(base_lrs=scheduler.base_lrs, _last_lr=rates)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.encoder.loss(
            batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
        )


class _RunningLoss:
    """Sums of loss, correct predictions and targets, on the device, read once a step."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: Tensor | None = None
        self._targets = 0

    def add(self, loss: Tensor, correct: Tensor, batch: Batch) -> None:
        sums = torch.stack((loss.detach().double(), correct.double()))
        self._sums = sums if self._sums is None else self._sums + sums
        self._targets += batch.num_targets  # known without a look at the device

    def collect(self, trainer: pl.Trainer) -> tuple[Tensor, Tensor]:
        """Mean loss and accuracy over all targets of all processes; begins anew."""
        assert self._sums is not None
        sums = torch.cat((self._sums, self._sums.new_tensor([self._targets])))
        loss, correct, targets = trainer.strategy.reduce(sums, reduce_op="sum")
        self.reset()
        targets = targets.clamp(min=1)
        return (loss / targets).float(), (correct / targets).float()


def _fit_loop_at(step: int, accumulate_grad_batches: int, saved: dict[str, Any]) -> dict[str, Any]:
    """State of Lightning's fit loop after ``step`` steps: inside its one epoch, between two micro-batches.

    ``started`` is one behind, which is how Lightning tells that a validation that is due at this point was held before
    the checkpoint was written (it then counts the step, hence one less); the loops that are left out begin afresh.
    """
    batches = step * accumulate_grad_batches
    counts = {"ready": batches, "completed": batches, "started": batches - 1, "processed": batches}
    epoch = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
    progress = "epoch_loop.automatic_optimization.optim_progress"
    return {
        "state_dict": {},
        "epoch_progress": {"total": dict(epoch), "current": dict(epoch)},
        "epoch_loop.state_dict": {"_batches_that_stepped": step - 1},
        "epoch_loop.batch_progress": {"total": dict(counts), "current": dict(counts), "is_last_batch": False},
        progress: saved[progress],
    }

"""`StepModule`: what every training here does at an optimizer step, whatever its head and targets are."""

from abc import abstractmethod
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.counter import RandomStream, derive_key
from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.packing import Pack
from pretrain.errors import UserError
from pretrain.model.attention import activate_flash_attention
from pretrain.model.cpu_kernels import CPUKernels
from pretrain.model.encoder import Encoder
from pretrain.train.schedule import restore
from pretrain.train.sharding import shard
from pretrain.train.together import over_processes


class StepModule(pl.LightningModule):
    """An encoder in training: losses divided by the step's targets, exact logs, sick steps skipped, exact resume.

    A subclass says what the loss is (`batch_loss`), what optimises it (`build_optimizer`) and what is logged of it
    (`train_figures`).

    Args:
        encoder: What is trained.
        activation_checkpointing: Compute blocks again for their gradients rather than keep them: a third more work for
            a fraction of the memory.
        compile: Compile the encoder's blocks by ``torch.compile``.
        scheduler_name: Name that the learning rate is logged under; Lightning's own (``lr-AdamW``) if not given.

    Attributes:
        initialized_from: Where the weights are from that training starts with, if they are not random.
        max_steps: Optimizer steps of the run, for a schedule that ends with it; the Trainer's, once there is one.
        optimizer_name: Which optimizer `build_optimizer` builds, for checks of what goes with one only.
        flash_attention: Whose kernels attention on a GPU calls: ``FA2`` are torch's own.
        cpu_kernels: Whose kernels compute on a CPU: torch's, the project's own (``LLVM``), or the faster (``auto``).
        sick: 1 where the last step was skipped because its loss or gradient was not finite.
    """

    optimizer_name: Literal["adamw", "muon"] = "adamw"
    flash_attention: Literal["FA2", "FA3"] = "FA2"
    cpu_kernels: CPUKernels = "auto"

    def __init__(
        self, encoder: Encoder, activation_checkpointing: bool, compile: bool, scheduler_name: str | None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.activation_checkpointing = activation_checkpointing
        self.initialized_from: str | None = None
        self.compile_blocks = compile
        self.scheduler_name = scheduler_name
        self.max_steps: int | None = None
        self._train_loss = RunningLoss()
        self._grad_norm: Tensor | float = 0.0
        self.sick = torch.zeros(())

    @abstractmethod
    def batch_loss(self, batch: Batch) -> Tensor:
        """The loss summed over a batch's targets."""

    @abstractmethod
    def build_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        """A new optimizer over the module's parameters, and its schedule by the step."""

    def schedule_over(self, max_steps: int) -> LRScheduler:
        """The schedule of a run of so many steps, for a look at it: with an optimizer that trains nothing.

        Raises:
            UserError: If the optimizer or the schedule does not take its settings, or ends before the run does.
        """
        self.max_steps = max_steps
        try:
            scheduler = self.build_optimizer()[1]
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the optimizer or its schedule cannot be made ({error}); change this setting of the model, or see the "
                "documentation of model.schedule"
            ) from error
        if isinstance(scheduler, OneCycleLR) and scheduler.total_steps < max_steps:
            raise UserError(
                f"model.schedule is OneCycleLR over {scheduler.total_steps} steps, and cannot follow all of "
                f"trainer.max_steps {max_steps}; give --model.schedule.total_steps {max_steps}"
            )
        return scheduler

    def train_figures(self, loss: Tensor) -> dict[str, Tensor]:
        """What is logged of a step's mean loss."""
        return {"train/loss": loss}

    def flops(self, pack: Pack) -> float:
        """The model's floating-point operations, forward and backward, over a pack; once, where any are done again."""
        return self.encoder.config.training_flops(pack.lengths, pack.targets)

    @override
    def configure_model(self) -> None:
        """Compile the blocks, if asked to; divide the encoder among the processes, where the strategy does so (FSDP2).

        Lightning may ask repeatedly.
        """
        if self.flash_attention != "FA2":
            activate_flash_attention(self.flash_attention)
        self.encoder.use_cpu_kernels(self.cpu_kernels)
        if self.compile_blocks:
            compile_blocks(self.encoder, self.trainer.strategy.root_device)
        if self.device_mesh is not None:
            shard(self.encoder, self.device_mesh, self.trainer.precision)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer, and the schedule stepped at every optimizer step."""
        optimizer, scheduler = self._new_optimizer()
        # Without "interval": "step" Lightning steps a schedule once an epoch, and the learning rate looks frozen. As a
        # "reduce_on_plateau" it would step one at every micro-batch, with a validation long past.
        entry = {"scheduler": scheduler, "interval": "step", "name": self.scheduler_name, "reduce_on_plateau": False}
        return {"optimizer": optimizer, "lr_scheduler": entry}  # type: ignore[typeddict-item]

    def _new_optimizer(self) -> tuple[Optimizer, LRScheduler]:
        if self._trainer:
            self.max_steps = self._trainer.max_steps
        optimizer, scheduler = self.build_optimizer()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # which ReduceLROnPlateau alone does not note
        return optimizer, scheduler

    @override
    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        """Step the schedule; one that follows the validation loss waits for it."""
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    @override
    def on_validation_end(self) -> None:
        """Step a schedule that follows the validation loss."""
        scheduler = self.lr_schedulers()
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if isinstance(scheduler, ReduceLROnPlateau) and fitting:
            scheduler.step(float(self.trainer.callback_metrics["val/loss"]))

    @override
    def on_train_start(self) -> None:
        """Forget a window that an earlier run left unfinished: it is computed again from its start."""
        self._train_loss.reset()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The micro-batch's share of the step's loss.

        Its sum over targets is divided by the targets of the *whole* step, so that the gradient does not depend on how
        the step was split; Lightning divides by the micro-batches and DDP by the processes, which is undone here.
        """
        self._seed_dropout(batch_idx)
        loss = self.batch_loss(batch)
        self._train_loss.add(loss, batch)
        shares = self.trainer.accumulate_grad_batches * self.trainer.world_size
        # Zero, or NaN where the loss is NaN or infinite: then so is every gradient, on all processes, whatever the
        # backward pass makes of it, and the step is skipped.
        nothing = loss.detach() * 0
        return loss * (shares / max(1, batch.pack.step_targets) + nothing)

    def _seed_dropout(self, batch_idx: int) -> None:
        """Let what is dropped depend on seed, step, process and micro-batch only, not on what was drawn before.

        So a continued run drops the same. Torch draws it from its global generator, of which activation checkpointing
        keeps the state where a block is computed again.
        """
        if not self.encoder.config.drops:
            return
        data = getattr(self.trainer, "datamodule", None)
        seed = data.seed if isinstance(data, PackedDataModule) else 0
        place = self.trainer.global_step, self.trainer.global_rank, batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(int(derive_key(seed, RandomStream.DROPOUT, *place)[0]))

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=not self._in_buckets())

    @override
    def on_validation_model_zero_grad(self) -> None:
        self.zero_grad(set_to_none=not self._in_buckets())

    def _in_buckets(self) -> bool:
        """Whether gradients lie in DDP's buckets: until they are sent, those outside take as much memory once more."""
        strategy = self.trainer.strategy
        return isinstance(strategy, DDPStrategy) and bool(strategy._ddp_kwargs.get("gradient_as_bucket_view"))

    @override
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
        # The gradients are the same everywhere, but for a process's own faults.
        self.sick = sick = over_processes(self.trainer, sick, ReduceOp.MAX)
        optimizer.found_inf = sick  # type: ignore[attr-defined]

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        # A number stays on the host: Lightning would put it on the GPU, and wait for the GPU to take it.
        if isinstance(value, int | float):
            value = torch.tensor(float(value), dtype=torch.float64)  # in which tokens can be counted
        super().log(name, value, *args, **kwargs)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the step's figures, once, when its last micro-batch is done."""
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        loss = self._train_loss.collect(self.trainer)
        after = batch.pack.after
        figures = {
            **self.train_figures(loss),
            "train/grad_norm": self._grad_norm,
            "data/epoch": after.epochs,
            "data/tokens_seen": float(after.tokens),
        }
        self.log_dict(figures)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let training continue at the checkpoint's step, whatever the accumulation was, under this module's settings.

        Lightning restores counters of micro-batches, which mean something else when ``accumulate_grad_batches``
        differs, and counts a window that was cut short. They follow from the step. It also restores the optimizer's
        hyper-parameters over those that were configured; the configured ones win (whether a run may change them is not
        this module's business). Without a Trainer that fits, as in ``load_from_checkpoint``, nothing continues.
        """
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if "loops" in checkpoint:
            checkpoint["loops"]["fit_loop"] = _fit_loop_at(
                checkpoint["global_step"], self.trainer.accumulate_grad_batches, checkpoint["loops"]["fit_loop"]
            )
        if checkpoint.get("optimizer_states"):
            restore(checkpoint, *self._new_optimizer())


def compile_blocks(encoder: Encoder, device: torch.device, **options: Any) -> None:
    """Compile an encoder's blocks by ``torch.compile``; since they are alike, once a shape for all but the last.

    On a GPU it sets torch's number of threads on the CPU to 1.

    Args:
        encoder: Blocks are compiled when they first see a shape.
        device: Where it is trained.
        options: For ``torch.compile``.
    """
    # A few shapes each for training and validation, with and without rows; beyond that, torch would quietly run
    # uncompiled.
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Under DDP torch would cut each block into pieces, so that gradients are sent early; blocks do as pieces.
    torch._dynamo.config.optimize_ddp = False
    if device.type == "cuda":
        # A GPU's backward pass has a thread of its own, in which activation checkpointing calls the blocks again. There
        # torch has one thread for the CPU, since the loader's pinning thread has set it so for all that begin later.
        # Compiled code is for one number of these: with another it would be compiled again, up to the limit.
        torch.set_num_threads(1)
    for block in encoder.blocks:
        block.compile(dynamic=False, **options)


class RunningLoss:
    """Sums of loss and targets, on the device, read once a step."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._sum: Tensor | None = None
        self._targets = 0

    def add(self, loss: Tensor, batch: Batch) -> None:
        """Count a batch's summed loss."""
        loss = loss.detach().double()
        self._sum = loss if self._sum is None else self._sum + loss
        self._targets += int(batch.pack.targets.sum())  # known without a look at the device

    def collect(self, trainer: pl.Trainer) -> Tensor:
        """Mean loss over all targets of all processes; begins anew."""
        assert self._sum is not None
        # Filled on the device: to copy the number there would be to wait for the device.
        sums = torch.stack((self._sum, self._sum.new_full((), self._targets)))
        loss, targets = over_processes(trainer, sums, ReduceOp.SUM)
        self.reset()
        mean: Tensor = loss / targets.clamp(min=1)
        return mean.float()


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

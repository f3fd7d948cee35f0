"""`FineTuneModule`: a pre-trained encoder with a head, trained on labels; in any ``pl.Trainer``."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.packing import Pack
from pretrain.corpus.tokenizer import Tokenizer
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.head import Pooling, build_head, head_outputs
from pretrain.downstream.finetune.labels import LabelSpec
from pretrain.downstream.finetune.lora import add_lora
from pretrain.downstream.finetune.metrics import Answers, metrics
from pretrain.downstream.finetune.packs import LabelledBatch
from pretrain.downstream.load import load
from pretrain.errors import UserError
from pretrain.model.config import EncoderConfig
from pretrain.model.encoder import Encoder
from pretrain.train.schedule import LinearDecay, ShapedScheduler
from pretrain.train.step import RunningLoss, StepModule

Number = TypeVar("Number", int, float)


class FineTuneModule(StepModule):
    """An encoder and a head for its labels, trained with AdamW and a linear schedule.

    The head is built when the labels are known, at `setup`.

    Args:
        initialize_from: The pre-trained model: a run, a checkpoint, or a directory that transformers saved.
        encoder: An encoder's shape, with random weights, instead.
        from_scratch: Take only the shape from ``initialize_from`` and begin with random weights: the comparison that
            shows what pre-training gave.
        pooling: How a sequence's hidden states become one: ``cls``, the first one's (the only one that transformers
            loads); ``mean`` over the residues; or ``attention``, a learnt mean of them.
        tune: ``full``: everything is trained. ``frozen``: the head alone (a probe). ``last``: the head and the last
            ``last_layers`` blocks. ``lora``: the head and a low-rank addition to every matrix of the blocks.
        last_layers: With ``last``, how many blocks; by default 1.
        lora_rank: With ``lora``, the rank; by default 8.
        lora_alpha: With ``lora``, the scale times the rank; by default 16.
        learning_rate: Peak learning rate, of the head and the last block.
        warmup_steps: Steps until the peak; from there it falls linearly to zero at ``max_steps``.
        layer_decay: Factor on the learning rate from one block to the one before (Howard and Ruder 2018).
        class_weights: ``balanced``: each class counts the same in the loss, however rare it is in training.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's epsilon.
        weight_decay: Decoupled weight decay.
        scheduler_name: Name that the learning rate is logged under; Lightning's own (``lr-AdamW``) if not given.
        activation_checkpointing: Compute blocks again for their gradients rather than keep them: a third more work for
            a fraction of the memory.

    Raises:
        UserError: If there is no model, or a setting has no meaning.
    """

    def __init__(
        self,
        initialize_from: str | None = None,
        encoder: EncoderConfig | None = None,
        from_scratch: bool = False,
        pooling: Pooling = "cls",
        tune: Literal["full", "frozen", "last", "lora"] = "full",
        last_layers: int | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        learning_rate: float = 1e-4,
        warmup_steps: int = 50,
        layer_decay: float = 1.0,
        class_weights: Literal["none", "balanced"] = "none",
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        scheduler_name: str | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        if not 0 < layer_decay <= 1:
            raise UserError(f"model.layer_decay is {layer_decay}; give a factor above 0 and at most 1, such as 0.9")
        last_layers = _with(tune, "last", "last_layers", last_layers, default=1)
        lora_rank = _with(tune, "lora", "lora_rank", lora_rank, default=8)
        lora_alpha = _with(tune, "lora", "lora_alpha", lora_alpha, default=16.0)
        if lora_rank < 1:
            raise UserError(f"model.lora_rank is {lora_rank}; give 1 or more")
        if not lora_alpha > 0:
            raise UserError(f"model.lora_alpha is {lora_alpha}; give a number above 0")
        net, read_tokenizer = _start(initialize_from, encoder, from_scratch)
        super().__init__(net, activation_checkpointing, compile=False, scheduler_name=scheduler_name)
        self.read_tokenizer = read_tokenizer
        layers = net.config.num_hidden_layers
        if tune == "last" and not 1 <= last_layers <= layers:
            raise UserError(f"model.last_layers is {last_layers}; the model has {layers}: give 1 to {layers}")
        self.initialized_from = None if from_scratch else initialize_from
        self.pooling, self.tune, self.last_layers = pooling, tune, last_layers
        self.lora_scale = lora_alpha / lora_rank if tune == "lora" else None
        self.learning_rate, self.warmup_steps, self.layer_decay = learning_rate, warmup_steps, layer_decay
        self.class_weights = class_weights
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        if tune == "lora":
            add_lora(net, lora_rank, lora_alpha)
        elif tune == "frozen":
            net.requires_grad_(False)
        elif tune == "last":
            net.requires_grad_(False)
            for block in net.blocks[-last_layers:]:
                block.requires_grad_(True)
            net.norm.requires_grad_(True)
        net.head.requires_grad_(False)  # the masked-LM head has no part in this; DDP must not wait for its gradients
        self.hparams["encoder"] = asdict(net.config)
        self._answers: list[Answers] = []
        self._validation_loss = RunningLoss()

    @override
    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, FineTuneDataModule)
        self.prepare(data)

    def prepare(self, data: FineTuneDataModule) -> None:
        """Build the head for a data module's labels, once; its `setup` comes first.

        Raises:
            UserError: If a setting has no meaning for such labels.
        """
        if hasattr(self, "head"):
            return
        if data.task == "token" and self.pooling != "cls":
            raise UserError(
                f"model.pooling is {self.pooling} but data.task is token, where nothing is pooled; leave it out"
            )
        if data.task == "regression" and self.class_weights != "none":
            raise UserError(
                f"model.class_weights is {self.class_weights} but data.task is regression; only classes have weights: "
                "leave it out"
            )
        self.spec: LabelSpec = data.spec
        self.head = build_head(self.encoder.config, self.spec, self.pooling)
        self.hparams["fine_tuning"] = {
            "labels": self.spec.plain(),
            "pooling": self.pooling,
            "lora_scale": self.lora_scale,
            "max_length": data.max_length,
            "pair_order": data.pair_order,
        }
        weight: Tensor | None = None
        if self.class_weights == "balanced":
            counts = torch.from_numpy(data.splits["train"].labels.counts(self.spec.num_outputs)).double()
            if self.spec.task == "multilabel":  # of each class by itself, those that have it against those that do not
                if (everywhere := counts == len(data.train_corpus)).any():
                    name = self.spec.classes[int(everywhere.nonzero()[0])]
                    raise UserError(
                        f"model.class_weights is balanced but all training rows have the class '{name}', which "
                        "cannot be balanced: leave the class out, or the weights"
                    )
                weight = (len(data.train_corpus) - counts) / counts
            else:
                weight = counts.sum() / (len(counts) * counts)
        self.register_buffer("_weight", None if weight is None else weight.float(), persistent=False)

    @override
    def build_optimizer(self) -> tuple[AdamW, LRScheduler]:
        groups = self._groups()
        optimizer = AdamW(groups, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True)
        steps = self.max_steps or self.trainer.max_steps
        return optimizer, ShapedScheduler(optimizer, LinearDecay(floor=0.0, end=1.0), self.warmup_steps, steps)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups by depth, the head first, each block by `layer_decay` slower than the one above it."""
        net = self.encoder
        depths: list[list[nn.Module]] = [[self.head, net.norm], *([block] for block in reversed(net.blocks))]
        depths += [[net.embedding]]
        if self.layer_decay == 1:
            depths = [[module for depth in depths for module in depth]]
        groups = []
        for above, modules in enumerate(depths):
            parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
            rate = self.learning_rate * self.layer_decay ** max(0, above - 1)
            if parameters:
                groups.append({"params": parameters, "lr": rate})
        return groups

    @override
    def batch_loss(self, batch: Batch) -> Tensor:
        assert isinstance(batch, LabelledBatch)
        return self._compare(head_outputs(self.encoder, self.head, batch), batch.targets)

    def _compare(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss summed over targets."""
        weight = self._weight
        assert weight is None or isinstance(weight, Tensor)
        if self.spec.task == "regression":
            standardised = (targets - self.spec.mean) / self.spec.std
            return F.mse_loss(outputs[:, 0], standardised, reduction="sum")
        if self.spec.task == "multilabel":
            loss = F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weight, reduction="sum")
            return loss / outputs.shape[1]
        return F.cross_entropy(outputs, targets, weight, reduction="sum")

    @override
    def flops(self, pack: Pack) -> float:
        """As for pre-training, less what a frozen part spares; the head itself is next to nothing."""
        targets = pack.lengths if self.spec.task != "token" and self.pooling != "cls" else pack.targets
        whole = self.encoder.config.training_flops(pack.lengths, targets)  # a third of it forward
        layers = self.encoder.config.num_hidden_layers
        backward = {"full": 1.0, "frozen": 0.0, "last": self.last_layers / layers, "lora": 0.5}[self.tune]
        return whole * (1 + 2 * backward) / 3

    @override
    def on_validation_epoch_start(self) -> None:
        self._answers = []
        self._validation_loss.reset()

    @override
    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        outputs = head_outputs(self.encoder, self.head, batch)
        self._validation_loss.add(self._compare(outputs, batch.targets), batch)
        self._answers.append(Answers.of(batch, outputs))

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the loss, and the task's metrics over the whole split, in the order of its sequences."""
        loss = self._validation_loss.collect(self.trainer)
        answers = Answers.join(self._answers)
        if self.trainer.world_size > 1:
            everyones: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(everyones, answers)
            answers = Answers.join(everyones)
        self._answers = []
        figures = {f"val/{name}": value for name, value in metrics(self.spec, answers).items()}
        self.log_dict({"val/loss": loss, **figures})


def _with(tune: str, its: str, name: str, given: Number | None, default: Number) -> Number:
    """A setting that only one way of tuning has."""
    if given is not None and tune != its:
        raise UserError(
            f"model.{name} is {given} but model.tune is {tune}, which has none; give --model.tune {its}, or leave "
            f"model.{name} out"
        )
    return default if given is None else given


def _start(
    initialize_from: str | None, encoder: EncoderConfig | None, from_scratch: bool
) -> tuple[Encoder, Callable[[], Tokenizer] | None]:
    """The encoder to train, and what reads the tokenizer of the model that it is from."""
    if initialize_from is None:
        if encoder is None:
            raise UserError(
                "no model to fine-tune; give --from RUN_OR_DIR: a run, or a directory that transformers saved"
            )
        return Encoder(encoder), None
    source = load(Path(initialize_from))
    if encoder is not None and encoder != source.config:
        raise UserError(f"model.encoder is not the shape of {initialize_from}; leave it out: the model says its own")
    net = Encoder(source.config)
    if not from_scratch:
        net.load_state_dict(source.state_dict())
    return net, lambda: source.tokenizer

"""`PackedDataModule`: a corpus in packs, from a data position that is one integer; whatever its targets are."""

import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.order import ORDER_VERSION
from pretrain.corpus.packing import BatchWarmup, FixedSampler, PackSampler, Position, StepPlanner, validation_packs
from pretrain.corpus.processes import end_with_parent
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.errors import UserError

MAX_TOKENS_PER_SEQUENCE = 2**18
"""The longest that is tested; attention, whose time grows with the square, would hardly end on longer ones."""


class PackedDataModule(pl.LightningDataModule):
    """Packs of a corpus, step by step, and the data position after each; in any ``pl.Trainer`` with ``max_steps``.

    A subclass opens the corpora (`open`), plans them and makes the batches.

    Args:
        train: What the training corpus is made of.
        validation: What the validation corpus is made of; nothing for none.
        tokenizer: ``esm``, or a ``tokenizer.json``, or a directory that holds one.
        max_length: Tokens of a sequence that one step sees, ``<cls>`` and ``<eos>`` included.
        global_batch_tokens: Tokens in an optimizer step, over all processes and micro-batches.
        validation_pack_tokens: Tokens in a forward pass of validation.
        attention_cost: Cost of attending to one token relative to a token's linear layers, for packs of equal cost;
            about ``1 / (6 * hidden_size)``.
        num_workers: Processes that load ahead of training.
        seed: Seed of order and crops.

    Attributes:
        train_corpus: After `setup`, what is trained on.
        validation_corpus: After `setup`, what is validated on, if anything is.

    Raises:
        UserError: On settings that cannot work, with the values that would.
    """

    static_shapes = False
    batch_warmup: BatchWarmup | None = None

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None,
        tokenizer: str,
        max_length: int,
        global_batch_tokens: int,
        validation_pack_tokens: int,
        attention_cost: float,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        if not 3 <= max_length <= MAX_TOKENS_PER_SEQUENCE:
            raise UserError(f"data.max_length is {max_length}; give 3 to {MAX_TOKENS_PER_SEQUENCE} tokens")
        if validation_pack_tokens < 1:
            raise UserError(
                f"data.validation_pack_tokens is {validation_pack_tokens}; give a positive number of tokens"
            )
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}; give 0 (training loads its data itself) or more")
        self.train = [train] if isinstance(train, str) else train
        self.validation = [validation] if isinstance(validation, str) else validation or []
        self.max_length = max_length
        self.global_batch_tokens = global_batch_tokens
        self.validation_pack_tokens = validation_pack_tokens
        self.attention_cost = attention_cost
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = load_tokenizer(tokenizer)
        self.train_corpus: Corpus
        self.validation_corpus: Corpus | None
        self.skips: list[tuple[int, int]] = []  # from and to places in the order, as decided so far
        self._start = (0, Position())
        self._sampler: PackSampler | None = None

    @abstractmethod
    def open(self) -> None:
        """Open the corpora; they are prepared first where that has not been done. May be called repeatedly."""

    @abstractmethod
    def train_planner(self) -> StepPlanner:
        """What plans the training corpus."""

    @abstractmethod
    def validation_planner(self) -> StepPlanner:
        """What plans the validation corpus, in epoch 0; only called where there is one."""

    @abstractmethod
    def dataset(self, planner: StepPlanner, pack_tokens: float) -> Dataset[Batch]:
        """From the planner's packs, of about so many tokens each, to batches."""

    @override
    def prepare_data(self) -> None:
        """Tokenise raw sources into the cache, in one process; the others find it there."""
        self.open()

    @override
    def setup(self, stage: str) -> None:
        """Open the corpora: memory-mapped, so this costs nothing however large they are."""
        self.open()
        if self.trainer and self.validation_corpus is None:
            self.trainer.limit_val_batches = 0  # or Lightning warns of an empty list

    def check_packs(self, processes: int, micro_batches: int) -> None:
        """Make sure that every pack of every step will hold a sequence.

        Raises:
            UserError: If a step is too small to be shared out among so many packs; names values that work.
        """
        packs, budget, name = processes * micro_batches, self.global_batch_tokens, "global_batch_tokens"
        if self.batch_warmup:
            budget, name = self.batch_warmup.first, "batch_warmup.first"
        if budget < packs * self.max_length:
            remedy = f"give at least {packs * self.max_length}"
            if fitting := budget // self.max_length:
                remedy += f", or at most {fitting} packs: fewer processes or a smaller trainer.accumulate_grad_batches"
            raise UserError(
                f"data.{name} is {budget}, too small for {packs} packs a step ({processes} processes x "
                f"{micro_batches} micro-batches) of up to {self.max_length} tokens; {remedy}"
            )

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """This process's micro-batches for the rest of the run."""
        trainer = self._trainer()
        self.check_packs(trainer.world_size, trainer.accumulate_grad_batches)
        planner = self.train_planner()
        if trainer.max_steps < 0:
            sequences = len(planner.step(Position(), self.global_batch_tokens).indices)
            raise UserError(
                f"{type(self).__name__} needs Trainer(max_steps=...): a run is counted in optimizer steps; "
                f"an epoch of this corpus is about {-(-planner.epoch_size // sequences)} steps"
            )
        self._sampler = PackSampler(
            planner,
            global_batch_tokens=self.global_batch_tokens,
            max_steps=trainer.max_steps,
            start=self._start,
            steps_taken=lambda: trainer.global_step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            attention_cost=self.attention_cost,
            skips=dict(self.skips),
        )
        pack_tokens = self.global_batch_tokens / (trainer.world_size * trainer.accumulate_grad_batches)
        return self._loader(planner, self._sampler, pack_tokens)

    @override
    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """This process's share of the validation corpus, the same at every call; nothing without a corpus."""
        return [] if self.validation_corpus is None else self.validation_loader(self.validation_planner())

    def validation_loader(self, planner: StepPlanner) -> DataLoader[Batch]:
        """This process's share of all that a planner plans, in epoch 0."""
        trainer = self._trainer()
        packs = validation_packs(planner, self.validation_pack_tokens, trainer.world_size)[trainer.global_rank]
        return self._loader(planner, FixedSampler(packs), self.validation_pack_tokens)

    def _loader(
        self, planner: StepPlanner, sampler: PackSampler | FixedSampler, pack_tokens: float
    ) -> DataLoader[Batch]:
        return TimedLoader(
            self.dataset(planner, pack_tokens),
            sampler=sampler,
            batch_size=None,  # a pack is a batch already
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            worker_init_fn=end_with_parent,
            pin_memory=self._trainer().strategy.root_device.type == "cuda",
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} is attached to no Trainer; pass it as Trainer.fit(module, datamodule)")
        return self.trainer

    def identity(self) -> dict[str, Any]:
        """What decides which tokens a step sees, and so cannot change when a run is continued."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "corpus": self.train_corpus.fingerprint,
            "max_length": self.max_length,
            "global_batch_tokens": self.global_batch_tokens,
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """The data position after the last finished optimizer step, and what identifies the order."""
        step = self._trainer().global_step
        position = self._sampler.position_after(step) if self._sampler else self._start[1]
        return {
            "step": step,
            "cursor": position.cursor,
            "tokens": position.tokens,
            "skips": len(self.skips),
            **self.identity(),
            "tokenizer": self.tokenizer.serialize(),
        }

    def check_identity(self, state: dict[str, Any]) -> None:
        """Make sure that a checkpoint's data position means the same sequences here; after `setup`.

        Raises:
            UserError: If the checkpoint was made with another order; names the first field that differs.
        """
        if state.get("tokenizer", ours := self.tokenizer.serialize()) != ours:
            raise UserError(
                f"the checkpoint was made with another tokenizer than {self.tokenizer.name}: its ids would mean other "
                "tokens; restore that tokenizer, or start another run"
            )
        for field, ours in self.identity().items():
            theirs = state.get(field)  # what an older version did not record, it did not have
            if theirs != ours and field == "corpus":
                raise UserError(
                    f"the checkpoint was made with corpus {theirs!r}, data.train is {ours!r} now: the data would "
                    "not continue where it stopped; give the same sequences as data.train, or another --run"
                )
            if theirs != ours:
                raise UserError(
                    f"the checkpoint was made with {field} {theirs!r}, this run has {ours!r}: the data would not "
                    "continue where it stopped; restore that setting, or start another run"
                )

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's data position.

        Raises:
            UserError: If the checkpoint was made with another order; names the first field that differs.
        """
        self.check_identity(state)
        # Lightning misses a loader state; there is none to keep, since the sampler seeks to the step.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        self._start = (state["step"], self.train_planner().position(state["cursor"], state["tokens"]))


class TimedLoader(DataLoader[Batch]):
    """A loader that counts how long its batches are waited for.

    Between two batches a training loop also waits for the GPU, wherever a figure is read, and that is no want of data.

    Attributes:
        seconds_waited: Seconds in all, so far.
    """

    seconds_waited = 0.0

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.seconds_waited += time.perf_counter() - begin
            yield batch


def _unchanged(batch: Any) -> Any:
    return batch

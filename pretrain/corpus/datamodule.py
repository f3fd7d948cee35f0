"""`MLMDataModule`: from configured sources to the batches of a training run."""

import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.corpus.baselines import Baselines, perplexities
from pretrain.corpus.batch import Batch, PackDataset
from pretrain.corpus.masking import MAX_TOKENS_PER_SEQUENCE, Masking
from pretrain.corpus.order import ORDER_VERSION, Order
from pretrain.corpus.packing import FixedSampler, PackSampler, Planner, Position, validation_packs
from pretrain.corpus.padding import PaddedDataset, static_shapes
from pretrain.corpus.prepare import open_or_prepare
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.errors import UserError

_VALIDATION_SEED = 0


class MLMDataModule(pl.LightningDataModule):
    """Packed, masked batches for masked-language-model training, in any ``pl.Trainer`` that sets ``max_steps``.

    Which tokens, crops and masks a step sees depends on the seed and on how many sequences were consumed, never on the
    number of processes, workers or micro-batches. A checkpoint holds that one number and what identifies the order.

    Args:
        train: Source files, patterns or directories (as `pretrain prepare` takes), or one corpus that it made. Sources
            are prepared once, into a cache.
        validation: The same, for validation; without it there is none.
        tokenizer: ``esm``, or a ``tokenizer.json``, or a directory that holds one.
        max_length: Tokens of a sequence that one step sees, ``<cls>`` and ``<eos>`` included; longer ones are cropped.
        global_batch_tokens: Tokens in an optimizer step, over all processes and micro-batches.
        mlm_probability: Share of the tokens that are targets.
        mask_replace_prob: Share of the targets that become ``<mask>``.
        random_replace_prob: Share of the targets that become a random token; the rest stays.
        validation_pack_tokens: Tokens in a forward pass of validation.
        attention_cost: Cost of attending to one token relative to a token's linear layers, for packs of equal cost;
            about ``1 / (6 * hidden_size)``.
        static_shapes: Pad packs to one of a few sizes, for compiled code; they are then made equal in tokens, not cost.
        num_workers: Processes that load ahead of training.
        seed: Seed of order, crops and masks.

    Raises:
        UserError: On settings that cannot work, with the values that would.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        tokenizer: str = "esm",
        max_length: int = 1024,
        global_batch_tokens: int = 131_072,
        mlm_probability: float = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        validation_pack_tokens: int = 16_384,
        attention_cost: float = 0.0005,
        static_shapes: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 3 <= max_length <= MAX_TOKENS_PER_SEQUENCE:
            raise UserError(f"data.max_length is {max_length}; give 3 to {MAX_TOKENS_PER_SEQUENCE} tokens")
        self.train = [train] if isinstance(train, str) else train
        self.validation = [validation] if isinstance(validation, str) else validation or []
        self.max_length = max_length
        self.global_batch_tokens = global_batch_tokens
        self.validation_pack_tokens = validation_pack_tokens
        self.attention_cost = 0.0 if static_shapes else attention_cost
        self.static_shapes = static_shapes
        self.num_workers = num_workers
        self.seed = seed
        self.tokenizer = load_tokenizer(tokenizer)
        shares = (mlm_probability, mask_replace_prob, random_replace_prob)
        vocabulary = (self.tokenizer.mask_token_id, self.tokenizer.replacement_ids)
        self.masking = Masking(*shares, *vocabulary, seed=seed)
        # Validation asks the same question in every run: a fixed share of positions under a fixed seed, all <mask>.
        self.validation_masking = Masking(0.15, 1.0, 0.0, *vocabulary, seed=_VALIDATION_SEED)
        self.skips: list[tuple[int, int]] = []  # from and to places in the order, as decided so far
        self._start = (0, Position())
        self._sampler: PackSampler | None = None

    def prepare_data(self) -> None:
        """Tokenise raw sources into the cache, in one process; the others find it there."""
        self._open()

    def setup(self, stage: str) -> None:
        """Open the corpora: memory-mapped, so this costs nothing however large they are."""
        self._open()

    def _open(self) -> None:
        if not hasattr(self, "train_corpus"):
            self.train_corpus = open_or_prepare(self.train, self.tokenizer)
            self.validation_corpus = open_or_prepare(self.validation, self.tokenizer) if self.validation else None

    def check_packs(self, processes: int, micro_batches: int) -> None:
        """Make sure that every pack of every step will hold a sequence.

        Raises:
            UserError: If a step is too small to be shared out among so many packs; names values that work.
        """
        packs, budget = processes * micro_batches, self.global_batch_tokens
        if budget < packs * self.max_length:
            remedy = f"give at least {packs * self.max_length}"
            if fitting := budget // self.max_length:
                remedy += f", or at most {fitting} packs: fewer processes or a smaller trainer.accumulate_grad_batches"
            raise UserError(
                f"data.global_batch_tokens is {budget}, too small for {packs} packs a step ({processes} processes x "
                f"{micro_batches} micro-batches) of up to {self.max_length} tokens; {remedy}"
            )

    def train_dataloader(self) -> DataLoader[Batch]:
        """This process's micro-batches for the rest of the run."""
        trainer = self._trainer()
        self.check_packs(trainer.world_size, trainer.accumulate_grad_batches)
        planner = Planner(self.train_corpus, Order(len(self.train_corpus), self.seed), self.masking, self.max_length)
        if trainer.max_steps < 0:
            sequences = len(planner.step(Position(), self.global_batch_tokens).indices)
            raise UserError(
                "MLMDataModule needs Trainer(max_steps=...): a run is counted in optimizer steps; "
                f"an epoch of this corpus is about {-(-len(self.train_corpus) // sequences)} steps"
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

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """This process's share of the validation corpus, the same at every call; nothing without a corpus."""
        if self.validation_corpus is None:
            return []
        trainer = self._trainer()
        planner = self._validation_planner(self.validation_corpus)
        packs = validation_packs(planner, self.validation_pack_tokens, trainer.world_size)[trainer.global_rank]
        return self._loader(planner, FixedSampler(packs), self.validation_pack_tokens)

    def baselines(self) -> Baselines | None:
        """Unigram and bigram perplexity on the positions that validation asks about; None without validation."""
        if self.validation_corpus is None:
            return None
        (packs,) = validation_packs(self._validation_planner(self.validation_corpus), self.validation_pack_tokens, 1)
        return perplexities(self.train_corpus, PackDataset(self.validation_corpus, self.validation_masking), packs)

    def _validation_planner(self, corpus: Corpus) -> Planner:
        return Planner(corpus, Order(len(corpus), _VALIDATION_SEED), self.validation_masking, self.max_length)

    def _loader(
        self, planner: Planner, sampler: PackSampler | FixedSampler, mean_pack_tokens: float
    ) -> DataLoader[Batch]:
        packs = PackDataset(planner.corpus, planner.masking)
        dataset: Dataset[Batch] = packs
        if self.static_shapes:
            share = planner.masking.mlm_probability
            shapes = static_shapes(mean_pack_tokens, planner.mean_length, self.max_length, share)
            dataset = PaddedDataset(packs, shapes)
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,  # a pack is a batch already
            collate_fn=_unchanged,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError("MLMDataModule is attached to no Trainer; pass it as Trainer.fit(module, datamodule)")
        return self.trainer

    def _identity(self) -> dict[str, Any]:
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "corpus": self.train_corpus.fingerprint,
            "max_length": self.max_length,
            "global_batch_tokens": self.global_batch_tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        """The data position after the last finished optimizer step, and what identifies the order."""
        step = self._trainer().global_step
        position = self._sampler.position_after(step) if self._sampler else self._start[1]
        return {
            "step": step,
            "cursor": position.cursor,
            "tokens": position.tokens,
            "skips": len(self.skips),
            **self._identity(),
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
        for field, ours in self._identity().items():
            if state.get(field) != ours:
                raise UserError(
                    f"the checkpoint was made with {field} {state.get(field)!r}, this run has {ours!r}: the data would "
                    "not continue where it stopped; restore that setting, or start another run"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's data position.

        Raises:
            UserError: If the checkpoint was made with another order; names the first field that differs.
        """
        self.check_identity(state)
        # Lightning misses a loader state; there is none to keep, since the sampler seeks to the step.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        cursor, tokens = state["cursor"], state["tokens"]
        self._start = (state["step"], Position(cursor, tokens, cursor / len(self.train_corpus)))


def _unchanged(batch: Any) -> Any:
    return batch

"""`MLMDataModule`: from configured sources to the batches of a training run."""

import re
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from pretrain.corpus.baselines import Baselines, perplexities
from pretrain.corpus.batch import Batch, PackDataset
from pretrain.corpus.masking import MaskDraws, Masking, MaskUnit
from pretrain.corpus.mixture import JoinedCorpus, draws_of_a_block, mixture_of
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.order import AnyOrder, Order
from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.packing import BatchWarmup, Planner, StepPlanner, validation_packs
from pretrain.corpus.padding import PaddedDataset, static_shapes
from pretrain.corpus.prefetch import group_size, order_of, prefetch_shards
from pretrain.corpus.remote import RemoteCorpus
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer, Tokenizer
from pretrain.errors import UserError

_VALIDATION_SEED = 0


class MLMDataModule(PackedDataModule):
    """Packed, masked batches for masked-language-model training, in any ``pl.Trainer`` that sets ``max_steps``.

    Which tokens, crops and masks a step sees depends on the seed and on how many sequences were consumed, never on the
    number of processes, workers or micro-batches. A checkpoint holds that one number and what identifies the order.

    Args:
        train: Local source files, patterns or directories, or one corpus that `pretrain prepare` made, here or at a URL
            (sources at URLs and Hub datasets: prepare them first). Sources are prepared once, into a cache. Or a
            mapping of several of these to their weights, ``{a.fasta: 3, b.fasta: 1}``: shares of the sequences drawn.
        validation: The same without weights, for validation; without it there is none. Or several sets by name,
            ``{near: a.fasta, far: b.fasta}``, the first of which is the one that ``val/loss`` is about.
        tokenizer: ``esm``, or a ``tokenizer.json``, or a directory that holds one.
        max_length: Tokens of a sequence that one step sees, ``<cls>`` and ``<eos>`` included.
        long_sequences: What becomes of longer ones: ``crop`` shows a random window, another one in each epoch;
            ``split`` cuts them into several sequences, without losing a token (for documents of text).
        global_batch_tokens: Tokens in an optimizer step, over all processes and micro-batches.
        batch_warmup: Smaller steps at the beginning, ``{first: 262144, tokens: 1000000000}``: of that many tokens at
            first, growing to ``global_batch_tokens`` while so many are consumed.
        mlm_probability: Share of the tokens that are targets; or two, between which one is drawn for each sequence.
        mask_replace_prob: Share of the targets that become ``<mask>``.
        random_replace_prob: Share of the targets that become a random token; the rest stays.
        mask_unit: What is chosen for masking: a ``token``, a ``span`` of tokens, or a whole ``word`` of a text.
        mask_draws: ``fixed``: as many targets in each sequence as the share says; ``independent``: each token (or word)
            is drawn by itself.
        mean_span_length: With spans, the mean number of their tokens (3 if not given); lengths are geometric.
        validation_pack_tokens: Tokens in a forward pass of validation.
        attention_cost: Cost of attending to one token relative to a token's linear layers, for packs of equal cost;
            about ``1 / (6 * hidden_size)``.
        static_shapes: Pad packs to one of a few sizes, for compiled code; they are then made equal in tokens, not cost.
        num_workers: Processes that load ahead of training.
        group_shards: Shards of the corpus that are shuffled together: a number, or ``all``. By default all, and 32 of a
            remote corpus, of which only a group, the next one and the one before are needed at a time.
        cache_gb: How much of a remote corpus to keep on the local disk; by default what is in use.
        seed: Seed of order, crops and masks.

    Raises:
        UserError: On settings that cannot work, with the values that would.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float],
        validation: str | list[str] | dict[str, str | list[str]] | None = None,
        tokenizer: str = "esm",
        max_length: int = 1024,
        long_sequences: Literal["crop", "split"] = "crop",
        global_batch_tokens: int = 131_072,
        batch_warmup: BatchWarmup | None = None,
        mlm_probability: float | tuple[float, float] = 0.15,
        mask_replace_prob: float = 0.8,
        random_replace_prob: float = 0.1,
        mask_unit: MaskUnit = "token",
        mask_draws: MaskDraws = "fixed",
        mean_span_length: float | None = None,
        validation_pack_tokens: int = 16_384,
        attention_cost: float = 0.0005,
        static_shapes: bool = False,
        num_workers: int = 0,
        group_shards: int | Literal["all"] | None = None,
        cache_gb: float | None = None,
        seed: int = 0,
    ) -> None:
        sets = validation if isinstance(validation, dict) else {"": validation} if validation else {}
        self.validation_sets = {name: [given] if isinstance(given, str) else given for name, given in sets.items()}
        _check_names(self.validation_sets)
        super().__init__(
            list(train) if isinstance(train, dict) else train,
            [source for sources in self.validation_sets.values() for source in sources],
            tokenizer,
            max_length,
            global_batch_tokens,
            validation_pack_tokens,
            0.0 if static_shapes else attention_cost,
            num_workers,
            seed,
        )
        self.draws = draws_of_a_block(train) if isinstance(train, dict) else None
        if long_sequences not in ("crop", "split"):
            raise UserError(f"data.long_sequences is '{long_sequences}'; give crop or split")
        self.windows = max_length if long_sequences == "split" else None
        if isinstance(group_shards, int) and group_shards < 1:
            raise UserError(f"data.group_shards is {group_shards}; give at least 1, or all")
        if static_shapes and batch_warmup:
            raise UserError(
                "data.batch_warmup makes small steps, which data.static_shapes pads to the full size, so that nothing "
                "is gained; leave one of them out"
            )
        if batch_warmup and batch_warmup.first >= global_batch_tokens:
            raise UserError(
                f"data.batch_warmup begins with {batch_warmup.first} tokens, which is not less than "
                f"data.global_batch_tokens, {global_batch_tokens}; give fewer, or leave the warmup out"
            )
        self.static_shapes = static_shapes
        self.batch_warmup = batch_warmup
        self.group_shards = group_shards
        self.cache_bytes = None if cache_gb is None else int(cache_gb * 1e9)
        shares = (mlm_probability, mask_replace_prob, random_replace_prob)
        vocabulary = (self.tokenizer.mask_token_id, self.tokenizer.replacement_ids)
        self.masking = Masking(*shares, *vocabulary, seed, mask_unit, mask_draws, mean_span_length)
        if mask_unit == "word" and isinstance(self.tokenizer, ProteinTokenizer):
            raise UserError(
                "data.mask_unit is word, but proteins have no words; choose token or span (or, for text, a tokenizer "
                "with --data.tokenizer)"
            )

    @override
    def open(self) -> None:
        if not hasattr(self, "train_corpus"):
            train = self._open_train()
            held = {
                name: open_or_prepare(given, self.tokenizer, self.windows)
                for name, given in self.validation_sets.items()
            }
            if self.masking.unit == "word" and not train.has_words:
                raise UserError(
                    f"{train}: was prepared without the words that data.mask_unit word needs; prepare it again"
                )
            self.validation_corpora, self.validation_corpus = held, next(iter(held.values()), None)
            self.train_corpus = train

    def _open_train(self) -> Corpus:
        if self.draws is None:
            return open_or_prepare(self.train, self.tokenizer, self.windows, self.cache_bytes)
        each = (open_or_prepare([name], self.tokenizer, self.windows, self.cache_bytes) for name in self.train)
        return JoinedCorpus(list(each))

    @override
    def train_planner(self) -> Planner:
        return Planner(self.train_corpus, self.train_order(), self.masking, self.max_length, self.batch_warmup)

    def train_order(self) -> AnyOrder:
        """The order of the training corpus."""
        corpus = self.train_corpus
        if self.draws is None:
            return order_of(corpus, self.group_shards, self.seed)
        assert isinstance(corpus, JoinedCorpus)
        return mixture_of(corpus, self.draws, self.seed)

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        loader = super().train_dataloader()
        assert self._sampler is not None
        prefetch_shards(self._sampler.planner)
        return loader

    @override
    def identity(self) -> dict[str, Any]:
        corpus, warmup = self.train_corpus, self.batch_warmup
        return {
            **super().identity(),
            "batch_warmup": [warmup.first, warmup.tokens] if warmup else None,
            "proportions": None if self.draws is None else self.draws.tolist(),
            "clusters": corpus.clusters_fingerprint,
            "group_shards": group_size(corpus, self.group_shards),
        }

    @override
    def validation_planner(self, name: str | None = None) -> Planner:
        """What plans a validation set, by default the first."""
        corpus = self.validation_corpus if name is None else self.validation_corpora[name]
        assert corpus is not None
        return validation_planner(corpus, self.tokenizer, self.max_length)

    @override
    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        for corpus in self.validation_corpora.values():
            if isinstance(corpus, RemoteCorpus):
                corpus.bring_all()
        loaders = [self.validation_loader(self.validation_planner(name)) for name in self.validation_sets]
        return loaders[0] if list(self.validation_sets) == [""] else loaders

    @override
    def dataset(self, planner: StepPlanner, pack_tokens: float) -> Dataset[Batch]:
        assert isinstance(planner, Planner)
        packs = PackDataset(planner.corpus, planner.masking)
        if not self.static_shapes:
            return packs
        masking, length = planner.masking, planner.mean_length
        spread = masking.deviation(pack_tokens, length)
        return PaddedDataset(packs, static_shapes(pack_tokens, length, self.max_length, masking.mean_share, spread))

    def baselines(self) -> dict[str, Baselines]:
        """What to compare with on the positions that validation asks about, for each set."""
        order, found = self.train_order(), {}
        for name, corpus in self.validation_corpora.items():
            planner = self.validation_planner(name)
            (packs,) = validation_packs(planner, self.validation_pack_tokens, 1)
            found[name] = perplexities(self.train_corpus, PackDataset(corpus, planner.masking), packs, order)
        return found


def validation_planner(corpus: Corpus, tokenizer: Tokenizer, max_length: int) -> Planner:
    """What plans a validation: in every run the same share of positions under the same seed, and all of them masked.

    Args:
        corpus: What is validated on.
        tokenizer: What made its ids.
        max_length: Tokens of a sequence that are seen.
    """
    masking = Masking(0.15, 1.0, 0.0, tokenizer.mask_token_id, tokenizer.replacement_ids, seed=_VALIDATION_SEED)
    return Planner(corpus, Order(len(corpus), _VALIDATION_SEED), masking, max_length)


def _check_names(sets: dict[str, list[str]]) -> None:
    for name, sources in sets.items():
        if (name and not re.fullmatch(r"[\w.-]+", name)) or name in ("loss", "perplexity", "accuracy"):
            raise UserError(
                f"data.validation has a set named {name!r}; give letters, digits, - . and _, and none of loss, "
                "perplexity, accuracy"
            )
        if not sources:
            raise UserError(f"data.validation: the set {name!r} names no source; give files or a corpus")

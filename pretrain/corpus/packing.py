"""The sampler: from a cursor, cut the order into steps, and share each step out into packs.

A step is a set of sequences, fixed by the cursor alone. Ranks and micro-batches only share out its work: nothing about
the data depends on how many there are. So the whole state of the data is one integer.
"""

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler
from typing_extensions import override

from pretrain.corpus.counter import Int64, RandomStream, below, bits, derive_key
from pretrain.corpus.masking import Masking
from pretrain.corpus.order import AnyOrder
from pretrain.corpus.store import Corpus
from pretrain.errors import UserError

_SAMPLE = 1024
"""Number of crops sampled to estimate their mean length, which sets how far the planner looks ahead and how fast the
batch warmup grows."""


@dataclass(frozen=True)
class Position:
    """Where the data stands after a step.

    Attributes:
        cursor: Sequences consumed: the whole state of the data.
        tokens: Tokens consumed, for the log.
        epochs: ``cursor`` as a number of epochs, for the log; with several corpora, how often their sequences were
            visited on average.
    """

    cursor: int = 0
    tokens: int = 0
    epochs: float = 0.0


@dataclass(frozen=True)
class BatchWarmup:
    """Steps that begin small and grow, in a straight line over the tokens consumed, to ``global_batch_tokens``.

    Small steps teach more for the same tokens while the loss still falls fast (McCandlish et al. 2018); how large a
    step is follows from the cursor, as everything does.

    Args:
        first: Tokens in the first step, at most.
        tokens: Tokens consumed (cursor times the mean length of a crop) until steps have their full size.

    Raises:
        UserError: If either is not positive.
    """

    first: int
    tokens: int

    def __post_init__(self) -> None:
        if self.first < 1 or self.tokens < 1:
            raise UserError(
                f"data.batch_warmup has first {self.first} and tokens {self.tokens}; give positive numbers of tokens"
            )

    def size(self, consumed: float, full: int) -> int:
        """Tokens in the step that begins after ``consumed`` tokens, at most."""
        return min(full, int(self.first + (full - self.first) * consumed / self.tokens))

    def consumed(self, steps: int, full: int) -> int:
        """About how many tokens so many steps consume: each is larger than the one before by the same factor."""
        rate = (full - self.first) / self.tokens
        growing = math.ceil(math.log(full / self.first) / math.log1p(rate))
        grown = self.first / rate * math.expm1(min(steps, growing) * math.log1p(rate))
        return int(grown + max(0, steps - growing) * full)


@dataclass(frozen=True)
class Pack:
    """The description of one micro-batch: everything that turns sequences of the corpus into tensors.

    Attributes:
        indices: The sequences, longest first, shape [N].
        epochs: Epoch in which the order visits each, shape [N].
        starts: First token of each sequence's crop, shape [N].
        lengths: Tokens in each crop, shape [N].
        maskable: Tokens of each crop that masking may choose (all but ``<cls>`` and ``<eos>``), shape [N].
        targets: Planned number of targets (`Masking.target_counts`); in `Batch.pack`, the number actually chosen;
            shape [N].
        step_targets: Planned targets of the whole step, over all packs and ranks: what the loss is divided by.
        after: Where the data stands once the step is finished.
    """

    indices: Int64
    epochs: Int64
    starts: Int64
    lengths: Int64
    maskable: Int64
    targets: Int64
    step_targets: int
    after: Position

    def take(self, rows: Int64) -> "Pack":
        """The pack of some of the sequences, of the same step."""
        columns: dict[str, Any] = {
            name: column[rows] for name, column in vars(self).items() if isinstance(column, np.ndarray)
        }
        return replace(self, **columns)


class StepPlanner(ABC):
    """Plans steps and packs from lengths alone; no token is read.

    Args:
        corpus: What to train on; only its counts and ``lengths`` are used.
        order: The order of its sequences.
        max_length: Tokens in a crop, at most.
        warmup: How the steps grow to their full size, if they do.
    """

    def __init__(self, corpus: Corpus, order: AnyOrder, max_length: int, warmup: BatchWarmup | None = None) -> None:
        self.corpus, self.order, self.max_length, self.warmup = corpus, order, max_length, warmup
        self.epoch_size = sum(order.sizes)
        _, sample = order(np.arange(_SAMPLE))
        self.mean_length = max(1.0, float(np.minimum(corpus.lengths(sample), max_length).mean()))

    def position(self, cursor: int, tokens: int) -> Position:
        """Where the data stands after so many sequences and tokens."""
        return Position(cursor, tokens, cursor / self.epoch_size)

    def crop_starts(self, epochs: Int64, indices: Int64, room: Int64) -> Int64:
        """First token of each crop, from 0 to ``room``: a random window, a new one in each epoch."""
        draws = bits(derive_key(self.order.seed, RandomStream.CROP, epochs, indices), 0)
        return below(draws, room + 1)

    @abstractmethod
    def target_counts(self, epochs: Int64, indices: Int64, starts: Int64, lengths: Int64, maskable: Int64) -> Int64:
        """How many targets each crop has; arguments as `Pack` describes them."""

    def step(self, start: Position, global_batch_tokens: int) -> Pack:
        """The step at ``start``, as one pack: the next sequences whose crops fit into ``global_batch_tokens``.

        Or into what the warmup allows there, which is less.
        """
        if self.warmup:
            global_batch_tokens = self.warmup.size(start.cursor * self.mean_length, global_batch_tokens)
        window = int(global_batch_tokens / self.mean_length * 1.1) + 16
        while True:
            epochs, indices = self.order(np.arange(start.cursor, start.cursor + window))
            lengths = np.minimum(self.corpus.lengths(indices), self.max_length)
            ends = np.cumsum(lengths)
            if ends[-1] > global_batch_tokens:
                break
            window *= 2  # how far it looks ahead never decides what is in a step
        size = max(1, int(np.searchsorted(ends, global_batch_tokens, side="right")))
        return self.describe(epochs[:size], indices[:size], start)

    def describe(self, epochs: Int64, indices: Int64, start: Position = Position()) -> Pack:
        """All of these sequences as one pack: their crops, and how many targets each will have."""
        full = self.corpus.lengths(indices)
        lengths = np.minimum(full, self.max_length)
        starts = self.crop_starts(epochs, indices, full - lengths)
        maskable = lengths - (starts == 0) - (starts + lengths == full)
        targets = self.target_counts(epochs, indices, starts, lengths, maskable)
        after = self.position(start.cursor + len(indices), start.tokens + int(lengths.sum()))
        return Pack(indices, epochs, starts, lengths, maskable, targets, int(targets.sum()), after)


class Planner(StepPlanner):
    """Plans for masked targets.

    Args:
        corpus: What to train on.
        order: The order of its sequences.
        masking: What will mask them; it knows how many targets a sequence gets.
        max_length: Tokens in a crop, at most.
        warmup: How the steps grow to their full size, if they do.
    """

    def __init__(
        self,
        corpus: Corpus,
        order: AnyOrder,
        masking: Masking,
        max_length: int,
        warmup: BatchWarmup | None = None,
    ) -> None:
        super().__init__(corpus, order, max_length, warmup)
        self.masking = masking

    @override
    def target_counts(self, epochs: Int64, indices: Int64, starts: Int64, lengths: Int64, maskable: Int64) -> Int64:
        return self.masking.target_counts(epochs, indices, maskable)


def share_out(pack: Pack, parts: int, attention_cost: float = 0.0) -> list[Pack]:
    """Divide a pack into ``parts`` packs of nearly equal cost, so that no rank waits for another.

    Longest first, each sequence to the pack that is cheapest so far (Graham 1969: at most 4/3 of the optimum, and
    within a fraction of a percent for the hundreds of sequences in a real step).

    Args:
        pack: What to divide; at least ``parts`` sequences.
        parts: How many packs to make.
        attention_cost: Cost of attending to one token relative to a token's linear layers: a crop of L tokens costs
            ``L * (1 + attention_cost * L)``.
    """
    longest_first = np.lexsort((pack.indices, -pack.lengths))
    if parts == 1:
        return [pack.take(longest_first)]
    lengths = pack.lengths[longest_first]
    costs = (lengths * (1.0 + attention_cost * lengths)).tolist()
    rows: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0.0, part) for part in range(parts)]
    for row, cost in zip(longest_first.tolist(), costs, strict=True):
        total, part = heap[0]
        rows[part].append(row)
        heapq.heapreplace(heap, (total + cost, part))
    return [pack.take(np.array(row, np.int64)) for row in rows]


class PackSampler(DistributedSampler[Pack]):
    """Yields this rank's packs, one a micro-batch, for the whole run.

    A ``DistributedSampler`` by class, so that Lightning leaves it alone: it wraps and shuffles any other kind.

    Args:
        planner: Plans the steps.
        global_batch_tokens: Tokens in a step, at most.
        max_steps: Optimizer steps in the whole run.
        start: A number of steps taken, and where the data stands after them.
        steps_taken: How many steps are taken when an iteration begins: it begins with the next one.
        rank: This process among ``world_size``.
        world_size: Processes that share a step.
        accumulate_grad_batches: Micro-batches of a step on each rank.
        attention_cost: See `share_out`.
        skips: Places in the order from which the data jumps to others, for runs that leave a stretch out.
    """

    def __init__(
        self,
        planner: StepPlanner,
        *,
        global_batch_tokens: int,
        max_steps: int,
        start: tuple[int, Position],
        steps_taken: Callable[[], int],
        rank: int,
        world_size: int,
        accumulate_grad_batches: int,
        attention_cost: float,
        skips: Mapping[int, int] | None = None,
    ) -> None:
        self.skips = skips or {}
        self.planner = planner
        self.global_batch_tokens = global_batch_tokens
        self.max_steps = max_steps
        self.rank, self.num_replicas = rank, world_size
        self.accumulate_grad_batches = accumulate_grad_batches
        self.attention_cost = attention_cost
        self.steps_taken = steps_taken
        # Where the data stands after n steps, for those planned so far: planning runs ahead of training.
        self._positions = dict([start])

    def __len__(self) -> int:
        # The whole run, not what is left of it: Lightning counts from the run's first micro-batch, also on resume.
        return self.max_steps * self.accumulate_grad_batches

    def __iter__(self) -> Iterator[Pack]:
        parts = self.num_replicas * self.accumulate_grad_batches
        for step in range(self.steps_taken(), self.max_steps):
            plan = self.planner.step(jump(self._positions[step], self.skips), self.global_batch_tokens)
            self._positions[step + 1] = plan.after
            yield from share_out(plan, parts, self.attention_cost)[self.rank :: self.num_replicas]

    def position_after(self, step: int) -> Position:
        """Where the data stands after ``step`` steps; forgets the steps before."""
        for old in [number for number in self._positions if number < step]:
            del self._positions[old]
        return self._positions[step]

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the epoch of a sequence follows from the cursor."""


def jump(position: Position, skips: Mapping[int, int]) -> Position:
    """Where the next step begins: here, or where a skip leads."""
    return replace(position, cursor=skips.get(position.cursor, position.cursor))


def validation_packs(planner: StepPlanner, pack_tokens: int, world_size: int) -> list[list[Pack]]:
    """The whole corpus once, in epoch 0, as packs of about ``pack_tokens``: a list for each rank, equally many each."""
    everything = np.arange(planner.corpus.num_sequences)
    plan = planner.describe(np.zeros_like(everything), everything)
    rounds = max(1, -(-int(plan.lengths.sum()) // (pack_tokens * world_size)))
    parts = min(rounds * world_size, planner.corpus.num_sequences)
    if parts < world_size:
        raise UserError(f"{parts} validation sequences cannot occupy {world_size} processes; validate on a larger set")
    packs = share_out(plan, parts - parts % world_size)
    return [packs[rank::world_size] for rank in range(world_size)]


class FixedSampler(DistributedSampler[Any]):
    """A fixed list of packs; a ``DistributedSampler`` by class for the reason given at `PackSampler`."""

    def __init__(self, packs: list[Pack]) -> None:
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[Pack]:
        return iter(self.packs)

    def set_epoch(self, epoch: int) -> None:
        """Nothing: every epoch asks the same question."""

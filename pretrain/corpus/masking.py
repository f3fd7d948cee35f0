"""Masking: tokens to inputs and targets. Pure functions of (seed, epoch, sequence index); nothing here holds state."""

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.counter import U64, Int64, RandomStream, below, bits, derive_key, uniform
from pretrain.errors import UserError

Bool = NDArray[np.bool_]

MaskUnit = Literal["token", "span", "word"]
MaskDraws = Literal["fixed", "independent"]

_MEAN_SPAN_LENGTH = 3.0


class Crops(NamedTuple):
    """What masking needs to know of the sequences of a pack, one number for each in every column.

    Attributes:
        first: Place in the pack of the first token that may be masked, ascending.
        maskable: Number of such tokens from there on.
        counts: Number of targets that were planned, from `Masking.target_counts`.
        epochs: Epoch in which the order visits the sequence.
        indices: Index of the sequence in the corpus.
    """

    first: Int64
    maskable: Int64
    counts: Int64
    epochs: Int64
    indices: Int64


@dataclass(frozen=True)
class Masking:
    """Which tokens a model is asked for, and what it sees there instead (Devlin et al. 2019, section 3.1).

    Of a sequence's ``n`` maskable tokens, ``mlm_probability * n`` are targets; the names of the three shares are those
    of transformers' ``DataCollatorForLanguageModeling``. How they are chosen:

    ========  ===========  ==========================================================================================
    unit      draws        targets
    ========  ===========  ==========================================================================================
    token     fixed        exactly the planned number, which is ``mlm_probability * n`` rounded up or down at random
                           (as fairseq's ``MaskTokensDataset``: the expectation is exact, the variance small)
    token     independent  each token by itself: a binomial number
    span      fixed        exactly the planned number, in spans of geometric length, the last one cut (Joshi et al.
                           2020, SpanBERT, section 3.1, without its limit of 10)
    word      fixed        whole words; the planned number in expectation, and within one word of it
    word      independent  each word by itself
    ========  ===========  ==========================================================================================

    In all of them every token is equally likely to be a target, and the planned number follows from lengths alone.
    Each target becomes ``<mask>``, a random token or stays, whatever happens to the other tokens of its span or word.

    Attributes:
        mlm_probability: Share of the maskable tokens that are targets, in (0, 1]; or the lowest and the highest share,
            between which one is drawn for each sequence in each epoch.
        mask_replace_prob: Share of the targets that become the mask token.
        random_replace_prob: Share of the targets that become a random token; the rest keeps its token.
        mask_token_id: Id of the mask token.
        replacement_ids: Ids that random tokens are drawn from: never special ones.
        seed: The run's seed.
        unit: What is chosen: a token, a span of tokens, or a whole word.
        draws: How many are chosen: a fixed number, or each by itself.
        mean_span_length: Mean number of tokens of a span; 3 if not given.

    Raises:
        UserError: On shares, lengths or combinations that cannot be.
    """

    mlm_probability: float | tuple[float, float]
    mask_replace_prob: float
    random_replace_prob: float
    mask_token_id: int
    replacement_ids: Int64
    seed: int
    unit: MaskUnit = "token"
    draws: MaskDraws = "fixed"
    mean_span_length: float | None = None

    def __post_init__(self) -> None:
        low, high = self.range
        if not 0 < low <= high <= 1:
            raise UserError(
                f"mlm_probability is {self.mlm_probability}; give a share above 0 and at most 1, such as 0.15, or two "
                "to draw from for each sequence, such as [0.1, 0.3]"
            )
        shares = (self.mask_replace_prob, self.random_replace_prob)
        if not (min(shares) >= 0 and sum(shares) <= 1 + 1e-9):
            raise UserError(
                f"mask_replace_prob and random_replace_prob are {shares[0]} and {shares[1]}; "
                "give two shares of the targets that add up to at most 1, such as 0.8 and 0.1"
            )
        for name, value, kinds in (("unit", self.unit, MaskUnit), ("draws", self.draws, MaskDraws)):
            if value not in get_args(kinds):
                raise UserError(f"mask_{name} is '{value}'; give one of {', '.join(get_args(kinds))}")
        if self.unit == "span" and self.draws == "independent":
            raise UserError(
                "mask_unit span goes with mask_draws fixed only: spans share out a fixed number of targets; leave "
                "mask_draws out, or choose mask_unit token or word"
            )
        if self.mean_span_length is not None and self.unit != "span":
            raise UserError(
                f"mean_span_length is {self.mean_span_length}, but mask_unit is {self.unit}; leave it out, or set "
                "mask_unit to span"
            )
        if self.mean_span_length is not None and not 1 <= self.mean_span_length <= 1000:
            raise UserError(f"mean_span_length is {self.mean_span_length}; give 1 to 1000 tokens, such as 3")

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest share of targets in a sequence."""
        given = self.mlm_probability
        return (given[0], given[1]) if isinstance(given, tuple | list) else (given, given)

    @property
    def mean_share(self) -> float:
        """Share of the maskable tokens that are targets, on average."""
        return sum(self.range) / 2

    def deviation(self, tokens: float, mean_length: float) -> float:
        """Standard deviation of the number of targets in a pack, roughly: what static shapes leave room for."""
        low, high = self.range
        share = self.mean_share
        variance = 2 * tokens * mean_length * (high - low) ** 2 / 12  # 2: lengths differ, and the long ones count most
        if self.draws == "independent":
            variance += tokens * share * (1 - share) * (1 if self.unit == "token" else 3)
        elif self.unit == "word":
            variance += tokens / mean_length
        return float(np.sqrt(variance))

    def target_counts(self, epochs: Int64, indices: Int64, maskable: Int64) -> Int64:
        """How many of each sequence's ``maskable`` tokens are planned to be targets: known without looking at a token.

        It is their exact number for units of tokens and spans, and their expectation (rounded up or down at random)
        for words and independent draws. A step's loss is divided by the planned number, which is the same however the
        step is shared out.
        """
        chance = uniform(bits(derive_key(self.seed, RandomStream.MASK_COUNT, epochs, indices), 0))
        return np.floor(self._shares(epochs, indices) * maskable + chance).astype(np.int64)

    def apply(
        self, tokens: NDArray[np.integer], crops: Crops, word_starts: Bool | None = None
    ) -> tuple[Int64, Int64, Int64]:
        """Mask one pack.

        Args:
            tokens: The pack's tokens, shape [T].
            crops: Where its sequences lie in it, and which they are.
            word_starts: For each token, whether a word begins there, shape [T]; needed for whole words.

        Returns:
            The corrupted tokens [T], the places of the targets in the pack [M] (ascending), and the original tokens
            there [M].
        """
        is_target = np.zeros(len(tokens), np.bool_)
        if self.unit == "word" or self.draws == "independent":
            is_target[self._units(crops, word_starts)] = True
        else:
            owner, place = self._spans(crops) if self.unit == "span" else self._tokens(crops)
            is_target[crops.first[owner] + place] = True
        positions = np.flatnonzero(is_target)

        bounds = np.append(np.searchsorted(positions, crops.first), len(positions))
        owner = np.repeat(np.arange(len(crops.first)), np.diff(bounds))
        place = positions - crops.first[owner]
        action = bits(self._keys(RandomStream.MASK_ACTION, crops)[owner], place)
        targets = tokens[positions].astype(np.int64)
        share = uniform(action)
        # The choice of a random token takes fresh bits: those of `action` already decided that there is one.
        random_tokens = self.replacement_ids[below(bits(action, 0), len(self.replacement_ids))]
        corrupted = np.where(share < self.mask_replace_prob + self.random_replace_prob, random_tokens, targets)
        corrupted[share < self.mask_replace_prob] = self.mask_token_id

        inputs = tokens.astype(np.int64)
        inputs[positions] = corrupted
        return inputs, positions, targets

    def _shares(self, epochs: Int64, indices: Int64) -> NDArray[np.float64]:
        low, high = self.range
        return low + (high - low) * uniform(bits(derive_key(self.seed, RandomStream.MASK_SHARE, epochs, indices), 0))

    def _keys(self, stream: RandomStream, crops: Crops) -> U64:
        return derive_key(self.seed, stream, crops.epochs, crops.indices)

    def _tokens(self, crops: Crops) -> tuple[Int64, Int64]:
        """Whose each target is, and its place among that sequence's maskable tokens."""
        return _without_replacement(self._keys(RandomStream.MASK_POSITION, crops), crops.maskable, crops.counts)

    def _spans(self, crops: Crops) -> tuple[Int64, Int64]:
        """The same for spans.

        Lengths are drawn until they reach the planned number, and the last is cut. The spans are then laid out among
        the other tokens, every arrangement as likely as any other, and turned around the sequence as around a ring:
        otherwise its first and last tokens would be chosen less often.
        """
        rows = np.arange(len(crops.first))
        owner = np.repeat(rows, crops.counts)
        number = _within(crops.counts)
        draws = bits(self._keys(RandomStream.MASK_SPAN, crops)[owner], number)
        lengths = 1 + np.searchsorted(_geometric(self.mean_span_length or _MEAN_SPAN_LENGTH), uniform(draws), "right")
        lengths = np.minimum(lengths, crops.counts[owner] - _before(lengths, crops.counts))
        owner, lengths = owner[lengths > 0], lengths[lengths > 0]
        spans = np.bincount(owner, minlength=len(rows))

        slots = crops.maskable - crops.counts + spans
        _, slot = _without_replacement(self._keys(RandomStream.MASK_POSITION, crops), slots, spans)
        begins = slot + _before(lengths - 1, spans)
        owner = np.repeat(owner, lengths)
        turn = below(bits(self._keys(RandomStream.MASK_TURN, crops), 0), crops.maskable)
        return owner, (np.repeat(begins, lengths) + _within(lengths) + turn[owner]) % crops.maskable[owner]

    def _units(self, crops: Crops, word_starts: Bool | None) -> Int64:
        """Places in the pack of the targets, for units of any length, or that are drawn each by itself."""
        sequence = np.repeat(np.arange(len(crops.first)), crops.maskable)
        offset = _within(crops.maskable)
        places = crops.first[sequence] + offset
        if self.unit == "word":
            assert word_starts is not None
            begins = np.flatnonzero(word_starts[places] | (offset == 0))  # a crop may begin within a word
        else:
            begins = np.arange(len(places))
        lengths = np.diff(begins, append=len(places))
        owner = sequence[begins]
        draws = bits(self._keys(RandomStream.MASK_POSITION, crops)[owner], offset[begins])
        if self.draws == "independent":
            chosen = uniform(draws) < self._shares(crops.epochs, crops.indices)[owner]
        else:
            # The units in random order, laid around a ring that is turned at random: those that begin in an arc as long
            # as the planned number. So every unit, however long, has the same chance, and the expectation is exact.
            order = np.argsort(owner.astype(np.uint64) << np.uint64(44) | draws >> np.uint64(20))
            around = _before(lengths[order], np.bincount(owner, minlength=len(crops.first)))
            turn = below(bits(self._keys(RandomStream.MASK_TURN, crops), 0), crops.maskable)
            chosen = np.empty(len(begins), np.bool_)
            chosen[order] = (around + turn[owner]) % crops.maskable[owner] < crops.counts[owner]
        return places[np.repeat(chosen, lengths)]


def _without_replacement(keys: U64, sizes: Int64, counts: Int64) -> tuple[Int64, Int64]:
    """For each row ``counts`` of the numbers below ``sizes``, every choice as likely as any other.

    Numbers are drawn until there are enough different ones: with its work in proportion to the targets, this takes a
    third of the time of sorting a random number for each token.

    Returns:
        The row of each number, and the number: ascending.
    """
    leave_out = 2 * counts > sizes  # the fewer of the two are drawn
    wanted = np.where(leave_out, sizes - counts, counts)
    first = np.cumsum(sizes) - sizes
    spare = wanted * wanted // np.maximum(sizes, 1) + np.sqrt(wanted).astype(np.int64) + 2
    taken = np.zeros(int(sizes.sum()), np.bool_)
    while True:
        tries = np.where(wanted > 0, wanted + spare, 0)  # how many never decides which numbers are the first
        drawn = below(bits(np.repeat(keys, tries), _within(tries)), np.repeat(sizes, tries)) + np.repeat(first, tries)
        number = np.arange(len(drawn))
        earliest = np.full(len(taken), len(drawn))
        np.minimum.at(earliest, drawn, number)
        different = np.concatenate([[0], np.cumsum(earliest[drawn] == number)])
        ends = np.cumsum(tries)
        before = different[ends - tries]
        if (different[ends] - before >= wanted).all():
            break
        spare *= 2
    is_new = np.diff(different) > 0
    taken[drawn[is_new & (different[1:] <= np.repeat(before + wanted, tries))]] = True
    taken ^= np.repeat(leave_out, sizes)
    rows = np.repeat(np.arange(len(sizes)), counts)
    return rows, np.flatnonzero(taken) - first[rows]


def _within(sizes: Int64) -> Int64:
    """0, 1, ... up to each size, end to end."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _before(values: Int64, sizes: Int64) -> Int64:
    """For each value the sum of those before it in its row; the rows, of these sizes, lie end to end."""
    sums = np.concatenate([[0], np.cumsum(values)])
    before: Int64 = sums[:-1] - np.repeat(sums[np.cumsum(sizes) - sizes], sizes)
    return before


@cache
def _geometric(mean: float) -> NDArray[np.float64]:
    """Chances of at most 1, 2, ... of a geometric distribution: by multiplication, so to the bit on every machine."""
    longer, chances = 1.0, []
    while longer > 2**-53:
        longer *= 1 - 1 / mean
        chances.append(1 - longer)
    return np.array(chances)

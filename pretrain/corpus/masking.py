"""Masking: tokens to inputs and targets. Pure functions of (seed, epoch, sequence index); nothing here holds state."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.corpus.counter import Stream, below, bits, derive_key, uniform
from pretrain.errors import UserError

Int64 = NDArray[np.int64]

# A sort key: the sequence's place in its pack (20 bits), random bits, the token's place in its sequence.
_RANDOM_BITS, _POSITION_BITS = 26, 18
MAX_TOKENS_PER_SEQUENCE = 2**_POSITION_BITS


@dataclass(frozen=True)
class Masking:
    """BERT's masked-language-model corruption with a fixed count per sequence.

    Of ``n`` maskable tokens, ``mlm_probability * n`` are chosen, rounded up or down at random so that the expectation
    is exact (probabilistic rounding, as fairseq's ``MaskTokensDataset`` does; independent draws would add variance).
    A chosen token becomes ``<mask>``, a random token or stays, with the given probabilities. The names are those of
    transformers' ``DataCollatorForLanguageModeling``. Reference: Devlin et al. 2019, section 3.1.

    Attributes:
        mlm_probability: Share of the maskable tokens that are targets, in (0, 1].
        mask_replace_prob: Share of the targets that become the mask token.
        random_replace_prob: Share of the targets that become a random token; the rest keeps its token.
        mask_token_id: Id of the mask token.
        replacement_ids: Ids that random tokens are drawn from: never special ones.
        seed: The run's seed.
    """

    mlm_probability: float
    mask_replace_prob: float
    random_replace_prob: float
    mask_token_id: int
    replacement_ids: Int64
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.mlm_probability <= 1:
            raise UserError(
                f"mlm_probability is {self.mlm_probability}; give a share above 0 and at most 1, such as 0.15"
            )
        shares = (self.mask_replace_prob, self.random_replace_prob)
        if not (min(shares) >= 0 and sum(shares) <= 1 + 1e-9):
            raise UserError(
                f"mask_replace_prob and random_replace_prob are {shares[0]} and {shares[1]}; "
                "give two shares of the targets that add up to at most 1, such as 0.8 and 0.1"
            )

    def target_counts(self, epochs: Int64, indices: Int64, maskable: Int64) -> Int64:
        """How many of each sequence's ``maskable`` tokens become targets: known without looking at a token."""
        chance = uniform(bits(derive_key(self.seed, Stream.MASK_COUNT, epochs, indices), 0))
        return np.floor(self.mlm_probability * maskable + chance).astype(np.int64)

    def apply(
        self,
        tokens: NDArray[np.integer],
        first: Int64,
        maskable: Int64,
        counts: Int64,
        epochs: Int64,
        indices: Int64,
    ) -> tuple[Int64, Int64, Int64]:
        """Mask one pack.

        Args:
            tokens: The pack's tokens, shape [T].
            first: Place of each sequence's first maskable token in the pack, shape [N], ascending.
            maskable: Number of maskable tokens from there on, shape [N].
            counts: Number of targets of each sequence, from `target_counts`, shape [N].
            epochs: Epoch of each sequence, shape [N].
            indices: Index of each sequence in the corpus, shape [N].

        Returns:
            The corrupted tokens [T], the places of the targets in the pack [M] (ascending), and the original tokens
            there [M].
        """
        sequence = np.repeat(np.arange(len(indices)), maskable)
        offset = np.arange(len(sequence)) - np.repeat(np.cumsum(maskable) - maskable, maskable)

        # The `counts` smallest of one random number for each maskable token: a uniform choice without replacement. The
        # sequence leads the sort key and the offset ends it, so one sort serves the whole pack.
        draws = bits(np.repeat(derive_key(self.seed, Stream.MASK_POSITION, epochs, indices), maskable), offset)
        keys = (
            sequence.astype(np.uint64) << np.uint64(_RANDOM_BITS + _POSITION_BITS)
            | (draws >> np.uint64(64 - _RANDOM_BITS)) << np.uint64(_POSITION_BITS)
            | offset.astype(np.uint64)
        )
        keys.sort()
        rank = np.arange(len(keys)) - np.repeat(np.cumsum(maskable) - maskable, maskable)
        chosen = keys[rank < np.repeat(counts, maskable)]
        owner = (chosen >> np.uint64(_RANDOM_BITS + _POSITION_BITS)).astype(np.int64)
        place = (chosen & np.uint64(2**_POSITION_BITS - 1)).astype(np.int64)

        action = bits(derive_key(self.seed, Stream.MASK_ACTION, epochs, indices)[owner], place)
        positions = first[owner] + place
        targets = tokens[positions].astype(np.int64)
        share = uniform(action)
        # The choice of a random token takes fresh bits: those of `action` already decided that there is one.
        random_tokens = self.replacement_ids[below(bits(action, 0), len(self.replacement_ids))]
        corrupted = np.where(share < self.mask_replace_prob + self.random_replace_prob, random_tokens, targets)
        corrupted[share < self.mask_replace_prob] = self.mask_token_id

        inputs = tokens.astype(np.int64)
        inputs[positions] = corrupted
        ascending = np.argsort(positions)
        return inputs, positions[ascending], targets[ascending]

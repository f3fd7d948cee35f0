"""Masking: which tokens a step asks about, and what it shows instead."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pretrain.corpus.masking import Crops, Masking
from pretrain.corpus.packed import MAX_TOKENS_PER_SEQUENCE
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.errors import UserError

CLS, EOS, MASK = ProteinTokenizer.cls_token_id, ProteinTokenizer.eos_token_id, ProteinTokenizer.mask_token_id
RESIDUES = ProteinTokenizer.replacement_ids
BERT = Masking(0.15, 0.8, 0.1, MASK, RESIDUES, seed=0)
VALIDATION = Masking(0.15, 1.0, 0.0, MASK, RESIDUES, seed=0)


class Masked(NamedTuple):
    """One sequence of a masked pack."""

    inputs: list[int]
    positions: list[int]
    targets: list[int]


def sequence(residues: int, index: int = 0) -> NDArray[np.uint8]:
    body = np.random.default_rng([residues, index]).choice(RESIDUES, residues)
    return np.array([CLS, *body, EOS], np.uint8)


def words(residues: int, index: int = 0) -> NDArray[np.bool_]:
    """Words of 1 to 6 tokens; the ends are words of their own."""
    starts = np.zeros(residues + 2, np.bool_)
    starts[np.cumsum(np.random.default_rng([residues, index, 1]).integers(1, 7, residues)) % (residues + 2)] = True
    starts[[0, -1]] = True
    return starts


def mask(masking: Masking, sequences: list[NDArray[np.uint8]], epochs: list[int], indices: list[int]) -> list[Masked]:
    """Mask whole sequences as one pack, and take the pack apart again."""
    lengths = np.array([len(tokens) for tokens in sequences])
    begins = np.cumsum(lengths) - lengths
    where = np.array(epochs), np.array(indices)
    counts = masking.target_counts(*where, lengths - 2)
    starts = np.concatenate([words(len(tokens) - 2, index) for tokens, index in zip(sequences, indices, strict=True)])
    crops = Crops(begins + 1, lengths - 2, counts, *where)
    inputs, positions, targets = masking.apply(np.concatenate(sequences), crops, starts)
    assert (np.diff(positions) > 0).all()
    parts = []
    for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True):
        here = slice(*np.searchsorted(positions, [begin, begin + length]))
        parts.append(
            Masked(inputs[begin : begin + length].tolist(), (positions[here] - begin).tolist(), targets[here].tolist())
        )
    assert sum(len(part.positions) for part in parts) == len(positions)
    return parts


MODES: list[dict[str, Any]] = [
    {},
    {"draws": "independent"},
    {"unit": "span"},
    {"unit": "span", "mean_span_length": 1.0},
    {"unit": "span", "mean_span_length": 20.0},
    {"unit": "word"},
    {"unit": "word", "draws": "independent"},
]
modes = st.sampled_from(MODES)
shares = st.floats(0.01, 1) | st.tuples(st.floats(0.01, 0.5), st.floats(0.5, 1))
maskings = st.builds(
    lambda p, masked, randomised, seed, mode: Masking(
        p, masked, (1 - masked) * randomised, MASK, RESIDUES, seed, **mode
    ),
    shares,
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(-(2**65), 2**65),
    modes,
)
packs = st.lists(  # (residues, epoch, index) of each sequence
    st.tuples(st.integers(0, 60), st.integers(0, 2**31), st.integers(0, 2**40)),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[1:],
)


# --- a function of (seed, epoch, index) -------------------------------------------------------------------------------


@given(maskings, packs, st.randoms(use_true_random=False))
def test_a_mask_is_the_same_in_any_pack_and_any_neighbourhood(
    masking: Masking, pack: list[tuple[int, int, int]], shuffle
) -> None:
    together = mask(masking, [sequence(n, i) for n, _, i in pack], [e for _, e, _ in pack], [i for _, _, i in pack])
    alone = [mask(masking, [sequence(n, i)], [e], [i])[0] for n, e, i in pack]
    assert together == alone
    order = list(range(len(pack)))
    shuffle.shuffle(order)
    moved = [pack[row] for row in order]
    shuffled = mask(masking, [sequence(n, i) for n, _, i in moved], [e for _, e, _ in moved], [i for _, _, i in moved])
    assert shuffled == [alone[row] for row in order]


def test_another_epoch_index_or_seed_gives_another_mask() -> None:
    tokens = sequence(200)
    (base,) = mask(BERT, [tokens], [0], [0])
    others = {
        "epoch": mask(BERT, [tokens], [1], [0]),
        "index": mask(BERT, [tokens], [0], [1]),
        "seed": mask(replace(BERT, seed=1), [tokens], [0], [0]),
    }
    for what, (other,) in others.items():
        # About 4.5 of 30 positions agree by chance.
        assert len(set(base.positions) & set(other.positions)) < 15, what


def test_the_choice_of_positions_does_not_depend_on_what_replaces_them() -> None:
    (shown,), (hidden,) = (mask(masking, [sequence(200)], [3], [9]) for masking in (BERT, VALIDATION))
    assert shown.positions == hidden.positions


# --- which positions --------------------------------------------------------------------------------------------------


@given(maskings, packs)
def test_as_many_positions_are_chosen_as_were_planned(masking: Masking, pack: list[tuple[int, int, int]]) -> None:
    residues, epochs, indices = (list(column) for column in zip(*pack, strict=True))
    planned = masking.target_counts(np.array(epochs), np.array(indices), np.array(residues))
    masked = mask(masking, [sequence(n, i) for n, _, i in pack], epochs, indices)
    found = np.array([len(part.positions) for part in masked])
    if masking.draws == "fixed" and masking.unit != "word":
        assert found.tolist() == planned.tolist()
    elif masking.draws == "fixed":
        longest = [int(np.diff(np.flatnonzero(words(n, i)), prepend=0).max()) for n, _, i in pack]
        assert (np.abs(found - planned) < longest).all()
    assert (found <= residues).all()
    assert all(found[row] == n for row, n in enumerate(residues) if planned[row] == n and masking.range[0] == 1)


@given(maskings, st.integers(0, 2**17), st.integers(0, 2**40))
def test_the_count_is_the_share_rounded_up_or_down(masking: Masking, maskable: int, index: int) -> None:
    (count,) = masking.target_counts(np.array([0]), np.array([index]), np.array([maskable]))
    low, high = masking.range
    assert low * maskable - 1 < count < high * maskable + 1
    assert 0 <= count <= maskable


@given(maskings, packs)
def test_whole_words_are_masked_or_none_of_them(masking: Masking, pack: list[tuple[int, int, int]]) -> None:
    draws = masking.draws
    whole = replace(masking, unit="word", draws=draws, mean_span_length=None)
    for (residues, _, index), part in zip(pack, mask(whole, *columns(pack)), strict=True):
        word = np.cumsum(words(residues, index) | (np.arange(residues + 2) == 1))
        chosen = np.isin(np.arange(residues + 2), part.positions)
        assert not set(word[chosen]) & set(word[1:-1][~chosen[1:-1]])


@pytest.mark.parametrize(
    ("probability", "maskable"), [(0.15, 1), (0.15, 3), (0.15, 33), (0.15, 100), (0.4, 4), (1.0, 7)]
)
def test_the_count_is_exact_in_expectation(probability: float, maskable: int) -> None:
    draws = 200_000
    indices = np.arange(draws)
    masking = replace(BERT, mlm_probability=probability)
    counts = masking.target_counts(np.zeros_like(indices), indices, np.full(draws, maskable))
    share = probability * maskable % 1
    assert abs(counts.mean() - probability * maskable) <= 5 * np.sqrt(share * (1 - share) / draws) + 1e-9
    assert set(counts.tolist()) <= {
        int(np.floor(probability * maskable + 1e-9)),
        int(np.ceil(probability * maskable - 1e-9)),
    }


def frequencies(masking: Masking, residues: int, draws: int, vary: str) -> tuple[NDArray[np.float64], list[int]]:
    """How often each position is a target, and how many there are in each draw."""
    if vary == "seed":
        drawn = [mask(replace(masking, seed=seed), [sequence(residues)], [0], [0])[0] for seed in range(draws)]
    else:
        numbers, zeros = list(range(draws)), [0] * draws
        epochs, indices = (numbers, zeros) if vary == "epoch" else (zeros, numbers)
        drawn = mask(masking, [sequence(residues)] * draws, epochs, indices)
    positions = np.concatenate([part.positions for part in drawn]).astype(int) - 1
    return np.bincount(positions, minlength=residues).astype(float), [len(part.positions) for part in drawn]


@pytest.mark.parametrize("vary", ["epoch", "index", "seed"])
def test_every_position_is_equally_likely(vary: str) -> None:
    residues, draws = 20, 1500 if vary == "seed" else 6000
    counts, _ = frequencies(BERT, residues, draws, vary)
    chosen = 3  # 0.15 * 20, without a remainder
    assert counts.sum() == draws * chosen
    # Drawn without replacement: the variance of each count is that of a Bernoulli variable times (n - k) / (n - 1).
    chi_square = ((counts - draws * chosen / residues) ** 2).sum() / (draws * chosen / residues)
    chi_square *= (residues - 1) / (residues - chosen)
    freedom = residues - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("share", [0.15, 0.6, (0.05, 0.4)])
def test_every_position_is_equally_likely_in_every_mode(
    mode: dict[str, Any], share: float | tuple[float, float]
) -> None:
    """Also at the ends, whatever the spans; and in words of any length."""
    residues, draws = 40, 8000
    masking = replace(BERT, mlm_probability=share, **mode)
    counts, _ = frequencies(masking, residues, draws, "epoch")  # of one sequence, so with the same words
    deviation = np.sqrt(draws * masking.mean_share * (1 - masking.mean_share))
    assert np.abs(counts - draws * masking.mean_share).max() < 4.5 * deviation


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_independent_draws_give_a_binomial_number_of_targets(share: float) -> None:
    residues, draws = 30, 20_000
    masking = replace(BERT, mlm_probability=share, draws="independent")
    _, found = frequencies(masking, residues, draws, "index")
    observed = np.bincount(found, minlength=residues + 1)
    expected = np.array(
        [math.comb(residues, k) * share**k * (1 - share) ** (residues - k) for k in range(residues + 1)]
    )
    expected *= draws
    likely = expected >= 10
    chi_square = ((observed - expected)[likely] ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)
    assert np.mean(found) == pytest.approx(share * residues, rel=0.01)


def test_words_drawn_by_themselves_give_a_binomial_number_of_words() -> None:
    residues, draws, share = 60, 20_000, 0.3
    masking = replace(BERT, mlm_probability=share, unit="word", draws="independent")
    first = np.flatnonzero(words(residues) | (np.arange(residues + 2) == 1))[1:-1]
    drawn = mask(masking, [sequence(residues)] * draws, list(range(draws)), [0] * draws)
    found = np.array([np.isin(first, part.positions).sum() for part in drawn])
    assert found.mean() == pytest.approx(share * len(first), rel=0.01)
    assert found.var() == pytest.approx(share * (1 - share) * len(first), rel=0.05)


@pytest.mark.parametrize("mean", [1.0, 3.0, 8.0])
def test_spans_have_geometric_lengths(mean: float) -> None:
    residues, draws = 40_000, 6  # long, so that the one span that is cut and the one that wraps count for little
    masking = replace(BERT, mlm_probability=0.1, unit="span", mean_span_length=mean)
    drawn = mask(masking, [sequence(residues)] * draws, list(range(draws)), [0] * draws)
    runs = np.concatenate(
        [np.diff(np.flatnonzero(np.diff(part.positions, prepend=-9, append=9**9) > 1)) for part in drawn]
    )
    # Spans may touch, and are then one run: each of the slots between the other tokens is a span's with this chance.
    touch = (0.1 / mean) / (0.9 + 0.1 / mean)
    assert runs.mean() == pytest.approx(mean / (1 - touch), rel=0.05)
    stop = (1 - touch) / mean  # a geometric number of geometric lengths is geometric
    for longest in (1, 2, 4):
        assert (runs > longest).mean() == pytest.approx((1 - stop) ** longest, abs=0.02)


def test_the_share_is_drawn_for_each_sequence_and_epoch_from_its_range() -> None:
    residues, draws = 1000, 4000
    masking = replace(BERT, mlm_probability=(0.1, 0.4))
    for vary in ("epoch", "index"):
        _, found = frequencies(masking, residues, draws, vary)
        shares = np.sort(found) / residues
        assert (shares[0], shares[-1]) == (pytest.approx(0.1, abs=0.003), pytest.approx(0.4, abs=0.003))
        uniform = np.linspace(0.1, 0.4, draws)
        assert np.abs(shares - uniform).max() < 0.3 * 2 / np.sqrt(draws)  # Kolmogorov and Smirnov


def test_pairs_of_positions_are_chosen_independently() -> None:
    residues, draws = 10, 20_000
    masking = replace(BERT, mlm_probability=0.2)
    drawn = mask(masking, [sequence(residues)] * draws, [0] * draws, list(range(draws)))
    counts = np.zeros((residues, residues))
    for part in drawn:
        counts[tuple(np.array(part.positions) - 1)] += 1
    counts = counts[np.triu_indices(residues, 1)]
    assert counts.sum() == draws
    expected = draws / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < (len(counts) - 1) + 5 * np.sqrt(2 * (len(counts) - 1))


@given(maskings, packs)
def test_the_ends_are_never_chosen_and_all_else_at_a_share_of_one(
    masking: Masking, pack: list[tuple[int, int, int]]
) -> None:
    masked = mask(replace(masking, mlm_probability=1.0), *columns(pack))
    for (residues, _, _), part in zip(pack, masked, strict=True):
        assert part.positions == list(range(1, residues + 1))
        assert (part.inputs[0], part.inputs[-1]) == (CLS, EOS)


def columns(pack: list[tuple[int, int, int]]) -> tuple[list[NDArray[np.uint8]], list[int], list[int]]:
    return [sequence(n, i) for n, _, i in pack], [e for _, e, _ in pack], [i for _, _, i in pack]


# --- what replaces them -----------------------------------------------------------------------------------------------


@given(maskings, packs)
def test_all_but_the_targets_are_untouched_and_the_targets_are_the_original_tokens(
    masking: Masking, pack: list[tuple[int, int, int]]
) -> None:
    for original, part in zip(columns(pack)[0], mask(masking, *columns(pack)), strict=True):
        restored = np.array(part.inputs)
        restored[part.positions] = part.targets
        assert restored.tolist() == original.tolist()


@given(maskings, packs)
def test_only_residues_and_the_mask_are_put_in(masking: Masking, pack: list[tuple[int, int, int]]) -> None:
    for part in mask(masking, *columns(pack)):
        assert {part.inputs[position] for position in part.positions} <= {MASK, *RESIDUES.tolist()}


@given(packs)
def test_in_validation_every_target_is_masked(pack: list[tuple[int, int, int]]) -> None:
    for part in mask(VALIDATION, *columns(pack)):
        assert all(part.inputs[position] == MASK for position in part.positions)


def masked_x(masking: Masking, sequences: int = 400) -> NDArray[np.int64]:
    """What stands in place of the targets of sequences that consist of ``X``, which is no residue to draw."""
    x = ProteinTokenizer.tokens.index("X")
    tokens = np.array([CLS, *[x] * 500, EOS], np.uint8)
    drawn = mask(masking, [tokens] * sequences, [0] * sequences, list(range(sequences)))
    return np.array([part.inputs[position] for part in drawn for position in part.positions])


@pytest.mark.parametrize("mode", [{}, {"draws": "independent"}, {"unit": "span"}, {"unit": "word"}], ids=str)
@pytest.mark.parametrize(("masked", "randomised"), [(0.8, 0.1), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 0.0)])
def test_targets_are_masked_randomised_and_kept_in_the_shares_asked_for(
    masked: float, randomised: float, mode: dict[str, Any]
) -> None:
    inputs = masked_x(replace(BERT, mask_replace_prob=masked, random_replace_prob=randomised, **mode))
    shares = {
        masked: (inputs == MASK).mean(),
        randomised: np.isin(inputs, RESIDUES).mean(),
        1 - masked - randomised: (inputs == ProteinTokenizer.tokens.index("X")).mean(),
    }
    for expected, share in shares.items():
        assert abs(share - expected) <= 5 * np.sqrt(max(0.0, expected * (1 - expected)) / len(inputs)) + 1e-9
    assert len(inputs) == pytest.approx(400 * 75, rel=0.05)


def test_every_residue_is_equally_likely_as_a_random_replacement() -> None:
    # A narrow share: which token it is must not follow from the draw that decided on a random one.
    inputs = masked_x(BERT, sequences=1000)
    counts = np.bincount(inputs, minlength=33)[RESIDUES]
    expected = counts.sum() / len(RESIDUES)
    assert expected > 300
    assert ((counts - expected) ** 2 / expected).sum() < 19 + 5 * np.sqrt(2 * 19)


def test_what_replaces_a_target_does_not_depend_on_its_place() -> None:
    (part,) = mask(replace(BERT, mlm_probability=1.0), [sequence(50_000)], [0], [0])
    masked = np.array(part.inputs[1:-1]) == MASK
    assert abs(masked[:25_000].mean() - masked[25_000:].mean()) < 5 * np.sqrt(2 * 0.16 / 25_000)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_sequence_of_the_greatest_length_is_masked_to_its_end() -> None:
    residues = MAX_TOKENS_PER_SEQUENCE - 2
    (part,) = mask(BERT, [sequence(residues)], [0], [0])
    assert min(part.positions) < residues / 1000
    assert max(part.positions) > residues * 0.999


PROBABILITY = (
    "mlm_probability is {0}; give a share above 0 and at most 1, such as 0.15, or two to draw from for each sequence, "
    "such as [0.1, 0.3]"
)
SHARES = (
    "mask_replace_prob and random_replace_prob are {1} and {2}; give two shares of the targets that add up to at most "
    "1, such as 0.8 and 0.1"
)
NAN = float("nan")


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0, 0.8, 0.1), PROBABILITY),
        ((1.2, 0.8, 0.1), PROBABILITY),
        ((NAN, 0.8, 0.1), PROBABILITY),
        (((0.3, 0.1), 0.8, 0.1), PROBABILITY),
        (((0.0, 0.1), 0.8, 0.1), PROBABILITY),
        ((0.15, 0.8, 0.3), SHARES),
        ((0.15, 1.1, -0.1), SHARES),
        ((0.15, NAN, 0.1), SHARES),
        ((0.15, 0.8, NAN), SHARES),
    ],
)
def test_shares_that_cannot_be_are_refused(shares: tuple[float, float, float], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Masking(*shares, MASK, RESIDUES, 0)
    assert str(caught.value) == message.format(*shares)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"unit": "residue"}, "mask_unit is 'residue'; give one of token, span, word"),
        ({"draws": "bernoulli"}, "mask_draws is 'bernoulli'; give one of fixed, independent"),
        (
            {"unit": "span", "draws": "independent"},
            "mask_unit span goes with mask_draws fixed only: spans share out a fixed number of targets; leave "
            "mask_draws out, or choose mask_unit token or word",
        ),
        (
            {"mean_span_length": 3},
            "mean_span_length is 3, but mask_unit is token; leave it out, or set mask_unit to span",
        ),
        (
            {"unit": "span", "mean_span_length": 0.5},
            "mean_span_length is 0.5; give 1 to 1000 tokens, such as 3",
        ),
    ],
)
def test_combinations_that_cannot_be_are_refused(mode: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        replace(BERT, **mode)
    assert str(caught.value) == message

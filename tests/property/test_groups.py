"""The order within groups of shards: exactly once an epoch, a group at a time, a pure function of (seed, n)."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.groups import GroupOrder

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 14), st.integers(0, 2**32), st.integers(0, 1000))
def test_every_epoch_visits_every_sequence_once(sizes: list[int], group: int, seed: int, epoch: int) -> None:
    size = sum(sizes)
    epochs, indices = GroupOrder(sizes, group, seed)(np.arange(epoch * size, (epoch + 1) * size))
    assert (epochs == epoch).all()
    assert sorted(indices.tolist()) == list(range(size))


@given(SIZES, st.integers(1, 14), st.integers(0, 2**32), st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_any_place_is_found_without_those_before(sizes: list[int], group: int, seed: int, places: list[int]) -> None:
    """Alone, in any order and from a fresh object: so there is nothing to save, and seeking costs nothing."""
    order = GroupOrder(sizes, group, seed)
    epochs, indices = order(places)
    for place, epoch, index in zip(places, epochs.tolist(), indices.tolist(), strict=True):
        assert [one.tolist() for one in GroupOrder(sizes, group, seed)(place)] == [[epoch], [index]]


@given(SIZES, st.integers(1, 14), st.integers(0, 2**32))
def test_only_the_shards_of_one_group_are_needed_at_a_time(sizes: list[int], group: int, seed: int) -> None:
    order, size = GroupOrder(sizes, group, seed), sum(sizes)
    n = np.arange(3 * size)
    groups, indices = order.groups(n), order(n)[1]
    assert (np.diff(groups) >= 0).all()
    assert set(np.diff(groups).tolist()) <= {0, 1}
    shard_of = np.searchsorted(np.cumsum(sizes), indices, side="right")
    for number in np.unique(groups).tolist():
        shards = order.shards(number)
        assert len(shards) <= group
        assert set(shard_of[groups == number].tolist()) == set(shards)
    for epoch in range(3):
        of_epoch = [order.shards(epoch * order.groups_per_epoch + number) for number in range(order.groups_per_epoch)]
        assert sorted(itertools.chain(*of_epoch)) == list(range(len(sizes)))


def test_groups_are_others_in_each_epoch_and_for_each_seed() -> None:
    made = [
        GroupOrder([7] * 40, 5, seed).shards(epoch * 8 + number)
        for seed in (0, 1)
        for epoch in range(3)
        for number in range(8)
    ]
    assert len({frozenset(shards) for shards in made}) == len(made)


def test_within_a_group_sequences_are_shuffled_over_all_its_shards() -> None:
    """Places and shards are independent (chi-square), and two groups of one size are shuffled in different ways."""
    order, epochs = GroupOrder([50] * 8, 4, 3), 200
    n = np.arange(epochs * 400)
    shard = order(n)[1] // 50
    counts = np.zeros((4, 8))
    np.add.at(counts, (n % 200 // 50, shard), 1)
    expected = len(n) / counts.size
    assert ((counts - expected) ** 2 / expected).sum() < 31 + 5 * np.sqrt(2 * 31)
    within = order(np.arange(400))[1] % 50
    assert (within[:200] != within[200:]).mean() > 0.9


GOLDEN = [  # sizes, group, seed, first position, indices from there on
    ([3, 4, 5], 2, 0, 0, [2, 10, 7, 0, 11, 8, 1, 9, 4, 5, 6, 3, 10, 0]),
    ([1000] * 1000, 32, 7, 10**12, [844497, 672965, 379657, 629021]),
]


@pytest.mark.parametrize(("sizes", "group", "seed", "first", "indices"), GOLDEN)
def test_the_order_gives_these_indices(sizes: list[int], group: int, seed: int, first: int, indices: list[int]) -> None:
    """A change of the algorithm must raise ORDER_VERSION, or running experiments continue on other data."""
    assert GroupOrder(sizes, group, seed)(first + np.arange(len(indices)))[1].tolist() == indices


@pytest.mark.parametrize(("sizes", "group"), [([], 1), ([3, 0], 1), ([3], 0)])
def test_an_order_without_shards_or_with_empty_ones_is_refused(sizes: list[int], group: int) -> None:
    with pytest.raises(ValueError, match=f"group_shards is {group} of {len(sizes)} shards"):
        GroupOrder(sizes, group, 0)

"""Mixtures and clusters: exact proportions, exactly once in each component's epoch, random access."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.clusters import ClusterOrder
from pretrain.corpus.mixture import MAX_BLOCK, MixtureOrder, draws_of_a_block
from pretrain.corpus.order import AnyOrder, Order
from pretrain.corpus.store import Clusters
from pretrain.errors import UserError


def clusters(sizes: list[int], seed: int = 0) -> Clusters:
    """Clusters of these sizes, their members anywhere in the corpus."""
    members = np.random.default_rng(seed).permutation(sum(sizes)).astype(np.uint32)
    return Clusters(np.cumsum([0, *sizes]), members)


@st.composite
def mixtures(draw: st.DrawFn) -> MixtureOrder:
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**40))
    orders: list[AnyOrder] = []
    sizes = []
    for number in range(len(counts)):
        if draw(st.booleans()):
            orders.append(Order(draw(st.integers(1, 40)), seed + number))
            sizes.append(orders[-1].sizes[0])
        else:
            of_clusters = draw(st.lists(st.integers(1, 5), min_size=1, max_size=12))
            orders.append(ClusterOrder(clusters(of_clusters, number), seed + number))
            sizes.append(sum(of_clusters))
    return MixtureOrder(orders, np.cumsum([0, *sizes])[:-1], np.array(counts), seed)


def components(order: MixtureOrder, indices: np.ndarray) -> np.ndarray:
    return np.searchsorted(order.offsets, indices, side="right") - 1


# --- proportions ------------------------------------------------------------------------------------------------------


@given(mixtures(), st.integers(0, 2**40), st.integers(1, 4))
def test_every_aligned_block_holds_exactly_the_proportions(order: MixtureOrder, block: int, blocks: int) -> None:
    size = int(order.counts.sum())
    _, indices = order(np.arange(block * size, (block + blocks) * size))
    for drawn in components(order, indices).reshape(blocks, size):
        assert np.bincount(drawn, minlength=len(order.counts)).tolist() == order.counts.tolist()


@given(mixtures(), st.integers(1, 200))
def test_no_component_is_ever_more_than_a_few_draws_ahead_or_behind(order: MixtureOrder, n: int) -> None:
    drawn = np.bincount(components(order, order(np.arange(n))[1]), minlength=len(order.counts))
    assert drawn.tolist() == order.drawn(n).tolist()
    assert np.abs(drawn - n * order.counts / order.counts.sum()).max() <= len(order.counts) / 2 + 0.5


@pytest.mark.parametrize(
    ("weights", "draws"),
    [([0.7, 0.3], [7, 3]), ([1, 1], [1, 1]), ([30, 20, 50], [3, 2, 5]), ([0.1, 0.2], [1, 2]), ([1e-3, 1], [1, 1000])],
)
def test_weights_become_the_fewest_draws_with_their_proportions(weights: list[float], draws: list[int]) -> None:
    assert draws_of_a_block(dict(zip("abc", weights, strict=False))).tolist() == draws


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_above_zero_is_refused_by_name(weight: float) -> None:
    with pytest.raises(UserError, match=r"the weight of two is .*; give a number above 0"):
        draws_of_a_block({"one": 1.0, "two": weight})


def test_weights_that_come_out_only_after_very_many_draws_are_refused_with_rounder_ones() -> None:
    with pytest.raises(UserError, match=f"at most {MAX_BLOCK:,} are possible; round them, for example to 0.536 and 0"):
        draws_of_a_block({"one": 3.1415926535, "two": 2.71828})


# --- epochs -----------------------------------------------------------------------------------------------------------


@given(mixtures())
def test_each_component_is_drawn_in_its_own_order_from_its_beginning(order: MixtureOrder) -> None:
    epochs, indices = order(np.arange(300))
    drawn = components(order, indices)
    for number, own in enumerate(order.orders):
        here = drawn == number
        expected = own(np.arange(here.sum()))
        assert epochs[here].tolist() == expected[0].tolist()
        assert (indices[here] - order.offsets[number]).tolist() == expected[1].tolist()


@given(mixtures())
def test_each_epoch_of_each_component_visits_everything_of_it_exactly_once(order: MixtureOrder) -> None:
    block = int(order.counts.sum())
    blocks = max(-(-2 * size // count) for size, count in zip(order.sizes, order.counts.tolist(), strict=True))
    epochs, indices = order(np.arange(blocks * block))
    places = order.places(indices)
    bounds = np.cumsum([0, *order.sizes])
    for part, size in enumerate(order.sizes):
        here = (places >= bounds[part]) & (places < bounds[part + 1])
        for epoch in range(2):
            visited = places[here & (epochs == epoch)]
            assert sorted(visited.tolist()) == list(range(bounds[part], bounds[part] + size))


@given(mixtures(), st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
def test_random_access_gives_what_walking_there_does(order: MixtureOrder, positions: list[int]) -> None:
    together = order(positions)
    for number, position in enumerate(positions):
        around = order(np.arange(max(0, position - 3), position + 1))
        assert (around[0][-1], around[1][-1]) == (together[0][number], together[1][number])


# --- clusters ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 6), min_size=1, max_size=30), st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_visits_each_cluster_once_by_one_of_its_members(sizes: list[int], seed: int, epoch: int) -> None:
    groups = clusters(sizes)
    epochs, indices = ClusterOrder(groups, seed)(np.arange(len(sizes)) + epoch * len(sizes))
    assert set(epochs.tolist()) == {epoch}
    cluster_of = {m: c for c in range(len(sizes)) for m in groups.members[slice(*groups.offsets[c : c + 2])].tolist()}
    assert Counter(cluster_of[index] for index in indices.tolist()) == Counter(range(len(sizes)))


def test_over_many_epochs_each_member_of_a_cluster_is_drawn_equally_often_and_independently() -> None:
    """Chi-square of the members of each cluster, and of pairs of draws in consecutive epochs, below the 0.1 % point."""
    sizes, epochs = [1, 2, 3, 5, 8], 6000
    groups = clusters(sizes)
    visits, indices = ClusterOrder(groups, 7)(np.arange(len(sizes) * epochs))
    for number, size in enumerate(sizes):
        members = groups.members[slice(*groups.offsets[number : number + 2])]
        place = np.argsort(members)[np.searchsorted(np.sort(members), indices[np.isin(indices, members)])]
        assert len(place) == epochs
        for draws, cells in ((place, size), (place[:-1] * size + place[1:], size**2)):
            observed = np.bincount(draws, minlength=cells)
            expected = len(draws) / cells
            statistic = float(((observed - expected) ** 2 / expected).sum())
            freedom = cells - 1
            limit = freedom * (1 - 2 / (9 * max(freedom, 1)) + 3.09 * np.sqrt(2 / (9 * max(freedom, 1)))) ** 3
            assert statistic <= limit, f"cluster {number}: {observed}"  # Wilson and Hilferty's approximation
    assert (np.diff(visits) >= 0).all()

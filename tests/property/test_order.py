"""The order: which sequence comes n-th."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.corpus.counter import bits
from pretrain.corpus.order import ORDER_VERSION, Order

SIZES = st.integers(1, 300)
SEEDS = st.integers(-(2**70), 2**70)
EPOCHS = st.integers(0, 2**30)


def epoch(size: int, seed: int, number: int) -> list[int]:
    return Order(size, seed)(np.arange(size) + number * size)[1].tolist()


@given(SIZES, SEEDS, EPOCHS)
def test_every_epoch_visits_every_sequence_once(size: int, seed: int, number: int) -> None:
    assert sorted(epoch(size, seed, number)) == list(range(size))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 10_007])
def test_every_epoch_visits_every_sequence_once_around_a_power_of_two(size: int) -> None:
    assert sorted(epoch(size, 5, 3)) == list(range(size))


@given(st.integers(1, 2**40), SEEDS, st.lists(st.integers(0, 2**62), min_size=1))
def test_the_epoch_is_n_over_N_and_the_index_is_in_range(size: int, seed: int, positions: list[int]) -> None:
    epochs, indices = Order(size, seed)(positions)
    assert epochs.tolist() == [n // size for n in positions]
    assert ((indices >= 0) & (indices < size)).all()


@given(SIZES, SEEDS, EPOCHS, st.data())
def test_random_access_gives_what_sequential_access_gives(
    size: int, seed: int, number: int, data: st.DataObject
) -> None:
    sequence = epoch(size, seed, number)
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20))
    order = Order(size, seed)
    assert order(np.array(places) + number * size)[1].tolist() == [sequence[place] for place in places]
    assert [int(order(place + number * size)[1][0]) for place in places] == [sequence[place] for place in places]


@given(st.integers(30, 300), SEEDS, EPOCHS)
def test_epochs_and_seeds_differ_in_their_order(size: int, seed: int, number: int) -> None:
    orders = [epoch(size, seed, number), epoch(size, seed, number + 1), epoch(size, seed + 1, number)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            # Two independent permutations agree in one place on average, in more than 12 with chance 1e-10.
            assert sum(a == b for a, b in zip(one, other, strict=True)) <= 12


def place_by_index(orders: np.ndarray) -> float:
    """Chi-square of how often each index stands at each place, in standard deviations from its mean."""
    draws, size = orders.shape
    counts = np.zeros((size, size))
    np.add.at(counts, (np.arange(size), orders), 1)
    # Rows and columns of permutations have fixed sums: (size - 1)**2 degrees of freedom, and a factor.
    chi_square = ((counts - draws / size) ** 2).sum() / (draws / size) * (size - 1) / size
    return float((chi_square - (size - 1) ** 2) / np.sqrt(2 * (size - 1) ** 2))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 13, 33])
def test_over_the_epochs_every_sequence_is_equally_likely_at_every_place(size: int) -> None:
    epochs = 30_000
    assert place_by_index(Order(size, 1)(np.arange(epochs * size))[1].reshape(epochs, size)) < 4


@pytest.mark.parametrize("size", [2, 5, 8])
def test_over_the_seeds_every_sequence_is_equally_likely_at_every_place(size: int) -> None:
    assert place_by_index(np.array([epoch(size, seed, 0) for seed in range(500)])) < 4


@pytest.mark.parametrize("size", [8, 13, 64])
def test_what_follows_a_sequence_is_not_predictable(size: int) -> None:
    """The step from one index to the next is as good as uniform: neighbours in a source do not stay neighbours."""
    epochs = 500
    steps = np.diff(Order(size, 2)(np.arange(epochs * size))[1].reshape(epochs, size), axis=1).ravel() % size
    counts = np.bincount(steps, minlength=size)[1:]
    expected = len(steps) / (size - 1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < (size - 2) + 5 * np.sqrt(2 * (size - 2))


GOLDEN = [  # size, seed, first position, indices from there on
    (10, 0, 0, [4, 3, 8, 7, 1, 5, 9, 2, 0, 6, 1, 7]),
    (1000, 42, 0, [323, 681, 643, 698, 687, 64, 809, 139, 385, 520, 870, 770]),
    (1000, 42, 10**9, [807]),
    (3_000_000_000, 7, 0, [661705483, 117244293, 875013840, 710876804]),
    (3_000_000_000, 7, 2**62, [1815114242]),
]


@pytest.mark.parametrize(("size", "seed", "first", "indices"), GOLDEN)
def test_the_order_gives_these_indices(size: int, seed: int, first: int, indices: list[int]) -> None:
    """A change of the algorithm must raise ORDER_VERSION, or running experiments continue on other data."""
    assert ORDER_VERSION == 2
    assert Order(size, seed)(first + np.arange(len(indices)))[1].tolist() == indices


def test_the_generator_is_splitmix64() -> None:
    # The first outputs for seed 1234567 of the reference implementation (Vigna, `splitmix64.c`).
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert bits(1234567, range(5)).tolist() == published


def test_an_order_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_sequences is 0; an order needs at least one sequence"):
        Order(0, 0)

"""Crops: which window of a long sequence a step sees."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from pretrain.corpus.batch import PackDataset
from pretrain.corpus.masking import Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Pack, Planner
from pretrain.corpus.tokenizer import ProteinTokenizer

CLS, EOS, MASK = ProteinTokenizer.cls_token_id, ProteinTokenizer.eos_token_id, ProteinTokenizer.mask_token_id
RESIDUES = ProteinTokenizer.replacement_ids


class Sequences:
    """A corpus in memory; the token of a residue tells its place in its sequence."""

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = np.array(lengths, np.int64)
        self.num_sequences, self.num_tokens = len(lengths), sum(lengths)

    def lengths(self, indices: ArrayLike) -> NDArray[np.int64]:
        return self._lengths[np.asarray(indices)]

    def tokens(self, index: int) -> NDArray[np.int64]:
        return np.array([CLS, *range(100, 98 + self._lengths[index]), EOS])


def make_planner(lengths: list[int], max_length: int, seed: int = 0, mlm_probability: float = 0.15) -> Planner:
    masking = Masking(mlm_probability, 1.0, 0.0, MASK, RESIDUES, seed)
    return Planner(Sequences(lengths), Order(len(lengths), seed), masking, max_length)  # type: ignore[arg-type]


def crops(planner: Planner, epochs: list[int], indices: list[int]) -> Pack:
    return planner.describe(np.array(epochs), np.array(indices))


corpora = st.lists(st.integers(2, 60), min_size=1, max_size=10)
limits = st.integers(3, 70)
seeds = st.integers(-(2**65), 2**65)


@given(corpora, limits, seeds, st.integers(0, 2**31))
def test_a_crop_lies_within_its_sequence_and_is_as_long_as_allowed(
    lengths: list[int], max_length: int, seed: int, epoch: int
) -> None:
    pack = crops(make_planner(lengths, max_length, seed), [epoch] * len(lengths), list(range(len(lengths))))
    full = np.array(lengths)
    assert (pack.lengths == np.minimum(full, max_length)).all()
    assert (pack.starts >= 0).all()
    assert (pack.starts + pack.lengths <= full).all()


@given(corpora, seeds, st.integers(0, 2**31))
def test_a_sequence_that_fits_is_seen_whole(lengths: list[int], seed: int, epoch: int) -> None:
    pack = crops(make_planner(lengths, max(3, *lengths), seed), [epoch] * len(lengths), list(range(len(lengths))))
    assert not pack.starts.any()
    assert pack.lengths.tolist() == lengths


@given(corpora, limits, seeds, st.data())
def test_a_crop_is_fixed_by_seed_epoch_and_index(
    lengths: list[int], max_length: int, seed: int, data: st.DataObject
) -> None:
    visit = st.tuples(st.integers(0, 9), st.integers(0, len(lengths) - 1))
    visits = data.draw(st.lists(visit, min_size=1, max_size=10))
    together = crops(make_planner(lengths, max_length, seed), [e for e, _ in visits], [i for _, i in visits])
    for row, (epoch, index) in enumerate(visits):
        alone = crops(make_planner(lengths, max_length, seed), [epoch], [index])
        assert alone.starts[0] == together.starts[row]
        assert alone.targets[0] == together.targets[row]


@pytest.mark.parametrize("vary", ["epoch", "index", "seed"])
def test_every_window_is_equally_likely(vary: str) -> None:
    length, max_length, draws = 30, 13, 4000
    windows = length - max_length + 1
    if vary == "seed":
        draws = 1500
        starts = [crops(make_planner([length], max_length, seed), [0], [0]).starts[0] for seed in range(draws)]
    else:
        numbers, zeros = list(range(draws)), [0] * draws
        planner = make_planner([length] * draws, max_length)
        starts = crops(planner, *((numbers, zeros) if vary == "epoch" else (zeros, numbers))).starts.tolist()
    counts = np.bincount(starts, minlength=windows)
    assert len(counts) == windows
    expected = draws / windows
    assert ((counts - expected) ** 2 / expected).sum() < (windows - 1) + 5 * np.sqrt(2 * (windows - 1))


@given(corpora, limits, seeds, st.integers(0, 99))
def test_all_of_a_crop_but_cls_and_eos_is_maskable(lengths: list[int], max_length: int, seed: int, epoch: int) -> None:
    planner = make_planner(lengths, max_length, seed, mlm_probability=1.0)
    pack = crops(planner, [epoch] * len(lengths), list(range(len(lengths))))
    batch = PackDataset(planner.corpus, planner.masking)[pack]
    ends = [CLS, EOS]
    expected, place = [], 0
    for row, index in enumerate(pack.indices.tolist()):
        window = planner.corpus.tokens(index)[pack.starts[row] : pack.starts[row] + pack.lengths[row]]
        inside = np.flatnonzero(~np.isin(window, ends))
        assert pack.maskable[row] == len(inside) == pack.targets[row]
        expected += [(place + position, window[position]) for position in inside.tolist()]
        assert (
            batch.input_ids[place : place + len(window)].tolist()
            == np.where(np.isin(window, ends), window, MASK).tolist()
        )
        place += len(window)
    assert list(zip(batch.target_positions.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(pack.lengths).tolist()]
    assert batch.max_seqlen == pack.lengths.max()


@given(corpora, limits, seeds, st.integers(0, 99))
def test_a_crop_in_a_pack_shows_the_tokens_of_its_window(
    lengths: list[int], max_length: int, seed: int, epoch: int
) -> None:
    planner = make_planner(lengths, max_length, seed, mlm_probability=0.3)
    pack = crops(planner, [epoch] * len(lengths), list(range(len(lengths))))
    batch = PackDataset(planner.corpus, planner.masking)[pack]
    restored = batch.input_ids.clone()
    restored[batch.target_positions] = batch.targets
    windows = [
        planner.corpus.tokens(index)[start : start + length]
        for index, start, length in zip(pack.indices, pack.starts, pack.lengths, strict=True)
    ]
    assert restored.tolist() == np.concatenate(windows).tolist()
    assert len(batch.targets) == pack.step_targets

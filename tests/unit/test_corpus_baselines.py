"""The numbers to beat: unigram and bigram perplexity, against a count by hand."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pretrain.corpus import baselines
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.masking import Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Planner
from pretrain.corpus.prepare import prepare
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer

ESM = ProteinTokenizer()
MASKING = Masking(0.3, 1.0, 0.0, ESM.mask_token_id, ESM.replacement_ids, 0)


def corpus(directory: Path, name: str, sequences: list[str]) -> Corpus:
    source = directory / f"{name}.txt"
    source.write_text("\n".join(sequences) + "\n")
    return prepare([source], directory / name, ESM)


def random_sequences(number: int, seed: int) -> list[str]:
    """Residues that depend on the one before: a bigram model has something to learn."""
    generator, sequences = np.random.default_rng(seed), []
    for _ in range(number):
        sequence = [int(generator.integers(20))]
        for _ in range(int(generator.integers(5, 40))):
            sequence.append((sequence[-1] + int(generator.integers(3))) % 20)
        sequences.append("".join("LAGVSERTIDPKQNFYMHWC"[i] for i in sequence))
    return sequences


@pytest.mark.parametrize("max_length", [8, 64])
def test_baselines_are_those_of_a_count_by_hand(
    max_length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_CHUNK", 7)  # several chunks: no pair may be lost or made where they meet
    train = corpus(tmp_path, "train", random_sequences(60, 0))
    validation = PackDataset(corpus(tmp_path, "validation", random_sequences(9, 1)), MASKING)
    planner = Planner(validation.corpus, Order(9, 0), MASKING, max_length)
    packs = [planner.describe(np.zeros(3, int), np.arange(first, first + 3)) for first in (0, 3, 6)]

    single, pairs, context = Counter[int](), Counter[tuple[int, int]](), Counter[int]()
    for index in range(len(train)):
        tokens = train.tokens(index).tolist()[:-1]  # <eos> is never asked for, nor <cls>
        for before, after in pairwise(tokens):
            single[after] += 1
            pairs[before, after] += 1
            context[before] += 1
    unigram, bigram = [], []
    for pack in packs:
        batch = validation[pack]
        owner = np.searchsorted(batch.cu_seqlens.numpy(), batch.target_positions.numpy(), side="right") - 1
        for row, position in zip(owner.tolist(), batch.target_positions.tolist(), strict=True):
            tokens = validation.corpus.tokens(int(pack.indices[row])).tolist()
            place = position - int(batch.cu_seqlens[row]) + int(pack.starts[row])
            left, target = tokens[place - 1], tokens[place]
            p = (single[target] + 1) / (single.total() + ESM.vocab_size)
            unigram.append(-math.log(p))
            bigram.append(-math.log((pairs[left, target] + 10 * p) / (context[left] + 10)))
    found = baselines.perplexities(train, validation, packs)
    assert found.unigram == pytest.approx(math.exp(np.mean(unigram)))
    assert found.bigram == pytest.approx(math.exp(np.mean(bigram)))
    assert found.bigram < found.unigram


def test_uniform_residues_have_a_perplexity_of_twenty(tmp_path: Path) -> None:
    sequences = ["".join(np.random.default_rng(n).permutation(list("LAGVSERTIDPKQNFYMHWC"))) for n in range(500)]
    train = corpus(tmp_path, "train", sequences)
    planner = Planner(train, Order(500, 0), MASKING, 64)
    found = baselines.perplexities(
        train, PackDataset(train, MASKING), [planner.describe(np.zeros(500, int), np.arange(500))]
    )
    assert found.unigram == pytest.approx(20, rel=0.005)

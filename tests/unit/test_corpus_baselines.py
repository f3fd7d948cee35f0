"""The numbers to beat: unigram and bigram perplexity, against a count by hand."""

import math
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pretrain.corpus import baselines
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.blosum import RESIDUES, blosum62, nats_given_homologue
from pretrain.corpus.masking import Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Planner
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer, load_tokenizer

ESM = ProteinTokenizer()
MASKING = Masking(0.3, 1.0, 0.0, ESM.mask_token_id, ESM.replacement_ids, 0)


def corpus(directory: Path, name: str, sequences: list[str]) -> Corpus:
    source = directory / f"{name}.txt"
    source.write_text("\n".join(sequences) + "\n")
    return prepare([source], directory / name, Settings(ESM))


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
    monkeypatch.setattr(baselines, "_CHUNK_TOKENS", 50)
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
    found = baselines.perplexities(train, validation, packs, Order(len(train), 0))
    assert found.unigram == pytest.approx(math.exp(np.mean(unigram)))
    assert found.bigram == pytest.approx(math.exp(np.mean(bigram)))
    assert found.bigram < found.unigram


def test_memory_does_not_grow_with_the_length_of_documents(tmp_path: Path) -> None:
    train = corpus(tmp_path, "train", ["LAGVSERT" * 2**13] * 128)  # 2**23 tokens
    validation = PackDataset(corpus(tmp_path, "validation", random_sequences(9, 1)), MASKING)
    packs = [Planner(validation.corpus, Order(9, 0), MASKING, 64).describe(np.zeros(9, int), np.arange(9))]
    tracemalloc.start()
    baselines.perplexities(train, validation, packs, Order(len(train), 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20  # bytes


def test_uniform_residues_have_a_perplexity_of_twenty(tmp_path: Path) -> None:
    sequences = ["".join(np.random.default_rng(n).permutation(list("LAGVSERTIDPKQNFYMHWC"))) for n in range(500)]
    train = corpus(tmp_path, "train", sequences)
    planner = Planner(train, Order(500, 0), MASKING, 64)
    found = baselines.perplexities(
        train, PackDataset(train, MASKING), [planner.describe(np.zeros(500, int), np.arange(500))], planner.order
    )
    assert found.unigram == pytest.approx(20, rel=0.005)


def test_told_a_homologues_residue_is_bayes_rule_written_out() -> None:
    frequencies = np.random.default_rng(0).dirichlet(np.ones(20))
    odds = 2 ** (blosum62() / 2)
    found = nats_given_homologue(frequencies)
    for a in range(20):
        weights = [frequencies[b] * odds[a, b] for b in range(20)]  # which residue the relative has, where this has a
        left = [
            -math.log(frequencies[a] * odds[a, b] / sum(frequencies[c] * odds[c, b] for c in range(20)))
            for b in range(20)
        ]
        assert found[a] == pytest.approx(np.dot(weights, left) / sum(weights))


def test_blosum62_tells_about_as_much_of_a_residue_as_was_published() -> None:
    """0.698 bits (Henikoff and Henikoff 1992), here with scores rounded to half-bits and other frequencies."""
    percent = dict(zip("ARNDCQEGHILKMFPSTWYV", [7.4, 5.2, 4.5, 5.4, 2.5, 3.4, 5.4, 7.4, 2.6, 6.8, 9.9, 5.8, 2.5, 4.7,
                                                3.9, 5.7, 5.1, 1.3, 3.2, 7.3], strict=True))  # fmt: skip
    frequencies = np.array([percent[residue] for residue in RESIDUES])
    frequencies /= frequencies.sum()
    entropy = -float((frequencies * np.log2(frequencies)).sum())
    left = float((frequencies * nats_given_homologue(frequencies)).sum()) / math.log(2)
    assert entropy - left == pytest.approx(0.698, abs=0.05)


def test_a_corpus_of_text_has_no_homologues(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("data/text/tokenizer.json")
    source = tmp_path / "text.jsonl"
    source.write_text('{"text": "the state of the union is strong and so is the state of this test"}\n' * 5)
    text = prepare([source], tmp_path / "text", Settings(tokenizer))
    masking = Masking(0.3, 1.0, 0.0, tokenizer.mask_token_id, tokenizer.replacement_ids, 0)
    planner = Planner(text, Order(len(text), 0), masking, 64)
    pack = planner.describe(np.zeros(len(text), int), np.arange(len(text)))
    assert baselines.perplexities(text, PackDataset(text, masking), [pack], planner.order).blosum62 is None

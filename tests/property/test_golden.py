"""The data of running experiments: what seeds and names mean, in numbers that no later version may change.

Whoever has to change one here raises ORDER_VERSION (crops, masks, orders) or FORMAT_VERSION (fingerprints), so that a
run from before is refused rather than continued on other data.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from test_crops import make_planner
from test_masking import BERT, VALIDATION, sequence, words

from pretrain.corpus.clusters import ClusterOrder
from pretrain.corpus.counter import RandomStream, derive_key
from pretrain.corpus.masking import Crops, Masking
from pretrain.corpus.mixture import MixtureOrder
from pretrain.corpus.names import hash_names
from pretrain.corpus.order import Order
from pretrain.corpus.store import Clusters, fingerprint_of


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.astype("<i8").tobytes() for array in arrays)).hexdigest()[:16]


CROPS = [22, 15, 16, 23, 11]


def test_these_crops_are_seen() -> None:
    pack = make_planner([60] * 5, 20, seed=3).describe(np.array([0, 0, 0, 1, 2**31]), np.array([0, 1, 2, 0, 4]))
    assert pack.starts.tolist() == CROPS


MODES = {
    "BERT": BERT,
    "validation": VALIDATION,
    "range": replace(BERT, mlm_probability=(0.1, 0.4)),
    "independent": replace(BERT, draws="independent"),
    "spans": replace(BERT, unit="span"),
    "words": replace(BERT, unit="word"),
    "independent words": replace(BERT, unit="word", draws="independent"),
}


# of each: how many targets are planned, and what `apply` returns
MASKS = {
    "BERT": ([0, 9, 50, 150], "e9ab341b7ec0c244"),
    "validation": ([0, 9, 50, 150], "11ded888219d2435"),
    "range": ([0, 8, 47, 368], "429e3120600430da"),
    "independent": ([0, 9, 50, 150], "ba3c10d692d0331c"),
    "spans": ([0, 9, 50, 150], "3f5d09ab9ab43faa"),
    "words": ([0, 9, 50, 150], "e136c87d0767fcb8"),
    "independent words": ([0, 9, 50, 150], "e30f23e9f6f30b17"),
}


@pytest.mark.parametrize("mode", MODES)
def test_these_tokens_are_asked_for_and_shown(mode: str) -> None:
    counts, shown = MASKS[mode]
    residues = np.array([5, 60, 333, 1000])
    epochs, indices = np.array([0, 1, 2, 2**31]), np.array([7, 0, 2**40, 1])
    masking: Masking = replace(MODES[mode], seed=11)
    planned = masking.target_counts(epochs, indices, residues)
    lengths = residues + 2
    pack = Crops(np.cumsum(lengths) - lengths + 1, residues, planned, epochs, indices)
    tokens = np.concatenate([sequence(int(n)) for n in residues])
    assert planned.tolist() == counts
    assert digest(*masking.apply(tokens, pack, np.concatenate([words(int(n)) for n in residues]))) == shown


MEMBERS = [2, 3, 5, 1, 3, 7, 3, 5, 0, 4, 3, 1]
SEEDS = [10355230182199428566, 7751695427129272536]
MIXTURE = [4, 5, 11, 6, 0, 9, 10, 2, 8, 7, 12, 3]


def test_these_members_of_clusters_and_components_of_mixtures_are_drawn() -> None:
    clusters = ClusterOrder(Clusters(np.array([0, 3, 4, 9]), np.arange(9)), 5)
    assert clusters(np.arange(12))[1].tolist() == MEMBERS
    seeds = [int(derive_key(5, RandomStream.COMPONENT, number)[0]) for number in range(2)]
    assert seeds == SEEDS
    mixture = MixtureOrder([Order(10, seeds[0]), Order(4, seeds[1])], [0, 10], np.array([3, 1]), 5)
    assert mixture(np.arange(12))[1].tolist() == MIXTURE


NAMES = [12620083424587144524, 13020603013274838756]
FINGERPRINT = "fe98e13432bc6069"


def test_these_names_are_for_validation_and_this_is_a_corpus_called() -> None:
    assert hash_names([b"sp|P12345|NAME", b""]).tolist() == NAMES
    assert fingerprint_of("tokenizer", ["a", "b"]) == FINGERPRINT


STREAMS = {
    "ORDER": 1,
    "CROP": 2,
    "MASK_COUNT": 3,
    "MASK_POSITION": 4,
    "MASK_ACTION": 5,
    "MASK_SHARE": 6,
    "MASK_SPAN": 7,
    "MASK_TURN": 8,
    "COMPONENT": 20,
    "CLUSTER_MEMBER": 21,
    "SHARDS": 30,
    "GROUP": 31,
    "PAIR": 40,
    "DROPOUT": 50,
}


def test_every_stream_of_random_bits_has_its_number() -> None:
    assert {stream.name: stream.value for stream in RandomStream} == STREAMS

"""Memory does not grow with the corpus: neither the trainer's own nor its loader workers'."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.corpus.writing import write_manifest, write_shard


def make_corpus(directory: Path, num_sequences: int) -> Corpus:
    """Short sequences, since it is the number of them that counts, straight into one shard."""
    directory.mkdir()
    generator, tokenizer = np.random.default_rng(0), ProteinTokenizer()
    lengths = generator.integers(5, 25, num_sequences)
    tokens = generator.integers(4, 24, int(lengths.sum())).astype(np.uint8)
    ids = [f"s{n}" for n in range(num_sequences)]
    file = directory / "shard-00000.arrow"
    checksum = write_shard(file, ids, np.split(tokens, np.cumsum(lengths)[:-1]), tokenizer.dtype)
    shard = {"file": file.name, "num_sequences": num_sequences, "num_tokens": len(tokens), "sha256": checksum}
    write_manifest(directory, [shard], tokenizer, {})
    return Corpus(directory)


def test_neither_the_trainer_nor_its_workers_need_more_memory_for_a_corpus_ten_times_as_large(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    most = []
    for num_sequences in (200_000, 2_000_000):
        corpus = make_corpus(tmp_path / str(num_sequences), num_sequences).path
        config = tiny(data__train=str(corpus), data__validation=None, data__num_workers=2, trainer__max_steps=6)
        path = tmp_path / f"{num_sequences}.json"
        callback = ("--trainer.callbacks+=anonymous.Anonymous", f"--trainer.callbacks.path={path}")
        assert fit("-c", config, "--run", tmp_path / f"run{num_sequences}", *callback) == 0
        most.append(json.loads(path.read_text()))
    small, large = most
    assert len(small) == 3
    for before, after in zip(small, large, strict=True):
        assert after <= 1.05 * before, f"RssAnon of trainer and workers, KiB: {small}, then {large}"
        assert (after - before) * 1024 < 1_800_000 * 8, "not even a number for each sequence more"

"""Anonymous memory of a whole trainer and of its loader workers, for a corpus and for one ten times as large.

    python benchmarks/memory.py [--sequences 200000] [--steps 20]

`pretrain fit` on a tiny encoder with two loader workers, in processes of its own; while it trains, the RssAnon of each
is read from /proc. Mapped pages of the corpus, which are the kernel's cache, are not in it.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.corpus.writing import write_manifest, write_shard

SHARD = 50_000


def make_corpus(directory: Path, num_sequences: int) -> Corpus:
    """Sequences of 20 to 100 random residues, straight into shards."""
    directory.mkdir()
    generator, tokenizer, shards = np.random.default_rng(0), ProteinTokenizer(), []
    for first in range(0, num_sequences, SHARD):
        lengths = generator.integers(20, 100, min(SHARD, num_sequences - first))
        tokens = generator.integers(4, 24, int(lengths.sum())).astype(np.uint8)
        file = directory / f"shard-{len(shards):05d}.arrow"
        sequences = np.split(tokens, np.cumsum(lengths)[:-1])
        checksum = write_shard(file, [f"s{first + n}" for n in range(len(lengths))], sequences, tokenizer.dtype)
        shard = {"file": file.name, "num_sequences": len(lengths), "num_tokens": len(tokens), "sha256": checksum}
        shards.append(shard)
    write_manifest(directory, shards, tokenizer, {})
    return Corpus(directory)


def anonymous_mib(process: int) -> float | None:
    """RssAnon of a process, if it runs."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(status.split("RssAnon:")[1].split()[0]) / 1024 if "RssAnon:" in status else None


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:
        return []


def train(corpus: Path, run: Path, steps: int) -> list[float]:
    """The most anonymous memory, in MiB, that the trainer and its two loader workers had."""
    config = {
        "model": {"encoder": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}},
        "data": {"train": str(corpus), "max_length": 128, "global_batch_tokens": 8192, "num_workers": 2},
        "trainer": {"accelerator": "cpu", "max_steps": steps, "enable_progress_bar": False, "logger": False},
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "pretrain", "fit", "-c", str(path), "--run", str(run)]
    most: dict[int, float] = {}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            for each in (process.pid, *children(process.pid)):
                if (now := anonymous_mib(each)) is not None:
                    most[each] = max(now, most.get(each, 0.0))
            time.sleep(0.05)
    assert process.returncode == 0
    trainer = most.pop(process.pid)
    return [trainer, *sorted(most.values(), reverse=True)[:2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for times in (1, 10):
            corpus = make_corpus(Path(folder) / f"corpus-{times}", times * options.sequences)
            rows.append(train(corpus.path, Path(folder) / f"run-{times}", options.steps))
    print("| RssAnon, MiB, at most | " + " | ".join(["trainer", "a loader worker", "the other"]) + " |")
    print("| --- | --- | --- | --- |")
    for times, row in zip((1, 10), rows, strict=True):
        print(f"| {times * options.sequences:,} sequences | " + " | ".join(f"{mib:.1f}" for mib in row) + " |")
    print("| ratio | " + " | ".join(f"{b / a:.3f}" for a, b in zip(*rows, strict=True)) + " |")


if __name__ == "__main__":
    main()

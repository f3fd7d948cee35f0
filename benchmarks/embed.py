"""`model.embed` beside the loop that transformers' documentation shows, alternating in one run.

    python benchmarks/embed.py [--shapes 8M 35M] [--orders given sorted] [--batch-sizes 8 16 32] [--rounds 3]

Both embed the same sequences (drawn at random from Swiss-Prot proteins of up to 1,024 tokens) from strings to one mean
vector each, with the same weights, threads and precision (fp32). The rival tokenises a batch, pads it to its longest
sequence, runs `EsmModel` under `inference_mode`, and averages over each sequence's residues; on batches in the order
given (`given`), or of sequences sorted by length, the longest first (`sorted`). Only real tokens count, padding does
not. Each round draws other sequences; rates are medians over the rounds, ratios medians of the rounds' ratios, after a
warm-up. The vectors of both are compared, too.
"""

import argparse
import os
import random
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from results_file import write_results
from torch import Tensor
from transformers import EsmModel, EsmTokenizer

from pretrain import EncoderConfig
from pretrain.corpus.readers import read_records
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.downstream.export import write_model
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.tokenizer_files import write_tokenizer
from pretrain.model.encoder import Encoder

MAX_LENGTH = 1024


class Rival:
    """transformers' padded loop."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = EsmTokenizer.from_pretrained(directory)
        self.model = EsmModel.from_pretrained(directory, add_pooling_layer=False).eval()

    @torch.inference_mode()
    def embed(self, sequences: list[str], batch_size: int, by_length: bool) -> Tensor:
        order = list(range(len(sequences)))
        if by_length:
            order.sort(key=lambda i: -len(sequences[i]))
        vectors = torch.empty(len(sequences), self.model.config.hidden_size)
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            batch = self.tokenizer([sequences[i] for i in places], padding=True, return_tensors="pt")
            hidden = self.model(**batch).last_hidden_state
            special = (batch.input_ids == self.tokenizer.cls_token_id) | (
                batch.input_ids == self.tokenizer.eos_token_id
            )
            residues = (batch.attention_mask.bool() & ~special)[..., None]
            vectors[places] = (hidden * residues).sum(1) / residues.sum(1)
        return vectors


def measure(shape: str, proteins: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One shape: ours once a round, and the rival at each batch size and order on the same sequences."""
    encoder = Encoder(EncoderConfig.named(shape)).eval()
    tokenizer = ProteinTokenizer()
    ours = PretrainedEncoder(encoder.config, lambda: tokenizer, MAX_LENGTH).eval()
    ours.load_state_dict(encoder.state_dict())
    with tempfile.TemporaryDirectory() as scratch:
        write_model(encoder, tokenizer, MAX_LENGTH, Path(scratch))
        write_tokenizer(tokenizer, MAX_LENGTH, Path(scratch))
        rival = Rival(Path(scratch))
    rows: dict[tuple[bool, int], dict[str, Any]] = {
        (by_length, size): {"order": "by length" if by_length else "as given", "batch_size": size, "rates": []}
        for by_length in (order == "sorted" for order in options.orders)
        for size in options.batch_sizes
    }
    ours.embed(proteins[:8])
    rival.embed(proteins[:8], 8, False)
    for number in range(options.rounds):
        sequences = random.Random(number).sample(proteins, options.sequences)
        tokens = sum(len(sequence) + 2 for sequence in sequences)
        for (by_length, size), row in rows.items():
            begin = time.perf_counter()
            mine = ours.embed(sequences)
            middle = time.perf_counter()
            theirs = rival.embed(sequences, size, by_length)
            end = time.perf_counter()
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
            row["rates"].append((tokens / (end - middle), tokens / (middle - begin)))
            their_rate, our_rate = row["rates"][-1]
            print(
                f"  {shape} round {number} {row['order']}, {size}: "
                f"{their_rate:,.0f} against our {our_rate:,.0f} tokens/s"
            )
    return [
        {
            **{name: row[name] for name in ("order", "batch_size")},
            "transformers": median(theirs for theirs, _ in row["rates"]),
            "pretrain": median(ours for _, ours in row["rates"]),
            "faster_by": median(ours / theirs for theirs, ours in row["rates"]),
            "rounds": row["rates"],
        }
        for row in rows.values()
    ]


def main() -> None:
    """Measure, print, and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8M"])
    parser.add_argument("--orders", nargs="+", choices=["given", "sorted"], default=["given", "sorted"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=64, help="sequences of a round")
    parser.add_argument("--source", default="data/proteins/train.fasta.gz")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    records = [record.text.decode() for record in read_records(options.source)]
    proteins = [sequence for sequence in records if len(sequence) <= MAX_LENGTH - 2]
    results = {shape: measure(shape, proteins, options) for shape in options.shapes}
    for shape, rows in results.items():
        print(f"\n{shape}\n  batches     size   transformers   pretrain   faster by    (real tokens/s)")
        for row in rows:
            print(
                f"  {row['order']:10}  {row['batch_size']:4}   {row['transformers']:12,.0f}   "
                f"{row['pretrain']:8,.0f}   {row['faster_by']:7.2f} x"
            )
    if options.out:
        write_results(options.out, options, results)


if __name__ == "__main__":
    main()

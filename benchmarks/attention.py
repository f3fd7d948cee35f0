"""Attention over packs of real lengths on a CPU: SDPA's kernels and the project's own, alternating in one process.

    OMP_NUM_THREADS=1 python benchmarks/attention.py [--head-sizes 16 24] [--lengths 100 300 1024] [--rounds 7]

A round draws a pack from the corpus's lengths (or takes one length), and times forward and backward of each, by the
clock and by processor time: the latter hardly changes with what else the machine does. Ratios are medians of the
rounds' ratios; rates count the seven products of forward and backward, none of them twice for recomputation.
"""

import argparse
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from results_file import write_results

from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.model.attention import Layout, variable_length_attention
from pretrain.model.cpu_kernels import require_llvm

HEADS = 20
PRODUCTS = 7


def seconds(llvm: bool, qkv: torch.Tensor, layout: Layout, weight: torch.Tensor) -> np.ndarray[Any, Any]:
    """Forward and backward, each by the clock and by processor time, shape [2, 2]."""
    query, key, value = (x.detach().requires_grad_() for x in qkv.unbind(1))
    times = [(time.perf_counter(), time.process_time())]
    attended = variable_length_attention(query, key, value, layout, layout, llvm=llvm)
    times.append((time.perf_counter(), time.process_time()))
    attended.backward(weight)
    times.append((time.perf_counter(), time.process_time()))
    return np.array([np.subtract(after, before) for before, after in pairwise(times)])


def measure(head_size: int, lengths: list[np.ndarray[Any, Any]]) -> dict[str, float]:
    """One head size over packs of these lengths; the first is not counted."""
    ratios, rates = [], []
    for pack in lengths:
        qkv = torch.randn(int(pack.sum()), 3, HEADS, head_size)
        layout = Layout.of(torch.tensor([0, *pack]).cumsum(0, dtype=torch.int32))
        weight = torch.randn_like(qkv[:, 0])
        theirs, ours = (seconds(llvm, qkv, layout, weight) for llvm in (False, True))
        ratios.append(np.vstack([theirs / ours, theirs.sum(0) / ours.sum(0)]))
        flops = PRODUCTS * 2 * head_size * HEADS * float((pack**2).sum())
        rates.append([flops / times.sum(0)[1] / 1e9 for times in (theirs, ours)])
    (forward, _), (backward, _), (clock, processor) = np.median(ratios[1:], 0)
    return {
        "forward": forward,
        "backward": backward,
        "both": clock,
        "both_by_processor_time": processor,
        "sdpa_gflops": median(rate[0] for rate in rates[1:]),
        "llvm_gflops": median(rate[1] for rate in rates[1:]),
    }


def main() -> None:
    """Measure, print, and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-sizes", type=int, nargs="+", default=[16, 20, 24, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 300, 1024], help="beside a mix of real ones")
    parser.add_argument("--tokens", type=int, default=4096, help="of a pack, at least")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--source", default="data/proteins/train.fasta.gz")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    corpus = open_or_prepare([options.source], load_tokenizer("esm"))
    real = np.minimum(corpus.lengths(np.arange(len(corpus))), 1024)
    generator, results = np.random.default_rng(0), []
    print("head size   lengths   forward   backward   both   by processor time   SDPA -> LLVM, GFLOP/s")
    for head_size in options.head_sizes:
        require_llvm(head_size)
        for length in (None, *options.lengths):
            packs = []
            for _ in range(options.rounds + 1):
                drawn = generator.permutation(real) if length is None else np.full(options.tokens, length)
                packs.append(-np.sort(-drawn[: int(np.searchsorted(drawn.cumsum(), options.tokens)) + 1]))
            row = measure(head_size, packs)
            results.append({"head_size": head_size, "length": length, **row})
            print(
                f"{head_size:9}   {length or 'real':>7}   {row['forward']:6.2f}x   {row['backward']:7.2f}x   "
                f"{row['both']:.2f}x   {row['both_by_processor_time']:16.2f}x   {row['sdpa_gflops']:.0f} -> "
                f"{row['llvm_gflops']:.0f}",
                flush=True,
            )
    if options.out:
        write_results(options.out, options, results)


if __name__ == "__main__":
    main()

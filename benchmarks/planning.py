"""Planning from lengths alone: speed, balance, memory and seeking, for corpora of 10^6 to 10^9 sequences.

    python benchmarks/planning.py [--sizes 1e6 1e7 1e8] [--steps 30]

Simulated: lengths as of UniRef (log-normal, median 270), in a mapped file of 2 bytes a sequence; 10^9 sequences have
computed ones. A step is 2M tokens with crops of 1,024, shared out into 32 packs (8 ranks x 4 micro-batches): what each
rank does for each step. Nothing is read or masked. Times are wall-clock, or
with --processor-time those of this process.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pretrain.corpus.masking import Masking
from pretrain.corpus.mixture import MixtureOrder
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Planner, Position, share_out

STEP_TOKENS, MAX_LENGTH, PACKS, ATTENTION_COST = 2**21, 1024, 32, 0.0005
Clock = Callable[[], float]
MASKING = Masking(0.15, 0.8, 0.1, 32, np.arange(4, 24), 0)


class Lengths:
    """All that planning knows of a corpus."""

    def __init__(self, num_sequences: int, of: Callable[[NDArray[np.int64]], NDArray[np.integer]]) -> None:
        self.num_sequences, self.of = num_sequences, of

    def lengths(self, indices: ArrayLike) -> NDArray[np.int64]:
        return self.of(np.asarray(indices, np.int64)).astype(np.int64)


def drawn(generator: np.random.Generator, count: int) -> NDArray[np.uint16]:
    return np.clip(generator.lognormal(5.6, 0.7, count), 20, 35_000).astype(np.uint16)


def mapped(directory: Path, num_sequences: int) -> Lengths:
    path, generator = directory / f"{num_sequences}.bin", np.random.default_rng(0)
    with path.open("wb") as file:
        for first in range(0, num_sequences, 2**20):
            file.write(drawn(generator, min(2**20, num_sequences - first)).tobytes())
    lengths = np.memmap(path, np.uint16, "r")
    return Lengths(num_sequences, lambda indices: lengths[indices])


def computed(num_sequences: int) -> Lengths:
    table = drawn(np.random.default_rng(0), 2**16)
    return Lengths(num_sequences, lambda indices: table[indices % len(table)])


def planner_of(corpus: Lengths, mixture: bool = False) -> Planner:
    order: Order | MixtureOrder = Order(corpus.num_sequences, 0)
    if mixture:
        half = corpus.num_sequences // 2
        order = MixtureOrder([Order(half, 1), Order(half, 2)], [0, half], np.array([7, 3]), 0)
    return Planner(corpus, order, MASKING, MAX_LENGTH)  # type: ignore[arg-type]


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def plan_steps(planner: Planner, steps: int, clock: Clock) -> tuple[list[float], list[float]]:
    """Tokens a second of each step, and its costliest pack beside the mean."""
    position, speeds, imbalance = Position(), [], []
    for _ in range(steps):
        begin = clock()
        step = planner.step(position, STEP_TOKENS)
        packs = share_out(step, PACKS, ATTENTION_COST)
        speeds.append(float(step.lengths.sum()) / (clock() - begin))
        costs = [float((pack.lengths * (1 + ATTENTION_COST * pack.lengths)).sum()) for pack in packs]
        imbalance.append(max(costs) / (sum(costs) / len(costs)))
        position = step.after
    return speeds[1:], imbalance


def seek_ms(corpus: Lengths, mixture: bool, clock: Clock) -> tuple[float, float]:
    """Milliseconds from nothing to the first step's packs, at cursor 0 and far into the epoch, in turns."""
    times: list[list[float]] = [[], []]
    for turn in range(30):
        cursor = turn % 2 * int(0.9 * corpus.num_sequences) + turn * 50_000  # each turn at sequences not yet seen
        begin = clock()
        share_out(planner_of(corpus, mixture).step(Position(cursor), STEP_TOKENS), PACKS, ATTENTION_COST)
        times[turn % 2].append(clock() - begin)
    return 1e3 * median(times[0]), 1e3 * median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e6, 1e7, 1e8])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processor-time", action="store_true", help="where other work runs")
    options = parser.parse_args()
    clock = time.process_time if options.processor_time else time.perf_counter
    row = "| {} | {:.2f} | {:.4f} | {:.2f} | {:.1f} | {:.1f} | {:.2f} |"
    print("| sequences | G tokens/s | costliest/mean pack | RssAnon +MiB | seek 0, ms | seek 0.9 N, ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as directory:
        cases = [(f"{int(size):,}", mapped(Path(directory), int(size)), False) for size in options.sizes]
        cases += [
            ("1,000,000,000", computed(10**9), False),
            ("1,000,000,000 in two corpora, 7:3", computed(10**9), True),
        ]
        plan_steps(planner_of(computed(10**6)), 3, clock)  # numpy's own buffers
        for name, corpus, mixture in cases:
            before = anonymous_mib()
            speeds, imbalance = plan_steps(planner_of(corpus, mixture), options.steps, clock)
            grown = anonymous_mib() - before
            start, far = seek_ms(corpus, mixture, clock)
            print(row.format(name, median(speeds) / 1e9, max(imbalance), grown, start, far, far / start), flush=True)


if __name__ == "__main__":
    main()

"""How long training stands still while a checkpoint is written, at once and in the background.

    python benchmarks/saving.py [--sizes 35M 150M] [--rounds 3]

A checkpoint as of a run (weights and AdamW's two moments, float32, on the CPU) is written into the current directory's
file system. `at once` is the whole of it: serialising, checksum, waiting for the disk. `in the background` is what
training waits for when a copy of the state is made first and written by a thread: the copy, and the time that the main
thread then could not run at all because the writing one held Python's lock. The main thread computes matrix products
meanwhile; their rate tells what the writing takes from training while it lasts.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import torch
from results_file import write_results

from pretrain import Encoder, EncoderConfig
from pretrain.train.checkpoint import AtomicCheckpointIO, snapshot


def state(size: str) -> dict[str, Any]:
    """What a run of this size saves."""
    encoder = Encoder(EncoderConfig.named(size))
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    for parameter in encoder.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    weights = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    return {"state_dict": weights, "optimizer_states": [optimizer.state_dict()], "global_step": 1}


def seconds(action: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def products(until: Callable[[], bool]) -> tuple[float, float]:
    """Matrix products a second, and how long the thread stood still, in seconds, until something is the case."""
    a = torch.rand(256, 256)
    usual = median(seconds(lambda: a @ a) for _ in range(200))
    count, still, begin = 0, 0.0, time.perf_counter()
    while not until():
        count, still = count + 1, still + max(0.0, seconds(lambda: a @ a) - 5 * usual)
    return count / (time.perf_counter() - begin), still


def measure(size: str, directory: Path) -> dict[str, float]:
    checkpoint, path = state(size), directory / "x.ckpt"
    end = time.perf_counter() + 3
    alone, _ = products(lambda: time.perf_counter() > end)
    at_once = seconds(lambda: AtomicCheckpointIO().save_checkpoint(checkpoint, path))
    gigabytes = path.stat().st_size / 1e9
    copy = seconds(lambda: checkpoint.update(copied=snapshot(checkpoint)))
    writer = Thread(target=AtomicCheckpointIO().save_checkpoint, args=(checkpoint.pop("copied"), path))
    begin = time.perf_counter()
    writer.start()
    rate, still = products(lambda: not writer.is_alive())
    return {
        "gigabytes": gigabytes,
        "at once": at_once,
        "copy": copy,
        "in the background": copy + still,
        "written after": time.perf_counter() - begin,
        "rate while writing": rate / alone,
    }


def main() -> None:
    """Measure each size in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["35M", "150M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {size: {} for size in options.sizes}
    with TemporaryDirectory(dir=".") as directory:
        for _ in range(options.rounds):
            for size in options.sizes:
                for name, value in measure(size, Path(directory)).items():
                    results[size].setdefault(name, []).append(value)
    for size, figures in results.items():
        print(size, {name: round(median(values), 3) for name, values in figures.items()})
    if options.out:
        write_results(options.out, options, results)


if __name__ == "__main__":
    main()

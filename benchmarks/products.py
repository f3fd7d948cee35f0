"""Matrix products of a block on a CPU: torch's and the project's own, alternating in one process.

    OMP_NUM_THREADS=2 python benchmarks/products.py [--shapes 8M 35M] [--tokens 4096] [--rounds 9]

For each weight of an ESM-2 shape and the quickstart's: the product of the forward pass, and both of the backward pass.
Rates are medians over the rounds, ratios medians of the rounds' ratios, by the clock. The largest difference of the
forward product from the one in float64 is told for both, in units of its own standard deviation.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from results_file import write_results
from torch import Tensor

import pretrain.model.linear
from pretrain import EncoderConfig
from pretrain.model.allocator import keep_freed_memory
from pretrain.model.cpu_kernels import require_llvm
from pretrain.model.linear import linear

PASSES = ("forward", "backward")


def seconds(x: Tensor, weight: Tensor, gradient: Tensor, llvm: bool) -> tuple[float, float]:
    """Of the forward pass and the backward pass."""
    begin = time.perf_counter()
    out = linear(x, weight, None, llvm)
    middle = time.perf_counter()
    out.backward(gradient)
    end = time.perf_counter()
    x.grad = weight.grad = None
    return middle - begin, end - middle


def measure(tokens: int, inputs: int, outputs: int, rounds: int) -> dict[str, float]:
    """One weight, with the rates of both in GFLOP/s."""
    x, weight = torch.randn(tokens, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    gradient, times = torch.randn(tokens, outputs), list[list[tuple[float, float]]]()
    for _ in range(rounds + 1):
        times.append([seconds(x, weight, gradient, llvm) for llvm in (False, True)])
    row: dict[str, float] = {}
    for i, name in enumerate(PASSES):
        flops = 2e-9 * tokens * inputs * outputs * (i + 1)
        row[f"{name}_torch"], row[f"{name}_llvm"] = (flops / median(t[who][i] for t in times[1:]) for who in (0, 1))
        row[f"{name}_faster_by"] = median(theirs[i] / ours[i] for theirs, ours in times[1:])
    with torch.no_grad():
        exact = x.double() @ weight.double().t()
        for who, llvm in (("torch", False), ("llvm", True)):
            row[f"error_{who}"] = float((linear(x, weight, None, llvm) - exact).abs().max() / exact.std())
    return row


def main() -> None:
    """Measure, print, and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["quickstart", "8M", "35M"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    require_llvm(1)
    pretrain.model.linear.MIN_MULTIPLICATIONS = 0  # the small ones show why they are torch's
    keep_freed_memory()  # as `pretrain fit` does, for both
    results = []
    print(
        "shape        weight        GFLOP/s, torch -> own:  forward               backward              largest error"
    )
    for shape in options.shapes:
        width = 64 if shape == "quickstart" else EncoderConfig.named(shape).hidden_size
        for outputs, inputs in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            row = measure(options.tokens, inputs, outputs, options.rounds)
            results.append({"shape": shape, "weight": [outputs, inputs], **row})
            rates = "   ".join(
                f"{row[f'{name}_torch']:5.0f} -> {row[f'{name}_llvm']:3.0f} ({row[f'{name}_faster_by']:.2f} x)"
                for name in PASSES
            )
            print(
                f"{shape:10}  {outputs:5} x {inputs:4}                          {rates}   "
                f"{row['error_torch']:.0e} -> {row['error_llvm']:.0e}",
                flush=True,
            )
    if options.out:
        write_results(options.out, options, results)


if __name__ == "__main__":
    main()

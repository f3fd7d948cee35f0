"""Training throughput on one GPU, beside padded transformers, in one run of at most ``--minutes``.

    python benchmarks/gpu.py [--shapes 8M 150M 650M bert-base] [--steps 6] [--minutes 8] [--out FILE]

For each shape this project trains through Lightning's Trainer as its users do (bfloat16 autocast, static packs,
compiled blocks, fused AdamW, four packs a step), and transformers' `EsmForMaskedLM` trains by a bare loop on padded
batches of the same corpus (bfloat16 autocast, fused AdamW, four batches a step, the largest that fit) with each
attention that runs: SDPA, and flash attention where it is installed. Printed: real tokens/s (padding does not count),
model FLOPs utilisation against the datasheet and against bfloat16 matrix products measured here, at 8,192 cubed and at
the shape's own sizes, peak memory, and the share of time spent waiting for data. The loss of compiled bfloat16 training
is compared with `EsmForMaskedLM` in float32 from the same weights on the same batches over ``--parity-steps`` steps.

What fails is told and left out, and so is what there is no time for; the rivals come last. The file is written after
each part. ``--device cpu --shapes tiny`` runs all of it on a CPU, to try it.
"""

import argparse
import gc
import json
import logging
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import EsmConfig, EsmForMaskedLM

from pretrain import EncoderConfig, MLMDataModule, MLMModule
from pretrain.corpus.batch import Batch
from pretrain.corpus.packed import TimedLoader
from pretrain.corpus.padding import IGNORED
from pretrain.model.hf import from_hf, to_hf_config
from pretrain.train.hardware import is_out_of_memory
from pretrain.train.throughput import matmul_rate, peak_flops

MAX_LENGTH = 1024
MICRO_BATCHES = 4  # packs a step: real steps have more
SHAPES = {  # tokens in a pack: as many as keep the GPU busy and fit beside the optimizer's state
    "8M": (EncoderConfig.named("8M"), 131_072),
    "150M": (EncoderConfig.named("150M"), 65_536),
    "650M": (EncoderConfig.named("650M"), 32_768),
    "bert-base": (
        EncoderConfig(768, 12, 12, vocab_size=30_592, token_dropout=False),  # BERT's vocabulary, in multiples of 64
        65_536,
    ),
    "tiny": (EncoderConfig(64, 2, 2), 2048),  # to try this file on a CPU
}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def data_module(options: argparse.Namespace, tokens: int, **settings: Any) -> MLMDataModule:
    return MLMDataModule(
        options.source,
        max_length=MAX_LENGTH,
        global_batch_tokens=tokens,
        static_shapes=True,
        num_workers=options.workers,
        **settings,
    )


class Window(pl.Callback):
    """Times the steps after the warm-up, and the waits for their batches."""

    def __init__(self, warm_up: int, device: torch.device) -> None:
        self.first, self.device = warm_up * MICRO_BATCHES, device
        self.tokens, self.flops = 0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: MLMModule, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        if batch_idx == self.first:
            synchronize(self.device)
            self.begin, self.waited = time.perf_counter(), self._waited(trainer)
            self.graphs = graphs()
        if batch_idx >= self.first:
            self.tokens += int(batch.pack.lengths.sum())
            self.flops += module.flops(batch.pack)

    def on_train_end(self, trainer: pl.Trainer, *_: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.begin
        self.waited = self._waited(trainer) - self.waited
        self.graphs = graphs() - self.graphs

    @staticmethod
    def _waited(trainer: pl.Trainer) -> float:
        assert isinstance(trainer.train_dataloader, TimedLoader)
        return trainer.train_dataloader.seconds_waited


def graphs() -> int:
    """How many graphs torch has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def ours(config: EncoderConfig, tokens: int, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """This project's training, through Lightning's Trainer."""
    window = Window(options.warm_up, device)
    module = MLMModule(config, compile=not options.eager, flash_attention=options.flash_attention)
    trainer = pl.Trainer(
        max_steps=options.warm_up + options.steps,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        accumulate_grad_batches=MICRO_BATCHES,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[window],
    )
    reset_peak(device)
    trainer.fit(module, data_module(options, MICRO_BATCHES * tokens))
    return {
        "tokens_per_second": window.tokens / window.seconds,
        "flops_per_second": window.flops / window.seconds,
        "data_wait": window.waited / window.seconds,
        "graphs_compiled_while_measured": window.graphs,
        "pack_tokens": tokens,
        "peak_memory_gib": peak_gib(device),
    }


def theirs(
    config: EncoderConfig, tokens: int, attention: str, options: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """transformers' model by a bare loop: no Trainer, no logging, batches ready in advance."""
    data = data_module(options, tokens)
    data.setup("fit")
    corpus = data.train_corpus
    size = max(1, tokens // MAX_LENGTH)
    generator = np.random.default_rng(0)
    batches = []
    for _ in range(MICRO_BATCHES * (options.warm_up + options.steps)):
        crops = [
            corpus.tokens(int(i))[:MAX_LENGTH].astype(np.int64) for i in generator.integers(len(corpus), size=size)
        ]
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in crops], True, config.pad_token_id)
        targets = torch.where(torch.rand(ids.shape) < 0.15, ids, IGNORED).masked_fill(ids < 4, IGNORED)
        inputs = torch.where(targets != IGNORED, config.mask_token_id, ids)
        batch = (inputs, (ids != config.pad_token_id).long(), targets)
        batches.append(tuple(t.pin_memory() for t in batch) if device.type == "cuda" else batch)
    model = EsmForMaskedLM(EsmConfig(**to_hf_config(config), attn_implementation=attention)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True)
    reset_peak(device)
    real = 0
    for number, batch in enumerate(batches):
        if number == MICRO_BATCHES * options.warm_up:
            synchronize(device)
            begin = time.perf_counter()
        inputs, mask, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(inputs, attention_mask=mask, labels=targets).loss / MICRO_BATCHES
        loss.backward()
        if (number + 1) % MICRO_BATCHES == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        real += int(batch[1].sum()) if number >= MICRO_BATCHES * options.warm_up else 0
    synchronize(device)
    return {
        "tokens_per_second": real / (time.perf_counter() - begin),
        "batch_size": size,
        "peak_memory_gib": peak_gib(device),
    }


def own_matmul_rate(config: EncoderConfig, tokens: int, device: torch.device, seconds: float = 2.0) -> float:
    """FLOP/s of the products of one block's linear layers, forward and backward, in bfloat16.

    Median over a while: a GPU that has been busy for longer runs at a lower clock, and training keeps it busy.
    """
    width, ffn = config.hidden_size, config.ffn_size
    pairs = [(width, 3 * width), (width, width), (width, ffn), (ffn, width)]
    work = []
    for inner, outer in pairs:
        x = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
        w = torch.randn(outer, inner, device=device, dtype=torch.bfloat16)
        work.append((x, w, x.new_empty(tokens, outer).normal_()))

    def once() -> float:
        synchronize(device)
        begin = time.perf_counter()
        for x, w, gradient in work:
            x @ w.T, gradient @ w, gradient.T @ x
        synchronize(device)
        return time.perf_counter() - begin

    once()
    times = [once()]
    while sum(times) < seconds:
        times.append(once())
    return sum(6.0 * tokens * i * o for i, o in pairs) / median(times)


@dataclass
class Parity:
    """Losses of both trainings, step by step."""

    compiled_bf16: list[float]
    reference_fp32: list[float]

    @property
    def largest_difference(self) -> float:
        return max(abs(a - b) / b for a, b in zip(self.compiled_bf16, self.reference_fp32, strict=True))


def parity(options: argparse.Namespace, device: torch.device) -> Parity:
    """Train both from the same weights on the same batches; the reference is padded, eager, in float32 with SDPA."""
    shape, tokens = SHAPES["tiny" if device.type == "cpu" else "8M"][0], 4096
    reference = EsmForMaskedLM(EsmConfig(**to_hf_config(shape), attn_implementation="sdpa")).to(device)
    module = MLMModule(shape, compile=not options.eager).to(device)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    module.encoder.load_state_dict({"inv_freq": module.encoder.inv_freq, **from_hf(state, shape)})
    module.configure_model()
    data = data_module(options, tokens)
    data.trainer = pl.Trainer(
        max_steps=options.parity_steps, logger=False, accelerator="cpu", enable_checkpointing=False
    )
    data.setup("fit")
    adams = [torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True) for model in (module.encoder, reference)]
    losses = Parity([], [])
    for batch in islice(data.train_dataloader(), options.parity_steps):
        batch = batch.to(device)
        count = int(batch.pack.targets.sum())
        with torch.autocast(device.type, torch.bfloat16):
            total = module.encoder.loss(
                batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
            )
        padded = padded_batch(batch, shape.pad_token_id)
        logits = reference(padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), padded["labels"].flatten(), ignore_index=IGNORED)
        for loss, adam in ((total / count, adams[0]), (expected, adams[1])):
            loss.backward()
            adam.step()
            adam.zero_grad()
        losses.compiled_bf16.append(float(total) / count)
        losses.reference_fp32.append(float(expected))
    return losses


def padded_batch(batch: Batch, pad: int) -> dict[str, Tensor]:
    labels = torch.full_like(batch.input_ids, IGNORED)
    labels[batch.target_positions] = batch.targets
    lengths = batch.pack.lengths.tolist()
    real = sum(lengths)

    def rows(flat: Tensor, value: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(flat[:real].split(lengths)), True, value)

    return {
        "input_ids": rows(batch.input_ids, pad),
        "attention_mask": rows(torch.ones_like(batch.input_ids), 0),
        "labels": rows(labels, IGNORED),
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


class Parts:
    """Runs the parts of the benchmark: what fails, or comes too late, is told and costs no other part its result.

    Args:
        seconds: In all.
        device: Where the parts run.
    """

    def __init__(self, seconds: float, device: torch.device) -> None:
        self.end, self.device = time.monotonic() + seconds, device

    def run(self, name: str, measure: Callable[[int], Any], size: int = 1) -> Any:
        """What ``measure`` returns, given ``size`` or, where memory runs out, half of it, and so on; else why not."""
        while True:
            if time.monotonic() > self.end:
                return self._without(name, "no time left")
            try:
                return measure(size)
            except Exception as error:  # a part may fail in any way
                if not (is_out_of_memory(error) and size > 1):
                    return self._without(name, " ".join(f"{type(error).__name__}: {error}".split())[:200])
                print(f"  {name}: {size:,} tokens do not fit into memory, once more with half", flush=True)
                size //= 2
            finally:
                gc.collect()
                torch._dynamo.reset()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()

    @staticmethod
    def _without(name: str, reason: str) -> dict[str, str]:
        print(f"  {name}: did not run ({reason})", flush=True)
        return {"did_not_run": reason}


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


def main() -> int:
    """Measure, print, and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["650M", "8M", "150M", "bert-base"])
    parser.add_argument("--steps", type=int, default=6, help="measured optimizer steps of each contestant")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them; compilation falls into these")
    parser.add_argument("--parity-steps", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=7.5, help="no part begins after so long")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--flash-attention", choices=["FA2", "FA3"], default="FA2", help="see MLMModule")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--source", default="data/proteins/train.fasta.gz")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures (on a GPU: in benchmarks/results)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here; --device cpu tries the script itself", file=sys.stderr)
        return 2
    quiet()
    device = torch.device(options.device)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    peak, source = peak_flops(device)
    measured = matmul_rate(device, torch.bfloat16)
    print(
        f"{device_name}, torch {torch.__version__}, transformers {transformers.__version__}: {peak / 1e12:.3g} TFLOP/s "
        f"({source}); measured bf16 products {measured / 1e12:.3g} TFLOP/s",
        flush=True,
    )
    if device.type == "cuda" and not options.out:
        kind = "-".join(device_name.removeprefix("NVIDIA ").split()[:2])
        options.out = Path("benchmarks/results") / f"{time.strftime('%Y-%m-%d')}-{kind}.json"
    conditions = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasheet_or_measured_peak": peak,
        "measured_matmul_rate": measured,
        **{name: str(value) for name, value in vars(options).items()},
    }
    results: dict[str, Any] = {}
    figures = {"conditions": conditions, "results": results, "parity": {}}

    def write() -> None:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(figures, indent=1) + "\n")

    parts = Parts(60 * options.minutes, device)
    for name in options.shapes:
        results[name] = measure_ours(name, parts, options, device, peak, measured)
        write()
    figures["parity"] = measure_parity(parts, options, device)
    write()
    for attention in ("sdpa", "flash_attention_2"):
        for name in options.shapes:
            results[name][attention] = measure_theirs(
                name, attention, results[name]["pretrain"], parts, options, device
            )
            write()
    return 0 if all("did_not_run" not in results[name]["pretrain"] for name in options.shapes) else 1


def measure_ours(
    name: str, parts: Parts, options: argparse.Namespace, device: torch.device, peak: float, measured: float
) -> dict[str, Any]:
    config, tokens = SHAPES[name]
    own_rate = parts.run(
        f"{name}, products of its own sizes", lambda size: own_matmul_rate(config, size, device), tokens
    )
    row = parts.run(f"{name}, pretrain", lambda size: ours(config, size, options, device), tokens)
    if "did_not_run" not in row:
        row["mfu"] = row["flops_per_second"] / peak
        against = [f"MFU {row['mfu']:.1%}", f"{row['flops_per_second'] / measured:.1%} of measured products"]
        if isinstance(own_rate, float):
            row["share_of_own_products"] = row["flops_per_second"] / own_rate
            against += [
                f"{row['share_of_own_products']:.1%} of products of its own sizes ({own_rate / 1e12:.3g} TFLOP/s)"
            ]
        print(
            f"{name}: {row['tokens_per_second']:,.0f} real tokens/s, {', '.join(against)}; packs of "
            f"{row['pack_tokens']:,}, peak {row['peak_memory_gib']:.1f} GiB, data wait {row['data_wait']:.1%}",
            flush=True,
        )
        if row["graphs_compiled_while_measured"]:
            print(f"  {row['graphs_compiled_while_measured']} graphs were compiled meanwhile: give a longer --warm-up")
    return {"pretrain": row, "own_matmul_rate": own_rate}


def measure_parity(parts: Parts, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    losses = parts.run("parity", lambda _: parity(options, device))
    if not isinstance(losses, Parity):
        return dict(losses)
    print(
        f"parity over {len(losses.reference_fp32)} steps: last losses {losses.compiled_bf16[-1]:.4f} (bf16) and "
        f"{losses.reference_fp32[-1]:.4f} (float32 reference), largest difference {losses.largest_difference:.2%}",
        flush=True,
    )
    return {**vars(losses), "largest_difference": losses.largest_difference}


def measure_theirs(
    name: str, attention: str, mine: dict[str, Any], parts: Parts, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    config, tokens = SHAPES[name]
    what = f"{name}, transformers, {attention}"
    rival = parts.run(what, lambda size: theirs(config, size, attention, options, device), tokens)
    if "did_not_run" not in rival:
        faster = ""
        if "did_not_run" not in mine:
            rival["pretrain_is_faster_by"] = mine["tokens_per_second"] / rival["tokens_per_second"]
            faster = f": pretrain is faster by {rival['pretrain_is_faster_by']:.2f} x"
        print(
            f"{what}: {rival['tokens_per_second']:,.0f} real tokens/s, batches of {rival['batch_size']}, peak "
            f"{rival['peak_memory_gib']:.1f} GiB{faster}",
            flush=True,
        )
    return dict(rival)


if __name__ == "__main__":
    sys.exit(main())

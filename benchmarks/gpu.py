"""Training throughput on one GPU, beside padded transformers, in one run.

    python benchmarks/gpu.py [--shapes 8M 150M 650M bert-base] [--steps 20] [--out FILE]

For each shape this project trains through Lightning's Trainer as its users do (bfloat16 autocast, static packs,
compiled blocks, fused AdamW, one pack a step), and transformers' `EsmForMaskedLM` trains by a bare loop on padded
batches of the same corpus (bfloat16 autocast, fused AdamW) with each attention that runs: SDPA, and flash attention
where it is installed. Printed: real tokens/s (padding does not count), model FLOPs utilisation against the datasheet
and against bfloat16 matrix products measured here, at 8,192 cubed and at the shape's own sizes, peak memory, and the
share of time spent waiting for data. Then the loss of compiled bfloat16 training is compared with `EsmForMaskedLM` in
float32 from the same weights on the same batches over ``--parity-steps`` steps. ``--device cpu`` runs all of it on a
CPU, to try it.
"""

import argparse
import json
import platform
import sys
import time
import warnings
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
from pretrain.corpus.padding import IGNORED
from pretrain.model.hf import from_hf, to_hf_config
from pretrain.train.throughput import matmul_rate, peak_flops

MAX_LENGTH = 1024
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
        self.warm_up, self.device = warm_up, device
        self.tokens, self.flops, self.wait = 0, 0.0, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, module: MLMModule, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        now = time.perf_counter()
        if batch_idx == self.warm_up:
            synchronize(self.device)
            self.begin = time.perf_counter()
        elif batch_idx > self.warm_up:
            self.wait += now - self.last
        if batch_idx >= self.warm_up:
            self.tokens += int(batch.pack.lengths.sum())
            self.flops += module.encoder.config.training_flops(batch.pack.lengths, batch.pack.targets)

    def on_train_batch_end(self, *_: object) -> None:
        self.last = time.perf_counter()

    def on_train_end(self, *_: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.begin


def ours(config: EncoderConfig, tokens: int, options: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """This project's training, through Lightning's Trainer."""
    window = Window(options.warm_up, device)
    module = MLMModule(config, compile=not options.eager)
    trainer = pl.Trainer(
        max_steps=options.warm_up + options.steps,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[window],
    )
    _reset_peak(device)
    trainer.fit(module, data_module(options, tokens))
    return {
        "tokens_per_second": window.tokens / window.seconds,
        "flops_per_second": window.flops / window.seconds,
        "data_wait": window.wait / window.seconds,
        "peak_memory_gib": _peak_gib(device),
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
    for _ in range(options.warm_up + options.steps):
        crops = [
            corpus.tokens(int(i))[:MAX_LENGTH].astype(np.int64) for i in generator.integers(len(corpus), size=size)
        ]
        ids = nn.utils.rnn.pad_sequence([torch.from_numpy(c) for c in crops], True, config.pad_token_id)
        targets = torch.where(torch.rand(ids.shape) < 0.15, ids, IGNORED).masked_fill(ids < 4, IGNORED)
        inputs = torch.where(targets != IGNORED, config.mask_token_id, ids)
        batches.append((inputs, (ids != config.pad_token_id).long(), targets))
    model = EsmForMaskedLM(EsmConfig(**to_hf_config(config), attn_implementation=attention)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, fused=True)
    _reset_peak(device)
    real = 0
    for number, batch in enumerate(batches):
        if number == options.warm_up:
            synchronize(device)
            begin = time.perf_counter()
        inputs, mask, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(inputs, attention_mask=mask, labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        real += int(batch[1].sum()) if number >= options.warm_up else 0
    synchronize(device)
    return {"tokens_per_second": real / (time.perf_counter() - begin), "peak_memory_gib": _peak_gib(device)}


def own_matmul_rate(config: EncoderConfig, tokens: int, device: torch.device) -> float:
    """FLOP/s of the products of one block's linear layers, forward and backward, in bfloat16."""
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
    return sum(6.0 * tokens * i * o for i, o in pairs) / median(once() for _ in range(10))


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
            total, _ = module.encoder.loss(
                batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
            )
        padded = _padded(batch, shape.pad_token_id)
        logits = reference(padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        expected = F.cross_entropy(logits.flatten(0, 1), padded["labels"].flatten(), ignore_index=IGNORED)
        for loss, adam in ((total / count, adams[0]), (expected, adams[1])):
            loss.backward()
            adam.step()
            adam.zero_grad()
        losses.compiled_bf16.append(float(total) / count)
        losses.reference_fp32.append(float(expected))
    return losses


def _padded(batch: Batch, pad: int) -> dict[str, Tensor]:
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


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


def main() -> int:
    """Measure, print, and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["8M", "150M", "650M", "bert-base"])
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each contestant")
    parser.add_argument("--warm-up", type=int, default=8, help="steps before them; compilation falls into these")
    parser.add_argument("--parity-steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--source", default="data/proteins/train.fasta.gz")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/gpu.py: no CUDA device here; --device cpu tries the script itself", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    device = torch.device(options.device)
    peak, source = peak_flops(device)
    measured = matmul_rate(device, torch.bfloat16)
    print(f"{device}: {peak / 1e12:.1f} TFLOP/s ({source}); measured bf16 products {measured / 1e12:.1f} TFLOP/s")
    results: dict[str, Any] = {}
    for name in options.shapes:
        config, tokens = SHAPES[name]
        own_rate = own_matmul_rate(config, tokens, device)
        row = results[name] = {"pretrain": ours(config, tokens, options, device), "own_matmul_rate": own_rate}
        mine = row["pretrain"]
        print(
            f"\n{name}: {mine['tokens_per_second']:,.0f} real tokens/s, MFU {mine['flops_per_second'] / peak:.1%} of "
            f"{source}, {mine['flops_per_second'] / measured:.1%} of measured products, "
            f"{mine['flops_per_second'] / own_rate:.1%} of products of its own sizes; peak "
            f"{mine['peak_memory_gib']:.1f} GiB, data wait {mine['data_wait']:.1%}",
            flush=True,
        )
        for attention in ("sdpa", "flash_attention_2"):
            try:
                rival = row[attention] = theirs(config, tokens, attention, options, device)
            except (ImportError, ValueError, torch.OutOfMemoryError) as error:
                reason = " ".join(str(error).split())[:100]
                row[attention] = {"did_not_run": reason}
                print(f"  transformers, {attention}: did not run ({reason})", flush=True)
                continue
            print(
                f"  transformers, {attention}: {rival['tokens_per_second']:,.0f} real tokens/s, peak "
                f"{rival['peak_memory_gib']:.1f} GiB: pretrain is faster by "
                f"{mine['tokens_per_second'] / rival['tokens_per_second']:.2f} x",
                flush=True,
            )
    losses = parity(options, device)
    print(
        f"\nparity over {len(losses.reference_fp32)} steps: last losses {losses.compiled_bf16[-1]:.4f} (bf16) and "
        f"{losses.reference_fp32[-1]:.4f} (float32 reference), largest difference {losses.largest_difference:.2%}"
    )
    if options.out:
        conditions = {
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "datasheet_or_measured_peak": peak,
            "measured_matmul_rate": measured,
            **{name: str(value) for name, value in vars(options).items()},
        }
        figures = {"conditions": conditions, "results": results, "parity": vars(losses)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Training throughput beside transformers' Trainer, alternating in one run.

    python benchmarks/throughput.py [--shapes 8M 35M] [--batch-sizes 1 8 16 32] [--rounds 4] [--out FILE]

Both train the same ESM-2 shape on the same sequences with the same threads, precision (fp32), fused AdamW and gradient
clipping. For each of Trainer's sampling strategies and batch sizes, a round takes batches at random from those that
Trainer's sampler deals over the whole corpus, at least ``--tokens`` real tokens; `Trainer` + `EsmForMaskedLM` +
`DataCollatorForLanguageModeling` trains on them, padding each to its longest sequence, and this project trains on the
very same sequences, both with one optimizer step a round. Only real tokens count, padding does not. The machine's rate
of matrix products (torch's or the project's own, whichever are faster) is measured before and after each of this
project's steps, and the highest is what shares are of. Both are warmed up first. Rates are medians over the rounds,
ratios medians of the rounds' ratios.
"""

import argparse
import logging
import os
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytorch_lightning as pl
import torch
import transformers
from numpy.typing import NDArray
from results_file import write_results
from transformers import (
    DataCollatorForLanguageModeling,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from pretrain import EncoderConfig, MLMModule
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.masking import Masking
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Pack, Planner, share_out
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.model.allocator import keep_freed_memory
from pretrain.model.cpu_kernels import CPUKernels
from pretrain.model.hf import to_hf_config
from pretrain.train.throughput import matmul_rate

MAX_LENGTH = 1024
CLIP = 1.0
MACHINE = (torch.device("cpu"), torch.float32, 1024, 70)
"""What the rate of matrix products is measured with: about a second of them, so that it is a sustained rate."""


class Ours:
    """This project's own step: sampler, masking, encoder, loss, clipping and optimizer, in Lightning's Trainer."""

    def __init__(self, config: EncoderConfig, corpus: Corpus, masking: Masking, cpu_kernels: CPUKernels) -> None:
        self.dataset = PackDataset(corpus, masking)
        self.module = MLMModule(config, learning_rate=1e-4, cpu_kernels=cpu_kernels)

    def seconds(self, step: Pack) -> float:
        loader = torch.utils.data.DataLoader(
            self.dataset, sampler=share_out(step, 1), batch_size=None, collate_fn=lambda batch: batch
        )
        clock = _Clock()
        pl.Trainer(
            max_steps=1,
            accelerator="cpu",
            gradient_clip_val=CLIP,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[clock],
        ).fit(self.module, loader)
        return clock.seconds


class _Clock(pl.Callback):
    def on_train_epoch_start(self, *_: object) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.begin


class Rival:
    """transformers' Trainer over the same sequences."""

    def __init__(self, config: EncoderConfig, corpus: Corpus, scratch: Path) -> None:
        self.corpus, self.scratch = corpus, scratch
        self.model = EsmForMaskedLM(EsmConfig(**to_hf_config(config)))
        vocabulary = scratch / "vocab.txt"
        vocabulary.write_text("\n".join(corpus.tokenizer.tokens))
        self.collator = DataCollatorForLanguageModeling(EsmTokenizer(str(vocabulary)), mlm_probability=0.15)

    def seconds(self, step: Pack, batch_size: int) -> float:
        crops = zip(step.indices.tolist(), step.starts.tolist(), step.lengths.tolist(), strict=True)
        dataset = [{"input_ids": self.corpus.tokens(i)[start : start + length].tolist()} for i, start, length in crops]
        clock = _TrainerClock()
        arguments = TrainingArguments(
            output_dir=str(self.scratch),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=-(-len(dataset) // batch_size),
            num_train_epochs=1,
            train_sampling_strategy="sequential",  # the sampler has dealt already
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            max_grad_norm=CLIP,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(self.model, arguments, train_dataset=dataset, data_collator=self.collator, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.seconds


def deal(lengths: NDArray[np.int64], strategy: str, batch_size: int, tokens: int, seed: int) -> NDArray[np.int64]:
    """Some of the batches that Trainer's sampler deals over the whole corpus, with at least ``tokens`` tokens in all.

    Returns:
        Sequences, batch after batch, shape [batches * batch_size].
    """
    generator = torch.Generator().manual_seed(seed)
    if strategy == "group_by_length":
        epoch = torch.tensor(get_length_grouped_indices(lengths.tolist(), batch_size, generator=generator))
    else:
        epoch = torch.randperm(len(lengths), generator=generator)
    batches = epoch[: len(lengths) // batch_size * batch_size].view(-1, batch_size)
    batches = batches[torch.randperm(len(batches), generator=generator)].numpy()
    enough = int(np.searchsorted(lengths[batches].sum(1).cumsum(), tokens)) + 1
    return batches[:enough].ravel()


class _TrainerClock(transformers.TrainerCallback):
    def on_train_begin(self, *_: object, **__: object) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds = time.perf_counter() - self.begin


def measure(shape: str, corpus: Corpus, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One shape, in turn with the rival at each strategy and batch size, round after round."""
    config = EncoderConfig.named(shape)
    masking = Masking(0.15, 0.8, 0.1, corpus.tokenizer.mask_token_id, corpus.tokenizer.replacement_ids, 0)
    planner = Planner(corpus, Order(len(corpus), 0), masking, MAX_LENGTH)
    lengths = np.minimum(corpus.lengths(np.arange(len(corpus))), MAX_LENGTH)
    ours, rival = Ours(config, corpus, masking, options.cpu_kernels), Rival(config, corpus, scratch)

    rows = [Row(strategy, size) for strategy in options.strategies for size in options.batch_sizes]
    machine: list[float] = []
    for round_number in range(options.rounds + 1):
        for row in rows if round_number else rows[:1]:
            indices = deal(lengths, row.strategy, row.batch_size, options.tokens, round_number)
            step = planner.describe(np.zeros_like(indices), indices)
            tokens = int(step.lengths.sum())
            machine.append(matmul_rate(*MACHINE))
            our_seconds = ours.seconds(step)
            machine.append(matmul_rate(*MACHINE))
            their_seconds = rival.seconds(step, row.batch_size)
            if round_number:
                row.ours.append(tokens / our_seconds)
                row.theirs.append(tokens / their_seconds)
                row.flops.append(config.training_flops(step.lengths, step.targets) / our_seconds)
                print(f"  {shape} round {round_number}: {row}", flush=True)
    return {
        "rows": [row.figures() for row in rows],
        "matmul_rate": max(machine),
        "share_of_matmul_rate": median(rate for row in rows for rate in row.flops) / max(machine),
    }


@dataclass
class Row:
    """The measurements beside the rival at one sampling strategy and batch size: real tokens/s, and our FLOP/s."""

    strategy: str
    batch_size: int
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.strategy} {self.batch_size}: {self.theirs[-1]:.0f} against our {self.ours[-1]:.0f} tokens/s"

    def figures(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "batch_size": self.batch_size,
            "transformers": median(self.theirs),
            "pretrain": median(self.ours),
            "faster_by": median(a / b for a, b in zip(self.ours, self.theirs, strict=True)),
            "rounds": {"transformers": self.theirs, "pretrain": self.ours, "flops": self.flops},
        }


def table(shape: str, result: dict[str, Any]) -> str:
    """What a person wants to know of one shape."""
    lines = [
        f"\n{shape}: {result['share_of_matmul_rate']:.0%} of the machine's fp32 matrix-product rate (executed FLOPs)",
        "  sampling          batch   transformers   pretrain   faster by    (real tokens/s)",
    ]
    for row in result["rows"]:
        lines.append(
            f"  {row['strategy']:16}  {row['batch_size']:5}   {row['transformers']:12.0f}   {row['pretrain']:8.0f}   "
            f"{row['faster_by']:7.2f} x"
        )
    for strategy in dict.fromkeys(row["strategy"] for row in result["rows"]):
        best = max((row for row in result["rows"] if row["strategy"] == strategy), key=lambda row: row["transformers"])
        lines.append(f"  beside the best of {strategy} (batch {best['batch_size']}): {best['faster_by']:.2f} x")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8M", "35M"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32], help="Trainer's")
    parser.add_argument("--strategies", nargs="+", default=["random", "group_by_length"], help="Trainer's sampling")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="real tokens of a round, at least")
    parser.add_argument("--cpu-kernels", choices=["auto", "torch", "LLVM"], default="auto", help="see MLMModule")
    parser.add_argument("--source", default="data/proteins/train.fasta.gz")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    keep_freed_memory()  # as `pretrain fit` does; here Trainer gains by it, too
    corpus = open_or_prepare([options.source], load_tokenizer("esm"))
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            results[shape] = measure(shape, corpus, options, Path(scratch))
    for shape, result in results.items():
        print(table(shape, result))
    if options.out:
        write_results(options.out, options, results)


if __name__ == "__main__":
    main()

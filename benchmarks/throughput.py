"""Training throughput beside transformers' Trainer, alternating in one run.

    python benchmarks/throughput.py [--shapes 8M 35M] [--rounds 3] [--tokens 16384] [--out FILE]

Both train the same ESM-2 shape on the same sequences with the same threads, precision (fp32), fused AdamW and gradient
clipping. In each round this project takes one optimizer step over up to ``--tokens`` real tokens, then each rival
trains over the very same sequences: `Trainer` + `EsmForMaskedLM` + `DataCollatorForLanguageModeling`, padding each
batch to its longest sequence, at several batch sizes. Only real tokens count,
padding does not. A round before the measured ones warms everything up. Rates are medians over the rounds, ratios
medians of the rounds' ratios.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytorch_lightning as pl
import torch
import transformers
from transformers import (
    DataCollatorForLanguageModeling,
    EsmConfig,
    EsmForMaskedLM,
    EsmTokenizer,
    Trainer,
    TrainingArguments,
)

from pretrain import EncoderConfig, MLMModule
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.masking import Masking
from pretrain.corpus.order import Order
from pretrain.corpus.packing import Pack, Planner, Position, share_out
from pretrain.corpus.prepare import open_or_prepare
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.model.hf import to_hf_config
from pretrain.train.throughput import matmul_rate

MAX_LENGTH = 1024
CLIP = 1.0


class Ours:
    """This project's own step: sampler, masking, encoder, loss, clipping and optimizer, in Lightning's Trainer."""

    def __init__(self, config: EncoderConfig, corpus: Corpus, masking: Masking) -> None:
        self.dataset = PackDataset(corpus, masking)
        self.module = MLMModule(config, learning_rate=1e-4)

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

    def __init__(self, config: EncoderConfig, corpus: Corpus, batch_size: int, strategy: str, scratch: Path) -> None:
        self.corpus, self.batch_size, self.strategy, self.scratch = corpus, batch_size, strategy, scratch
        self.model = EsmForMaskedLM(EsmConfig(**to_hf_config(config)))
        vocabulary = scratch / "vocab.txt"
        vocabulary.write_text("\n".join(corpus.tokenizer.tokens))
        self.collator = DataCollatorForLanguageModeling(EsmTokenizer(str(vocabulary)), mlm_probability=0.15)

    def seconds(self, step: Pack) -> float:
        crops = zip(step.indices.tolist(), step.starts.tolist(), step.lengths.tolist(), strict=True)
        sequences = [self.corpus.tokens(i)[start : start + length].tolist() for i, start, length in crops]
        clock = _TrainerClock()
        arguments = TrainingArguments(
            output_dir=str(self.scratch),
            per_device_train_batch_size=self.batch_size,
            num_train_epochs=1,
            train_sampling_strategy=self.strategy,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            max_grad_norm=CLIP,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        dataset = [{"input_ids": ids} for ids in sequences]
        Trainer(self.model, arguments, train_dataset=dataset, data_collator=self.collator, callbacks=[clock]).train()
        return clock.seconds


class _TrainerClock(transformers.TrainerCallback):
    def on_train_begin(self, *_: object, **__: object) -> None:
        self.begin = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds = time.perf_counter() - self.begin


def measure(shape: str, corpus: Corpus, options: argparse.Namespace, scratch: Path) -> dict[str, object]:
    """All contestants on one shape, in turn, round after round."""
    config = EncoderConfig.named(shape)
    masking = Masking(0.15, 0.8, 0.1, corpus.tokenizer.mask_token_id, corpus.tokenizer.replacement_ids, 0)
    planner = Planner(corpus, Order(len(corpus), 0), masking, MAX_LENGTH)
    contestants: dict[str, Ours | Rival] = {"pretrain": Ours(config, corpus, masking)}
    for strategy in options.strategies:
        for size in options.batch_sizes:
            contestants[f"transformers {strategy} batch {size}"] = Rival(config, corpus, size, strategy, scratch)

    position = Position()
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    shares: list[float] = []
    for round_number in range(options.rounds + 1):
        step = planner.step(position, options.tokens)
        position = step.after
        tokens = int(step.lengths.sum())
        matmul = matmul_rate(torch.device("cpu"), torch.float32)
        for name, contestant in contestants.items():
            seconds = contestant.seconds(step)
            if round_number:
                rates[name].append(tokens / seconds)
                if name == "pretrain":
                    shares.append(config.training_flops(step.lengths, step.targets) / seconds / matmul)
                print(f"  {shape} round {round_number}: {name:40} {tokens / seconds:8.0f} tokens/s", flush=True)
    ours = rates["pretrain"]
    rows = {
        name: {
            "tokens_per_second": statistics.median(rate),
            "pretrain_is_faster_by": statistics.median(a / b for a, b in zip(ours, rate, strict=True)),
        }
        for name, rate in rates.items()
    }
    return {
        "rows": rows,
        "share_of_matmul_rate": statistics.median(shares),
        "all_tokens_per_second": rates,
        "strategies": options.strategies,
    }


def table(shape: str, result: dict) -> str:
    """What a person wants to know of one shape."""
    rows = result["rows"]
    lines = [
        f"\n{shape}: {result['share_of_matmul_rate']:.0%} of the machine's fp32 matrix-product rate (executed FLOPs)"
    ]
    for name, row in rows.items():
        lines.append(
            f"  {name:40} {row['tokens_per_second']:8.0f} real tokens/s   x {row['pretrain_is_faster_by']:.2f}"
        )
    for strategy in result["strategies"]:
        best = min((r["pretrain_is_faster_by"], n) for n, r in rows.items() if strategy in n)
        lines.append(f"  faster than the best of {strategy}: x {best[0]:.2f} ({best[1]})")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the figures with their conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8M", "35M"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="real tokens of a round, at most")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--strategies", nargs="+", default=["random"], help="also: group_by_length, with many --tokens")
    parser.add_argument("--source", default="data/proteins/train.fasta.gz")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    corpus = open_or_prepare([options.source], load_tokenizer("esm"))
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            results[shape] = measure(shape, corpus, options, Path(scratch))
    for shape, result in results.items():
        print(table(shape, result))
    if options.out:
        conditions = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **{name: str(value) for name, value in vars(options).items()},
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

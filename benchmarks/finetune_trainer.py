"""Fine-tuning beside transformers' Trainer: localisation from the same pre-trained weights.

    python benchmarks/finetune_trainer.py speed --from runs/quickstart [--shape 8M] [--steps 20] [--out FILE]
    python benchmarks/finetune_trainer.py metric --from runs/quickstart --runs DIR [--seeds 2] [--out FILE]

Both train `configs/finetune_localisation.yaml`: the same splits, sequences of up to 512 tokens, weights, head, peak
learning rate, warmup, straight line to zero, fused AdamW, clipping, fp32 and threads. A step of this project holds
8,192 tokens; a step of Trainer the number of sequences that those are on average, so both pass over the data equally
often.

``speed``: real (non-padding) tokens per second, from the end of the first step to the end of the last, loading
included, by the wall and of the processor (of one thread, that is the wall of a quiet machine); in turn with Trainer's
default sampling (batches of all the step's sequences, and its default of 8 with accumulation) and with its
``group_by_length``. With ``--shape`` an encoder of that shape and random weights in the place of the run's. ``metric``:
the whole recipe on both, and the test split with bootstrap intervals.
"""

import argparse
import json
import logging
import os
import sys
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
from results_file import write_results
from transformers import (
    DataCollatorWithPadding,
    EsmForSequenceClassification,
    EsmTokenizer,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from pretrain import EncoderConfig, load
from pretrain.cli import main as pretrain
from pretrain.downstream.export import write_model
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.metrics import Answers, bootstrap, metrics
from pretrain.downstream.finetune.module import FineTuneModule
from pretrain.downstream.tokenizer_files import write_tokenizer
from pretrain.model.encoder import Encoder

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "finetune_localisation.yaml"
TABLE = ROOT / "data" / "localisation" / "localisation.csv.gz"
MAX_LENGTH, STEP_TOKENS = 512, 8192
LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP, BETAS, EPS = 1e-3, 50, 0.01, 1.0, (0.9, 0.98), 1e-8
"""As the recipe has them."""
TRAINERS_BATCH = 8
"""Trainer's own default."""


class Clock:
    """Real tokens, and seconds by the wall and of the processor, of all steps but the first."""

    def __init__(self) -> None:
        self.begin: tuple[float, float] | None = None
        self.tokens = self.seconds = self.processor_seconds = 0.0

    def count(self, tokens: int) -> None:
        if self.begin is not None:
            self.tokens += tokens

    def step_ended(self) -> None:
        now = time.perf_counter(), time.process_time()
        self.begin = self.begin or now
        self.seconds, self.processor_seconds = now[0] - self.begin[0], now[1] - self.begin[1]

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens a second by the wall, and a second of the processor."""
        return self.tokens / self.seconds, self.tokens / self.processor_seconds


class _OurClock(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.clock.count(int(batch.pack.lengths.sum()))

    def on_train_batch_end(self, *_: object) -> None:
        self.clock.step_ended()


class _TheirClock(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: object, **__: object) -> None:
        self.clock.step_ended()


def our_rates(source: str, steps: int, seed: int) -> tuple[float, float]:
    """A module, data module and Trainer as `pretrain finetune` puts them together, for some steps."""
    clock = Clock()
    data = FineTuneDataModule(str(TABLE), max_length=MAX_LENGTH, global_batch_tokens=STEP_TOKENS, seed=seed)
    module = FineTuneModule(
        source, learning_rate=LEARNING_RATE, warmup_steps=min(WARMUP, steps - 1), weight_decay=WEIGHT_DECAY
    )
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_OurClock(clock)],
    ).fit(module, datamodule=data)
    return clock.rates


class Rival:
    """transformers' Trainer on the same task.

    Args:
        directory: The pre-trained model as transformers saves it.
        data: The same splits.
    """

    def __init__(self, directory: Path, data: FineTuneDataModule, scratch: Path) -> None:
        self.directory, self.data, self.scratch = directory, data, scratch
        self.sets = {split: self._rows(split) for split in data.splits}
        self.tokens = float(np.mean([len(row["input_ids"]) for row in self.sets["train"]]))
        self.per_step = round(STEP_TOKENS / self.tokens)

    def _rows(self, split: str) -> list[dict[str, Any]]:
        """What its tokenizer makes of the sequences, truncated, and the class of each."""
        corpus, labels = self.data.splits[split]
        eos = self.data.tokenizer.eos_token_id
        rows = []
        for index, label in enumerate(labels.values.tolist()):
            ids = corpus.tokens(index)[:MAX_LENGTH].tolist()
            rows.append({"input_ids": [*ids[:-1], eos], "labels": label})
        return rows

    def trainer(self, batch: int, grouped: bool, steps: int, seed: int, clock: Clock) -> Trainer:
        transformers.set_seed(seed)
        model = EsmForSequenceClassification.from_pretrained(self.directory, num_labels=len(self.data.spec.classes))
        model.register_forward_pre_hook(
            lambda _, __, given: clock.count(int(given["attention_mask"].sum())), with_kwargs=True
        )
        arguments = TrainingArguments(
            output_dir=str(self.scratch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=max(1, round(self.per_step / batch)),
            max_steps=steps,
            train_sampling_strategy="group_by_length" if grouped else "random",
            optim="adamw_torch_fused",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            warmup_steps=min(WARMUP, steps - 1),
            weight_decay=WEIGHT_DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            max_grad_norm=CLIP,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collator = DataCollatorWithPadding(EsmTokenizer.from_pretrained(self.directory))
        trainer = Trainer(
            model,
            arguments,
            train_dataset=self.sets["train"],
            data_collator=collator,
            callbacks=[_TheirClock(clock)],
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def rates(self, batch: int, grouped: bool, steps: int, seed: int) -> tuple[float, float]:
        clock = Clock()
        self.trainer(batch, grouped, steps, seed, clock).train()
        return clock.rates

    def test(self, steps: int, seed: int) -> dict[str, Any]:
        """Train with its default sampling and batches, accumulated, and look at the test split."""
        clock = Clock()
        trainer = self.trainer(TRAINERS_BATCH, False, steps, seed, clock)
        trainer.train()
        outputs = torch.from_numpy(trainer.predict(self.sets["test"]).predictions)
        targets = torch.from_numpy(self.data.splits["test"].labels.values)
        ones = np.ones(len(targets), np.int64)
        answers = Answers(np.arange(len(ones)), ones, outputs, targets)
        values, intervals = metrics(self.data.spec, answers), bootstrap(self.data.spec, answers)
        found = {name: {"value": values[name], "interval": intervals[name]} for name in values}
        return {"test": found, "seconds": clock.seconds}


@dataclass
class Row:
    """One way to set the rival up, and the rates of both in each round: by the wall, and of the processor."""

    batch: int
    grouped: bool
    ours: list[tuple[float, float]] = field(default_factory=list)
    theirs: list[tuple[float, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        return {
            "sampling": "group_by_length" if self.grouped else "random",
            "batch_size": self.batch,
            "transformers": median(wall for wall, _ in self.theirs),
            "pretrain": median(wall for wall, _ in self.ours),
            "faster_by": median(a / b for (a, _), (b, _) in zip(self.ours, self.theirs, strict=True)),
            "faster_by_processor_time": median(a / b for (_, a), (_, b) in zip(self.ours, self.theirs, strict=True)),
            "rounds": {"transformers": self.theirs, "pretrain": self.ours},
        }


def speed(source: str, rival: Rival, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds in turn: ours, then the rival in each of its set-ups."""
    rows = [Row(rival.per_step, False), Row(TRAINERS_BATCH, False), Row(rival.per_step, True)]
    our_rates(source, 2, 0)  # a warm-up
    rival.rates(rival.per_step, False, 2, 0)
    for seed in range(1, options.rounds + 1):
        for row in rows:
            row.ours.append(our_rates(source, options.steps, seed))
            row.theirs.append(rival.rates(row.batch, row.grouped, options.steps, seed))
            (theirs, their_processor), (ours, our_processor) = row.theirs[-1], row.ours[-1]
            print(
                f"  round {seed}, {row.batch}{' grouped' * row.grouped}: {theirs:.0f} against our {ours:.0f} tokens/s",
                end="",
            )
            print(f"; of processor time {their_processor:.0f} and {our_processor:.0f}", flush=True)
    print("  sampling          batch   transformers   pretrain   faster by   by processor time    (real tokens/s)")
    found = [row.figures() for row in rows]
    for r in found:
        print(f"  {r['sampling']:16}  {r['batch_size']:5}   {r['transformers']:12.0f}   {r['pretrain']:8.0f}", end="")
        print(f"   {r['faster_by']:7.2f} x   {r['faster_by_processor_time']:15.2f} x")
    return found


def metric(rival: Rival, options: argparse.Namespace) -> dict[str, Any]:
    """The test split of both, after the whole recipe."""
    found: dict[str, Any] = {}
    for seed in range(options.seeds):
        run = options.runs / f"pre-trained-{seed}"
        given = ["-c", str(CONFIG), "--from", options.source, "--run", str(run), "--seed_everything", str(seed)]
        quiet = ["--trainer.enable_progress_bar", "false", "--data.train", str(TABLE)]
        if not (run / "result.json").is_file() and pretrain(["finetune", *given, *quiet]):
            sys.exit(f"{run} failed")
        result = json.loads((run / "result.json").read_text())
        found[f"pretrain, seed {seed}"] = {"test": result["test"]}
        found[f"Trainer, seed {seed}"] = rival.test(result["steps"], seed)
    for name, its in found.items():
        cells = (f"{m} {its['test'][m]['value']:.3f} {its['test'][m]['interval']}" for m in ("accuracy", "mcc", "f1"))
        print(f"  {name:20} {'  '.join(cells)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "metric"])
    parser.add_argument("--from", dest="source", required=True, help="the quickstart's run")
    parser.add_argument("--shape", help="speed: of this shape, with random weights, rather than the run's model")
    parser.add_argument("--steps", type=int, default=20, help="speed: optimizer steps of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="metric: where this project's runs are")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    data = FineTuneDataModule(str(TABLE), max_length=MAX_LENGTH, global_batch_tokens=STEP_TOKENS)
    data.setup("fit")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "model"
        directory.mkdir()
        torch.manual_seed(0)
        encoder = Encoder(EncoderConfig.named(options.shape)) if options.shape else load(options.source)
        write_model(encoder, data.tokenizer, MAX_LENGTH, directory)
        write_tokenizer(data.tokenizer, MAX_LENGTH, directory)
        rival = Rival(directory, data, Path(scratch))
        print(f"{rival.tokens:.0f} tokens a sequence on average, {rival.per_step} sequences a step", flush=True)
        results = speed(str(directory), rival, options) if options.what == "speed" else metric(rival, options)
    if options.out:
        write_results(options.out, options, results)


if __name__ == "__main__":
    main()

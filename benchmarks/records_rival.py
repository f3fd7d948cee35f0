"""A small protein model by this project or by transformers' Trainer: the same first weights and sequences in each step.

    python benchmarks/records_rival.py --who transformers --steps 500 --every 100 --run DIR --seed_everything 0

Proteins of up to 1,022 residues, as they come. Equal for both: crops, tokens, fp32, fused AdamW with the same decay,
clipping, inverse-square-root schedule, threads. Each draws its own masks (30 %, 80/10/10); transformers pads each step
to its longest sequence. This project's validation asks both, while the clock stands still. Leaves what a run leaves:
`metrics.csv`, with `seconds_of_training` at each validation, and `result.json`.
"""

import argparse
import csv
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytorch_lightning as pl
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, EsmConfig, EsmForMaskedLM, EsmTokenizer, PrinterCallback

from pretrain import EncoderConfig, MLMDataModule, MLMModule
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.packing import Pack, Position, validation_packs
from pretrain.model.encoder import Encoder
from pretrain.model.hf import from_hf, to_hf, to_hf_config

CONFIG = EncoderConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
RATE, WARMUP, BETAS, DECAY, CLIP, MASKED = 3e-3, 50, (0.9, 0.98), 0.01, 1.0, 0.3


class Clock:
    """Counts the seconds of training, and stands still while what was learnt is looked at."""

    def __init__(self, data: MLMDataModule, every: int, last: int, metrics: Path) -> None:
        (self.packs,) = validation_packs(data.validation_planner(), data.validation_pack_tokens, 1)
        assert data.validation_corpus is not None
        self.validation = PackDataset(data.validation_corpus, data.validation_masking)
        self.every, self.last = every, last
        self.seconds, self.loss = 0.0, 0.0
        self.rows = csv.writer(metrics.open("w", newline="", buffering=1))
        self.rows.writerow(["step", "name", "value"])

    def start(self) -> None:
        """Training begins, or goes on."""
        self._begin = time.perf_counter()

    def after_step(self, step: int, encoder: Callable[[], Encoder]) -> None:
        """Validate, where that is due."""
        if step % self.every and step != self.last:
            return
        self.seconds += time.perf_counter() - self._begin
        self.loss = self._validate(encoder())
        for name, value in (("val/loss", self.loss), ("seconds_of_training", self.seconds)):
            self.rows.writerow([step - 1, name, value])
        print(f"step {step}: {self.loss:.4f} after {self.seconds:.1f} s", flush=True)
        self.start()

    @torch.no_grad()
    def _validate(self, encoder: Encoder) -> float:
        total, targets = 0.0, 0
        for pack in self.packs:
            batch = self.validation[pack]
            losses, _ = encoder.score(
                batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
            )
            total, targets = total + float(losses.sum()), targets + len(batch.targets)
        return total / targets


class _Lightning(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_epoch_start(self, *_: Any) -> None:
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.clock.after_step(trainer.global_step, lambda: module.encoder)


def _as_ours(model: EsmForMaskedLM) -> Encoder:
    encoder = Encoder(CONFIG)
    encoder.load_state_dict(from_hf(model.state_dict(), CONFIG))
    return encoder


class _Transformers(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 0:
            self.clock.start()

    def on_step_end(self, _: Any, state: Any, *__: Any, model: Any, **___: Any) -> None:
        self.clock.after_step(state.global_step, lambda: _as_ours(model))


def train_here(module: MLMModule, data: MLMDataModule, steps: int, clock: Clock) -> None:
    """In Lightning's Trainer, with this project's modules and nothing else."""
    data.validation_corpus, data.validation_sets = None, {}  # validated by the clock
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Lightning(clock)],
    ).fit(module, data)


class _Trainer(transformers.Trainer):
    """Its batches are this project's steps."""

    steps: list[list[int]]

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self.steps, collate_fn=self.data_collator)  # type: ignore[arg-type]


def train_there(module: MLMModule, data: MLMDataModule, steps: list[Pack], clock: Clock, directory: Path) -> None:
    """In transformers' Trainer, from the same weights, with its own collator."""
    model = EsmForMaskedLM(EsmConfig(**to_hf_config(CONFIG)))
    model.load_state_dict(to_hf(module.encoder.state_dict()), strict=False)  # it has a contact head besides
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(data.tokenizer.tokens))
    sequences, batches = [], []
    for pack in steps:
        batches.append(list(range(len(sequences), len(sequences) + len(pack.indices))))
        for index, start, length in zip(
            pack.indices.tolist(), pack.starts.tolist(), pack.lengths.tolist(), strict=True
        ):
            sequences.append({"input_ids": data.train_corpus.tokens(index)[start : start + length].tolist()})
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=len(steps),
        optim="adamw_torch_fused",
        learning_rate=RATE,
        warmup_steps=WARMUP,
        lr_scheduler_type="inverse_sqrt",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = _Trainer(
        model,
        arguments,
        train_dataset=sequences,
        data_collator=DataCollatorForLanguageModeling(EsmTokenizer(str(vocabulary)), mlm_probability=MASKED),
        callbacks=[_Transformers(clock)],
    )
    trainer.steps = batches
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main() -> None:
    """Train one of the two, and leave what a run leaves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=("pretrain", "transformers"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True, help="steps between validations")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seed_everything", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    options.run.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(options.seed_everything, verbose=False)
    data = MLMDataModule(
        "data/proteins/train.fasta.gz",
        "data/proteins/validation.fasta.gz",
        max_length=1024,
        global_batch_tokens=4096,
        mlm_probability=MASKED,
        seed=options.seed_everything,
    )
    data.open()
    settings: dict[str, Any] = {"learning_rate": RATE, "warmup_steps": WARMUP, "betas": BETAS, "weight_decay": DECAY}
    module = MLMModule(CONFIG, decay="matrices", **settings)  # as Trainer decays
    clock = Clock(data, options.every, options.steps, options.run / "metrics.csv")
    planner, position, steps = data.train_planner(), Position(), []
    for _ in range(options.steps):
        steps.append(planner.step(position, data.global_batch_tokens))
        position = steps[-1].after
    if options.who == "pretrain":
        train_here(module, data, options.steps, clock)
    else:
        train_there(module, data, steps, clock, options.run)
    result = {
        "steps": options.steps,
        "parameters": sum(p.numel() for p in module.parameters()),
        "tokens_seen": position.tokens,
        "epochs": position.epochs,
        "seconds_of_training": clock.seconds,
        "val/loss": clock.loss,
        "val/perplexity": float(np.exp(clock.loss)),
    }
    (options.run / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()

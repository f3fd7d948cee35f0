"""A protein model by this project or by transformers' Trainer: the same first weights and sequences in each step.

    python benchmarks/records_rival.py --who transformers --steps 500 --every 100 --run DIR --seed_everything 0

    python benchmarks/records_rival.py --who pretrain --gpu --shape 35M --max_length 1024 --minutes 8 --every 200 \\
        --train swissprot.train.fasta --validation swissprot.validation.fasta --run DIR

Equal for both: crops, tokens, precision, fused AdamW with the same decay, clipping, inverse-square-root schedule,
threads. Each draws its own masks (30 %, 80/10/10); transformers pads each batch to its longest sequence. This project's
validation asks both, while the clock stands still. Leaves what a run leaves: `metrics.csv`, with `seconds_of_training`
at each validation, and `result.json`.

On a GPU both train in bfloat16 autocast, with SDPA there and varlen_attn, static shapes and compiled blocks here, in
steps of 131,072 tokens and as many packs or batches as `--micro-batches` says, until `--minutes` of training are over,
compilation included. So the question is which loss is reached in that time: one call for each of the two.
"""

import argparse
import csv
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytorch_lightning as pl
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import DataCollatorForLanguageModeling, EsmConfig, EsmForMaskedLM, EsmTokenizer, PrinterCallback

from pretrain import EncoderConfig, MLMDataModule, MLMModule
from pretrain.corpus.batch import PackDataset
from pretrain.corpus.packing import Pack, Position, validation_packs
from pretrain.model.allocator import keep_freed_memory
from pretrain.model.encoder import Encoder
from pretrain.model.hf import from_hf, to_hf, to_hf_config

BETAS, DECAY, CLIP, MASKED = (0.9, 0.98), 0.01, 1.0, 0.3
MOST_STEPS = 100_000  # where minutes decide


@dataclass(frozen=True)
class Recipe:
    """What differs between the two kinds of machine."""

    encoder: EncoderConfig
    rate: float
    warmup: int
    step_tokens: int
    device: str
    micro_batches: int
    workers: int


class Clock:
    """Counts the seconds of training, and stands still while what was learnt is looked at."""

    def __init__(self, data: MLMDataModule, options: argparse.Namespace, recipe: Recipe) -> None:
        planner = data.validation_planner()
        (self.packs,) = validation_packs(planner, data.validation_pack_tokens, 1)
        assert data.validation_corpus is not None
        self.validation = PackDataset(data.validation_corpus, planner.masking)
        self.every, self.last, self.device = options.every, options.steps, torch.device(recipe.device)
        self.limit = 60 * options.minutes
        self.encoder = Encoder(recipe.encoder).to(self.device)  # for both the same, and not compiled
        self.seconds, self.loss, self.steps = 0.0, 0.0, 0
        self.rows = csv.writer((options.run / "metrics.csv").open("w", newline="", buffering=1))
        self.rows.writerow(["step", "name", "value"])

    def start(self) -> None:
        """Training begins, or goes on."""
        self._begin = time.perf_counter()

    def after_step(self, step: int, weights: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Validate, where that is due; whether the time is over."""
        over = self.seconds + time.perf_counter() - self._begin > self.limit
        self.steps = step
        if step % self.every and step != self.last and not over:
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._begin
        self.encoder.load_state_dict(weights())
        self.loss = self._validate()
        for name, value in (("val/loss", self.loss), ("seconds_of_training", self.seconds)):
            self.rows.writerow([step - 1, name, value])
        print(f"step {step}: {self.loss:.4f} after {self.seconds:.1f} s", flush=True)
        self.start()
        return over

    @torch.no_grad()
    def _validate(self) -> float:
        total, targets = 0.0, 0
        for pack in self.packs:
            batch = self.validation[pack].to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                losses, _ = self.encoder.score(
                    batch.input_ids, batch.cu_seqlens, batch.max_seqlen, batch.target_positions, batch.targets
                )
            total, targets = total + float(losses.sum()), targets + len(batch.targets)
        return total / targets


# --- this project -----------------------------------------------------------------------------------------------------


class _Lightning(pl.Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock, self.step = clock, 0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.clock.start()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            if self.clock.after_step(self.step, module.encoder.state_dict):
                trainer.should_stop = True


def train_here(module: MLMModule, data: MLMDataModule, steps: int, recipe: Recipe, clock: Clock) -> None:
    """In Lightning's Trainer, with this project's modules and nothing else."""
    data.validation_corpus, data.validation_sets = None, {}  # validated by the clock
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu" if recipe.device == "cpu" else "gpu",
        devices=1,
        precision="32-true" if recipe.device == "cpu" else "bf16-mixed",
        accumulate_grad_batches=recipe.micro_batches,
        gradient_clip_val=CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Lightning(clock)],
    ).fit(module, data)


# --- transformers -----------------------------------------------------------------------------------------------------


class _Steps:
    """This project's steps as transformers takes them: places of sequences, in batches of equally many."""

    def __init__(self, data: MLMDataModule, steps: int, micro_batches: int) -> None:
        self.planner, self.tokens, self.steps, self.micro_batches = (
            data.train_planner(),
            data.global_batch_tokens,
            steps,
            micro_batches,
        )

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def packs(self) -> Iterator[Pack]:
        position = Position()
        for _ in range(self.steps):
            pack = self.planner.step(position, self.tokens)
            position = pack.after
            yield pack

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for pack in self.packs():
            crops = list(zip(pack.indices.tolist(), pack.starts.tolist(), pack.lengths.tolist(), strict=True))
            for number in range(self.micro_batches):
                yield crops[number :: self.micro_batches]


class _Crops(Dataset[dict[str, list[int]]]):
    def __init__(self, data: MLMDataModule) -> None:
        self.corpus = data.train_corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, crop: tuple[int, int, int]) -> dict[str, list[int]]:
        index, start, length = crop
        return {"input_ids": self.corpus.tokens(index)[start : start + length].tolist()}


class _Trainer(transformers.Trainer):
    """Its batches are this project's steps."""

    steps: _Steps

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.steps,  # type: ignore[arg-type]
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=not self.args.use_cpu,
        )


class _Transformers(transformers.TrainerCallback):
    def __init__(self, clock: Clock, config: EncoderConfig) -> None:
        self.clock, self.config = clock, config

    def on_step_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step == 0:
            self.clock.start()

    def on_step_end(self, _: Any, state: Any, control: Any, *__: Any, model: Any, **___: Any) -> None:
        if self.clock.after_step(state.global_step, lambda: from_hf(model.state_dict(), self.config)):
            control.should_training_stop = True


def train_there(
    module: MLMModule, data: MLMDataModule, steps: int, recipe: Recipe, clock: Clock, directory: Path
) -> None:
    """In transformers' Trainer, from the same weights, with its own collator."""
    model = EsmForMaskedLM(EsmConfig(**to_hf_config(recipe.encoder)))
    model.load_state_dict(to_hf(module.encoder.state_dict()), strict=False)  # it has a contact head besides
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(data.tokenizer.tokens))
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        gradient_accumulation_steps=recipe.micro_batches,
        optim="adamw_torch_fused",
        learning_rate=recipe.rate,
        warmup_steps=recipe.warmup,
        lr_scheduler_type="inverse_sqrt",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        use_cpu=recipe.device == "cpu",
        bf16=recipe.device != "cpu",
        dataloader_num_workers=recipe.workers,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = _Trainer(
        model,
        arguments,
        train_dataset=_Crops(data),
        data_collator=DataCollatorForLanguageModeling(EsmTokenizer(str(vocabulary)), mlm_probability=MASKED),
        callbacks=[_Transformers(clock, recipe.encoder)],
    )
    trainer.steps = _Steps(data, steps, recipe.micro_batches)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def main() -> None:
    """Train one of the two, and leave what a run leaves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=("pretrain", "transformers"), required=True)
    parser.add_argument("--steps", type=int, default=MOST_STEPS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of training, validations not counted")
    parser.add_argument("--every", type=int, required=True, help="steps between validations")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--seed_everything", type=int, default=0)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--shape", default="64x2", help="width x layers, or a published size such as 35M")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=1, help="packs or batches a step")
    parser.add_argument("--train", default="data/proteins/train.fasta.gz")
    parser.add_argument("--validation", default="data/proteins/validation.fasta.gz")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    options.run.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(options.seed_everything, verbose=False)
    width, _, layers = options.shape.partition("x")
    encoder = EncoderConfig(int(width), int(layers), int(width) // 32) if layers else EncoderConfig.named(width)
    recipe = Recipe(encoder, 3e-3, 50, 4096, "cpu", options.micro_batches, 0)
    if options.gpu:
        recipe = Recipe(encoder, 1e-3, 500, 131_072, "cuda", options.micro_batches, 8)
    data = MLMDataModule(
        options.train,
        options.validation,
        max_length=options.max_length,
        global_batch_tokens=recipe.step_tokens,
        mlm_probability=MASKED,
        static_shapes=options.gpu,
        num_workers=recipe.workers,
        seed=options.seed_everything,
    )
    data.open()
    module = MLMModule(
        encoder,
        decay="matrices",  # as Trainer decays
        learning_rate=recipe.rate,
        warmup_steps=recipe.warmup,
        betas=BETAS,
        weight_decay=DECAY,
        compile=options.gpu,
    )
    clock = Clock(data, options, recipe)
    if options.who == "pretrain":
        if not options.gpu:
            keep_freed_memory()  # as `pretrain fit` does
        train_here(module, data, options.steps, recipe, clock)
    else:
        train_there(module, data, options.steps, recipe, clock, options.run)
    position = list(_Steps(data, clock.steps, 1).packs())[-1].after
    result = {
        "steps": clock.steps,
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

"""`Biology`: during pre-training, what the model knows of structures and of the effects of variants.

A callback for any Trainer of `MLMModule`; a run gets it by its class path, as ``--trainer.callbacks+=``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from typing_extensions import override

from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.tokenizer import ProteinTokenizer, Tokenizer
from pretrain.downstream.contact_regression import contact_labels, fit_regression, precisions, read_regression
from pretrain.downstream.pretrained_encoder import PretrainedEncoder
from pretrain.downstream.score import METHODS, spearman
from pretrain.downstream.structures import read_structures
from pretrain.downstream.variants import MEASURED_COLUMN, VariantColumns, read_variants
from pretrain.errors import UserError
from pretrain.model.encoder import Encoder
from pretrain.train.module import MLMModule
from pretrain.train.throughput import Throughput
from pretrain.train.watchdog import untimed


class Biology(pl.Callback):
    """Logs ``biology/*`` every so many steps and after the last one.

    ``biology/p_at_l/long`` (also ``/medium``, ``/short``; ``p_at_l2``, ``p_at_l5``): the precision of predicted
    contacts (`pretrain.downstream.contact_regression.precisions`); ``biology/chance/long``: what a guess would reach.
    ``biology/spearman/<name of the table>``: rank correlation with measured effects of variants, and
    ``biology/spearman``, the mean of all tables.

    Training does not notice: the weights are looked at through a second encoder that shares their memory, and no random
    number is drawn. The first process computes, the others wait; under FSDP2 the weights are gathered first.

    Args:
        every_n_steps: Steps between evaluations.
        structures: PDB and mmCIF files, or directories of them, whose contacts are predicted.
        fit_on: Others, on which the contact regression is fitted, anew at each evaluation; twenty are usual.
        regression: A regression from `pretrain contacts --save_regression`, in place of ``fit_on``: it holds for
            attention as it was when it was fitted.
        variants: CSV tables, as `pretrain score` takes them, with measured effects.
        method: How variants are scored: of `pretrain.downstream.score.METHODS`.

    Raises:
        UserError: If there is nothing to evaluate, or a file cannot be read or evaluated.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        structures: list[str] | str | None = None,
        fit_on: list[str] | str | None = None,
        regression: str | None = None,
        variants: list[str] | str | None = None,
        method: str = "masked-marginals",
    ) -> None:
        if every_n_steps < 1:
            raise UserError(f"Biology: every_n_steps is {every_n_steps}; give 1 or more")
        if not structures and not variants:
            raise UserError("Biology: nothing to evaluate; give structures, variants or both")
        if structures and bool(fit_on) == bool(regression):
            raise UserError("Biology: contacts need a regression; give either fit_on or regression")
        if method not in METHODS:
            raise UserError(f"Biology: method is '{method}'; give one of {', '.join(METHODS)}")
        self.every_n_steps = every_n_steps
        self.method = method
        self.structures = read_structures(_paths(structures))
        self.fit_on = read_structures(_paths(fit_on))
        if self.fit_on:
            contact_labels(self.fit_on)
        self.regression = read_regression(Path(regression)) if regression else None
        marginals = method != "pseudo-perplexity"
        self.variants = {
            path.stem: read_variants(path, None, VariantColumns(), 1, marginals) for path in _paths(variants)
        }
        if len(self.variants) < len(_paths(variants)):
            raise UserError("Biology: two tables of variants have the same name; rename one, figures go by it")
        for path in _paths(variants):
            if sum(variant.measured is not None for variant in self.variants[path.stem].rows) < 2:
                raise UserError(f"{path}: has no measured effects (column {MEASURED_COLUMN}) to compare with")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, MLMModule) or not isinstance(data, MLMDataModule):
            raise UserError("Biology goes with MLMModule and MLMDataModule; leave it out of trainer.callbacks")
        if not isinstance(data.tokenizer, ProteinTokenizer):
            raise UserError("Biology evaluates models of proteins, this is one of text; leave it out")
        if self.regression:
            self.regression.check(pl_module.encoder.config, "Biology's regression")
        self._tokenizer = data.tokenizer

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if step % self.every_n_steps and step < trainer.max_steps:
            return
        assert isinstance(pl_module, MLMModule)
        with untimed(trainer):
            model = sharing_weights(pl_module.encoder, self._tokenizer)
            if trainer.is_global_zero:
                self._log(trainer, model)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput):
                callback.leave_out()

    def _log(self, trainer: pl.Trainer, model: PretrainedEncoder) -> None:
        step = trainer.global_step
        try:
            figures = self.evaluate(model)
        except UserError as error:  # of a model that went astray, which is no reason to end its run
            tqdm.write(f"  biology after step {step}: {error}")
            return
        for logger in trainer.loggers:
            logger.log_metrics(figures, step - 1)  # where Lightning logs this step's figures
        told = {name: value for name, value in figures.items() if name in ("biology/p_at_l/long", "biology/spearman")}
        shown = ", ".join(f"{name.removeprefix('biology/')} {value:.3f}" for name, value in told.items())
        tqdm.write(f"  biology after step {step}: {shown}")

    def evaluate(self, model: PretrainedEncoder) -> dict[str, float]:
        """What is logged, by name."""
        figures: dict[str, float] = {}
        if self.structures:
            regression = self.regression or fit_regression(model, self.fit_on)
            maps = model.predict_contacts([structure.sequence for structure in self.structures], regression)
            for span, values in precisions(self.structures, [each.numpy() for each in maps]).items():
                for top, value in values.items():
                    figures[f"biology/{top.lower().replace('@', '_at_').replace('/', '')}/{span}"] = value
        found: list[float] = []
        for name, table in self.variants.items():
            agreement = spearman(table.rows, METHODS[self.method](model, table.rows))
            if agreement is not None:
                figures[f"biology/spearman/{name}"] = agreement
                found.append(agreement)
        if found:
            figures["biology/spearman"] = float(np.mean(found))
        return figures


def sharing_weights(encoder: Encoder, tokenizer: Tokenizer) -> PretrainedEncoder:
    """A second encoder over the same weights, in eval mode; whole ones, where FSDP2 divides them (all must call it)."""

    def whole(tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # layers draw initial values
        view = PretrainedEncoder(encoder.config, lambda: tokenizer, None)
    view.load_state_dict({name: whole(tensor) for name, tensor in encoder.state_dict().items()}, assign=True)
    view.use_cpu_kernels(encoder.cpu_kernels)
    return view.eval().requires_grad_(False)


def _paths(given: Sequence[str] | str | None) -> list[Path]:
    return [Path(path) for path in ([given] if isinstance(given, str) else given or ())]

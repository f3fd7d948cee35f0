"""`pretrain finetune`: the command line of `pretrain fit`, with a pre-trained model, labels and a test split."""

from collections.abc import Sequence
from typing import Any, cast

import pytorch_lightning as pl
from jsonargparse import dict_to_namespace
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.cli import LightningArgumentParser
from typing_extensions import override

from pretrain.downstream.finetune import report
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.module import FineTuneModule
from pretrain.errors import UserError
from pretrain.train.build import FitCLI
from pretrain.train.fit import complete
from pretrain.train.settings import parse
from pretrain.train.sharding import FullyShardedStrategy

_DESCRIPTION = """Fine-tune a pre-trained model on labels as the config says, or continue such a run where it stopped.

--from RUN_OR_DIR names the model: a run, a checkpoint, or a directory that transformers saved (short for
--model.initialize_from). Exit codes are those of `pretrain fit`.
"""


class FineTuneCLI(FitCLI):
    """The settings of a fine-tuning run, and the run."""

    module_class, data_class = FineTuneModule, FineTuneDataModule
    fine_tunes = True

    @override
    def link_model(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--early_stopping",
            type=int | None,
            default=None,
            help="Validations in a row without a better val/loss, after which training ends; the best checkpoint is "
            "kept then, also where checkpoint.keep_best is null.",
        )
        parser.set_defaults({"checkpoint.keep_best": 1})

    @override
    def before_instantiate_classes(self) -> None:
        config = self.config
        if config.early_stopping is not None:
            if config.early_stopping < 1:
                raise UserError(
                    f"early_stopping is {config.early_stopping}; give 1 or more validations, or null for none"
                )
            if config.checkpoint.keep_best is None:  # or the newest would answer, so many validations past the best
                config.checkpoint.keep_best = 1
        super().before_instantiate_classes()
        result = self.run.result
        if result and "test" in result and (self.changes or not self.finished(result)):
            raise UserError(
                f"{self.run.directory}: the test split was looked at after step {result['steps']}; training on from "
                "there would be choosing by it: start another run, with --run"
            )
        if self.run.hyper_parameters:  # the checkpoint has the weights and says their shape
            config.model.encoder = dict_to_namespace(self.run.hyper_parameters["encoder"])
            config.model.from_scratch = False

    @override
    def callbacks(self) -> list[pl.Callback]:
        patience = self.config_init.early_stopping
        return [] if patience is None else [_EarlyStopping("val/loss", patience=patience)]

    @override
    def ready(self) -> None:
        """Refuse what cannot be trained; build the head, now that the labels are known."""
        data = self.data
        if isinstance(self.trainer.strategy, FullyShardedStrategy):
            raise UserError("fine-tuning is not sharded; leave configs/fsdp.yaml out, or use configs/ddp.yaml")
        if self.config_init.early_stopping and data.validation_corpus is None:
            raise UserError("early_stopping needs a validation split; give data.validation or a split column")
        if read_tokenizer := self.model.read_tokenizer:
            theirs, source = read_tokenizer(), self.settings["model"]["initialize_from"]
            if theirs.fingerprint != data.tokenizer.fingerprint:
                raise UserError(
                    f"{source}: was trained with tokenizer '{theirs.name}' ({theirs.vocab_size} ids), data.tokenizer "
                    f"is '{data.tokenizer.name}' ({data.tokenizer.vocab_size} ids): another alphabet; set "
                    "data.tokenizer to the one it was trained with"
                )
        if self.model.encoder.config.vocab_size != data.tokenizer.vocab_size:
            raise UserError(
                f"the model has {self.model.encoder.config.vocab_size} token ids, data.tokenizer "
                f"'{data.tokenizer.name}' {data.tokenizer.vocab_size}: another alphabet; set data.tokenizer to the one "
                "it was trained with"
            )
        if not 0 <= self.model.warmup_steps < self.trainer.max_steps:
            raise UserError(
                f"model.warmup_steps is {self.model.warmup_steps} of {self.trainer.max_steps} steps in all; give 0 to "
                f"{self.trainer.max_steps - 1}"
            )
        self.model.prepare(data)
        super().check_weights()

    @override
    def check_weights(self) -> None:
        """Later, when there is a head."""

    @property
    def data(self) -> FineTuneDataModule:
        """The data module, by its own type."""
        return cast(FineTuneDataModule, self.datamodule)

    @override
    def finished(self, result: dict[str, Any]) -> bool:
        return super().finished(result) or (bool(result.get("stopped_early")) and result["steps"] == self.run.step)

    @override
    def header(self) -> str:
        return report.header(self.run, self.trainer, self.model, self.data)

    @override
    def final_figures(self) -> dict[str, Any]:
        early = self.trainer.global_step < self.trainer.max_steps
        source = self.settings["model"]["initialize_from"]
        return report.final_figures(self.run, self.trainer, self.data, source, early)

    @override
    def summary(self, result: dict[str, Any]) -> str:
        return report.summary(self.run.directory, result)


class _EarlyStopping(EarlyStopping):
    """Lightning's, which also ends a run at once that was killed after it had been told to stop."""

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.wait_count >= self.patience:
            trainer.should_stop = True


def build(arguments: Sequence[str]) -> FineTuneCLI:
    """Module, data module, Trainer and run, as the arguments say; nothing is written yet.

    Raises:
        UserError: On any mistake in the arguments or the config, or a config that is not the run's.
    """
    given = [
        argument.replace("--from", "--model.initialize_from", 1) if argument.partition("=")[0] == "--from" else argument
        for argument in arguments
    ]
    return parse(FineTuneCLI, "finetune", _DESCRIPTION, given)


def finetune(arguments: Sequence[str]) -> int:
    """Fine-tune, or continue to, as the arguments say; the exit code is that of `fit`.

    Raises:
        UserError: On any mistake in the arguments, the config, the labels, the model or the run directory.
    """
    return complete(build, arguments)

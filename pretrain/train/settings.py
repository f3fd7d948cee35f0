"""The settings of a run: what a command's arguments and configs say, and what is wrong with them, in one line."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.errors import UserError
from pretrain.shipped import find_recipes
from pretrain.train.changes import precision_name, yaml_error
from pretrain.train.hardware import other_precision
from pretrain.train.memory import COMPUTE_SIZES
from pretrain.train.module import MLMModule
from pretrain.train.saving import StepCheckpoint
from pretrain.train.settings_errors import MISFIT, explain, no_section
from pretrain.train.settings_help import shorten_help, wants_help
from pretrain.train.spikes import LossSpikes
from pretrain.train.step import StepModule

_NOT_IN_A_RUN = {
    "val_check_interval": (None, "--validate_every_n_steps"),
    "check_val_every_n_epoch": (1, "--validate_every_n_steps"),
    "default_root_dir": (None, "--run"),
    "enable_checkpointing": (None, "--checkpoint.every_minutes"),
    "fast_dev_run": (False, "--trainer.max_steps and another --run"),
    "limit_train_batches": (None, "--trainer.max_steps"),
    "max_epochs": (None, "--trainer.max_steps"),
    "max_time": (
        None,
        "--trainer.max_steps, or end the run by a signal, as `timeout -s USR1 1h pretrain fit ...` does,",
    ),
    "min_epochs": (None, "--trainer.max_steps"),
    "min_steps": (None, "--trainer.max_steps"),
    "overfit_batches": (0.0, "a small file as --data.train"),
    "reload_dataloaders_every_n_epochs": (0, "0"),
}
"""Settings of the Trainer that a run makes itself, or under which it would not consist of whole steps in order: the
default of each, and what to give instead."""

CLI = TypeVar("CLI", bound="SettingsCLI")

_QUIET = (
    ".*does not have many workers.*",  # a worker costs a core that a small machine needs for training
    "This DataLoader will create .* worker processes",  # as asked; `throughput/data_wait` says whether they do
    ".*is smaller than the logging interval.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # what is logged has been summed over processes already
    ".*`broadcast_buffers` is deprecated.*",  # its successor is not in the oldest torch that will do
    "The `srun` command is available on your system but is not used",  # outside a job, as on a login node
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)


class SettingsCLI(LightningCLI):
    """The settings of a run: a model, data, a trainer, checkpoints; links between values that must agree.

    Attributes:
        module_class: What is trained.
        data_class: What gives it batches.
    """

    module_class: type[StepModule] = MLMModule
    data_class: type[PackedDataModule] = MLMDataModule

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--validate_every_n_steps",
            type=int,
            default=1000,
            help="Steps between validations; one is always held last.",
        )
        parser.add_argument(
            "--max_sick_steps_in_a_row",
            type=int,
            default=10,
            help="Steps skipped in a row because of a NaN or infinite loss or gradient, after which the run stops.",
        )
        parser.add_argument(
            "--hang_timeout_minutes",
            type=float | None,
            default=20.0,
            help="End the job, and say which process hangs, after so long without progress; null to wait for ever.",
        )
        parser.add_class_arguments(LossSpikes, "spikes", skip={"run", "skips", "settle"}, instantiate=False)
        parser.add_class_arguments(
            StepCheckpoint, "checkpoint", skip={"directory", "before_save", "mirror"}, instantiate=False
        )
        parser.link_arguments("seed_everything", "data.seed")
        self.link_model(parser)

    def link_model(self, parser: LightningArgumentParser) -> None:
        """Settings of the model that follow from others."""
        parser.link_arguments(
            "data.tokenizer", "model.encoder.vocab_size", lambda name: load_tokenizer(name).vocab_size
        )
        parser.link_arguments(
            "data.tokenizer", "model.encoder.pad_token_id", lambda name: load_tokenizer(name).pad_token_id
        )
        parser.link_arguments(
            "data.tokenizer", "model.encoder.mask_token_id", lambda name: load_tokenizer(name).mask_token_id
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given; Lightning's own version warns when that is also what stands in ``sys.argv``."""
        for given in paths_given(args, "-c", "--config"):
            if given.is_file() and (problem := yaml_error(given) or no_section(given, parser)):
                raise UserError(problem)
        if wants_help(args):
            print(shorten_help(parser.format_help(), args), end="")
            raise SystemExit(0)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(explain(str(error), parser)) from error
        if self.config.trainer.max_steps < 1:
            raise UserError(
                f"trainer.max_steps is {self.config.trainer.max_steps}; say how many optimizer steps the run takes"
            )
        if (self.config.trainer.gradient_clip_val or 0) < 0:
            raise UserError(
                f"trainer.gradient_clip_val is {self.config.trainer.gradient_clip_val}; give a positive number, or "
                "null for no clipping"
            )
        precision = precision_name(self.config.trainer.precision)
        if precision not in COMPUTE_SIZES:  # of float16, Lightning would make bfloat16 on a CPU
            raise UserError(other_precision(precision))
        for name, (default, remedy) in _NOT_IN_A_RUN.items():
            if (value := self.config.trainer[name]) != default:
                raise UserError(f"trainer.{name} is {value}, which a run cannot have; give {remedy} instead")

    @override
    def instantiate_classes(self) -> None:
        """Build what the settings name; what a class refuses of its own is reported in one line."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if MISFIT not in str(error):
                raise
            raise UserError(explain(str(error), self.parser)) from error


def parse(cli: type[CLI], command: str, description: str, arguments: Sequence[str]) -> CLI:
    """The settings that the arguments of a command give, and what its ``cli`` makes of them.

    Raises:
        UserError: On any mistake in the arguments or the config.
    """
    if not arguments:
        raise UserError(
            f"no config; give -c CONFIG, for example `pretrain {command} -c quickstart`; `pretrain recipes` lists them"
        )
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _QUIET:
        warnings.filterwarnings("ignore", pattern)
    return cli(
        cli.module_class,
        cli.data_class,
        run=False,
        save_config_callback=None,
        load_from_checkpoint_support=False,
        auto_configure_optimizers=False,  # or --optimizer and --lr_scheduler would take the place of the module's own
        seed_everything_default=0,
        trainer_defaults={
            "max_steps": -1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        parser_kwargs={
            "exit_on_error": False,
            "allow_abbrev": False,
            "prog": f"pretrain {command}",
            "description": description,
        },
        args=find_recipes(arguments),
    )


def paths_given(arguments: Sequence[str], *options: str) -> list[Path]:
    """What the arguments give as one of some options, such as ``--config``."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    separate = [following for argument, following in pairs if argument in options]
    joined = [argument.partition("=") for argument in arguments if "=" in argument]
    return [Path(name) for name in [*separate, *(value for option, _, value in joined if option in options)]]

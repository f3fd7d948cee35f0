"""What a run is built of: its directory, module, data module and Trainer, as the settings say."""

from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

import pretrain.train.pseudo_perplexity  # noqa: F401  (trainer.callbacks then knows it by its name)
from pretrain.errors import UserError, one_line
from pretrain.train.branch import Branch
from pretrain.train.changes import is_fine_tuning, read_config
from pretrain.train.checkpoint import CHECKPOINTS, AtomicCheckpointIO
from pretrain.train.ledger import Ledger
from pretrain.train.logging import EventLogger, LearningRateMonitor, MetricsFile, ProgressBar
from pretrain.train.mirror import Mirror
from pretrain.train.report import final_figures, header, summary
from pretrain.train.run import CONFIG, Run
from pretrain.train.saving import StepCheckpoint
from pretrain.train.settings import SettingsCLI, paths_given
from pretrain.train.sharding import FullyShardedStrategy
from pretrain.train.sick import SickSteps
from pretrain.train.spikes import LossSpikes
from pretrain.train.step import StepModule
from pretrain.train.tensorboard import TensorBoardPages
from pretrain.train.throughput import Throughput
from pretrain.train.watchdog import Watchdog


class FitCLI(SettingsCLI):
    """The settings, and the run that they are for.

    Attributes:
        fine_tunes: Whether it is for runs of fine-tuning.
    """

    fine_tunes = False

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run", type=str | None, default=None, help="Run directory (default: runs/<first config>)."
        )
        parser.add_argument(
            "--allow_change",
            nargs="?",
            const=True,
            type=bool,
            default=False,
            help="Continue a run with other learning-rate, masking, ... settings.",
        )
        parser.add_argument(
            "--branch_from",
            type=str | None,
            default=None,
            metavar="RUN_OR_CHECKPOINT",
            help="Begin a new run where another one stands, with other history settings if wanted.",
        )
        super().add_arguments_to_parser(parser)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse a run of the other kind first: its settings would be told to be wrong one by one."""
        for directory in paths_given(args, "--run"):
            _check_kind(directory, self.fine_tunes)
        super().parse_arguments(parser, args)

    @override
    def before_instantiate_classes(self) -> None:
        """Open the run, and refuse a config that is not its own, before anything is built or written."""
        config = self.config
        for name in ("validate_every_n_steps", "max_sick_steps_in_a_row"):
            if config[name] < 1:
                raise UserError(f"{name} is {config[name]}; give 1 or more")
        first = Path(config.config[0].relative) if config.config else None
        if config.run is None and first is None:
            raise UserError("no config file and no run directory; give -c CONFIG or --run DIR")
        self.branch: Branch | None = None
        directory = Path(config.run) if config.run else Path("runs") / first.stem  # type: ignore[union-attr]
        if config.branch_from and config.run is None:
            raise UserError("a branch is a run of its own; say where with --run DIR")
        mirror = Mirror(config.checkpoint.remote, directory) if config.checkpoint.remote else None
        if mirror:
            mirror.bring_files(of_a_branch=bool(config.branch_from))
        if config.branch_from:
            self.branch = Branch(Path(config.run), Path(config.branch_from))
        self.run = Run(directory, mirror=mirror)
        if self.branch and self.branch.origin:
            self.run.begin_at(self.branch.origin)
        self.settings = yaml.safe_load(self.parser.dump(config))
        for name in ("config", "run", "allow_change", "branch_from"):
            self.settings.pop(name, None)
        # Where a branch begins, other settings are what it is for.
        begins = self.branch is not None and self.branch.step in (None, self.run.step)
        defaults = yaml.safe_load(self.parser.dump(self.parser.get_defaults(), skip_validation=True))
        self.changes = self.run.check(self.settings, config.allow_change or begins, defaults)
        if self.run.checkpoint:  # which holds the weights: those that the run began with may be gone by now
            config.model.initialize_from = None

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A Trainer with the run's checkpoints, loggers, monitor and progress bar."""
        settings: Namespace = self.config_init.trainer
        logger: Any = settings.logger
        loggers: list[Any] = []
        if logger is not False:
            extra = logger if isinstance(logger, list) else [] if logger in (None, True) else [logger]
            loggers = [
                EventLogger(self.run.directory, self.run.step),
                MetricsFile(self.run.directory, self.run.step),
                *extra,
            ]
        callbacks: list[pl.Callback] = [_ValidateLast(), Watchdog(self.config_init.hang_timeout_minutes)]
        if loggers:
            pages = TensorBoardPages(yaml.safe_dump(self.settings, sort_keys=False))
            callbacks += [LearningRateMonitor(), pages]
        callbacks += [ProgressBar()] if settings.enable_progress_bar is not False else []
        callbacks += [Throughput()]  # after these: what they show of a validation is no time of training
        sick = SickSteps(self.run.directory, self.run.step, self.config_init.max_sick_steps_in_a_row)
        ledger = Ledger(self.run.directory, self.run.step)
        checkpoints = self.run.directory / CHECKPOINTS

        def before_save(trainer: pl.Trainer) -> None:
            self.run.check_in_place()
            ledger.write(trainer)

        self.saving = StepCheckpoint(checkpoints, before_save, self.run.mirror, **self.config_init.checkpoint)
        spikes = LossSpikes(self.run.directory, self.run.skips, settle=self.saving.finish, **self.config_init.spikes)
        # What else decides at a validation comes before the checkpoint that follows it.
        callbacks += [
            *self.callbacks(),
            sick,
            spikes,
            ledger,
            self.saving,
        ]
        given = settings.callbacks or []
        plugins, checkpoint_io = settings.plugins or [], AtomicCheckpointIO()
        try:
            trainer = super().instantiate_trainer(
                logger=loggers or False,
                callbacks=[*callbacks, *(given if isinstance(given, list) else [given])],
                plugins=[checkpoint_io, *(plugins if isinstance(plugins, list) else [plugins])],
                val_check_interval=self.config_init.validate_every_n_steps * settings.accumulate_grad_batches,
                check_val_every_n_epoch=None,
                default_root_dir=self.run.directory,  # where, under SLURM, Lightning looks for checkpoints of its own
                **kwargs,
            )
            # What goes on to a GPU need not be copied in the host's memory first, by each process of it.
            checkpoint_io.mapped = trainer.strategy.root_device.type == "cuda"
            _check_processes(trainer.strategy)
        except (MisconfigurationException, ValueError) as error:
            message = one_line(error).rstrip(".")
            raise UserError(
                f"the trainer's settings do not work here: {message}; change them, for example --trainer.accelerator, "
                "--trainer.devices, --trainer.strategy or --trainer.precision"
            ) from error
        _check_strategy(trainer.strategy, self.model)
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy._setup_model = partial(_in_ddp, trainer.strategy)  # type: ignore[method-assign]
        return trainer

    def callbacks(self) -> list[pl.Callback]:
        """What this kind of run has besides."""
        return []

    def check_weights(self) -> None:
        """Make sure that the checkpoint to continue from is one of this model."""
        self.run.check_weights(self.model.state_dict(), self.model.hparams["encoder"])

    def ready(self) -> None:
        """Called when the data are open, before anything is written."""

    def finished(self, result: dict[str, Any]) -> bool:
        """Whether the run that left this result stands where the config wants it."""
        return bool(result.get("steps") == self.run.step == self.config.trainer.max_steps)

    def header(self) -> str:
        """What will run."""
        return header(self.run, self.trainer, self.model, self.datamodule)

    def final_figures(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        return final_figures(self.trainer, self.model, self.datamodule)

    def summary(self, result: dict[str, Any]) -> str:
        """How it went."""
        return summary(self.run.directory, result)


def _check_kind(directory: Path, fine_tunes: bool) -> None:
    """Refuse to continue a run of pre-training as one of fine-tuning, or the other way round."""
    path = directory / CONFIG
    if not path.is_file() or is_fine_tuning(read_config(path)) == fine_tunes:
        return
    kind, command = ("pre-training", "fit") if fine_tunes else ("fine-tuning", "finetune")
    beginning = f"give --from {directory} and another --run" if fine_tunes else "choose another directory with --run"
    raise UserError(
        f"{directory}: is a run of {kind}, which `pretrain {command} -c {path} --run {directory}` continues; to begin "
        f"another one, {beginning}"
    )


def _in_ddp(strategy: DDPStrategy, module: torch.nn.Module) -> DistributedDataParallel:
    """As Lightning does it, but on the stream that training runs on.

    Lightning 2.6 makes it on another, which gradients are then added up on: each waits for the other, and memory that
    one has freed cannot be used by the other before the GPU is as far as the host.
    """
    ids = strategy.determine_ddp_device_ids()
    return DistributedDataParallel(module, device_ids=ids, **strategy._ddp_kwargs)


def _check_processes(strategy: Strategy) -> None:
    """Compare the processes that a launcher (torchrun, SLURM) started with those that the Trainer was set to."""
    if isinstance(strategy, DDPStrategy | FullyShardedStrategy) and strategy.cluster_environment:
        devices = len(strategy.parallel_devices or ())
        strategy.cluster_environment.validate_settings(num_devices=devices, num_nodes=strategy.num_nodes)


def _check_strategy(strategy: Strategy, module: StepModule) -> None:
    """Refuse strategies under which gradients are clipped, checkpoints written or matrices held in another way."""
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FullyShardedStrategy)
    if not known or isinstance(strategy.launcher, _MultiProcessingLauncher):
        name = type(strategy).__name__ + (", with processes that Python starts" if known else "")
        raise UserError(
            f"trainer.strategy is {name}, under which gradients are not clipped or checkpoints not written as a run "
            "needs it; add -c configs/ddp.yaml or -c configs/fsdp.yaml"
        )
    if module.optimizer_name == "muon" and isinstance(strategy, FullyShardedStrategy):
        raise UserError(
            "model.optimizer is muon, which needs whole matrices, and FSDP2 divides them among the processes; train "
            "with -c configs/ddp.yaml, or with --model.optimizer adamw"
        )


class _ValidateLast(pl.Callback):
    """Let Lightning validate after the last step, also where the interval does not fall on it."""

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True

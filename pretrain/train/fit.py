"""`pretrain fit`: from config files and overrides to a trained run; the same command again continues it."""

import difflib
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.utilities import rank_zero_only
from torch._dynamo.exc import TorchDynamoException
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from pretrain.corpus.datamodule import MLMDataModule
from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.store import verify
from pretrain.corpus.tokenizer import load_tokenizer
from pretrain.errors import CrashError, UserError
from pretrain.shipped import find_recipes
from pretrain.train.branch import Branch
from pretrain.train.checkpoint import AtomicCheckpointIO
from pretrain.train.hardware import check_hardware, out_of_memory
from pretrain.train.ledger import Ledger
from pretrain.train.logging import EventLogger, LearningRateMonitor, MetricsFile, ProgressBar
from pretrain.train.module import MLMModule
from pretrain.train.report import execution, final_figures, header, summary
from pretrain.train.run import CHECKPOINTS, Run, yaml_error
from pretrain.train.saving import RunInterruptedError, StepCheckpoint
from pretrain.train.settings_help import asked_for, shown
from pretrain.train.sharding import FullyShardedStrategy
from pretrain.train.sick import SickSteps
from pretrain.train.spikes import LossSpikes, RewindError
from pretrain.train.step import StepModule
from pretrain.train.tensorboard import TensorBoardPages
from pretrain.train.throughput import Throughput
from pretrain.train.watchdog import Watchdog

_MISFIT = "Does not validate against any of the Union subtypes"  # begins jsonargparse's list of what else was tried

CLI = TypeVar("CLI", bound="SettingsCLI")

_QUIET = (
    ".*does not have many workers.*",  # a worker costs a core that a small machine needs for training
    ".*is smaller than the logging interval.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # what is logged has been summed over processes already
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
)


_DESCRIPTION = """Train as the config says, or continue its run where it stopped.

Exit codes: 0 the run is finished; 2 a person is needed (one line says for what); 130, 138 and 143 a signal (SIGINT,
SIGUSR1, SIGTERM) ended it after a whole step: the same command continues it; anything else is a crash, from which the
same command continues, too. With SIGUSR1 under SLURM (sbatch --signal=USR1@120) the job puts itself back into the
queue.
"""


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
            help="End the job, and say which process hangs, when nothing was done for so long; null to wait for ever.",
        )
        parser.add_class_arguments(LossSpikes, "spikes", skip={"run", "skips"}, instantiate=False)
        parser.add_class_arguments(StepCheckpoint, "checkpoint", skip={"directory", "before_save"}, instantiate=False)
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given; Lightning's own version warns when that is also what stands in ``sys.argv``."""
        for given in _config_files(args):
            if given.is_file() and (problem := yaml_error(given)):
                raise UserError(problem)
        if asked_for(args):
            print(shown(parser.format_help(), args), end="")
            raise SystemExit(0)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise UserError(_explain(str(error), parser)) from error
        if self.config.trainer.max_steps < 1:
            raise UserError(
                f"trainer.max_steps is {self.config.trainer.max_steps}; say how many optimizer steps the run takes"
            )

    @override
    def instantiate_classes(self) -> None:
        """Build what the settings name; a class that refuses one of its own is told in one line."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            if _MISFIT not in str(error):
                raise
            raise UserError(_explain(str(error), self.parser)) from error


class FitCLI(SettingsCLI):
    """The settings, and the run that they are for."""

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
        if config.branch_from and config.run is None:
            raise UserError("a branch is a run of its own; say where with --run DIR")
        if config.branch_from:
            self.branch = Branch(Path(config.run), Path(config.branch_from))
        self.run = Run(Path(config.run) if config.run else Path("runs") / first.stem)  # type: ignore[union-attr]
        if self.branch and self.branch.origin:
            self.run.begin_at(self.branch.origin)
        self.settings = yaml.safe_load(self.parser.dump(config))
        for name in ("config", "run", "allow_change", "branch_from"):
            self.settings.pop(name, None)
        # Where a branch begins, other settings are what it is for.
        begins = self.branch is not None and self.branch.step in (None, self.run.step)
        self.changes = self.run.check(self.settings, config.allow_change or begins)
        if self.run.checkpoint:  # which holds the weights: those that the run began with may be gone by now
            config.model.initialize_from = None

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
        callbacks: list[pl.Callback] = [Throughput(), _ValidateLast()]
        callbacks += [Watchdog(self.config_init.hang_timeout_minutes)]
        if loggers:
            pages = TensorBoardPages(yaml.safe_dump(self.settings, sort_keys=False))
            callbacks += [LearningRateMonitor(), pages]
        callbacks += [ProgressBar()] if settings.enable_progress_bar is not False else []
        sick = SickSteps(self.run.directory, self.run.step, self.config_init.max_sick_steps_in_a_row)
        ledger = Ledger(self.run.directory, self.run.step)
        checkpoints = self.run.directory / CHECKPOINTS

        def before_save(trainer: pl.Trainer) -> None:
            self.run.check_in_place()
            ledger.write(trainer)

        spikes = LossSpikes(self.run.directory, self.run.skips, **self.config_init.spikes)
        # What else decides at a validation comes before the checkpoint that follows it.
        callbacks += [
            *self.callbacks(),
            sick,
            spikes,
            ledger,
            StepCheckpoint(checkpoints, before_save, **self.config_init.checkpoint),
        ]
        given = settings.callbacks or []
        plugins = settings.plugins or []
        try:
            trainer = super().instantiate_trainer(
                logger=loggers or False,
                callbacks=[*callbacks, *(given if isinstance(given, list) else [given])],
                plugins=[AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])],
                val_check_interval=self.config_init.validate_every_n_steps * settings.accumulate_grad_batches,
                check_val_every_n_epoch=None,
                **kwargs,
            )
            _check_processes(trainer.strategy)
        except (MisconfigurationException, ValueError) as error:
            message = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"the trainer's settings do not work here: {message}; change them, for example --trainer.devices, "
                "--trainer.strategy or --trainer.precision"
            ) from error
        _check_strategy(trainer.strategy, self.model)
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
        return bool(self.run.step == self.config.trainer.max_steps)

    def header(self) -> str:
        """What will run."""
        return header(self.run, self.trainer, self.model, self.datamodule)

    def final_figures(self) -> dict[str, Any]:
        """What ``result.json`` holds."""
        return final_figures(self.trainer, self.model, self.datamodule)

    def summary(self, result: dict[str, Any]) -> str:
        """How it went."""
        return summary(self.run.directory, result)


def _check_processes(strategy: Strategy) -> None:
    """Compare the processes that a launcher (torchrun, SLURM) started with those that the Trainer was set to."""
    if isinstance(strategy, DDPStrategy | FullyShardedStrategy) and strategy.cluster_environment:
        devices = len(strategy.parallel_devices or ())
        strategy.cluster_environment.validate_settings(num_devices=devices, num_nodes=strategy.num_nodes)


def _check_strategy(strategy: Strategy, module: MLMModule) -> None:
    """Refuse strategies under which gradients are clipped, checkpoints written or matrices held in another way."""
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FullyShardedStrategy):
        raise UserError(
            f"trainer.strategy is {type(strategy).__name__}, under which gradients are not clipped or checkpoints not "
            "written as a run needs it; add -c configs/ddp.yaml or -c configs/fsdp.yaml"
        )
    if module.optimizer_name == "muon" and isinstance(strategy, FullyShardedStrategy):
        raise UserError(
            "model.optimizer is muon, which needs whole matrices, and FSDP2 divides them among the processes; train "
            "with -c configs/ddp.yaml, or with --model.optimizer adamw"
        )


class _ValidateLast(pl.Callback):
    """Let Lightning validate after the last step, also where the interval does not fall on it."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= trainer.max_steps:
            trainer.should_stop = True


def build(arguments: Sequence[str]) -> FitCLI:
    """Module, data module, Trainer and run, as the arguments say; nothing is written yet.

    Raises:
        UserError: On any mistake in the arguments or the config, or a config that is not the run's.
    """
    return parse(FitCLI, "fit", _DESCRIPTION, arguments)


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
        seed_everything_default=0,
        trainer_defaults={
            "max_steps": -1,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        parser_kwargs={"exit_on_error": False, "prog": f"pretrain {command}", "description": description},
        args=find_recipes(arguments),
    )


def fit(arguments: Sequence[str]) -> int:
    """Train, or continue to train, as the arguments say.

    Returns:
        The exit code: 0 when the run is finished, 128 + n when signal n ended it after a whole step and the same
        command continues it.

    Raises:
        UserError: On any mistake in the arguments, the config, the data or the run directory.
    """
    return complete(build, arguments)


def complete(build: Callable[[Sequence[str]], FitCLI], arguments: Sequence[str]) -> int:
    """Train what is built of the arguments until it is finished, or a signal ends it; see `fit`."""
    while True:
        try:
            return _fit(build(arguments))
        except RewindError as rewind:
            _say(f"\n{rewind}")


def _fit(cli: FitCLI) -> int:
    run, trainer, module, data = cli.run, cli.trainer, cli.model, cli.datamodule
    data.skips = [(skip.first, skip.end) for skip in run.skips]
    for problem in run.problems:
        _say(f"passed over: {problem}")
    if run.step > trainer.max_steps:
        raise UserError(
            f"{run.directory}: stands at step {run.step}, beyond trainer.max_steps {trainer.max_steps}; give at least "
            f"{run.step}, or choose another directory with --run"
        )
    result = run.result
    if result and cli.finished(result) and run.config and run.config["data"]["train"] == cli.settings["data"]["train"]:
        _say(f"{run.directory}: finished already (step {run.step} of {trainer.max_steps})")
        _say(cli.summary(result))
        return 0
    cli.check_weights()
    data.prepare_data()
    data.setup("fit")
    if data.validation_corpus is None:
        trainer.limit_val_batches = 0
    if run.data_state:
        data.check_identity(run.data_state)
    data.check_packs(trainer.world_size, trainer.accumulate_grad_batches)
    cli.ready()
    check_hardware(trainer, module, data)
    _check_schedule(trainer, module, data)
    if run.checkpoint and trainer.is_global_zero:
        _verify_what_changed(data.train_corpus.path, run.checkpoint)
    if cli.branch and trainer.is_global_zero:
        cli.branch.create()
        run.reopened()
    with run.locked() if trainer.is_global_zero else nullcontext():
        try:
            return _train(cli)
        except RewindError:
            raise
        except Exception:
            if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
                trainer.strategy.launcher.kill(signal.SIGKILL)  # who would wait for this process
            raise


def _verify_what_changed(corpus: Path, checkpoint: Path) -> None:
    """Compare a corpus with its checksums where a file of it is younger than the checkpoint that was trained on it."""
    trained = checkpoint.stat().st_mtime
    if any(file.stat().st_mtime > trained for file in corpus.glob("*.arrow")):
        verify(corpus)


def _check_schedule(trainer: pl.Trainer, module: StepModule, data: PackedDataModule) -> None:
    """Refuse a schedule that cannot be made, or has nothing to follow."""
    try:
        module.max_steps = trainer.max_steps
        scheduler = module.build_optimizer()[1]
    except (TypeError, ValueError) as error:
        raise UserError(f"model.schedule: {error}; see the scheduler's documentation") from error
    if isinstance(scheduler, ReduceLROnPlateau) and data.validation_corpus is None:
        raise UserError(
            "model.schedule is ReduceLROnPlateau, which follows val/loss, and there is no validation; give "
            "data.validation, or another schedule"
        )


def _train(cli: FitCLI) -> int:
    run, trainer, module, data = cli.run, cli.trainer, cli.model, cli.datamodule
    config_text = yaml.safe_dump(cli.settings, sort_keys=False)
    rank_zero_only(run.record_start)(cli.settings, config_text, cli.changes, execution(trainer))
    _say(cli.header())
    for change in cli.changes:
        _say(f"  changed   {change}")
    try:
        trainer.fit(module, data, ckpt_path=run.checkpoint, weights_only=True)
        if data.validation_corpus and "val/loss" not in trainer.callback_metrics:  # killed after its last checkpoint
            trainer.validate(module, data, verbose=False)
    except RunInterruptedError as interruption:
        _say(f"\n{interruption}; the same command continues the run")
        if interruption.signal_number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            rank_zero_only(_requeue)(os.environ["SLURM_JOB_ID"])
        return 128 + interruption.signal_number
    except torch.OutOfMemoryError as error:
        raise UserError(f"{run.directory}: {out_of_memory(trainer, data)}") from error
    except TorchDynamoException as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{run.directory}: model.compile failed ({reason}); install what it asks for, or train with "
            "--model.compile false"
        ) from error
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # which Lightning met another one while tidying up after
            raise error.__context__ from error
        if problem := _lost_worker(run, str(error)):
            raise problem from error
        raise
    result = cli.final_figures()
    rank_zero_only(run.record_result)(result)
    _say(f"\n{run.directory}: finished\n{cli.summary(result)}")
    return 0


def _lost_worker(run: Run, reason: str) -> Exception | None:
    """What to say where training ended because a loader worker did; None where that is not the reason."""
    if "Bus error" in reason:
        return UserError(
            f"{run.directory}: a loader worker met a bus error, as where a corpus file is cut short while it is read; "
            "compare the corpus by `pretrain inspect CORPUS --verify`"
        )
    if "DataLoader worker" in reason:
        return CrashError(
            f"{run.directory}: a loader worker was killed, as happens where memory runs out ({reason.strip()[:100]}); "
            "the same command continues from the newest checkpoint; if it happens again, use fewer --data.num_workers"
        )
    return None


def _requeue(job: str) -> None:
    """Give the SLURM job back to its queue; it will run the same command again."""
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", "") or "").strip().partition("\n")[0] or error
        print(f"pretrain: warning: job {job} is not requeued ({reason}); submit it again", file=sys.stderr, flush=True)
    else:
        _say(f"job {job} is requeued")


def _config_files(arguments: Sequence[str]) -> list[Path]:
    """What the arguments give as ``-c`` or ``--config``."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    separate = [following for argument, following in pairs if argument in ("-c", "--config")]
    return [Path(name) for name in separate] + [
        Path(argument.partition("=")[2]) for argument in arguments if argument.startswith("--config=")
    ]


def _explain(message: str, parser: LightningArgumentParser) -> str:
    """A parser's message in one line, with the key that was probably meant and where the keys are listed."""
    if _MISFIT in message:
        message = _of_the_union(message)
    # What a link computes is a UserError's own line; jsonargparse puts its machinery before it.
    message = re.sub(r"^Call to compute_fn of link .* failed: ", "", " ".join(message.split()))
    unknown = re.search(r"(?:'([\w.]+)' does not accept (?:option|nested key)|[Kk]ey) '([\w.]+)'", message)
    if unknown:
        given = ".".join(part for part in unknown.groups() if part)
        message += "".join(
            f"; did you mean {key}?"
            for key in difflib.get_close_matches(given, list(parser.get_defaults().keys()), n=1)
        )
    return f"{message}; `{parser.prog} --help` lists the settings"


def _of_the_union(message: str) -> str:
    """Of what jsonargparse says about a setting of several types, what is wrong with the type that was meant."""
    key = re.search(r'key "([\w.]+)"', message)
    tried = re.findall(r"^ *- +(.*(?:\n {8,}.*)*)", message, re.MULTILINE)
    meant = [text for text in tried if "subclass of" not in text and "NoneType" not in text]
    reason = " ".join((meant or tried)[0].split())
    reason = re.sub(r"^Type .* expects a function or a callable class: ", "", reason)
    if reason.startswith(("Expected a path", "Expected a dot import path")):
        given = message.rpartition("Given value: ")[2].strip()
        reason = f"no class '{given}' can be imported; give its import path, or check its name"
    return f"{key[1]}: {reason}" if key else reason


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)

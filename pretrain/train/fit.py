"""`pretrain fit`: from config files and overrides to a trained run; the same command again continues it."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
import yaml
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher
from pytorch_lightning.strategies.launchers.launcher import _Launcher
from pytorch_lightning.utilities import rank_zero_only
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pretrain.corpus.packed import PackedDataModule
from pretrain.corpus.store import LENGTHS, Corpus, verify
from pretrain.errors import CrashError, UserError
from pretrain.model.allocator import keep_freed_memory
from pretrain.train.build import FitCLI
from pretrain.train.hardware import (
    check_hardware,
    compile_failure,
    is_out_of_host_memory,
    is_out_of_memory,
    out_of_memory,
)
from pretrain.train.report import execution
from pretrain.train.run import Run
from pretrain.train.saving import RunInterruptedError
from pretrain.train.settings import parse
from pretrain.train.spikes import RewindError
from pretrain.train.step import StepModule

_DESCRIPTION = """Train as the config says, or continue its run where it stopped.

Exit codes: 0 the run is finished; 2 a person is needed (one line says for what); 130, 138 and 143 a signal (SIGINT,
SIGUSR1, SIGTERM) ended it after a whole step: the same command continues it; anything else is a crash, from which the
same command continues, too. A second SIGINT ends it at once, and makes no checkpoint. With SIGUSR1 under SLURM (sbatch
--signal=USR1@120) the job puts itself back into the queue.
"""


def build(arguments: Sequence[str]) -> FitCLI:
    """Module, data module, Trainer and run, as the arguments say; nothing is written yet.

    Raises:
        UserError: On any mistake in the arguments or the config, or a config that is not the run's.
    """
    return parse(FitCLI, "fit", _DESCRIPTION, arguments)


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
    launcher: _Launcher | None = None
    while True:
        try:
            cli = build(arguments)
            launcher = launcher or cli.trainer.strategy.launcher  # of a Trainer that is built again, it starts nobody
            return _fit(cli)
        except RewindError as rewind:
            _say(f"\n{rewind}")
        except Exception:
            if isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(signal.SIGKILL)  # who would wait for this process
            raise
        del cli
        gc.collect()  # module and optimizer leave the GPU before they are built again


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
    same_data = run.config and run.config["data"]["train"] == cli.settings["data"]["train"]
    if result and cli.finished(result) and same_data and not cli.changes:
        if run.mirror and trainer.is_global_zero:
            run.mirror.push_all()
        _say(f"{run.directory}: finished already (step {run.step} of {trainer.max_steps})")
        _say(cli.summary(result))
        return 0
    cli.check_weights()
    data.prepare_data()
    data.setup("fit")
    if run.data_state:
        data.check_identity(run.data_state)
    data.check_packs(trainer.world_size, trainer.accumulate_grad_batches)
    cli.ready()
    check_hardware(trainer, module, data)
    _check_schedule(trainer, module, data)
    if run.checkpoint and trainer.is_global_zero:
        for corpus in data.train_corpus.components:
            _verify_if_younger(corpus, run.checkpoint)
    if cli.branch and cli.branch.origin:  # otherwise it is there already
        if trainer.is_global_zero:
            cli.branch.create()
        run.branched()
    with run.locked() if trainer.is_global_zero else nullcontext():
        return _train(cli)


def _verify_if_younger(corpus: Corpus, checkpoint: Path) -> None:
    """Compare a corpus with its checksums where a file of it is younger than the checkpoint that was trained on it."""
    trained = checkpoint.stat().st_mtime
    files = (*corpus.path.glob("*.arrow"), *corpus.path.glob(LENGTHS))  # none of a remote corpus
    if any(file.stat().st_mtime > trained for file in files):
        _say(f"{corpus}: has changed or was copied since the checkpoint; comparing it with its checksums")
        verify(corpus.path)


def _check_schedule(trainer: pl.Trainer, module: StepModule, data: PackedDataModule) -> None:
    """Refuse a schedule that cannot be made, or has nothing to follow."""
    scheduler = module.schedule_over(trainer.max_steps)
    if isinstance(scheduler, ReduceLROnPlateau) and (data.validation_corpus is None or not trainer.limit_val_batches):
        raise UserError(
            "model.schedule is ReduceLROnPlateau, which follows val/loss, and there is no validation; give "
            "data.validation (and no trainer.limit_val_batches 0), or another schedule"
        )


def _train(cli: FitCLI) -> int:
    run, trainer, module, data = cli.run, cli.trainer, cli.model, cli.datamodule
    if trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    config_text = yaml.safe_dump(cli.settings, sort_keys=False)
    rank_zero_only(run.record_start)(config_text, cli.changes, execution(trainer, module))
    if run.mirror and trainer.is_global_zero:
        run.mirror.begin()
    _say(cli.header())
    for change in cli.changes:
        _say(f"  changed   {change}")
    try:
        trainer.fit(module, data, ckpt_path=run.checkpoint, weights_only=True)
        if data.validation_corpus and "val/loss" not in trainer.callback_metrics:  # killed after its last checkpoint
            if not cli.changes:
                trainer.loggers = []  # which have the same figures from before
            trainer.validate(module, data, verbose=False)
    except RunInterruptedError as interruption:
        _say(f"\n{interruption}; the same command continues the run")
        if interruption.signal_number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            rank_zero_only(_requeue)(os.environ["SLURM_JOB_ID"])
        cli.saving.restore_handlers()  # only now: SLURM's SIGTERM, which follows its warning, must not come between
        return 128 + interruption.signal_number
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # which Lightning tidied up after, and made an exit of
            raise end.__context__ from None
        raise
    except Exception as error:
        # Memory may also run out while kernels are tried out, and then that is the reason.
        if is_out_of_memory(error):
            raise UserError(f"{run.directory}: {out_of_memory(trainer, module, data)}") from error
        if is_out_of_host_memory(error):
            raise UserError(
                f"{run.directory}: this machine has too little memory for a pack of this model; give more "
                "--trainer.accumulate_grad_batches, which makes packs smaller, or a smaller model"
            ) from error
        if module.compile_blocks and (reason := compile_failure(error)):
            raise UserError(
                f"{run.directory}: model.compile failed ({reason}); install what it asks for, or train with "
                "--model.compile false"
            ) from error
        if not isinstance(error, RuntimeError):
            raise
        if isinstance(error.__context__, OSError):  # which Lightning met another one while tidying up after
            raise error.__context__ from error
        if problem := _lost_worker(run, str(error)):
            raise problem from error
        raise
    result = cli.final_figures()
    rank_zero_only(run.record_result)(result)
    if run.mirror and trainer.is_global_zero:
        run.mirror.push_all()
    ended = "finished"
    if trainer.global_step < trainer.max_steps and not result.get("stopped_early"):
        ended = f"ended early after step {trainer.global_step} of {trainer.max_steps}; the same command goes on"
    _say(f"\n{run.directory}: {ended}\n{cli.summary(result)}")
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
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
        reason = said.strip().partition("\n")[0] or error
        print(f"pretrain: warning: job {job} is not requeued ({reason}); submit it again", file=sys.stderr, flush=True)
    else:
        _say(f"job {job} is requeued")


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)

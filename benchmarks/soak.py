"""Train for a while, killing the run at random times, and check that nothing wears out, leaks or is lost.

    python benchmarks/soak.py --minutes 30        (`make soak`)

The first half of the time it trains undisturbed, and its anonymous memory, a loader worker's included, and its open
files must be flat. In the second half it gets, at random times, a SIGKILL, SIGTERM, SIGINT or SIGUSR1,
whatever it is doing then; after each, no process of it may be left, and every file of the run must be readable. At the
end every step must stand once in every curve, and the audit must hold. Exit code 1 if anything is found.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.train.checkpoint import CHECKPOINTS, checkpoints_in, step_of

ROOT = Path(__file__).parents[1]
WARM_UP = 1500  # steps
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def processes_of(group: int) -> list[int]:
    """The living processes of a process group, the oldest first."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp, *others = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(pgrp) == group and state != "Z":
            started = int(others[16])  # not their numbers, which begin anew when they have come to the largest
            found.append((started, int(stat.parent.name)))
    return [process for _, process in sorted(found)]


def usage(process: int) -> tuple[int, int] | None:
    """Anonymous memory in bytes, with that of its loader worker, and open files; None when it is gone.

    The worker is the oldest of the others in its group: a validation's come and go.
    """
    memory = 0
    try:
        files = len(os.listdir(f"/proc/{process}/fd"))
        for member in processes_of(process)[:2]:
            status = Path(f"/proc/{member}/status").read_text()
            (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
            memory += int(line.split()[1]) * 1024
    except (OSError, ValueError):  # one has ended meanwhile
        return None
    return memory, files


def grows(samples: list[tuple[float, int]], allowed: float) -> float:
    """How much higher the second half lies than the first, if by more than is allowed; else 0.

    High values are compared, the 90th percentiles, since the kernel takes pages back now and then, and gives them
    again; not the highest, which a checkpoint or a validation makes for a moment. The samples must begin after the
    warming up: packs differ in size, and until the heap has a hole for each, a thousand steps or so, it grows by 20 MiB
    and more, while what is allocated in it stays the same.

    Args:
        samples: Times in seconds, and values.
        allowed: What may come by chance, as a share of the first half's.
    """
    if len(samples) < 2:
        return 0.0
    middle = (samples[0][0] + samples[-1][0]) / 2
    halves = [sorted(value for time, value in samples if (time > middle) == later) for later in (False, True)]
    before, after = (half[len(half) * 9 // 10] for half in halves)
    return float(after - before) if after - before > allowed * before else 0.0


def newest_step(run: Path) -> int:
    """The step of a run's newest checkpoint; 0 before the first."""
    return max((step_of(path.name) for path in checkpoints_in(run / CHECKPOINTS)), default=0)


def check_files(run: Path) -> list[str]:
    """What is wrong with a run's files while nobody trains: unreadable ones, and figures that stand twice."""
    found = []
    seen: set[tuple[str, str]] = set()
    lines = (run / "metrics.csv").read_text().splitlines() if (run / "metrics.csv").exists() else []
    for line in lines[1:-1]:  # the last one may be half-written by a kill
        step, name, value = line.split(",")
        float(value)
        if (step, name) in seen:
            found.append(f"metrics.csv has {name} twice for step {step}")
        seen.add((step, name))
    try:
        accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
        accumulator.Reload()
    except Exception as error:  # whatever the reader meets in a half-written file
        found.append(f"TensorBoard cannot read the run: {error}")
    return found


def soak(run: Path, minutes: float, workers: int, seed: int) -> list[str]:
    """Train and kill until the time is over; what was found."""
    draw, found = random.Random(seed), []
    pretrain = [sys.executable, "-m", "pretrain"]
    command = [*pretrain, "fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), "--run", str(run)]
    command += ["--trainer.max_steps", "1000000", "--validate_every_n_steps", "200", "--checkpoint.every_n_steps", "50"]
    command += ["--data.num_workers", str(workers), "--trainer.enable_progress_bar", "false"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    end, kills = time.monotonic() + 60 * minutes, 0
    output = (run.parent / "soak.log").open("ab")
    while time.monotonic() < end:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, start_new_session=True, stdout=output, stderr=output
        )
        length = draw.uniform(8, 40) if kills else 30 * minutes
        stop = min(time.monotonic() + length, end + 5)
        memory: list[tuple[float, int]] = []
        files: list[tuple[float, int]] = []
        while time.monotonic() < stop and process.poll() is None:
            time.sleep(0.5)
            sample = usage(process.pid)
            if sample and not kills and newest_step(run) >= WARM_UP:
                memory.append((time.monotonic(), sample[0]))
                files.append((time.monotonic(), sample[1]))
        if process.poll() is not None:
            found.append(f"the run ended by itself with code {process.returncode}; see {output.name}")
            break
        number = draw.choice(SIGNALS)
        process.send_signal(number)
        code, kills = process.wait(60), kills + 1
        expected = -number if number == signal.SIGKILL else 128 + number
        if code not in (expected, -number):  # -number: before it had begun to train
            found.append(f"{number.name} ended the run with code {code}")
        deadline = time.monotonic() + 15
        while (left := processes_of(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)  # loader workers look for their parent every five seconds
        if left:
            found.append(f"{len(left)} processes outlived the run by 15 seconds")
            for orphan in left:
                os.kill(orphan, signal.SIGKILL)
        if growth := grows(memory, 0.03):
            found.append(f"anonymous memory grew by {growth / 2**20:.0f} MiB in {length:.0f} seconds")
        if growth := grows(files, 0.1):
            found.append(f"open files grew by {growth:.0f} in {length:.0f} seconds")
        if kills == 1 and not memory:
            print(f"  {newest_step(run)} steps: too few to judge memory by, which takes {WARM_UP}", flush=True)
        if memory:
            peaks = f"{max(value for _, value in memory) / 2**20:.0f} MiB, {max(value for _, value in files)} files"
            print(f"  at most {peaks} in {memory[-1][0] - memory[0][0]:.0f} s, flat: {not found}", flush=True)
        found += check_files(run)
        print(f"  {number.name:8} after {length:4.0f} s, {len(found)} found", flush=True)
        if found:
            break
    return found + check_end(run, command, environment, kills)


def check_end(run: Path, command: list[str], environment: dict[str, str], kills: int) -> list[str]:
    """Finish the run a few steps on, and look at the whole of it."""
    found = []
    steps = newest_step(run) + 20
    last = [*command, "--trainer.max_steps", str(steps), "--allow_change"]
    done = subprocess.run(last, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        found.append(f"the last start ended with code {done.returncode}: {done.stderr[-500:]}")
    found += check_files(run)
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    for tag in ("train/loss", "lr-AdamW"):
        if [event.step for event in accumulator.Scalars(tag)] != list(range(steps)):
            found.append(f"TensorBoard's {tag} is not one curve with every step once")
    audit = [sys.executable, "-m", "pretrain", "inspect", str(run), "--audit"]
    done = subprocess.run(audit, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        found.append(f"the audit fails: {done.stderr.strip()}")
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    print(f"{run}: {steps} steps, {len(starts)} starts that trained, {kills} kills")
    return found


def main() -> int:
    """Parse the arguments and soak."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=Path("runs/soak"), help="must not exist")
    options = parser.parse_args()
    if options.run.exists():
        parser.error(f"{options.run} exists; remove it, or choose another with --run")
    options.run.parent.mkdir(parents=True, exist_ok=True)
    found = soak(options.run.absolute(), options.minutes, options.workers, options.seed)
    print("\n".join(f"found: {line}" for line in found) or "nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

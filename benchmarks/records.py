"""Recipes beside each other: the runs of `record_list.py`, each with several seeds, and what came out.

    python benchmarks/records.py                   run what has not been run yet, then write tables and pictures
    python benchmarks/records.py schedules crops   only the runs of these records
    python benchmarks/records.py transformers      this one tells times: only when it is named, with nothing beside it
    python benchmarks/records.py --minutes 30      begin no run after so many minutes
    python benchmarks/records.py --write           run nothing, only write

A finished run leaves one file in `benchmarks/records/log`: its command, commit, machine, versions, final figures and
curve. It is not run again while that file is there; records whose arms have the same options share it. The run itself
stays in `runs/records`, where one that was ended goes on. Several of these may work side by side: what one is at, the
others leave.
"""

import argparse
import csv
import fcntl
import gzip
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from record_list import RECORDS, Options, Record
from records_page import write_page
from results_file import processor

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "records"
SCRATCH = Path("runs/records")

_CURVES = ("train/loss", "val/loss", "data/tokens_seen", "seconds_of_training")
_POINTS = 100
"""Of a training curve: means of equal stretches."""


def result_file(options: Options, seed: int) -> Path:
    """Where the result of a run is kept; named by what decides it."""
    digest = hashlib.sha256("\0".join(options).encode()).hexdigest()[:10]
    return RESULTS / "log" / f"{digest}-{seed}.json"


def run(options: Options, seed: int) -> bool:
    """Train once, in a process of its own, and keep what came out; false where that is done or another is at it."""
    out = result_file(options, seed)
    directory = SCRATCH / out.stem
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if out.exists():
            return False
        print(f"seed {seed}, {' '.join(options)}", flush=True)
        _write(out, _train(options, seed, directory))
    return True


def _train(options: Options, seed: int, directory: Path) -> dict[str, Any]:
    _prepare(options)
    program, arguments = ["-m", "pretrain"], ["fit", *options]
    if options[0].endswith(".py"):
        program, arguments = [os.path.relpath(HERE / options[0])], [*options[1:]]
    command = [*program, *arguments, "--run", str(directory), "--seed_everything", str(seed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    with open(f"{directory}.log", "w", encoding="utf-8") as log:
        subprocess.run([sys.executable, *command], env=environment, check=True, stdout=log, stderr=log)
    result = json.loads((directory / "result.json").read_text())
    return {
        "command": " ".join(["python", *command]),
        "commit": _git("rev-parse", "HEAD") + " and changes" * bool(_git("status", "--porcelain", "pretrain")),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} of them used",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "pytorch-lightning", "transformers", "numpy")},
        "seed": seed,
        "figures": {name: value for name, value in result.items() if not isinstance(value, dict | list | str)},
        **_curves(directory / "metrics.csv"),
    }


def _write(out: Path, document: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in document.items()]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _prepare(options: Options) -> None:
    """The training set cut to the beginnings of its sequences, where a run is to train on that."""
    wanted = SCRATCH / "truncated.fasta"
    if str(wanted) in options and not wanted.exists():
        with gzip.open("data/proteins/train.fasta.gz", "rt") as file:
            records = [record.split("\n", 1) for record in file.read().split(">")[1:]]
        cut = [f">{head}\n{sequence.replace(chr(10), '')[:254]}\n" for head, sequence in records]
        partial = wanted.with_suffix(f".{os.getpid()}")
        partial.write_text("".join(cut))
        partial.rename(wanted)


def _curves(metrics: Path) -> dict[str, list[list[float]]]:
    found: dict[str, list[list[float]]] = {name: [] for name in _CURVES}
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["name"] in found:
                found[row["name"]].append([int(row["step"]) + 1, float(row["value"])])
    points = found["train/loss"]
    size = max(1, -(-len(points) // _POINTS))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    found["train/loss"] = [[part[-1][0], round(sum(y for _, y in part) / len(part), 5)] for part in parts]
    validated = {step for step, _ in found["val/loss"]}
    found["data/tokens_seen"] = [point for point in found["data/tokens_seen"] if point[0] in validated]
    return {name: points for name, points in found.items() if points}


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], check=True, capture_output=True, text=True).stdout.strip()


def results(record: Record) -> dict[str, list[dict[str, Any]]]:
    """For each arm, the results of its seeds; only arms of which all seeds have been run."""
    files = {
        arm: [result_file((*record.common, *options), seed) for seed in record.seeds]
        for arm, options in record.arms.items()
    }
    return {
        arm: [json.loads(file.read_text()) for file in found]
        for arm, found in files.items()
        if all(file.exists() for file in found)
    }


def main() -> None:
    """Run what is missing; then write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", metavar="RECORD", help="default: all that tell no times")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no run is begun")
    parser.add_argument("--write", action="store_true", help="run nothing")
    options = parser.parse_args()
    if unknown := set(options.records) - {record.name for record in RECORDS}:
        parser.error(f"no record is called {unknown.pop()}; there are {', '.join(r.name for r in RECORDS)}")
    wanted = [record for record in RECORDS if record.name in options.records or not (options.records or record.alone)]
    todo = [
        ((*record.common, *arm), seed) for record in wanted for seed in record.seeds for arm in record.arms.values()
    ]
    end = time.monotonic() + 60 * options.minutes
    for one in [] if options.write else dict.fromkeys(todo):
        if not result_file(*one).exists() and time.monotonic() < end:
            run(*one)
    write_page({record: results(record) for record in RECORDS})


if __name__ == "__main__":
    main()

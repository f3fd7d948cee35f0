"""What the measurements on a CPU leave behind: their figures, and the conditions of these."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def processor() -> str:
    """The name of the CPU, as Linux tells it."""
    with open("/proc/cpuinfo") as file:
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")


def write_results(out: Path, options: argparse.Namespace, results: Any) -> None:
    """Write figures into a JSON file, with the date, the machine, the versions and the options of the command."""
    conditions = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: str(value) for name, value in vars(options).items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")

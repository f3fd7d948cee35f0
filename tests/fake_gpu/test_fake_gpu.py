"""What of the CUDA code can be known without a GPU: it runs to its end on fake tensors; see fake_gpu.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA: tests/gpu are for it"),
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, root = tmp_path_factory.mktemp("fake_gpu") / "cuda.so", Path(torch.__file__).parent
    options = ["-shared", "-fPIC", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", str(HERE / "cuda.cpp"), *options, "-o", str(path)], check=True, timeout=120)
    return path


def run(library: Path, *arguments: object) -> Any:
    command = [sys.executable, "-W", "ignore", str(HERE / "fake_gpu.py"), str(library), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_between_log_steps_the_host_never_waits_for_the_gpu(library: Path, proteins: Path, tmp_path: Path) -> None:
    found = run(library, "waits", proteins, tmp_path)
    assert found["steps"] == 8
    in_training = [wait for wait in found["waits"] if not {"has_len_all_ranks", "teardown"} & set(wait["where"])]
    # Figures are read by Lightning at every fourth step, and by nothing else.
    assert {(wait["step"], wait["kind"]) for wait in in_training} == {(3, "value"), (7, "value")}
    assert {wait["where"][-1] for wait in in_training} == {"to_item"}


def test_blocks_are_compiled_once_a_size_without_a_break(library: Path) -> None:
    # Blocks with rows and blocks without, in training and in validation: four graphs for each size of a pack.
    assert run(library, "compile") == {"kept": [4, 4, 8, 8, 12, 12], "recomputed": [4, 4, 8, 8, 12, 12]}


def test_a_gpus_memory_is_planned_within_a_tenth(library: Path) -> None:
    shapes = [("150M", 6, 16_384), ("3B", 4, 8192), ("15B", 3, 8192)]  # of each, so many blocks and tokens
    cases = [(*shape, recompute) for shape in shapes for recompute in (False, True)]
    for case, found in zip(cases, run(library, "memory", json.dumps(cases)), strict=True):
        assert found["planned"] == pytest.approx(found["peak"], rel=0.1), (case, found["parts"])

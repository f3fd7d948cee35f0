"""The parts of the GPU benchmark: one that fails, or for which there is no time, costs no other its result."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_fails_is_told_and_the_next_one_runs(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(size: int) -> None:
        raise ValueError("no\nkernel")

    parts = gpu.Parts(60, torch.device("cpu"))
    assert parts.run("first", fail) == {"did_not_run": "ValueError: no kernel"}
    assert "first: did not run (ValueError: no kernel)" in capsys.readouterr().out
    assert parts.run("second", lambda size: size, 8) == 8


def test_what_does_not_fit_into_memory_is_halved_until_it_does(gpu: Any) -> None:
    def measure(fits: int) -> Callable[[int], int]:
        def run(size: int) -> int:
            if size > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return size

        return run

    parts = gpu.Parts(60, torch.device("cpu"))
    assert parts.run("large", measure(300), 1024) == 256
    assert "OutOfMemoryError" in parts.run("too large", measure(0), 4)["did_not_run"]


def test_no_part_begins_when_the_time_is_over(gpu: Any) -> None:
    parts = gpu.Parts(-1, torch.device("cpu"))
    assert parts.run("late", lambda size: size) == {"did_not_run": "no time left"}


def test_parts_that_did_not_run_are_in_the_file_and_end_the_command_with_an_error(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "figures.json"
    monkeypatch.setattr(gpu, "peak_flops", lambda _: (1e12, "a datasheet"))
    monkeypatch.setattr(gpu, "matmul_rate", lambda *_: 1e12)
    arguments = ["--device", "cpu", "--shapes", "tiny", "8M", "--minutes", "-1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(gpu, "quiet", lambda: None)  # which would last beyond this test
    assert gpu.main() == 1
    results = json.loads(out.read_text())["results"]
    for shape in ("tiny", "8M"):
        assert set(results[shape]) == {"pretrain", "own_matmul_rate", "sdpa", "flash_attention_2"}
        assert results[shape]["pretrain"] == {"did_not_run": "no time left"}

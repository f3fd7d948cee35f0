"""Compiled training: the same losses, a handful of compilations, and no quiet way out."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.cli import main


def test_compiled_training_has_the_same_losses_and_soon_compiles_no_more(proteins: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("compiled.py")), str(proteins)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    plain, compiled = json.loads(done.stdout.splitlines()[-1]).values()
    assert len(plain["losses"]) == 16
    assert plain["compilations"][-1] == 0
    assert compiled["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    # The first validation falls after the fourth step; from then on every shape but a rare one has been seen.
    assert 0 < compiled["compilations"][5] <= compiled["compilations"][-1] <= compiled["compilations"][5] + 4 <= 20


def test_compiling_without_static_shapes_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", str(tiny(model__compile=True)), "--run", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert "--data.static_shapes true" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()

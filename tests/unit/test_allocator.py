"""What becomes of freed memory, as the kernel counts it."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.downstream import load as loading
from pretrain.train import fit as fitting

_PROGRAM = """
import torch
from pretrain.model.allocator import keep_freed_memory
{call}
x = torch.ones(2**26)
del x
print(open("/proc/self/status").read())
"""


def resident(call: str) -> int:
    """MiB of anonymous memory of a process that made a tensor of 256 and freed it."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(call=call)], check=True, capture_output=True, text=True
    )
    found = re.search(r"RssAnon:\s+(\d+) kB", done.stdout)
    assert found
    return int(found[1]) // 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_that_is_freed_stays_with_the_process() -> None:
    assert resident("keep_freed_memory()") - resident("") == pytest.approx(256, abs=30)


def test_training_and_commands_on_a_cpu_keep_it(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    monkeypatch.setattr(fitting, "keep_freed_memory", lambda: called.append("fit"))
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: called.append("command"))
    fitting.fit(["-c", str(tiny(trainer__max_steps=1)), "--run", str(tmp_path / "run")])
    loading.use_device("cpu")
    assert called == ["fit", "command"]

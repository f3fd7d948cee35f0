"""compose.yaml is started: it trains, continues after a crash, and TensorBoard shows it, on the loopback only.

Beside what the image needs: podman, runc and catatonit (apt-get install), and podman-compose.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"

# What a user would lay over it, here to see a checkpoint soon.
COMMAND = ["fit", "-c", "quickstart", "--trainer.max_steps", "300", "--checkpoint.every_n_steps", "5"]
SHORT = {"services": {"train": {"command": COMMAND}}}


def test_compose_serves_tensorboard_on_loopback_only_and_restarts_a_crashed_run() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert services["train"]["restart"].startswith("on-failure"), "a finished run is not started again"
    assert services["train"]["command"][0] == "fit"
    (port,) = services["tensorboard"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert "ports" not in services["train"]


def wait_for(what: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


class Compose:
    """compose.yaml under podman-compose."""

    def __init__(self, engine: dict[str, str], override: Path) -> None:
        self.engine = engine
        self.files = ["-f", str(COMPOSE), "-f", str(override)]

    def __call__(self, *command: str) -> None:
        subprocess.run([sys.executable, "-m", "podman_compose", *self.files, *command], check=True, env=self.engine)

    def podman(self, *command: str) -> str:
        """What podman prints; nothing where there is no such container yet."""
        return subprocess.run(
            ["podman", *command], env=self.engine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ).stdout


@pytest.fixture
def compose(engine: dict[str, str], image: str, tmp_path: Path) -> Iterator[Compose]:
    pytest.importorskip("podman_compose")
    if not all(map(shutil.which, ("podman", "runc", "catatonit"))):
        pytest.skip("needs podman, runc and catatonit")
    override = tmp_path / "short.yaml"
    override.write_text(yaml.safe_dump(SHORT))
    services = Compose(engine, override)
    try:
        yield services
    finally:
        services("down", "--volumes", "--timeout", "20")


@pytest.mark.slow
def test_a_crashed_run_continues_and_tensorboard_shows_it(compose: Compose) -> None:
    compose("up", "--detach", "--no-build")
    checkpoints = ("exec", "pretrain_train_1", "ls", "/work/runs/quickstart/checkpoints")
    wait_for(lambda: "step-" in compose.podman(*checkpoints), 300)
    os.kill(int(compose.podman("inspect", "--format", "{{.State.Pid}}", "pretrain_train_1")), signal.SIGKILL)
    logs = ("logs", "pretrain_train_1")
    wait_for(lambda: re.search(r"continues after step \d+ of 300", compose.podman(*logs)), 120)

    def shown() -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:6006/data/runs", timeout=5) as answer:
                return "quickstart" in json.load(answer)
        except OSError:
            return False

    wait_for(shown, 120)
    wait_for(lambda: "/work/runs/quickstart: finished" in compose.podman(*logs), 300)
    state = ("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "pretrain_train_1")
    wait_for(lambda: compose.podman(*state).split() == ["exited", "0"], 30)

"""Two nodes started by torchrun, here on one machine's loopback with gloo, train as one process does."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.train.logging import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(step, value) for step, name, value in read_metrics(run / METRICS_FILE) if name == "train/loss"]


@pytest.mark.slow
def test_two_nodes_have_the_losses_of_one_process(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    config = tiny()
    assert fit("-c", config, "--run", tmp_path / "one") == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *rendezvous),
        *("--local-addr", "127.0.0.1", "-m", "--", "pretrain", "fit", "-c", str(config), "-c", "ddp"),
        *("--run", str(tmp_path / "two"), "--trainer.num_nodes", "2", "--trainer.devices", "1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for _ in range(2)
    ]
    printed = [node.communicate(timeout=240)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert [step for step, _ in losses(tmp_path / "two")] == [step for step, _ in losses(tmp_path / "one")]
    for (_, two), (_, one) in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)

"""One process of a job is killed, or hangs: the launcher starts the job again by itself, and not a bit is lost."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_resume import STEPS, equal, events, figures, final_state

from pretrain.train.ledger import audit

ROOT = Path(__file__).parents[2]


def torchrun(*arguments: object, restarts: int) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "e2e")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    # Otherwise torchrun (torch 2.13) keeps its store between restarts, and with it the addresses of dead processes.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    settings = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    command = [sys.executable, "-m", *launcher, "-m", "--", "pretrain", "fit", *map(str, (*arguments, *settings))]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)


def hang(how: str, number: int) -> list[str]:
    return [
        "--trainer.callbacks+=poison.Hang",
        f"--trainer.callbacks.how={how}",
        f"--trainer.callbacks.number={number}",
    ]


SAYS = {"dies": "", "sleeps": "hangs while computing the loss", "stops": "does not answer"}


@pytest.mark.slow
@pytest.mark.parametrize("how", SAYS)
def test_torchrun_brings_a_job_back_whose_process_was_killed_or_hung(
    how: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    config, straight, broken = tiny(), tmp_path / "straight", tmp_path / "broken"
    assert torchrun("-c", config, "--run", straight, restarts=0).returncode == 0
    # In step 5; the newest checkpoint is then that after step 3.
    wait = ("--hang_timeout_minutes", "null" if how == "dies" else 0.5)
    ended = torchrun("-c", config, "--run", broken, *wait, *hang(how, 11), restarts=1)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = [line for line in ended.stderr.splitlines() if line.startswith("pretrain: error: no progress for")]
    assert len(said) == (how != "dies"), ended.stderr[-3000:]
    if said:
        assert "after step 5: rank 1 of 2 (process " in said[0]
        assert f") {SAYS[how]};" in said[0]
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    assert [step for step, _ in events(broken, "lr-AdamW")] == list(range(STEPS))
    assert len((broken / "starts.jsonl").read_text().splitlines()) == 2
    assert "exactly once" in audit(broken)

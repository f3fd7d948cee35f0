"""What processes do together, in two that talk over gloo."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch
import torch.distributed as dist
from pretrain.train.together import largest, over_processes, wait_for_all

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
assert largest(trainer, 5 - 3 * rank) == 5
assert over_processes(trainer, torch.tensor([1, rank]), dist.ReduceOp.SUM).tolist() == [2, 1]
# Only now, so that a slow machine's beginning is not what is waited for too long.
limit = timedelta(seconds=1)
dist.distributed_c10d._set_pg_timeout(limit)
dist.distributed_c10d._get_default_store().set_timeout(limit)
for late in (0, 1):
    if rank == late:
        time.sleep(2)
    wait_for_all(trainer)
print("together")
"""


def test_two_processes_agree_and_wait_for_each_other_beyond_the_limit_of_a_collective(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in ended] == [b"together\n"] * 2, ended

"""The SLURM scripts run in a real SLURM: a cluster of two nodes on this machine's loopback, while these tests last.

Needs root, two cores, and Debian's munge, slurmctld, slurmd and slurm-client (apt-get install). Each node has the
machine's first two cores, and two GPUs that are empty files; the processes train on the CPU.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from pretrain.train.logging import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "docker" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, DAEMONS)), reason="needs root, munge, slurmctld and slurmd"
    ),
]

CLUSTER = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={place}/munge.sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=Cores
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
GresTypes=gpu
StateSaveLocation={place}
SlurmdSpoolDir={place}/%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(what: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.3)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A cluster; gives the environment in which SLURM's commands find it."""
    place = Path(tempfile.mkdtemp(prefix="slurm"))  # short: the path of a socket has 107 bytes at most
    ports = free_ports(3)
    (place / "slurm.conf").write_text(CLUSTER.format(place=place, host=socket.gethostname(), ports=ports))
    (place / "gres.conf").write_text(f"Name=gpu File={place}/gpu[0-1]\n")
    for number in range(2):
        (place / f"gpu{number}").touch()
    (place / "munge.key").write_bytes(os.urandom(1024))
    (place / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(place / "slurm.conf")}
    files = {"key": "munge.key", "socket": "munge.sock", "pid": "munged.pid", "log": "munged.log", "seed": "munge.seed"}
    options = [f"--{name}{'' if name == 'socket' else '-file'}={place / file}" for name, file in files.items()]
    commands = [
        ["munged", "--foreground", "--force", *options],
        ["slurmctld", "-D", "-i"],
        ["slurmd", "-D", "-N", "n1"],
        ["slurmd", "-D", "-N", "n2"],
    ]
    started = []
    try:
        with (place / "daemons.log").open("w") as log:
            for command in commands:
                started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
                if command[0] == "munged":
                    wait_for((place / "munge.sock").exists, 20)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        told = partial(subprocess.run, idle, env=environment, capture_output=True, text=True)
        wait_for(lambda: told().stdout.strip() == "2", 60)
        yield environment
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        shutil.rmtree(place)


class Queue:
    """Submits scripts with small demands, from a directory where `pretrain` is this checkout's."""

    def __init__(self, cluster: dict[str, str], directory: Path) -> None:
        self.directory = directory
        program = directory / "bin" / "pretrain"
        program.parent.mkdir()
        program.write_text(
            "#!/bin/sh\n"
            f"env -u OMP_NUM_THREADS nproc > {directory}/cores.$SLURM_PROCID\n"
            f'exec {sys.executable} -m pretrain "$@"\n'
        )
        program.chmod(0o755)
        loopback = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}  # n1 and n2 are names of SLURM's only
        path = os.pathsep.join([str(program.parent), cluster["PATH"]])
        self.environment = {**cluster, **loopback, "PATH": path, "PYTHONPATH": str(ROOT)}

    def run(self, *command: object) -> str:
        given = [str(part) for part in command]
        return subprocess.run(
            given, cwd=self.directory, env=self.environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    def submit(self, script: str, options: list[str], *arguments: object) -> str:
        return self.run("sbatch", "--parsable", *options, SCRIPTS / script, *arguments)

    def state(self, job: str) -> str:
        return re.findall(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[0]

    def log(self, job: str) -> str:
        path = self.directory / f"pretrain-{job}.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def queue(cluster: dict[str, str], tmp_path: Path) -> Queue:
    return Queue(cluster, tmp_path)


def losses(run: Path) -> dict[int, float]:
    return {step: value for step, name, value in read_metrics(run / METRICS_FILE) if name == "train/loss"}


@pytest.mark.parametrize(
    ("script", "options", "cores"),
    [
        ("one_node.sbatch", ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"], "1"),
        ("many_nodes.sbatch", ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2"], "2"),
    ],
)
def test_two_tasks_train_as_one_process_does(
    queue: Queue,
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    tmp_path: Path,
    script: str,
    options: list[str],
    cores: str,
) -> None:
    config = tiny()
    assert fit("-c", config, "--run", tmp_path / "one") == 0
    job = queue.submit(script, options, "-c", config, "-c", "ddp", "--run", tmp_path / "two")
    wait_for(lambda: queue.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), 240)
    assert queue.state(job) == "COMPLETED", queue.log(job)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert [(tmp_path / f"cores.{task}").read_text().strip() for task in range(2)] == [cores] * 2


def test_before_its_time_limit_a_job_saves_goes_back_into_the_queue_and_continues(
    queue: Queue, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    config = tiny(trainer__max_steps=1_000_000, validate_every_n_steps=1_000_000, checkpoint__every_n_steps=1_000_000)
    options = ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1", "--time=1", "--signal=USR1@20"]
    job = queue.submit("requeue.sbatch", options, "-c", config, "-c", "ddp", "--run", tmp_path / "run")
    wait_for(lambda: f"job {job} is requeued" in queue.log(job), 240)
    wait_for(lambda: queue.state(job) == "PENDING", 60)
    queue.run("scontrol", "update", f"JobId={job}", "StartTime=now")  # a requeued job waits for two minutes otherwise
    wait_for(lambda: re.search(r"continues after step \d+ of 1000000", queue.log(job)), 240)
    queue.run("scancel", job)
    assert queue.log(job).count("is requeued") == 1
    wait_for(lambda: queue.state(job) == "CANCELLED", 60)

"""The image is built without a daemon on a bare Debian, trains as its user, is killed, and continues; so under compose.

Needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap), a Debian mirror and a package index;
no mirror with ``PRETRAIN_DEBIAN`` naming a Debian root with python3 and python3-venv. Compose needs podman, runc and
catatonit, too, and podman-compose. Some minutes, 8 GB in ``TMPDIR``.
"""

import json
import os
import re
import resource
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
STORAGE = '[storage]\ndriver = "vfs"\ngraphroot = "{place}/root"\nrunroot = "{place}/run"\n'
CONTAINERS = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""

# What a user would lay over it, here to see a checkpoint soon.
COMMAND = ["fit", "-c", "quickstart", "--trainer.max_steps", "60", "--checkpoint.every_n_steps", "5"]
SHORT = {"services": {"train": {"command": COMMAND, "environment": {"OMP_NUM_THREADS": "1"}}}}


def test_the_image_takes_the_versions_that_are_tested() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    normal = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for kind in ("cpu", "cuda"):
        text = (ROOT / f"requirements-{kind}.lock").read_text()
        locked = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.MULTILINE))
        assert {"torch", "pytorch-lightning", "transformers", "s3fs"} <= locked.keys()
        known = {name: version for name, version in locked.items() if name in normal}
        assert known == {name: normal[name] for name in known}, "make locks"
        assert text.count("==") <= text.count("--hash=sha256:"), "every file is checked"


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


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment in which buildah and podman have images of their own, and ask for no more than root has here."""
    if os.geteuid() or not all(map(shutil.which, ("buildah", "debootstrap"))):
        pytest.skip("needs root, buildah and debootstrap")
    place = tmp_path_factory.mktemp("images")
    (place / "storage.conf").write_text(STORAGE.format(place=place))
    files, processes = (resource.getrlimit(which)[1] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    # buildah lowers its own limit to this, and may not be allowed to raise it again for what it runs.
    processes = min(processes, int(Path("/proc/sys/kernel/pid_max").read_text()))
    (place / "containers.conf").write_text(CONTAINERS.format(files=files, processes=processes))
    configuration = {"CONTAINERS_STORAGE_CONF": "storage.conf", "CONTAINERS_CONF": "containers.conf"}
    yield {**os.environ, **{name: str(place / file) for name, file in configuration.items()}}
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def image(engine: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CPU image, on a base that debootstrap made; where this machine's pip finds packages, pip in it does, too."""
    place = tmp_path_factory.mktemp("base")
    debian = os.environ.get("PRETRAIN_DEBIAN")
    if not debian:
        debian = str(place / "debian")
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", debian], check=True)
    downloads = ["--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*"]
    subprocess.run(["tar", "-C", debian, "--one-file-system", *downloads, "-cf", place / "root.tar", "."], check=True)
    (place / "Dockerfile").write_text("FROM scratch\nADD root.tar /\nENV PATH=/usr/sbin:/usr/bin:/sbin:/bin\n")
    build = ["buildah", "bud", "--isolation", "chroot", "--format", "docker", "--layers=false"]
    subprocess.run([*build, "-t", "base", str(place)], check=True, env=engine)
    arguments = ["--build-arg", "BASE=localhost/base", "--build-arg", "TORCH=cpu"]
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT"):
        if value := os.environ.get(name):
            arguments += ["--build-arg", f"{name}={value}"]
            if Path(value).exists():
                folder = Path(value) if Path(value).is_dir() else Path(value).parent
                arguments += ["--volume", f"{folder}:{folder}:ro"]
    dockerfile = str(ROOT / "docker" / "Dockerfile")
    subprocess.run([*build, *arguments, "-f", dockerfile, "-t", "pretrain:cpu", str(ROOT)], check=True, env=engine)
    return "localhost/pretrain:cpu"


class Container:
    """A container of the image; one command at a time runs in it."""

    def __init__(self, engine: dict[str, str], image: str) -> None:
        self.engine = engine
        self.name = self._buildah("from", image).split()[-1]
        # At times buildah 1.28 mounts the image's own volumes over those that the command line names.
        self._buildah("config", "--volume", "/work/runs-", "--volume", "/work/cache-", self.name)

    def _buildah(self, *command: str) -> str:
        return subprocess.run(["buildah", *command], check=True, env=self.engine, capture_output=True, text=True).stdout

    def start(self, *command: str, volumes: dict[Path, str] | None = None) -> subprocess.Popen[str]:
        mounts = [f"--volume={outside}:{inside}" for outside, inside in (volumes or {}).items()]
        run = [
            "buildah",
            "run",
            "--isolation",
            "chroot",
            "--user",
            "1000",
            "--env",
            "OMP_NUM_THREADS=1",
            *mounts,
            self.name,
            "--",
            *command,
        ]
        return subprocess.Popen(run, env=self.engine, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def container(engine: dict[str, str], image: str) -> Container:
    return Container(engine, image)


@pytest.mark.slow
def test_nothing_of_the_build_is_left_but_what_runs(container: Container) -> None:
    leftovers = """
        ls -A /work/cache /work/runs /tmp /source /opt/installer 2>/dev/null | grep -v :
        find /opt/pretrain -name pip -o -path '*/torch/test' -o -name '*.whl'
        find / -xdev -user root -perm -o+w -type f 2>/dev/null
        id -u"""
    process = container.start("sh", "-c", leftovers)
    printed, _ = process.communicate(timeout=120)
    assert printed.split() == ["1000"]


@pytest.mark.slow
def test_a_container_trains_as_its_user_and_a_killed_one_continues(container: Container, tmp_path: Path) -> None:
    volumes = {tmp_path / name: f"/work/{name}" for name in ("runs", "cache")}
    for folder in volumes:
        folder.mkdir()
        os.chown(folder, 1000, 1000)
    fit = ("pretrain", "fit", "-c", "quickstart", "--trainer.max_steps", "60", "--checkpoint.every_n_steps", "5")
    quickstart = tmp_path / "runs" / "quickstart"

    first = container.start(*fit, volumes=volumes)
    wait_for(lambda: list(quickstart.glob("checkpoints/step-*.ckpt")) or first.poll() is not None, 300)
    (owner,) = re.findall(r"process (\d+)", (quickstart / ".lock").read_text())  # chroot shares the host's processes
    os.kill(int(owner), signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode != 0

    second = container.start(*fit, volumes=volumes)
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, printed
    assert re.search(r"continues after step \d+ of 60", printed)
    assert {path.stat().st_uid for path in quickstart.rglob("*")} == {1000}


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
    wait_for(lambda: re.search(r"continues after step \d+ of 60", compose.podman(*logs)), 300)

    def shown() -> bool:
        try:
            with urllib.request.urlopen("http://127.0.0.1:6006/data/runs", timeout=5) as answer:
                return "quickstart" in json.load(answer)
        except OSError:
            return False

    wait_for(shown, 120)
    wait_for(lambda: "runs/quickstart: finished" in compose.podman(*logs), 300)
    state = ("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "pretrain_train_1")
    wait_for(lambda: compose.podman(*state).split() == ["exited", "0"], 30)

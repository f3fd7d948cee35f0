"""The image is built without a daemon on a bare Debian, trains as its user, is killed, and continues."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
        run = ["buildah", "run", "--isolation", "chroot", "--user", "1000", *mounts, self.name, "--", *command]
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
    fit = ("pretrain", "fit", "-c", "quickstart", "--trainer.max_steps", "200", "--checkpoint.every_n_steps", "5")
    quickstart = tmp_path / "runs" / "quickstart"

    first = container.start(*fit, volumes=volumes)
    deadline = time.monotonic() + 300
    while not list(quickstart.glob("checkpoints/step-*.ckpt")):
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    (owner,) = re.findall(r"process (\d+)", (quickstart / ".lock").read_text())  # chroot shares the host's processes
    os.kill(int(owner), signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode != 0

    second = container.start(*fit, volumes=volumes)
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0, printed
    assert re.search(r"continues after step \d+ of 200", printed)
    assert {path.stat().st_uid for path in quickstart.rglob("*")} == {1000}

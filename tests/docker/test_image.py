"""The image is built without a daemon on a bare Debian, trains as its user, is killed, and continues.

Needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap), a Debian mirror and a package index;
no mirror with ``PRETRAIN_DEBIAN`` naming a Debian root with python3 and python3-venv. Ten minutes, 8 GB in ``TMPDIR``.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def test_compose_serves_tensorboard_on_loopback_only_and_restarts_a_crashed_run() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    assert services["train"]["restart"].startswith("on-failure"), "a finished run is not started again"
    assert services["train"]["command"][0] == "fit"
    (port,) = services["tensorboard"]["ports"]
    assert port.startswith("127.0.0.1:")
    assert "ports" not in services["train"]


def test_the_image_takes_the_versions_that_are_tested() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    normal = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for kind in ("cpu", "cuda"):
        text = (ROOT / f"requirements-{kind}.lock").read_text()
        locked = dict(re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.MULTILINE))
        assert {"torch", "pytorch-lightning", "transformers"} <= locked.keys()
        known = {name: version for name, version in locked.items() if name in normal}
        assert known == {name: normal[name] for name in known}, "make locks"
        assert text.count("==") <= text.count("--hash=sha256:"), "every file is checked"


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    if os.geteuid() or not all(map(shutil.which, ("buildah", "debootstrap"))):
        pytest.skip("needs root, buildah and debootstrap")
    storage = tmp_path_factory.mktemp("images")
    where = ["--root", f"{storage}/root", "--runroot", f"{storage}/run", "--storage-driver", "vfs"]
    yield ["buildah", *where]
    shutil.rmtree(storage, ignore_errors=True)


@pytest.fixture(scope="module")
def image(buildah: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The CPU image, on a base that debootstrap made; where this machine's pip finds packages, pip in it does, too."""
    place = tmp_path_factory.mktemp("base")
    debian = os.environ.get("PRETRAIN_DEBIAN")
    if not debian:
        debian = str(place / "debian")
        packages = "--include=python3,python3-venv,ca-certificates"
        subprocess.run(["debootstrap", "--variant=minbase", packages, "bookworm", debian], check=True)
    subprocess.run(["tar", "-C", debian, "--one-file-system", "-cf", place / "root.tar", "."], check=True)
    (place / "Dockerfile").write_text("FROM scratch\nADD root.tar /\nENV PATH=/usr/sbin:/usr/bin:/sbin:/bin\n")
    build = [*buildah, "bud", "--isolation", "chroot", "--format", "docker", "--layers=false"]
    subprocess.run([*build, "-t", "base", str(place)], check=True)
    arguments = ["--build-arg", "BASE=localhost/base", "--build-arg", "TORCH=cpu"]
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT"):
        if value := os.environ.get(name):
            arguments += ["--build-arg", f"{name}={value}"]
            if Path(value).is_dir():
                arguments += ["--volume", f"{value}:{value}:ro"]
            elif Path(value).is_file():
                arguments += ["--volume", f"{Path(value).parent}:{Path(value).parent}:ro"]
    subprocess.run([*build, *arguments, "-f", str(DOCKERFILE), "-t", "pretrain:cpu", str(ROOT)], check=True)
    container = subprocess.run([*buildah, "from", "localhost/pretrain:cpu"], check=True, capture_output=True, text=True)
    return container.stdout.split()[-1]


@pytest.mark.slow
def test_a_container_trains_as_its_user_and_a_killed_one_continues(
    buildah: list[str], image: str, tmp_path: Path
) -> None:
    for volume in ("runs", "cache"):
        (tmp_path / volume).mkdir()
        os.chown(tmp_path / volume, 1000, 1000)
    volumes = [f"--volume={tmp_path / volume}:/work/{volume}" for volume in ("runs", "cache")]
    run = [*buildah, "run", "--isolation", "chroot", "--user", "1000", *volumes, image, "--", "pretrain"]
    fit = [*run, "fit", "-c", "quickstart", "--trainer.max_steps", "200", "--checkpoint.every_n_steps", "5"]
    quickstart = tmp_path / "runs" / "quickstart"

    first = subprocess.Popen(fit, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(quickstart.glob("checkpoints/step-*.ckpt")):
        assert first.poll() is None, "it ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    owner = int(
        re.findall(r"process (\d+)", (quickstart / ".lock").read_text())[0]
    )  # chroot shares the host's processes
    os.kill(owner, signal.SIGKILL)
    assert first.wait(60) != 0

    second = subprocess.run(fit, capture_output=True, text=True, timeout=600)
    assert second.returncode == 0, second.stderr
    assert re.search(r"continues after step \d+ of 200", second.stdout)
    assert {path.stat().st_uid for path in quickstart.rglob("*")} == {1000}

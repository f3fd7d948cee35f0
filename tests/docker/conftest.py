"""The CPU image, built without a daemon, for the tests that run it.

Needs root, buildah and debootstrap (Debian: apt-get install buildah debootstrap), a Debian mirror and a package index;
no mirror with ``PRETRAIN_DEBIAN`` naming a Debian root with python3 and python3-venv. Some minutes, 8 GB in ``TMPDIR``.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STORAGE = '[storage]\ndriver = "vfs"\ngraphroot = "{place}/root"\nrunroot = "{place}/run"\n'
CONTAINERS = """
[containers]
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
"""


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment in which buildah and podman have images of their own, and ask for no more than root has here."""
    if os.geteuid() or not all(map(shutil.which, ("buildah", "debootstrap"))):
        pytest.skip("needs root, buildah and debootstrap")
    place = tmp_path_factory.mktemp("images")
    (place / "storage.conf").write_text(STORAGE.format(place=place))
    files, processes = (resource.getrlimit(which)[1] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
    (place / "containers.conf").write_text(CONTAINERS.format(files=files, processes=processes))
    configuration = {"CONTAINERS_STORAGE_CONF": "storage.conf", "CONTAINERS_CONF": "containers.conf"}
    yield {**os.environ, **{name: str(place / file) for name, file in configuration.items()}}
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
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

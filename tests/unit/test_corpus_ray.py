"""`--engine ray`: on a cluster of two nodes, one of which is lost half-way, the corpus that one machine makes."""

import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # else Ray takes the loopback for an address to the outside
import ray
from ray.cluster_utils import Cluster

from pretrain.cli import main
from pretrain.corpus import pieces, shards
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.shards import Filters
from pretrain.corpus.tokenizer import ProteinTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of what ray leaves open

ESM = ProteinTokenizer()
SOME = Filters(min_length=10, skip_bad=True, deduplicate=True)


@pytest.fixture(scope="module")
def cluster(s3: Any) -> Iterator[Cluster]:
    """A cluster of one node on the loopback, which others may join."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 2**27}
        running = Cluster(initialize_head=True, head_node_args=head)
        monkeypatch.setenv("RAY_ADDRESS", running.address)
        yield running
        ray.shutdown()
        running.shutdown()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Proteins for about two dozen blocks, some of them twice and some bad."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 250)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 500)
    generator = random.Random(1)
    some = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randint(1, 60))) for _ in range(200)]
    path = tmp_path / "x.fasta"
    path.write_text("".join(f">{n}\n{residues}\n>bad\n1\n" for n, residues in enumerate([*some, *some[:50]])))
    return path


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_node_that_is_lost_half_way_changes_nothing(
    cluster: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node is killed while it is in the middle of a block."""
    whole = prepare([source], tmp_path / "whole", Settings(ESM, filters=SOME)).path
    half = sum(name.startswith("shard") for name in content(whole)) // 2
    doomed = cluster.add_node(num_cpus=1, object_store_memory=2**27)
    doomed_id, make_shard = doomed.node_id, shards.make_shard
    began, nodes = tmp_path / "began", tmp_path / "nodes"
    nodes.mkdir()

    def watched(job: Any, block: Any) -> Any:
        node = ray.get_runtime_context().get_node_id()
        if block.number >= half and node == doomed_id:
            began.touch()
            time.sleep(600)
        time.sleep(0.05)
        (nodes / f"{block.number} {node}").touch()
        return make_shard(job, block)

    def kill() -> None:
        while not began.exists():
            time.sleep(0.01)
        cluster.remove_node(doomed, allow_graceful=False)

    monkeypatch.setattr(shards, "make_shard", watched)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    made = prepare([source], tmp_path / "corpus", Settings(ESM, filters=SOME), engine="ray").path
    killer.join(60)
    assert content(made) == content(whole)
    by_node = [file.name.split() for file in nodes.iterdir()]
    assert {node == doomed_id for _, node in by_node} == {True, False}  # both took part
    assert max(int(number) for number, node in by_node if node == doomed_id) < half
    assert {file.name for file in tmp_path.iterdir()} == {"x.fasta", "whole", "corpus", "began", "nodes"}


def test_the_command_makes_it_too_and_the_first_mistake_is_told_in_one_line(
    cluster: Cluster, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["prepare", str(source), "--out", str(tmp_path / "corpus"), "--engine", "ray", "--windows", "20"]
    assert main(command) == 2
    assert capsys.readouterr().err == (
        f"pretrain: error: {source}:3: record 'bad' has '1' at position 1; allowed: the letters A-Z, '-' and '.'; "
        "correct or remove it\n"
    )
    assert main([*command, "--skip_bad"]) == 0
    prepare([source], tmp_path / "whole", Settings(ESM, filters=Filters(windows=20, skip_bad=True)))
    assert content(tmp_path / "corpus") == content(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nodes_put_their_shards_into_a_bucket(
    cluster: Cluster, source: Path, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which the sources come from, too: the nodes share no directory."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    s3.mkdir("nodes")
    s3.put(str(source), "nodes/x.fasta")
    given = ["s3://nodes/x.fasta", "--skip_bad"]
    assert main(["prepare", *given, "--out", "s3://nodes/x", "--engine", "ray"]) == 0
    whole = prepare(given[:1], tmp_path / "whole", Settings(ESM, filters=Filters(skip_bad=True))).path
    made = {name.rpartition("/")[2]: s3.cat_file(name) for name in s3.ls("nodes/x", detail=False)}
    assert made == content(whole)


def test_what_another_engine_began_is_continued(
    cluster: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare([source], tmp_path / "whole", Settings(ESM, filters=SOME)).path
    out, write_shard = tmp_path / "corpus", shards.write_shard

    def stop(file: Path, *rest: Any) -> str:
        if file.name == "shard-00005.arrow":
            raise KeyboardInterrupt
        return write_shard(file, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out, Settings(ESM, filters=SOME), workers=1)
    first = tmp_path / ".corpus.partial" / "shard-00000.arrow"
    before = first.stat().st_ino
    make_shard = shards.make_shard

    def watched(job: Any, block: Any) -> Any:
        part = make_shard(job, block)
        if block.number == 0:
            assert os.stat(job.directory / part.file).st_ino == before
        return part

    monkeypatch.setattr(shards, "make_shard", watched)
    prepare([source], out, Settings(ESM, filters=SOME), engine="ray")
    assert content(out) == content(whole)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def told(source: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["prepare", str(source), "--out", str(out), "--engine", *more]) == 2
    assert not out.exists()
    return capsys.readouterr().err.removeprefix("pretrain: error: ").rstrip("\n")


def test_a_directory_that_the_nodes_do_not_see_is_told(
    cluster: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shard = shards.make_shard

    def elsewhere(job: Any, block: Any) -> Any:
        return make_shard(job._replace(directory=Path("/nowhere/.corpus.partial")), block)

    monkeypatch.setattr(shards, "make_shard", elsewhere)
    message = told(source, tmp_path / "out", capsys, "ray", "--skip_bad")
    assert message == (
        f"/nowhere/.corpus.partial: not to be seen on {os.uname().nodename}; for --engine ray give --out a directory "
        "that all nodes share"
    )


def test_a_node_that_lacks_a_package_is_told(
    cluster: Cluster, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks(job: Any, block: Any) -> Any:
        import no_such_package

        return no_such_package

    monkeypatch.setattr(shards, "make_shard", lacks)
    assert told(source, tmp_path / "out", capsys, "ray") == (
        "a node of the Ray cluster lacks something (No module named 'no_such_package'); install the same on every node"
    )


def test_an_engine_that_there_is_not_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(source, tmp_path / "out", capsys, "spark") == "engine is 'spark'; give one of local, ray"
    monkeypatch.setitem(sys.modules, "ray", None)
    message = told(source, tmp_path / "out", capsys, "ray")
    assert message == "--engine ray needs Ray on every node: `pip install '.[ray]'` in pretrain's clone"


def test_a_cluster_that_there_is_not_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    message = told(source, tmp_path / "out", capsys, "ray")
    assert message == (
        "no Ray cluster at 127.0.0.1:1 ([Errno 111] Connection refused); start one with `ray start --head`, or name "
        "one in RAY_ADDRESS"
    )

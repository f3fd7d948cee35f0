"""A remote corpus: the same sequences, fetched once, checked, and no more of it on the disk than is needed."""

import errno
import functools
import http.server
import json
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from pretrain.corpus import pieces, remote_files, shards
from pretrain.corpus.groups import GroupOrder
from pretrain.corpus.masking import Masking
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.packing import Planner
from pretrain.corpus.prefetch import PrefetchingOrder, group_size, order_of, prefetch_shards
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.remote import RemoteCorpus
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer, train_tokenizer
from pretrain.errors import UserError

ESM = ProteinTokenizer()
SHARDS = 12


class Server(http.server.ThreadingHTTPServer):
    """Serves a directory; ``faults`` says what to do instead, once each, and ``served`` counts the answers."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(directory)))
        self.faults: dict[str, list[str]] = {}
        self.served: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.served[name] += 1
        waiting = self.server.faults.get(name)
        fault = waiting.pop(0) if waiting else None
        if fault is None:
            return super().do_GET()
        if fault == "refused":
            return self.send_error(503)
        body = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":  # the connection is lost half-way
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif fault == "corrupt":
            self.wfile.write(bytes([body[0] ^ 1]) + body[1:])
        return None


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of a dozen shards."""
    directory = tmp_path_factory.mktemp("afar")
    generator = random.Random(1)
    sequences = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randint(1, 60))) for _ in range(200)]
    source = directory / "x.fasta"
    source.write_text("".join(f">{number}\n{residues}\n" for number, residues in enumerate(sequences)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pieces, "PIECE_BYTES", 250)
        monkeypatch.setattr(shards, "BLOCK_BYTES", 500)
        corpus = prepare([source], directory / "corpus", Settings(ESM))
    assert len(corpus.shards) >= SHARDS
    return corpus


@pytest.fixture
def server(local: Corpus) -> Iterator[Server]:
    with Server(local.path) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between attempts, which the tests do not wait."""
    seconds = list[float]()
    monkeypatch.setattr(remote_files, "_wait", seconds.append)
    return seconds


def everything(corpus: Corpus) -> list[tuple[str, list[int]]]:
    return [(corpus.id(i), corpus.tokens(i).tolist()) for i in range(len(corpus))]


def cached(corpus: RemoteCorpus) -> set[str]:
    return {path.name for path in corpus._cache.directory.glob("*.arrow")}


def sizes(corpus: Corpus) -> list[int]:
    return [shard["num_sequences"] for shard in corpus.manifest["shards"]]


def names(corpus: Corpus, numbers: list[int]) -> set[str]:
    return {corpus.manifest["shards"][number]["file"] for number in numbers}


# --- the same corpus --------------------------------------------------------------------------------------------------


def test_a_corpus_from_afar_holds_what_it_holds_at_home(local: Corpus, server: Server) -> None:
    corpus = open_or_prepare([server.url], ESM)
    assert isinstance(corpus, RemoteCorpus)
    assert (corpus.fingerprint, len(corpus), corpus.num_tokens) == (local.fingerprint, len(local), local.num_tokens)
    indices = np.random.default_rng(0).integers(0, len(local), (3, 50))
    assert corpus.lengths(indices).tolist() == local.lengths(indices).tolist()
    assert set(server.served) == {"manifest.json", "lengths.npy"}  # no shard so far
    assert everything(corpus) == everything(local)


def test_a_corpus_in_memory_and_one_in_a_directory_open_by_their_urls(local: Corpus) -> None:
    memory = fsspec.filesystem("memory")
    for file in local.path.iterdir():
        memory.pipe(f"/bucket/corpus/{file.name}", file.read_bytes())
    assert everything(RemoteCorpus("memory://bucket/corpus/")) == everything(local)
    assert everything(RemoteCorpus(f"file://{local.path}")) == everything(local)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_corpus_in_an_s3_bucket_opens_and_what_is_lost_there_is_told(local: Corpus, s3: Any) -> None:
    s3.mkdir("bucket")
    s3.put(f"{local.path}/", "bucket/corpora/x/", recursive=True)
    corpus = RemoteCorpus("s3://bucket/corpora/x")
    assert everything(corpus) == everything(local)
    corpus._cache.evict()
    corpus._open.clear()
    s3.rm(f"bucket/corpora/x/{shard(local)}")
    with pytest.raises(UserError, match=rf"^s3://bucket/corpora/x/{shard(local)}: .*; check the address and your"):
        corpus.tokens(0)


def test_a_pickled_corpus_is_its_address(local: Corpus, server: Server) -> None:
    pickled = pickle.dumps(RemoteCorpus(server.url, 5000))
    assert len(pickled) < 300
    again = pickle.loads(pickled)
    assert (again.cache_bytes, again.tokens(7).tolist()) == (5000, local.tokens(7).tolist())


def test_each_shard_is_fetched_once(server: Server, own_cache: Path) -> None:
    RemoteCorpus(server.url, 10**9).bring_all()
    everything(RemoteCorpus(server.url, 10**9))
    assert {name: count for name, count in server.served.items() if name.endswith("arrow")} == dict.fromkeys(
        (name for name in server.served if name.endswith("arrow")), 1
    )
    assert server.served["lengths.npy"] == 1
    assert not list(own_cache.rglob(".*"))


# --- a group at a time ------------------------------------------------------------------------------------------------


def test_training_needs_a_group_and_the_next_comes_meanwhile(local: Corpus, server: Server) -> None:
    corpus = RemoteCorpus(server.url)
    order = GroupOrder(sizes(local), 3, 0)
    ahead, n = PrefetchingOrder(order, corpus), np.arange(3 * len(local))
    groups = order.groups(n)
    for number in range(groups[-1]):
        here = n[groups == number]
        assert ahead(here)[1].tolist() == order(here)[1].tolist()
        before = order.shards(number - 1) if number else []
        allowed = names(local, [*before, *order.shards(number), *order.shards(number + 1)])
        assert names(local, order.shards(number)) <= cached(corpus)
        for index in order(here)[1].tolist():
            assert corpus.tokens(index).tolist() == local.tokens(index).tolist()
        wait_for(lambda: cached(corpus) == allowed)  # noqa: B023
    most_served = max(count for name, count in server.served.items() if name.endswith("arrow"))
    assert most_served <= 3  # epochs


def wait_for(condition: Any) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited for ten seconds in vain")


def test_a_position_deep_in_an_epoch_needs_no_group_before_it(local: Corpus, server: Server) -> None:
    corpus = RemoteCorpus(server.url)
    order = GroupOrder(sizes(local), 2, 0)
    place = 5 * len(local) - 1
    PrefetchingOrder(order, corpus)(place)
    (group,) = order.groups(place).tolist()
    needed = names(local, [*order.shards(group), *order.shards(group + 1), *order.shards(group - 1)])
    assert {name for name in server.served if name.endswith("arrow")} <= needed


def test_with_room_for_it_all_nothing_is_fetched_again(local: Corpus, server: Server) -> None:
    corpus = RemoteCorpus(server.url, 10**9)
    order = GroupOrder(sizes(local), 2, 0)
    for place in range(0, 3 * len(local), 10):
        PrefetchingOrder(order, corpus)(place)
    wait_for(lambda: len(cached(corpus)) == len(sizes(local)))
    assert {count for name, count in server.served.items() if name.endswith("arrow")} == {1}


def test_the_shuffle_is_whole_at_home_and_in_groups_from_afar(local: Corpus, server: Server) -> None:
    corpus = RemoteCorpus(server.url)
    assert group_size(local, None) is None
    assert group_size(corpus, "all") is None
    assert group_size(local, 3) == group_size(corpus, 3) == 3
    assert group_size(corpus, len(sizes(local))) is None
    n = np.arange(50)
    for group in ("all", 3):
        assert order_of(corpus, group, 1)(n)[1].tolist() == order_of(local, group, 1)(n)[1].tolist()


def test_a_cache_too_small_for_three_groups_is_refused(server: Server) -> None:
    corpus = RemoteCorpus(server.url, 3000)
    with pytest.raises(UserError) as caught:
        corpus.check_cache(2)
    assert str(caught.value).startswith("data.cache_gb is 3e-06, three groups of 2 shards take up to ")
    with pytest.raises(UserError, match="the whole corpus take"):
        corpus.check_cache(None)
    RemoteCorpus(server.url, 10**6).check_cache(2)


# --- a bad network ----------------------------------------------------------------------------------------------------


def shard(corpus: Corpus, number: int = 0) -> str:
    return str(corpus.manifest["shards"][number]["file"])


@pytest.mark.parametrize("fault", ["refused", "cut", "corrupt"])
@pytest.mark.parametrize("name", ["manifest.json", "lengths.npy", "shard"])
def test_what_came_badly_is_fetched_again_after_a_while(
    fault: str, name: str, local: Corpus, server: Server, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    if (fault, name) == ("corrupt", "manifest.json"):
        pytest.skip("it has no checksum")
    name = shard(local) if name == "shard" else name
    server.faults[name] = [fault, fault]
    assert everything(RemoteCorpus(server.url)) == everything(local)
    assert server.served[name] == 3
    assert waits == [1, 2]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all(line.startswith(f"pretrain: warning: {server.url}/{name}: ") for line in warnings)
    assert [line[-12:] for line in warnings] == ["; again in 1 s"[-12:], "; again in 2 s"[-12:]]


def test_a_server_that_is_down_for_a_while_is_none_without_the_file(
    server: Server, tmp_path: Path, waits: list[float]
) -> None:
    server.faults["manifest.json"] = ["refused"]
    assert remote_files.get_file(f"{server.url}/manifest.json", tmp_path / "x")
    assert waits == [1]
    assert not remote_files.get_file(f"{server.url}/nowhere", tmp_path / "y")
    assert waits == [1]


def test_a_file_is_removed_although_the_connection_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/lost/x", b"x")
    with monkeypatch.context() as patched:
        patched.setattr(type(memory), "info", lost)
        remote_files.remove_file("memory://lost/x")
        remote_files.remove_file("memory://lost/x")  # which is not there now
    assert not memory.exists("/lost/x")


def lost(*_: Any, **__: Any) -> None:
    raise ConnectionResetError("connection lost")


def test_a_network_that_stays_bad_is_told_in_one_line(
    local: Corpus, server: Server, waits: list[float], own_cache: Path
) -> None:
    corpus = RemoteCorpus(server.url)
    server.faults[shard(local)] = ["corrupt"] * 100
    with pytest.raises(UserError) as caught:
        corpus.tokens(0)
    told = str(caught.value)
    assert told.startswith(f"{server.url}/{shard(local)}: cannot be read (checksum ")
    assert told.endswith(") in 9 attempts; check the address and the network, and give the same command again")
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert not [path for path in own_cache.rglob("*") if "shard" in path.name]


def test_what_failed_in_the_background_is_tried_again_when_it_is_needed(local: Corpus, server: Server) -> None:
    corpus = RemoteCorpus(server.url)
    order = GroupOrder(sizes(local), 2, 0)
    later = shard(local, order.shards(1)[0])
    server.faults[later] = ["refused"] * 9
    PrefetchingOrder(order, corpus)(0)
    wait_for(lambda: corpus._cache._coming[later].done())
    place = int(np.flatnonzero(order.groups(np.arange(len(local))) == 1)[0])
    PrefetchingOrder(order, corpus)(place)
    assert later in cached(corpus)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{server}/nowhere", "{server}/nowhere/manifest.json: {server}/nowhere/manifest.json; check the address and "
         "your rights there"),
        ("http://127.0.0.1:1/corpus", "http://127.0.0.1:1/corpus/manifest.json: cannot be read (Cannot connect to host "
         "127.0.0.1:1 ssl:default [Connect call failed ('127.0.0.1', 1)]) in 3 attempts; check the address and the "
         "network, and give the same command again"),
        ("nothing://corpus", "nothing://corpus/manifest.json: cannot be read (Protocol not known: nothing) in 3 "
         "attempts; check the address and the network, and give the same command again"),
    ],
)  # fmt: skip
def test_an_address_without_a_corpus_is_told_in_one_line(url: str, message: str, server: Server) -> None:
    with pytest.raises(UserError) as caught:
        open_or_prepare([url.format(server=server.url)], ESM)
    assert str(caught.value) == message.format(server=server.url)


@pytest.mark.parametrize("where", ["here", "there", "at a file:// address"])
def test_a_lack_of_rights_here_is_not_told_as_one_at_the_address(
    where: str, local: Corpus, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(files: Any, remote: str, to: str, **_: Any) -> None:
        if where == "there":
            raise PermissionError("Access Denied")
        path = to if where == "here" else remote
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(LocalFileSystem, "get_file", refuse)
    with pytest.raises(PermissionError if where == "here" else UserError) as caught:
        RemoteCorpus(f"file://{local.path}")
    if where == "here":
        assert str(own_cache) in caught.value.filename  # the command says so, and to choose another place
    else:
        assert "check the address and your rights there" in str(caught.value)


@pytest.mark.parametrize("name", ["lengths.npy", "*.arrow"])
def test_a_damaged_copy_is_told_by_its_place(name: str, server: Server, own_cache: Path) -> None:
    RemoteCorpus(server.url, 10**9).tokens(0)
    (copy,) = own_cache.rglob(name)
    copy.write_bytes(bytes(copy.stat().st_size))
    with pytest.raises(UserError) as caught:
        RemoteCorpus(server.url, 10**9).tokens(0)
    assert str(caught.value).startswith(f"{copy}: damaged (")
    assert str(caught.value).endswith("); delete this file and give the same command again")


def test_a_corpus_that_is_not_cut_into_windows_is_named_by_its_address(server: Server) -> None:
    with pytest.raises(UserError, match=f"^{server.url}: was prepared without --windows"):
        open_or_prepare([server.url], ESM, windows=64)


def test_a_corpus_that_another_tokenizer_made_is_refused(server: Server) -> None:
    with pytest.raises(UserError, match=f"^{server.url}: made with tokenizer 'esm'"):
        open_or_prepare([server.url], train_tokenizer([], 261))


def test_a_manifest_that_lacks_something_or_lies_is_refused(local: Corpus, tmp_path: Path) -> None:
    manifest = json.loads((local.path / "manifest.json").read_text())
    without = {name: value for name, value in manifest.items() if name != "lengths"}
    outside = {**manifest, "shards": [{**entry, "file": f"../{entry['file']}"} for entry in manifest["shards"]]}
    for made, message in (
        (without, "damaged corpus (KeyError: 'lengths'); prepare it again"),
        (outside, f"manifest.json names the shard '../{shard(local)}', which is not beside it; prepare it again"),
        ({**manifest, "num_sequences": 3}, "lengths.npy does not hold the sequences that manifest.json counts; prepare "
         "it again"),
    ):  # fmt: skip
        fsspec.filesystem("memory").pipe("/bad/manifest.json", json.dumps(made).encode())
        fsspec.filesystem("memory").pipe("/bad/lengths.npy", (local.path / "lengths.npy").read_bytes())
        with pytest.raises(UserError) as caught:
            RemoteCorpus("memory://bad")
        assert str(caught.value) == f"memory://bad: {message}"


# --- several processes ------------------------------------------------------------------------------------------------


def _read_all(url: str, seed: int, results: "multiprocessing.Queue[Any]") -> None:
    corpus = RemoteCorpus(url)
    order = GroupOrder([entry["num_sequences"] for entry in corpus.manifest["shards"]], 2, seed)
    ahead, total = PrefetchingOrder(order, corpus), 0
    for place in range(2 * len(corpus)):
        (index,) = ahead(place)[1].tolist()
        total += int(corpus.tokens(index).sum())
    results.put((seed, total))


def test_processes_in_different_places_share_the_cache(local: Corpus, server: Server, own_cache: Path) -> None:
    """Each evicts what nobody holds; what another one holds stays, and what it lost is fetched again."""
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[Any] = context.Queue()
    children = [context.Process(target=_read_all, args=(server.url, seed, results)) for seed in range(4)]
    for child in children:
        child.start()
    expected = 2 * sum(int(local.tokens(i).astype(np.int64).sum()) for i in range(len(local)))
    assert dict(results.get(timeout=60) for _ in children) == dict.fromkeys(range(4), expected)
    for child in children:
        child.join(60)
    assert {child.exitcode for child in children} == {0}
    corpus = RemoteCorpus(server.url)
    corpus._cache.evict()
    assert cached(corpus) == set()  # the locks of processes that ended are gone


def test_what_another_process_holds_is_not_evicted(local: Corpus, server: Server) -> None:
    corpus = RemoteCorpus(server.url)
    corpus.bring_all()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            other = RemoteCorpus(server.url)
            other._cache.evict()
            code = 0 if len(cached(other)) == len(sizes(local)) else 1
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert corpus.tokens(3).tolist() == local.tokens(3).tolist()


def test_a_forked_worker_that_has_used_the_corpus_keeps_nothing_from_being_evicted(
    local: Corpus, server: Server
) -> None:
    """A loader worker inherits its parent's locks, and may live as long as the run."""
    corpus = RemoteCorpus(server.url)
    order = GroupOrder(sizes(local), 1, 0)
    PrefetchingOrder(order, corpus)(0)
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.close(done[1])
        try:
            corpus.tokens(int(order(0)[1][0]))
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    first = names(local, order.shards(0))
    places = np.arange(len(local))
    for group in range(4):
        PrefetchingOrder(order, corpus)(places[order.groups(places) == group])
    assert not first & cached(corpus)
    os.write(done[1], b"x")
    os.waitpid(pid, 0)


@pytest.mark.parametrize("comes_to_be", ["forked", "pickled"])
def test_a_loader_worker_keeps_no_more_shards_open_than_two_groups(
    comes_to_be: str, local: Corpus, server: Server
) -> None:
    """What is evicted stays on the disk for as long as anyone has it mapped."""
    corpus = RemoteCorpus(server.url)
    masking = Masking(0.15, 1.0, 0.0, ESM.mask_token_id, ESM.replacement_ids, seed=0)
    planner = Planner(corpus, GroupOrder(sizes(local), 2, 0), masking, 64)
    prefetch_shards(planner)
    pickled = pickle.dumps(corpus)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            here = pickle.loads(pickled) if comes_to_be == "pickled" else corpus
            everything(here)
            lines = Path("/proc/self/maps").read_text().splitlines()
            mapped = {line.split()[5] for line in lines if f"{here._cache.directory}/shard-" in line}
            code = 0 if 1 <= len(mapped) <= 4 else 1
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0

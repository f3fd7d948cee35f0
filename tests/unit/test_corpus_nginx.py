"""A corpus and sources behind a real web server, Debian's nginx: ranges, a restart in mid-transfer, a damaged file."""

import os
import random
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.corpus import pieces, remote_files, shards
from pretrain.corpus.prepare import Settings, prepare
from pretrain.corpus.remote import RemoteCorpus
from pretrain.corpus.store import Corpus
from pretrain.corpus.tokenizer import ProteinTokenizer
from pretrain.errors import UserError

ESM = ProteinTokenizer()
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="needs nginx: apt-get install nginx-light")

CONFIG = """
{user}
daemon off;
master_process off;
pid {home}/pid;
events {{}}
http {{
    access_log {home}/access.log;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        limit_rate {rate};
    }}
}}
"""


class Nginx:
    """nginx on the loopback, serving a directory; it may be killed and started again at the same address."""

    def __init__(self, home: Path, root: Path) -> None:
        self.home, self.root = home, root
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self, rate: str = "0") -> None:
        user = "user root;" if os.geteuid() == 0 else ""
        config = self.home / "nginx.conf"
        config.write_text(CONFIG.format(home=self.home, root=self.root, port=self.port, rate=rate, user=user))
        assert NGINX is not None
        self.process = subprocess.Popen([NGINX, "-e", str(self.home / "error.log"), "-c", str(config)])
        for _ in range(500):
            assert self.process.poll() is None, (self.home / "error.log").read_text()
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
            except ConnectionRefusedError:
                time.sleep(0.01)
            else:
                return
        raise AssertionError("nginx does not answer")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def served(self) -> list[tuple[str, int]]:
        """The path and status of each answer with a content."""
        lines = [line for line in (self.home / "access.log").read_text().splitlines() if '"GET' in line]
        return [(line.split('"')[1].split()[1], int(line.split('"')[2].split()[0])) for line in lines]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A corpus of nine shards of a quarter megabyte."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100_000)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 200_000)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    generator = random.Random(1)
    source = tmp_path / "x.fasta"
    residues = "".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=10_000))
    source.write_text(
        "".join(f">{n}\n{residues[(place := generator.randint(0, 7000)) : place + 2000]}\n" for n in range(1000))
    )
    return prepare([source], tmp_path / "served" / "corpus", Settings(ESM))


@pytest.fixture
def server(corpus: Corpus, tmp_path: Path) -> Iterator[Nginx]:
    (tmp_path / "nginx").mkdir()
    running = Nginx(tmp_path / "nginx", corpus.path.parent)
    yield running
    running.kill()


def everything(corpus: Corpus) -> list[tuple[str, bytes]]:
    return [(corpus.id(i), corpus.tokens(i).tobytes()) for i in range(len(corpus))]


def test_a_corpus_behind_it_is_the_one_at_home_each_file_fetched_once(corpus: Corpus, server: Nginx) -> None:
    afar = RemoteCorpus(f"{server.url}/corpus", 10**9)
    afar.bring_all()
    assert everything(afar) == everything(corpus)
    assert len(corpus.shards) == 9
    fetched = [path for path, status in server.served() if status == 200 and path.endswith(".arrow")]
    assert sorted(fetched) == sorted(f"/corpus/{shard['file']}" for shard in corpus.manifest["shards"])


def test_sources_behind_it_are_read_in_ranges_where_their_format_asks_for_it(
    corpus: Corpus, server: Nginx, tmp_path: Path
) -> None:
    rows = everything(corpus)
    texts = ["".join(ESM.tokens[token] for token in tokens[1:-1]) for _, tokens in rows]
    table = pa.table({"id": [name for name, _ in rows], "sequence": texts, "unused": texts})
    pq.write_table(table, server.root / "x.parquet", row_group_size=100, compression="none", use_dictionary=False)
    made = prepare([f"{server.url}/x.parquet"], tmp_path / "made", Settings(ESM))
    assert everything(made) == rows
    assert {status for path, status in server.served() if path == "/x.parquet"} == {206}
    fasta = f"{server.url}/x.fasta"
    shutil.copy(tmp_path / "x.fasta", server.root / "x.fasta")
    assert prepare([fasta], tmp_path / "again", Settings(ESM)).fingerprint == corpus.fingerprint


def test_a_server_that_is_killed_in_mid_transfer_and_started_again_costs_another_try(
    corpus: Corpus, server: Nginx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    afar = RemoteCorpus(f"{server.url}/corpus")
    server.kill()
    server.start(rate="50k")  # a shard takes some seconds
    waits = list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:  # the first further try finds nobody there
            server.start()

    def kill_in_mid_transfer() -> None:
        partial = tmp_path / "cache" / "remote" / afar.fingerprint / ".shard-00000.arrow.partial"
        while not (partial.exists() and partial.stat().st_size):
            time.sleep(0.01)
        server.kill()

    monkeypatch.setattr(remote_files, "_wait", wait)
    killer = threading.Thread(target=kill_in_mid_transfer, daemon=True)
    killer.start()
    assert afar.tokens(0).tolist() == corpus.tokens(0).tolist()
    killer.join()
    assert waits == [1.0, 2.0]
    told = capsys.readouterr().err.splitlines()
    assert [line.rpartition("; ")[2] for line in told] == ["again in 1 s", "again in 2 s"]
    assert all(f"{server.url}/corpus/shard-00000.arrow: " in line for line in told)
    assert everything(afar) == everything(corpus)


def test_a_file_that_is_damaged_there_is_fetched_again_until_it_is_whole(
    corpus: Corpus, server: Nginx, monkeypatch: pytest.MonkeyPatch
) -> None:
    afar = RemoteCorpus(f"{server.url}/corpus")
    expected = everything(corpus)[0]
    file = corpus.path / "shard-00000.arrow"
    good = file.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 1
    replacement = file.with_name("new")  # what the corpus at home has mapped stays
    replacement.write_bytes(damaged)
    replacement.replace(file)
    waits = list[float]()

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            file.write_bytes(good)

    monkeypatch.setattr(remote_files, "_wait", wait)
    assert (afar.id(0), afar.tokens(0).tobytes()) == expected
    assert waits == [1.0, 2.0, 4.0]
    afar._cache.evict()
    afar._open.clear()
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r"shard-00000\.arrow: cannot be read \(checksum .* in 9 attempts; check the"):
        afar.tokens(0)

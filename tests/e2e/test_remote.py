"""Training on a remote corpus: the bits of training on it at home, killed and continued or not."""

import functools
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_resume import equal, figures, final_state, kill

from pretrain.cli import main
from pretrain.corpus import pieces, shards


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def corpus(proteins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 500)
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)
    assert main(["prepare", str(proteins), "--out", str(tmp_path / "corpus")]) == 0
    return tmp_path / "corpus"


@pytest.fixture
def url(corpus: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(corpus))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_on_a_corpus_from_afar_killed_and_continued_has_the_bits_of_one_at_home(
    workers: int,
    corpus: Path,
    url: str,
    tiny: Callable[..., Path],
    fit: Callable[..., int],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    options = {"data__num_workers": workers, "data__group_shards": 3}
    assert fit("-c", tiny(data__train=str(corpus), **options), "--run", straight) == 0
    config = tiny(data__train=url, **options)
    assert fit("-c", config, "--run", broken, *kill("batch_start", 9)) == -9
    assert fit("-c", config, "--run", broken) == 0
    assert equal(final_state(straight), final_state(broken))
    assert figures(straight) == figures(broken)
    assert main(["inspect", str(broken), "--audit"]) == 0
    capfd.readouterr()
    other = ("--data.group_shards", "all", "--trainer.max_steps", "12", "--allow_change")
    assert main(["fit", "-c", str(config), "--run", str(broken), *other]) == 2
    assert "the checkpoint was made with group_shards 3, this run has None" in capfd.readouterr().err

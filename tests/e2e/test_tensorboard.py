"""What TensorBoard is given beside the curves, and what it shows of it."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from pretrain.corpus.batch import PackDataset
from pretrain.corpus.blosum import RESIDUES, blosum62
from pretrain.corpus.command import train_tokenizer_file
from pretrain.corpus.datamodule import validation_planner
from pretrain.corpus.opening import open_or_prepare
from pretrain.corpus.packing import validation_packs
from pretrain.corpus.padding import StaticShape
from pretrain.corpus.tokenizer import train_tokenizer
from pretrain.train.substitutions import log_odds, picture
from pretrain.train.tensorboard import fill_ins


def events(run: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run), size_guidance={"images": 0, "tensors": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def text(accumulator: EventAccumulator, tag: str) -> list[tuple[int, str]]:
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in accumulator.Tensors(f"{tag}/text_summary")]


def test_a_protein_run_has_its_layout_config_command_and_a_picture_at_each_validation(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path
) -> None:
    assert fit("-c", tiny(), "--run", tmp_path / "run") == 0
    shown = events(tmp_path / "run")
    assert [event.step for event in shown.Images("val/substitutions")] == [3, 7, 9]
    ((_, config),) = text(shown, "config")
    assert "    global_batch_tokens: 512" not in config.splitlines()[0]
    assert "      global_batch_tokens: 512" in config
    ((_, command),) = text(shown, "command")
    assert command.startswith("    ")
    layout = layout_pb2.Layout()
    layout.ParseFromString(shown.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    tags = shown.Tags()["scalars"]
    found = {
        title: {t for t in tags for pattern in patterns if re.match(pattern, t)} for title, patterns in charts.items()
    }
    assert found["loss: training and validation"] == {"train/loss", "val/loss"}
    assert found["learning rate"] == {"lr-AdamW"}
    assert len(found["accuracy by class of residue"]) == 6
    assert all(found.values()), "no chart is empty"


def test_a_text_run_shows_fill_ins(
    tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    train_tokenizer_file([source], tmp_path / "tokenizer.json", 300)
    files = {"data__train": str(source), "data__validation": str(source)}
    config = tiny(**files, data__tokenizer=str(tmp_path / "tokenizer.json"), trainer__max_steps=3)
    assert fit("-c", config, "--run", tmp_path / "run") == 0
    ((step, shown),) = text(events(tmp_path / "run"), "val/fill_ins")
    assert step == 2
    assert "**" in shown
    assert "quick" in shown or "brown" in shown or "lazy" in shown


def test_fill_ins_are_the_same_of_a_padded_batch(tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "text.txt", train_tokenizer(["the quick brown fox"], 270)
    source.write_text("the quick brown fox jumps\nthe quick one\n")
    corpus = open_or_prepare([source], tokenizer)
    planner = validation_planner(corpus, tokenizer, 64)
    ((pack,),) = validation_packs(planner, 4096, 1)
    batch = PackDataset(corpus, planner.masking)[pack]
    shown = []
    for given in (batch, StaticShape(256, 200, 20, 64).pad(batch, tokenizer.pad_token_id)):
        module: Any = SimpleNamespace(sample=(given, torch.full_like(given.targets, tokenizer.mask_token_id)))
        shown.append(fill_ins(module, tokenizer))
    assert shown[0] == shown[1]
    assert shown[0].count("\n\n") == 2  # a line above them, and two texts


def test_histograms_by_option(tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path) -> None:
    option = ["--trainer.callbacks+=pretrain.train.tensorboard.Histograms", "--trainer.callbacks.every_n_steps=4"]
    assert fit("-c", tiny(), "--run", tmp_path / "run", *option) == 0
    shown = events(tmp_path / "run")
    for kind in ("weights", "gradients"):
        assert [e.step for e in shown.Histograms(f"{kind}/encoder.embedding.weight")] == [0, 4, 8]


def test_blosum62_is_symmetric_and_has_the_published_diagonal() -> None:
    table = blosum62()
    assert (table == table.T).all()
    expected = dict(
        zip("ARNDCQEGHILKMFPSTWYV", [4, 5, 6, 6, 9, 5, 5, 6, 8, 4, 4, 5, 5, 6, 7, 4, 5, 11, 7, 4], strict=True)
    )
    assert dict(zip(RESIDUES, table.diagonal(), strict=True)) == expected
    assert table[RESIDUES.index("I"), RESIDUES.index("V")] == 3
    assert table[RESIDUES.index("W"), RESIDUES.index("D")] == -4


def test_what_is_predicted_as_often_as_by_chance_is_white_and_more_is_blue() -> None:
    confusion = np.full((20, 20), 100.0)
    assert np.allclose(log_odds(confusion), 0)
    confusion[3, 3] += 2000
    odds = log_odds(confusion)
    assert odds[3, 3] == odds.max() > 1
    assert odds[3, 4] < 0
    assert np.allclose(log_odds(np.zeros((20, 20))), 0), "nothing seen says nothing"
    image = picture(confusion)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(port: int, *command: str) -> Iterator[str]:
    """The address of a server that runs meanwhile."""
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/status", timeout=5).close()
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.5)
            else:
                break
        yield address
    finally:
        server.terminate()
        server.wait()


class Browser:
    """A headless Chromium, through chromedriver's own protocol (W3C WebDriver)."""

    # Most of TensorBoard's text is in shadow trees, which neither the page's source nor innerText holds.
    TEXT = """
        const text = node => [...node.childNodes, node.shadowRoot ?? []].flat()
            .map(child => child.nodeType == Node.TEXT_NODE ? child.data : text(child)).join("");
        return text(document.body);"""

    def __init__(self, driver: str) -> None:
        self.session = driver + "/session"
        offline = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1400,1500", *offline]
        capabilities = {"alwaysMatch": {"goog:chromeOptions": {"args": options}}}
        self.session += "/" + self._ask("", capabilities=capabilities)["sessionId"]

    def _ask(self, path: str, **body: object) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.session + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self._ask("/url", url=address)

    def text(self) -> str:
        """What the page shows now."""
        return str(self._ask("/execute/sync", script=self.TEXT, args=[]))

    def close(self) -> None:
        urllib.request.urlopen(urllib.request.Request(self.session, method="DELETE"), timeout=60).close()


@pytest.fixture
def browser() -> Iterator[Browser]:
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("needs chromium and chromedriver (Debian: chromium-driver)")
    port = free_port()
    with serving(port, "chromedriver", f"--port={port}") as driver:
        browser = Browser(driver)
        yield browser
        browser.close()


@pytest.fixture
def tensorboard(tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path) -> Iterator[str]:
    run, port = tmp_path / "run", free_port()
    assert fit("-c", tiny(model__scheduler_name="the_rate"), "--run", run) == 0
    program = str(Path(sys.executable).with_name("tensorboard"))
    with serving(port, program, "--logdir", str(run), "--port", str(port)) as address:
        yield address


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("scalars", ["the_rate"]),
        ("custom_scalars", ["learning rate", "loss: training and validation"]),
    ],
)
def test_a_browser_shows_the_figures_under_their_names(
    browser: Browser, tensorboard: str, page: str, said: list[str]
) -> None:
    browser.open(f"{tensorboard}/#{page}")
    deadline = time.monotonic() + 120
    while missing := [name for name in said if name not in browser.text()]:
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)

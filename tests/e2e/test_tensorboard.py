"""What TensorBoard is given beside the curves, and what it shows of it."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from pretrain.corpus.blosum import ORDER, blosum62
from pretrain.corpus.prepare import train_tokenizer_file
from pretrain.train.substitutions import log_odds, picture


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
    assert dict(zip(ORDER, table.diagonal(), strict=True)) == expected
    assert table[ORDER.index("I"), ORDER.index("V")] == 3
    assert table[ORDER.index("W"), ORDER.index("D")] == -4


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


@pytest.fixture
def tensorboard(tiny: Callable[..., Path], fit: Callable[..., int], tmp_path: Path) -> Iterator[str]:
    run = tmp_path / "run"
    assert fit("-c", tiny(model__scheduler_name="the_rate"), "--run", run) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("tensorboard")), "--logdir", str(run), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(120):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize(("page", "said"), [("#scalars", "the_rate"), ("#custom_scalars", "learning rate")])
def test_a_browser_sees_the_learning_rate_under_its_name(tensorboard: str, page: str, said: str) -> None:
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1500"]
    command = [*browser, "--virtual-time-budget=30000", "--dump-dom", tensorboard + page]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True).stdout
    assert said in dom

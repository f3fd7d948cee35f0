"""An evaluation may take as long as it needs; the processes that wait for it do not hang."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl

from pretrain import EncoderConfig, MLMDataModule, MLMModule
from pretrain.downstream.biology import Biology
from pretrain.train import pseudo_perplexity, watchdog
from pretrain.train.pseudo_perplexity import PseudoPerplexity
from pretrain.train.watchdog import Watchdog

CONFIG = EncoderConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
TIMEOUT = 0.3


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What hung, as a watchdog saw it, which ends nothing here."""
    found = list[str]()
    monkeypatch.setattr(watchdog, "_end", lambda *given: found.append(given[-1]))
    return found


@pytest.fixture
def biology(tmp_path: Path) -> Biology:
    (tmp_path / "assay.csv").write_text("mutant,mutated_sequence,DMS_score\nA4G,MKTGYIAK,0.5\nK2R,MRTAYIAK,-1.2\n")
    return Biology(1, variants=str(tmp_path / "assay.csv"))


def train(proteins: Path, *callbacks: pl.Callback) -> None:
    data = MLMDataModule(str(proteins), str(proteins), max_length=40, global_batch_tokens=512)
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    options |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, callbacks=[Watchdog(TIMEOUT / 60), *callbacks], **options)
    trainer.fit(MLMModule(CONFIG), data)


def test_a_long_evaluation_is_no_hang(
    proteins: Path, biology: Biology, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lasted = list[str]()

    def long(evaluate: Any) -> Any:
        def evaluated(*given: Any) -> Any:
            judged.clear()
            time.sleep(3 * TIMEOUT)
            lasted.append(evaluate.__name__)
            assert not judged
            return evaluate(*given)

        return evaluated

    monkeypatch.setattr(Biology, "evaluate", long(Biology.evaluate))
    monkeypatch.setattr(pseudo_perplexity, "mask_singly", long(pseudo_perplexity.mask_singly))
    train(proteins, biology)
    train(proteins, PseudoPerplexity(1))
    assert lasted == ["evaluate", "mask_singly"]


class Sleep(pl.Callback):
    """Long after each micro-batch."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(3 * TIMEOUT)


def test_what_comes_after_an_evaluation_is_watched_again(proteins: Path, biology: Biology, judged: list[str]) -> None:
    train(proteins, biology, Sleep())
    assert "loading data" in judged


def test_a_process_that_waits_for_another_ones_evaluation_does_not_hang(
    biology: Biology, monkeypatch: pytest.MonkeyPatch
) -> None:
    watching, at_the_barrier = Watchdog(), list[str]()
    monkeypatch.setattr("pretrain.train.watchdog.wait_for_all", lambda trainer: at_the_barrier.append(watching._doing))
    module: Any = MLMModule(CONFIG)
    trainer: Any = SimpleNamespace(callbacks=[watching], is_global_zero=False, global_step=1, max_steps=2)
    trainer.accumulate_grad_batches = 1
    biology.setup(SimpleNamespace(datamodule=MLMDataModule("unread.fasta", max_length=40)), module, "fit")  # type: ignore[arg-type]
    watching.on_train_batch_end()
    biology.on_train_batch_end(trainer, module, None, None, 0)
    assert at_the_barrier == ["evaluating"]
    assert watching._doing == "loading data"


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_process_that_goes_on_while_it_is_judged_is_not_ended(goes_on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, ended = Watchdog(), list[int]()
    monkeypatch.setattr(watchdog, "_end", lambda step, *_: ended.append(step))

    def guilty(*_: object) -> dict[int, str]:
        if goes_on:
            watching.on_train_batch_end()
        return {}

    monkeypatch.setattr(watching, "_guilty", guilty)
    watching._judge(0, 2, 1.0, 7, 1300.0)
    assert ended == ([] if goes_on else [7])


@pytest.mark.parametrize(
    ("doing", "guilty"),
    [
        ((7, "evaluating"), None),
        ((6, "evaluating"), None),
        ((6, "validating"), {1: "(other) hangs while validating"}),
        ((7, "validating"), {}),
    ],
)
def test_who_waits_in_an_evaluation_names_another_one_that_hangs(
    doing: tuple[int, str], guilty: dict[int, str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes: this one evaluates, or waits for the end of it, and the other stands where it is."""
    watching, beats, stood = Watchdog(), iter(range(10)), Watchdog()._done
    for _ in range(7 - stood):
        watching._tick("evaluating" if doing != (7, "validating") else "validating")
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(watching, "_store", "shared")
    monkeypatch.setattr(watching, "_write", lambda _: None)

    def pulses(_: int) -> dict[int, Any]:
        beat = next(beats)
        ours = watchdog._Pulse(beat, watching._done, watching._doing, "this")
        return {0: ours, 1: watchdog._Pulse(beat, *doing, "other")}

    monkeypatch.setattr(watching, "_read", pulses)
    assert watching._guilty(0, 2, 1.0) == guilty

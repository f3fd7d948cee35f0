"""The same code on a GPU: run with `pytest -m gpu`; skipped where there is no CUDA device."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest
import pytorch_lightning as pl
import torch

from pretrain import Encoder, EncoderConfig, MLMDataModule, MLMModule
from pretrain.train.logging import read_metrics
from pretrain.train.sick import SickSteps
from pretrain.train.spikes import LossSpikes
from pretrain.train.throughput import Throughput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # what the compiler and the driver warn of depends on the machine
]
CONFIG = EncoderConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2)


def pack() -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([300, 64, 64, 7, 129])
    input_ids = torch.randint(4, 24, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    return input_ids, torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


POSITIONS = {
    "all": None,
    "some of each sequence": range(3, 564, 7),
    "none of most sequences": range(10, 40),  # whose keys then get a gradient of zero in the last block
}


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes are not checked: the compiler cannot see through that."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize("head_size", [16, 24, 32, 64])
@pytest.mark.parametrize("asked", POSITIONS)
def test_bf16_logits_and_gradients_on_cuda_agree_with_fp32_on_the_cpu(asked: str, head_size: int) -> None:
    torch.manual_seed(0)
    config = EncoderConfig(hidden_size=2 * head_size, num_hidden_layers=2, num_attention_heads=2)
    cpu = Encoder(config)
    gpu = Encoder(config).cuda()
    gpu.load_state_dict(cpu.state_dict())
    input_ids, cu_seqlens = pack()
    places = POSITIONS[asked]
    positions = None if places is None else torch.tensor(list(places))
    expected = cpu(input_ids, cu_seqlens, 300, positions)
    with torch.autocast("cuda", torch.bfloat16):
        found = gpu(input_ids.cuda(), cu_seqlens.cuda(), 300, None if positions is None else positions.cuda())
    assert (found.float().cpu() - expected).norm() / expected.norm() < 2e-2
    expected.square().sum().backward()
    found.float().square().sum().backward()
    for (name, ours), theirs in zip(gpu.named_parameters(), cpu.parameters(), strict=True):
        assert (ours.grad.cpu() - theirs.grad).norm() <= 5e-2 * theirs.grad.norm() + 1e-6, name


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("compiled", [False, True])
def test_training_on_cuda_in_bf16_follows_the_losses_of_the_cpu(proteins: Path, compiled: bool) -> None:
    def losses(accelerator: str, precision: str, compiled: bool) -> list[float]:
        pl.seed_everything(0, verbose=False)
        seen: list[float] = []

        class Keep(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
                if "train/loss" in trainer.callback_metrics:
                    seen.append(float(trainer.callback_metrics["train/loss"]))

        trainer = pl.Trainer(
            max_steps=20,
            accelerator=accelerator,
            devices=1,
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[Keep()],
        )
        data = MLMDataModule(
            str(proteins), max_length=64, global_batch_tokens=1024, static_shapes=compiled, num_workers=2
        )
        trainer.fit(MLMModule(CONFIG, learning_rate=1e-3, warmup_steps=5, compile=compiled), data)
        return seen

    assert losses("gpu", "bf16-mixed", compiled) == pytest.approx(losses("cpu", "32-true", False), rel=1e-2)


def test_padding_with_empty_sequences_changes_nothing_on_cuda() -> None:
    torch.manual_seed(0)
    encoder = Encoder(CONFIG).cuda()
    input_ids, cu_seqlens = (tensor.cuda() for tensor in pack())
    padded = torch.nn.functional.pad(input_ids, (0, 20), value=1)
    bounds = torch.nn.functional.pad(cu_seqlens, (0, 4), value=len(padded))  # one sequence of padding, three empty
    with torch.autocast("cuda", torch.bfloat16):
        expected, found = encoder(input_ids, cu_seqlens, 300), encoder(padded, bounds, 300)
    # By the norm: for another number of rows cuBLAS may add up in another order.
    assert (found[: len(input_ids)] - expected).norm() < 1e-2 * expected.norm()
    assert found.isfinite().all()


class Sticklers(pl.Callback):
    """From the third step on, whatever waits for the GPU is an error."""

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_end(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("compiled", [False, True])
def test_the_host_never_waits_for_the_gpu_where_nothing_is_logged(
    proteins: Path, tmp_path: Path, compiled: bool
) -> None:
    callbacks = [Throughput(), SickSteps(tmp_path, 0, 10), LossSpikes(tmp_path, []), Sticklers()]
    trainer = pl.Trainer(
        max_steps=10,
        accelerator="gpu",
        devices=1,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    data = MLMDataModule(str(proteins), max_length=64, global_batch_tokens=2048, static_shapes=True, num_workers=2)
    trainer.fit(MLMModule(CONFIG, warmup_steps=2, compile=compiled), data)
    assert trainer.global_step == 10


@pytest.mark.parametrize("overlays", [["gpu"], ["gpu", "compile"], ["gpu", "fsdp"]], ids="+".join)
def test_the_command_line_trains_and_continues_on_a_gpu(
    tiny: Callable[..., Path], tmp_path: Path, overlays: list[str]
) -> None:
    config = tiny(model__encoder={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2})
    configs = [part for overlay in overlays for part in ("-c", overlay)]
    command = [sys.executable, "-m", "pretrain", "fit", "-c", str(config), *configs, "--trainer.devices", "1"]
    command += ["--run", str(tmp_path / "run")]
    subprocess.run([*command, "--trainer.max_steps", "4"], check=True, timeout=600)
    subprocess.run([*command, "--trainer.max_steps", "8", "--allow_change"], check=True, timeout=600)
    losses = [value for _, name, value in read_metrics(tmp_path / "run" / "metrics.csv") if name == "train/loss"]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text().splitlines()[-1])
    assert (start["attention"], start["precision"]) == ("varlen_attn (FA2)", "bf16-mixed")
    assert start["compiled"] is ("compile" in overlays)

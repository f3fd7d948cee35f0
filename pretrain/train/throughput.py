"""How fast a run is: real tokens a second, model FLOPs utilisation, and the share of time spent waiting for data."""

import re
import statistics
import time
from functools import lru_cache
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from typing_extensions import override

from pretrain.corpus.batch import Batch
from pretrain.corpus.packed import TimedLoader
from pretrain.model.cpu_kernels import by_llvm
from pretrain.model.linear import linear
from pretrain.train.step import StepModule


class GPU(NamedTuple):
    """What a GPU offers to training.

    Attributes:
        bf16_flops: Dense half-precision matrix rate by NVIDIA's datasheet, in FLOP/s, without sparsity.
        memory: Memory in GiB, as the driver reports it (the datasheet's figure is rounded).
    """

    bf16_flops: float
    memory: float


GPUS = {
    "GB200": GPU(2500e12, 185.0),
    "B200": GPU(2250e12, 179.0),
    "H200 NVL": GPU(836e12, 140.4),
    "H200": GPU(989e12, 140.4),
    "H100 PCIe": GPU(756e12, 79.6),
    "H100 NVL": GPU(835e12, 93.6),
    "H100": GPU(989e12, 79.6),
    "A100-SXM4-40GB": GPU(312e12, 40.0),
    "A100-PCIE-40GB": GPU(312e12, 40.0),
    "A100": GPU(312e12, 80.0),
    "L40S": GPU(362e12, 45.0),
    "L40": GPU(181e12, 45.0),
    "L4": GPU(121e12, 22.5),
    "A10G": GPU(70e12, 22.5),
    "A10": GPU(125e12, 22.5),
    "RTX 4090": GPU(165e12, 24.0),
    "RTX 3090": GPU(71e12, 24.0),
}
"""GPUs by words of their names, the more special first."""


def known_gpu(name: str) -> str | None:
    """The key in `GPUS` of a GPU, by the name that the driver gives it; None for others, and for parts of one.

    Args:
        name: Such as ``NVIDIA H100 80GB HBM3``.
    """
    if re.search(r"\b(MIG|Laptop)\b", name):
        return None
    return next((part for part in GPUS if re.search(rf"\b{part}\b", name)), None)


@lru_cache
def peak_flops(device: torch.device) -> tuple[float, str]:
    """The FLOP/s that utilisation is measured against, and where the figure is from.

    A GPU in the table counts with its datasheet's rate; anything else with a matrix product measured here and now.
    """
    if device.type == "cuda" and (known := known_gpu(torch.cuda.get_device_name(device))):
        return GPUS[known].bf16_flops, f"datasheet rate of {known}"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return matmul_rate(device, dtype), f"measured {str(dtype).removeprefix('torch.')} matrix products"


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    """Median FLOP/s of a square matrix product; on a CPU by the faster of torch's kernels and the project's own."""
    size = size if device.type == "cpu" else 8 * size
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def seconds(llvm: bool) -> float:
        begin = time.perf_counter()
        linear(a, b, None, llvm)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    rates = []
    for llvm in (False, True) if dtype == torch.float32 and by_llvm("auto", 1).products else (False,):
        seconds(llvm)  # warm up
        rates.append(2.0 * size**3 / statistics.median(seconds(llvm) for _ in range(repeats)))
    return max(rates)


class Throughput(pl.Callback):
    """Logs ``throughput/*``, over the steps since the Trainer last passed figures to its loggers.

    It never synchronises a GPU: where figures are passed on, the host waits for them, and in between it may run ahead.
    Validation is not counted.
    """

    def __init__(self) -> None:
        self._peak = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._peak = self._peak or peak_flops(pl_module.device)[0] * trainer.world_size
        self._loader = trainer.train_dataloader
        self._last = time.perf_counter()
        self._begin()

    def _begin(self) -> None:
        self._tokens, self._flops, self._seconds, self._waited = 0, 0.0, 0.0, self._seconds_waited()

    def _seconds_waited(self) -> float:
        return self._loader.seconds_waited if isinstance(self._loader, TimedLoader) else float("nan")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StepModule)
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._tokens += int(batch.pack.lengths.sum())
        self._flops += pl_module.flops(batch.pack)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Packs cost nearly the same on every process, so this one's share stands for all.
        pl_module.log_dict(
            {
                "throughput/tokens_per_second": self._tokens * trainer.world_size / self._seconds,
                "throughput/mfu": self._flops * trainer.world_size / self._seconds / self._peak,
                "throughput/data_wait": (self._seconds_waited() - self._waited) / self._seconds,
            }
        )
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._begin()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.leave_out()

    def leave_out(self) -> None:
        """Do not count the time since the last batch: something other than training was done."""
        self._last = time.perf_counter()

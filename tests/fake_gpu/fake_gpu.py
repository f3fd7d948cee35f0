"""Programs that run the CUDA code on a GPU that is not there, and print as JSON what happened.

    python fake_gpu.py LIBRARY waits|compile|memory ...

Tensors are torch's fake ones: they have a device and a shape and go through the real dispatcher, autocast, autograd and
compiler as CUDA tensors, so mixed-up devices and types, looks at values, and shapes that depend on values are errors.
The library must be there before torch looks for CUDA, hence programs of their own. No kernel runs: numbers are for a
real GPU (tests/gpu).
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

for name in ("libc10.so", "libtorch_cpu.so", sys.argv[1]):
    folder = Path(importlib.util.find_spec("torch").origin).parent / "lib"  # type: ignore[union-attr, arg-type]
    ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from pytorch_lightning.accelerators import Accelerator  # noqa: E402
from pytorch_lightning.loggers.logger import DummyLogger  # noqa: E402
from pytorch_lightning.plugins import MixedPrecision  # noqa: E402
from pytorch_lightning.strategies import SingleDeviceStrategy  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from pretrain import Encoder, EncoderConfig, MLMDataModule, MLMModule  # noqa: E402
from pretrain.corpus.batch import Batch  # noqa: E402
from pretrain.train.memory import TrainingMemory  # noqa: E402
from pretrain.train.sick import SickSteps  # noqa: E402
from pretrain.train.spikes import LossSpikes  # noqa: E402
from pretrain.train.step import compile_blocks  # noqa: E402
from pretrain.train.throughput import Throughput  # noqa: E402

GPU = torch.device("cuda", 0)


class Event:
    """What `torch.cuda.Event` needs a GPU for."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_name = lambda *_: "H100"
    torch.cuda.Event = Event  # type: ignore[misc, assignment]
    Tensor.__deepcopy__ = lambda tensor, _: tensor.detach().clone()  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


class FakeAccelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [GPU]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "fake"


class OnFakeGPU(SingleDeviceStrategy):
    def model_to_device(self) -> None:
        pass  # it was made there: a fake tensor cannot move

    def teardown(self) -> None:
        pass


class Waits(TorchDispatchMode):
    """Notes where the host would wait for the GPU: for a value of it, or for a copy to have been made."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.noted: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].is_cuda:
                self._note("value")
            return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **kwargs)
        devices = {t.device.type for t in (*args, result) if isinstance(t, Tensor)}
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        non_blocking = kwargs.get("non_blocking") or (func is copies[1] and len(args) > 2 and args[2])
        if func in copies and len(devices) > 1 and not non_blocking:
            self._note("copy")
        return result

    def _note(self, kind: str) -> None:
        frames = [frame.name for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
        self.noted.append({"step": self.step, "kind": kind, "where": frames})


class Loader:
    """Batches that are there already; Lightning takes a list for loaders."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class Counter(pl.Callback):
    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.waits.step = trainer.global_step


def waits(source: str, folder: str) -> Any:
    """Trains eight steps with all that a run does at each, figures logged at every fourth."""
    batches = real_batches(source, steps=8, micro_batches=2)
    noted = Waits()
    run = Path(folder)
    # Spikes are sought by values, which fake tensors have not; SickSteps finds all of its constant.
    callbacks = [Throughput(), SickSteps(run, 0, 10), LossSpikes(run, []), Counter(noted)]
    SickSteps._record = lambda *_: None  # type: ignore[method-assign]
    with fake_gpu():
        with GPU:
            module = MLMModule(SMALL, warmup_steps=2)
        trainer = pl.Trainer(
            max_steps=8,
            strategy=OnFakeGPU(GPU, FakeAccelerator()),
            plugins=[MixedPrecision("bf16-mixed", "cuda")],
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            log_every_n_steps=4,
            logger=DummyLogger(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        with noted:
            trainer.fit(module, train_dataloaders=Loader(batches))
        parameters = list(module.parameters())
        assert all(p.grad is None or p.grad.is_cuda for p in parameters)
        return {"steps": trainer.global_step, "waits": noted.noted}


SMALL = EncoderConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2)


def real_batches(source: str, steps: int, micro_batches: int) -> list[Batch]:
    data = MLMDataModule(source, max_length=64, global_batch_tokens=1024, static_shapes=True)
    data.trainer = pl.Trainer(
        max_steps=steps,
        accumulate_grad_batches=micro_batches,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    data.setup("fit")
    return list(data.train_dataloader())


def compilations() -> Any:
    """How often blocks are compiled over packs of two sizes, in training and validation; a break is an error."""
    found = {}
    for recompute in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        seen = []
        with fake_gpu():
            with GPU:
                encoder = Encoder(SMALL)
            encoder.activation_checkpointing = recompute
            torch.set_num_threads(2)
            compile_blocks(encoder, GPU, backend=counter, fullgraph=True)
            pinning = threading.Thread(target=torch.set_num_threads, args=(1,))  # as the loader's pinning thread begins
            pinning.start()
            pinning.join()
            for tokens in (512, 512, 640, 512, 768, 640):
                pack = fake_pack(tokens, 9)
                with torch.autocast("cuda", torch.bfloat16):
                    loss = encoder.loss(*pack)
                loss.backward()
                with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                    encoder.score(*pack)
                seen.append(counter.frame_count)
            assert (loss.dtype, loss.device) == (torch.float32, GPU)
        found["recomputed" if recompute else "kept"] = seen
    return found


def fake_pack(tokens: int, bounds: int) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    rows = round(0.15 * tokens)
    ids, targets = (torch.zeros(n, dtype=torch.int64, device=GPU) for n in (tokens, rows))
    return ids, torch.zeros(bounds, dtype=torch.int32, device=GPU), 1024, torch.zeros_like(targets), targets


class Peak(TorchDispatchMode):
    """The most bytes of the GPU that tensors take together."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_cuda:
                reference = StorageWeakRef(tensor.untyped_storage())
                self._storages.setdefault(reference.cdata, (reference, tensor.untyped_storage().nbytes()))
        self._storages = {key: item for key, item in self._storages.items() if not item[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return result


def memory(cases: str) -> Any:
    """Bytes at the fullest moment of a step's second micro-batch, and bytes planned, for each case."""
    return [fullest(*case) for case in json.loads(cases)]


def fullest(size: str, layers: int, tokens: int, recompute: bool) -> Any:
    named = EncoderConfig.named(size)
    config = EncoderConfig(named.hidden_size, layers, named.num_attention_heads)
    with torch.device("meta"):
        planned = TrainingMemory(
            Encoder(config), "bf16-mixed", target_share=0.15, activation_checkpointing=recompute
        ).split(tokens)
    with fake_gpu(), Peak() as peak:
        with GPU:
            encoder = Encoder(config)
        encoder.activation_checkpointing = recompute
        optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
        pack = fake_pack(tokens, 1 + tokens // 350)
        for number in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                loss = encoder.loss(*pack)
            loss.backward()
            if number == 0:
                optimizer.step()
            del loss
    del planned["CUDA and fragmentation"]
    return {"peak": peak.most, "planned": sum(planned.values()), "parts": planned}


if __name__ == "__main__":
    programs: dict[str, Any] = {"waits": waits, "compile": compilations, "memory": memory}
    torch.set_num_threads(1)
    found = programs[sys.argv[2]](*sys.argv[3:])
    print(json.dumps(found), flush=True)
    os._exit(0)  # autograd's threads for a device that is not there do not end by themselves

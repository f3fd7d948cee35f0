"""What `pretrain plan` says of memory, beside real training steps of small models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain import Encoder, EncoderConfig
from pretrain.train.fit import build
from pretrain.train.memory import COMPUTE_SIZES, GIB, TrainingMemory

WIDE = EncoderConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
DEEP = EncoderConfig(hidden_size=32, num_hidden_layers=8, num_attention_heads=2, intermediate_size=96, vocab_size=200)
LENGTHS = [100, 60, 60, 30]


def memory_of(config: EncoderConfig, precision: str, **settings: Any) -> TrainingMemory:
    with torch.device("meta"):
        return TrainingMemory(Encoder(config), precision, target_share=0.15, **settings)


def batch(repeats: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, cu_seqlens, positions: 250 tokens a repeat, 15 % of them targets."""
    cu_seqlens = torch.tensor([0, *LENGTHS * repeats]).cumsum(0, dtype=torch.int32)
    tokens = int(cu_seqlens[-1])
    positions = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[: round(0.15 * tokens)]
    return torch.randint(4, 24, (tokens,)), cu_seqlens, positions.sort().values


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd keeps, each counted once; without those of ``known`` tensors."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.sizes: dict[int, tuple[int, tuple[int, ...]]] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._storages[storage.data_ptr()] = storage  # held, so that no other takes its place
            self.sizes[storage.data_ptr()] = storage.nbytes(), tuple(tensor.shape)
        return tensor

    def split(self, weights: set[tuple[int, ...]]) -> tuple[int, int]:
        """Bytes of activations, and bytes of copies of the weights, which have the weights' shapes."""
        copies = sum(size for size, shape in self.sizes.values() if shape in weights)
        return sum(size for size, _ in self.sizes.values()) - copies, copies


@pytest.mark.parametrize("repeats", [2, 5], ids=lambda repeats: f"{250 * repeats} tokens")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("config", [WIDE, DEEP], ids=["wide", "deep"])
def test_activations_and_autocast_copies_are_what_autograd_keeps(
    config: EncoderConfig, precision: str, repeats: int
) -> None:
    encoder = Encoder(config)
    input_ids, cu_seqlens, positions = batch(repeats)
    kept = Kept([*encoder.parameters(), *encoder.buffers()])
    with kept, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        encoder.loss(input_ids, cu_seqlens, None, positions, input_ids[positions])
    width = config.hidden_size
    matrices = {tuple(p.shape) for p in encoder.parameters() if p.ndim == 2} | {(width, width), (2 * width, width)}
    activations, copies = kept.split(matrices | {shape[::-1] for shape in matrices})
    memory = memory_of(config, precision)
    assert memory.activations(len(input_ids), len(positions)) == pytest.approx(activations, rel=0.1)
    planned = memory.split(len(input_ids))
    assert planned.get("autocast copies", 0) == pytest.approx(copies, rel=0.05)  # biases are copied, but not kept
    assert planned["activations"] == pytest.approx(activations, rel=0.1)


class Tracker(TorchDispatchMode):
    """The most bytes that tensors made under it take together."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def live(self) -> int:
        self._storages = {key: item for key, item in self._storages.items() if not item[0].expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self._storages[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.live())
        return result


@pytest.mark.parametrize("recompute", [False, True], ids=["all kept", "activation checkpointing"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("config", [WIDE, DEEP], ids=["wide", "deep"])
def test_the_fullest_moment_of_a_step_is_the_planned_one(
    config: EncoderConfig, precision: str, recompute: bool
) -> None:
    """The second micro-batch of a step, when gradients are there already; the allowance for CUDA left out."""
    encoder = Encoder(config)
    encoder.use_cpu_kernels("torch")  # as on CUDA: the project's own copy what they multiply
    encoder.activation_checkpointing = recompute
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    input_ids, cu_seqlens, positions = batch(8)

    def micro_batch() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = encoder.loss(input_ids, cu_seqlens, None, positions, input_ids[positions])
        loss.backward()

    micro_batch()
    optimizer.step()
    with Tracker() as tracker:
        micro_batch()
    planned = memory_of(config, precision, activation_checkpointing=recompute).split(len(input_ids))
    state = sum(planned[name] for name in ("weights", "gradients", "optimizer state"))
    planned_peak = sum(planned.values()) - planned["CUDA and fragmentation"] - state
    assert tracker.peak == pytest.approx(planned_peak, rel=0.15)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weights_gradients_and_optimizer_state_are_those_of_a_real_run_to_the_byte(
    name: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = build(["-c", str(tiny(trainer__max_steps=1, trainer__logger=False, model__optimizer=name))])
    cli.run.directory.mkdir(parents=True)
    measured = {}

    class Measure(pl.Callback):
        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
        ) -> None:
            measured["gradients"] = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    cli.trainer.callbacks.append(Measure())
    cli.trainer.fit(cli.model, cli.datamodule)
    (optimizer,) = cli.trainer.optimizers
    measured["weights"] = sum(tensor.nbytes for tensor in [*cli.model.parameters(), *cli.model.buffers()])
    measured["optimizer state"] = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    planned = replace(memory_of(cli.model.encoder.config, "32-true"), muon=name == "muon").split(512)
    assert {name: planned[name] for name in measured} == measured


def test_sharding_divides_the_state_and_gathers_blocks() -> None:
    whole = memory_of(WIDE, "bf16-mixed", gpus=4)
    sharded = replace(whole, sharded=True)
    ours, theirs = sharded.split(1000), whole.split(1000)
    buffers = 4 * WIDE.head_dim // 2
    assert ours["weights"] - buffers == (theirs["weights"] - buffers) / 4
    assert ours["gradients"] == theirs["gradients"] / 4
    steps = 4 * len(list(whole.encoder.parameters()))  # counts, which are not divided
    assert ours["optimizer state"] - steps == (theirs["optimizer state"] - steps) / 4
    assert ours["activations"] == theirs["activations"]
    block = sum(p.numel() for p in whole.encoder.blocks[0].parameters())
    outside = sum(p.numel() for p in whole.encoder.parameters()) - 3 * block
    assert ours["gathered blocks"] == 2 * 3 * block + 4 * 2 * outside


def test_ddp_copies_gradients_unless_told_not_to() -> None:
    name = "copies of gradients for DDP"
    assert name not in memory_of(WIDE, "32-true").split(1000)
    several = memory_of(WIDE, "32-true", gpus=2)
    assert several.split(1000)[name] == several.split(1000)["gradients"]
    assert name not in replace(several, gradients_in_buckets=True).split(1000)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", COMPUTE_SIZES)
def test_the_largest_pack_fits_and_one_token_more_does_not(precision: str, recompute: bool) -> None:
    memory = memory_of(EncoderConfig.named("650M"), precision, activation_checkpointing=recompute)
    largest = memory.largest_pack(80 * GIB)
    assert memory.total(largest) <= 80 * GIB < memory.total(largest + 1)
    assert memory.largest_pack(2 * GIB) == 0

"""What the machine cannot run is refused in one line, before anything is written."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported

from pretrain import EncoderConfig, MLMModule
from pretrain.errors import UserError
from pretrain.train.fit import fit
from pretrain.train.hardware import check_hardware, out_of_memory
from pretrain.train.throughput import known_gpu


def check(
    precision: str,
    capability: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    heads: int = 2,
    flash: bool = True,
    kernels: str = "FA2",
    attention_dropout: float = 0.0,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)), precision=precision, world_size=1
    )
    config = EncoderConfig(48, num_attention_heads=heads, attention_probs_dropout_prob=attention_dropout)
    module: Any = SimpleNamespace(
        compile_blocks=False, flash_attention=kernels, cpu_kernels="auto", encoder=SimpleNamespace(config=config)
    )
    check_hardware(trainer, module, SimpleNamespace(static_shapes=False))  # type: ignore[arg-type]


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"Tesla V100 has compute capability 7\.0; .* need 8\.0"):
        check("bf16-mixed", (7, 0), monkeypatch)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_gpu_is_known_by_whole_words_of_its_name(name: str, known: str | None) -> None:
    assert known_gpu(name) == known


def test_other_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("mps")), precision="32-true")
    module: Any = SimpleNamespace(compile_blocks=False)
    with pytest.raises(UserError, match=r"the accelerator is mps, .* give --trainer\.accelerator cpu"):
        check_hardware(trainer, module, SimpleNamespace(static_shapes=False))  # type: ignore[arg-type]


def test_single_precision_on_a_gpu_names_the_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"trainer\.precision is 32-true; .* configs/gpu\.yaml"):
        check("32-true", (9, 0), monkeypatch)
    check("bf16-mixed", (9, 0), monkeypatch)


def test_attention_dropout_on_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"drops no attention weights; set attention_probs_dropout_prob to 0"):
        check("bf16-mixed", (9, 0), monkeypatch, attention_dropout=0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_of_another_precision_are_refused(precision: str, tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = tiny(trainer__precision=precision)
    with pytest.raises(UserError, match=rf"trainer\.precision is {precision}; .* give bf16-mixed"):
        fit(["-c", str(config), "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_torch_without_flash_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"built without varlen_attn .* install torch 2\.11"):
        check("bf16-mixed", (9, 0), monkeypatch, flash=False)


def test_a_torch_without_varlen_attn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"built without varlen_attn .* install torch 2\.11"):
        check("bf16-mixed", (9, 0), monkeypatch)


def test_heads_that_the_kernels_do_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"heads of 12 dimensions; .* a multiple of 8"):
        check("bf16-mixed", (9, 0), monkeypatch, heads=4)
    check("bf16-mixed", (9, 0), monkeypatch, heads=6)


def test_kernels_for_another_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"FA3, which is for .* 9\.0 .* has 8\.0: leave it out"):
        check("bf16-mixed", (8, 0), monkeypatch, kernels="FA3")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(UserError, match="flash attention FA3 cannot be used"):
        check("bf16-mixed", (9, 0), monkeypatch, kernels="FA3")


def test_kernels_for_a_gpu_are_refused_on_a_cpu(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.flash_attention is FA3, whose kernels are for GPUs"):
        fit(["-c", str(tiny(model__flash_attention="FA3")), "--run", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_kernels_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(UserError, match=r"flash attention FA3 cannot be used .* --model.flash_attention FA2") as raised:
        MLMModule(EncoderConfig(16, 1, 2), flash_attention="FA3").configure_model()
    assert "\n" not in str(raised.value)


class TritonError(Exception):
    """As triton's own, by where it is defined."""


TritonError.__module__ = "triton.runtime.errors"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\n..."), "accumulate_grad_batches 4"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "accumulate_grad_batches"),
        (Unsupported("no compiler\nfound"), r"model\.compile failed \(no compiler found.*--model.compile false"),
        (TritonError("no Python.h\nhere"), r"model\.compile failed \(no Python\.h here.*--model.compile false"),
        (FailOnRecompileLimitHit("limit"), "packs of too many different shapes"),
    ],
)
def test_what_fails_in_the_first_step_says_what_to_do(
    error: Exception, message: str, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(MLMModule, "training_step", fail)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # nothing gets as far as that
    config = tiny(model__compile=True, data__static_shapes=True)
    with pytest.raises(UserError, match=message) as raised:
        fit(["-c", str(config), "--run", str(tmp_path / "run")])
    assert "\n" not in str(raised.value)


def test_memory_that_runs_out_in_a_validation_asks_for_smaller_packs_of_it(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(MLMModule, "validation_step", fail)
    with pytest.raises(UserError, match=r"about 4,096 tokens of the validation .* smaller --data.validation_pack_tok"):
        fit(["-c", str(tiny()), "--run", str(tmp_path / "run")])


def test_what_went_wrong_elsewhere_is_not_taken_for_the_compiler(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("something else, not out of memory")

    monkeypatch.setattr(MLMModule, "training_step", fail)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # nothing gets as far as that
    config = tiny(model__compile=True, data__static_shapes=True)
    with pytest.raises(RuntimeError, match="something else"):
        fit(["-c", str(config), "--run", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("micro_batches", "recompute", "processes", "said", "unsaid"),
    [
        (2, False, 1, ["accumulate_grad_batches 4", "activation_checkpointing", "fsdp.yaml"], "max_length"),
        (8, False, 1, ["activation_checkpointing", "fsdp.yaml"], "accumulate_grad_batches"),
        (8, True, 1, ["on several GPUs"], "activation_checkpointing"),
        (2, True, 4, ["shard the model"], "several GPUs"),
    ],
)
def test_remedies_for_a_full_gpu_are_those_that_work(
    micro_batches: int, recompute: bool, processes: int, said: list[str], unsaid: str
) -> None:
    trainer: Any = SimpleNamespace(world_size=processes, accumulate_grad_batches=micro_batches)
    encoder = SimpleNamespace(activation_checkpointing=recompute)
    module: Any = SimpleNamespace(encoder=encoder, device_mesh=None, training=True)
    data: Any = SimpleNamespace(global_batch_tokens=512, batch_warmup=None, max_length=64, validation_pack_tokens=4096)
    message = out_of_memory(trainer, module, data)
    assert all(words in message for words in said)
    assert unsaid not in message
    data.batch_warmup = SimpleNamespace(first=64 * micro_batches * processes)  # as small as it can be
    assert "accumulate_grad_batches" not in out_of_memory(trainer, module, data)


def test_what_runs_is_printed_and_logged(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(trainer__max_steps=1, model__activation_checkpointing=True, model__cpu_kernels="torch")
    fit(["-c", str(config), "--run", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "1 x cpu, SingleDeviceStrategy, 32-true, attention by SDPA by sequence, products by torch" in said
    assert "products by torch, not compiled, activations computed again" in said
    start = json.loads((tmp_path / "run" / "starts.jsonl").read_text())
    assert start["attention"] == "SDPA by sequence"
    assert start["precision"] == "32-true"
    assert start["compiled"] is False
    assert start["activation_checkpointing"] is True
    assert start["python"] == platform.python_version()
    assert start["packages"].keys() >= {"torch", "pytorch-lightning", "transformers", "numpy"}
    assert start["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    commit = ""  # where there is no git, or no checkout
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    assert start["git_commit"] == (commit or None)

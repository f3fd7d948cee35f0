"""The project's own attention kernels for CPUs, beside SDPA's and a softmax written out in float64."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import Encoder, EncoderConfig
from pretrain.errors import UserError
from pretrain.model import cpu_kernels
from pretrain.model.attention import Layout, variable_length_attention
from pretrain.model.cpu_kernels import by_llvm, has_avx512, require_llvm
from pretrain.model.linear import Linear
from pretrain.train.fit import fit
from pretrain.train.hardware import check_hardware
from pretrain.train.report import execution

pytest.importorskip("llvmlite")
here = pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="needs AVX2 and Linux",
)

LENGTHS = [1024, 511, 257, 100, 100, 33, 32, 31, 17, 16, 8, 2, 1]


def layout(lengths: list[int]) -> Layout:
    return Layout.of(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32))


def projection(tokens: int, head_size: int, heads: int = 3) -> Tensor:
    torch.manual_seed(head_size)
    return torch.randn(tokens, 3, heads, head_size)


def attended(
    kernels: Any, qkv: Tensor, queries: list[int], keys: list[int], dropout: float = 0.0
) -> tuple[Tensor, ...]:
    """Values and the gradients of q, k and v; the queries are of the first tokens of each sequence."""
    rows = torch.cat([torch.arange(k)[:q] + start for q, k, start in zip(queries, keys, starts(keys), strict=True)])
    query, key, value = (x.detach().requires_grad_() for x in (qkv[:, 0][rows], qkv[:, 1], qkv[:, 2]))
    out = variable_length_attention(query, key, value, layout(queries), layout(keys), dropout, kernels == "LLVM")
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return out.detach(), *torch.autograd.grad((out * weight).sum(), (query, key, value))


def starts(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0)[:-1].tolist()]


@here
@pytest.mark.parametrize("head_size", [8, 10, 16, 20, 24, 32, 64, 128])
def test_values_and_gradients_are_sdpas(head_size: int) -> None:
    qkv = projection(sum(LENGTHS), head_size)
    exact = attended("SDPA", qkv.double(), LENGTHS, LENGTHS)
    for ours, expected in zip(attended("LLVM", qkv, LENGTHS, LENGTHS), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@here
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5])
def test_a_sequence_may_have_fewer_queries_than_keys(share: float) -> None:
    queries = [int(share * length) for length in LENGTHS[:-1]] + [1]
    qkv = projection(sum(LENGTHS), 24)
    expected = attended("SDPA", qkv.double(), queries, LENGTHS)
    for ours, theirs in zip(attended("LLVM", qkv, queries, LENGTHS), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@here
def test_results_do_not_depend_on_threads_nor_on_the_rest_of_the_pack() -> None:
    threads, qkv = torch.get_num_threads(), projection(sum(LENGTHS), 16)
    try:
        torch.set_num_threads(1)
        alone = attended("LLVM", qkv, LENGTHS, LENGTHS)
        torch.set_num_threads(3)
        again = attended("LLVM", qkv, LENGTHS, LENGTHS)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, again))
    last = attended("LLVM", qkv[: LENGTHS[0]], LENGTHS[:1], LENGTHS[:1])[0]
    torch.testing.assert_close(last, alone[0][: LENGTHS[0]], rtol=0, atol=0)


@here
def test_any_layout_in_memory_gives_the_same() -> None:
    qkv = projection(150, 16)
    by_head = qkv.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    for ours, expected in zip(
        attended("LLVM", by_head, [150], [150]), attended("LLVM", qkv, [150], [150]), strict=True
    ):
        assert torch.equal(ours, expected)


@here
def test_bounds_of_any_integers_give_the_same() -> None:
    qkv, bounds = projection(300, 16), torch.tensor([0, 100, 140, 300])
    query, key, value = qkv.unbind(1)
    found = []
    for given in (bounds.int(), bounds, bounds.int().repeat_interleave(2)[::2]):
        pack = Layout.of(given)
        found.append(variable_length_attention(query, key, value, pack, pack, llvm=True))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@here
def test_scores_in_the_hundreds_neither_overflow_nor_vanish() -> None:
    qkv = 18 * projection(300, 16)
    scores = torch.einsum("qhd,khd->hqk", qkv[:, 0], qkv[:, 1]) / 4
    assert scores.amax() > 500
    for ours, exact in zip(
        attended("LLVM", qkv, [300], [300]), attended("SDPA", qkv.double(), [300], [300]), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@here
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_own_sequence_and_no_other(number: float) -> None:
    qkv = projection(150, 16)
    clean = attended("LLVM", qkv, [50, 50, 50], [50, 50, 50])
    qkv[70, :, 1] = number
    for ours, before in zip(attended("LLVM", qkv, [50, 50, 50], [50, 50, 50]), clean, strict=True):
        assert not ours[50:100, 1].isfinite().all(dim=-1).any()
        ours[50:100, 1] = before[50:100, 1]
        assert torch.equal(ours, before)


@here
def test_dropout_and_other_precisions_are_sdpas() -> None:
    qkv = projection(80, 16)
    for given, dropout in ((qkv, 0.5), (qkv.bfloat16(), 0.0)):
        both = []
        for kernels in ("LLVM", "SDPA"):
            torch.manual_seed(0)
            both.append(attended(kernels, given, [80], [80], dropout))
        assert all(map(torch.equal, *both))


@here
def test_an_encoders_loss_and_gradients_are_those_of_torch() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(48, num_hidden_layers=2, num_attention_heads=2))
    ids, positions = torch.randint(4, 24, (300,)), torch.arange(0, 300, 7)
    pack = ids, torch.tensor([0, 100, 140, 300], dtype=torch.int32), None, positions, ids[positions]
    gradients = []
    for kernels in ("torch", "LLVM"):
        encoder.use_cpu_kernels(kernels)  # type: ignore[arg-type]
        loss = encoder.loss(*pack)
        gradients.append((loss, *torch.autograd.grad(loss, list(encoder.parameters()))))
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_need_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"256 dimensions are too large|Linux and a CPU with AVX2"):
        require_llvm(256)
    assert not any(by_llvm("auto", 256))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(UserError, match=r"Linux and a CPU with AVX2; or leave the choice: --model\.cpu_kernels auto"):
        require_llvm(16)
    monkeypatch.setattr(cpu_kernels, "version", lambda _: "0.49.1")
    with pytest.raises(UserError, match=r"llvmlite 0\.49\.1 is too old"):
        require_llvm(16)
    assert not any(by_llvm("auto", 16))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"llvmlite, .* is not installed: `pip install '.\[cpu\]'"):
        require_llvm(16)


@here
@pytest.mark.skipif(not has_avx512(), reason="needs AVX-512")
def test_where_torch_is_told_to_use_avx2_so_do_the_kernels() -> None:
    tests = [f"{Path(__file__).parent}/test_cpu_{kernels}.py" for kernels in ("attention", "linear", "rotary")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "sdpas or float64", *tests]
    done = subprocess.run(command, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@here
def test_products_are_left_to_mkl_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    for of_intel in (False, True):
        monkeypatch.setattr(cpu_kernels, "_of_intel", lambda of_intel=of_intel: of_intel)
        assert by_llvm("auto", 16) == (True, not of_intel)
        assert by_llvm("LLVM", 16) == (True, True)
        assert by_llvm("torch", 16) == (False, False)
        encoder = Encoder(EncoderConfig(48, num_hidden_layers=2, num_attention_heads=2))
        assert {linear.llvm for linear in encoder.modules() if isinstance(linear, Linear)} == {not of_intel}
        assert [block.llvm_attention for block in encoder.blocks] == [True, True]


@here
@pytest.mark.parametrize(
    "changed", [{"trainer__precision": "bf16-mixed"}, {"model__encoder__attention_probs_dropout_prob": 0.1}]
)
def test_a_run_that_the_kernels_could_not_serve_is_refused(
    changed: dict[str, Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="compute in float32 and drop no attention weights"):
        fit(["-c", str(tiny(model__cpu_kernels="LLVM", **changed)), "--run", str(tmp_path / "run")])


def test_kernels_for_cpus_are_refused_on_a_gpu() -> None:
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda", 0)), precision="bf16-mixed", world_size=1
    )
    module: Any = SimpleNamespace(compile_blocks=False, flash_attention="FA2", cpu_kernels="LLVM")
    with pytest.raises(UserError, match=r"model\.cpu_kernels is LLVM, whose kernels are for CPUs"):
        check_hardware(trainer, module, SimpleNamespace(static_shapes=False))  # type: ignore[arg-type]


@here
def test_compiled_blocks_have_torchs_kernels(tiny: Callable[..., Path], tmp_path: Path) -> None:
    compiled = {"model__compile": True, "data__static_shapes": True}
    with pytest.raises(UserError, match=r"cpu_kernels is LLVM, but model\.compile leaves no kernels but torch's"):
        fit(["-c", str(tiny(model__cpu_kernels="LLVM", **compiled)), "--run", str(tmp_path / "run")])
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), precision="32-true", world_size=1
    )
    shape, own = EncoderConfig(16, num_hidden_layers=1, num_attention_heads=2), []
    encoder = SimpleNamespace(config=shape, activation_checkpointing=False)
    for compile_blocks in (False, True):
        module: Any = SimpleNamespace(compile_blocks=compile_blocks, cpu_kernels="auto", encoder=encoder)
        own.append(execution(trainer, module)["attention"])
    assert own == ["LLVM kernels", "SDPA by sequence"]


@here
def test_a_run_says_that_it_trains_with_them(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(["-c", str(tiny(model__cpu_kernels="LLVM")), "--run", str(tmp_path / "run")])
    assert "attention by LLVM kernels, products by LLVM kernels" in capsys.readouterr().out

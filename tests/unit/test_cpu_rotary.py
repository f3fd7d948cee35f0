"""The project's own rotation of queries and keys, beside its formula in float64."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pretrain.model.rotary import rotate

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="needs AVX2 and Linux",
)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as projected": lambda parts: parts,
    "a slice of something wider": lambda parts: torch.cat([parts, parts], dim=2)[:, :, : parts.shape[2]],
    "tokens innermost": lambda parts: parts.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other token": lambda parts: parts.repeat_interleave(2, dim=0)[::2],
}


def turned(parts: Tensor, angles: Tensor, count: int, llvm: bool) -> tuple[Tensor, Tensor]:
    """The parts and the gradient of a weighted sum of them."""
    parts = parts.detach().requires_grad_()
    out = torch.stack(rotate(parts, (angles.cos(), angles.sin()), count, llvm))
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad(out, parts, weight)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("heads", "head_size"), [(3, 2), (1, 6), (20, 16), (20, 24), (12, 64), (2, 128)])
@pytest.mark.parametrize(("tokens", "count"), [(1, 2), (31, 1), (33, 2), (100, 3)])
def test_parts_and_gradients_are_those_of_the_formula(
    tokens: int, count: int, heads: int, head_size: int, layout: str
) -> None:
    torch.manual_seed(tokens)
    parts, angles = torch.randn(tokens, 3, heads, head_size), 6.3 * torch.rand(tokens, head_size // 2)
    exact = turned(parts.double(), angles.double(), count, llvm=False)
    for ours, expected in zip(turned(LAYOUTS[layout](parts), angles, count, llvm=True), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_kernel_is_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("pretrain.model.cpu_rotary.cpu_rotate", lambda *given: calls.append(given))
    turned(torch.randn(4, 3, 2, 8), torch.rand(4, 4), 2, llvm=True)
    assert len(calls) == 3  # queries and keys at once, and the gradient of either

"""The project's own matrix products for CPUs, beside torch's in float64."""

import inspect
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from pretrain.model.linear import MIN_ROWS, Linear, linear

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="needs AVX2 and Linux",
)

SHAPES = [(1, 1, 1), (300, 1, 5), (12, 16, 32), (13, 17, 33), (11, 515, 31), (257, 1030, 64), (100, 2500, 900)]


@pytest.fixture(autouse=True)
def small_products_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.model.linear.MIN_MULTIPLICATIONS", 0)


def product(*given: Tensor) -> Tensor:
    from pretrain.model.cpu_linear import product  # needs llvmlite

    return product(*given) if len(given) == 3 else product(*given, None)


def close(ours: Tensor, exact: Tensor, depth: int) -> None:
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-6 * depth**0.5 * 5)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_float64_whatever_is_transposed(shape: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    rows, depth, columns = shape
    left, right = torch.randn(rows, depth), torch.randn(depth, columns)
    added = [torch.randn(columns)] if bias else []
    exact = left.double() @ right.double() + sum(added)
    for x in (left, left.t().contiguous().t()):
        for y in (right, right.t().contiguous().t()):
            close(product(x, y, *added), exact, depth)


def test_parts_of_larger_tensors_and_repeated_rows_are_read_as_they_lie() -> None:
    torch.manual_seed(0)
    large = torch.randn(3, 50, 100)
    parts = (large[0, :40, 3:90], large[1, :, ::2][:, :30].t(), torch.randn(1, 60).expand(20, 60), torch.ones(1, 1))
    for part in (*parts, parts[3].expand(20, 60)):
        for left in (part, part.t()):
            right = torch.randn(left.shape[1], 35)
            close(product(left, right), left.double() @ right.double(), left.shape[1])
            close(product(right.t(), left.t()), right.t().double() @ left.t().double(), left.shape[1])


def test_tiles_at_the_edges_are_whole() -> None:
    for rows in range(1, 30, 3):
        for columns in range(1, 70, 4):
            ours = product(torch.ones(rows, 7), torch.ones(7, columns))
            assert torch.equal(ours, torch.full((rows, columns), 7.0))


def test_what_is_not_finite_stays_in_its_row() -> None:
    x = torch.randn(40, 50)
    clean = product(x, torch.ones(50, 40))
    x[7, 3] = float("nan")
    x[20, 3] = float("inf")
    ours = product(x, torch.ones(50, 40))
    assert ours[7].isnan().all()
    assert ours[20].isinf().all()
    ours[[7, 20]] = clean[[7, 20]]
    assert torch.equal(ours, clean)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(1000, 1100), torch.randn(1100, 70)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(product(left, right))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1)], ids=str)
def test_gradients_are_torchs_and_only_those_that_are_asked_for(frozen: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2 * MIN_ROWS, 70), torch.randn(50, 70), torch.randn(50)]
    gradients = []
    for llvm in (False, True):
        given = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(tensors)]
        out = linear(given[0], given[1], given[2], llvm)
        out.square().sum().backward()
        gradients.append([out, *(x.grad for x in given)])
    for theirs, ours in zip(*gradients, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-3)


def test_other_precisions_few_rows_and_small_products_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(20, 30)
    layer.llvm = True
    monkeypatch.setattr("pretrain.model.cpu_linear.cpu_linear", None)
    few, many = torch.randn(MIN_ROWS - 1, 20), torch.randn(MIN_ROWS, 20)
    assert torch.equal(layer(few), F.linear(few, layer.weight, layer.bias))
    with monkeypatch.context() as patched:
        patched.setattr("pretrain.model.linear.MIN_MULTIPLICATIONS", 1 + many.numel() * 30)
        assert torch.equal(layer(many), F.linear(many, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(many).dtype == torch.bfloat16
    assert layer.double()(many.double()).dtype == torch.float64
    with pytest.raises(TypeError, match="NoneType"):
        layer.float()(many)


def test_what_torch_refuses_or_cannot_hand_over_is_torchs() -> None:
    x, weight = torch.randn(MIN_ROWS, 20), torch.randn(30, 20)
    unchecked = inspect.unwrap(linear)  # shapes are checked in tests only
    for wrong in (torch.randn(30, 21), torch.randn(20, 1)):
        with pytest.raises(RuntimeError):
            unchecked(x, wrong, None, True)
    with pytest.raises(RuntimeError):
        unchecked(x, weight, torch.randn(7), True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(x), mode.from_tensor(weight), None, True).shape == (MIN_ROWS, 30)


def test_compiled_or_computed_again_it_is_the_same() -> None:
    torch.manual_seed(0)
    layer, x = Linear(20, 30), torch.randn(MIN_ROWS, 20)
    layer.llvm = True
    compiled = torch.compile(partial(inspect.unwrap(linear), llvm=True), backend="eager")
    torch.testing.assert_close(compiled(x, layer.weight, layer.bias), layer(x))
    gradients = []
    for again in (False, True):
        layer.zero_grad()
        out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        out.square().sum().backward()
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)

"""Rotation of queries and keys on CPUs with AVX-512 or AVX2: one pass over memory, torch's operators take three."""

import math
from functools import cache

import llvmlite.ir as ir
from jaxtyping import Float
from torch import Tensor

from pretrain.model.vector_code import Compiled, Function, vector

TOKENS = 32
"""Of a task, which one thread does."""

ROTATE = ("next_task", "tokens", "rows", "x", "x_stride", "out", "out_stride", "cos", "sin")


def _write_rotate(kernel: Function, head_size: int) -> None:
    half = head_size // 2
    tokens, x_stride, out_stride = (kernel.integer(name) for name in ("tokens", "x_stride", "out_stride"))
    with (
        kernel.each("next_task", (tokens + TOKENS - 1).divmod(TOKENS)[0]) as task,
        kernel.loop((tokens - task * TOKENS).min(TOKENS)) as i,
    ):
        token = task * TOKENS + i
        cos, sin = ((kernel.array(name) + token * half).load(vector(half)) for name in ("cos", "sin"))
        factor = cos.mixed(cos, [*range(half), *range(half)])
        factor_of_other = (sin * -1.0).mixed(sin, list(range(head_size)))
        x, out = kernel.array("x") + token * x_stride, kernel.array("out") + token * out_stride
        with kernel.loop(kernel.integer("rows") * head_size, head_size) as place:
            row = (x + place).load(vector(head_size))
            other_half = row.mixed(row, [*range(half, head_size), *range(half)])
            (out + place).store(row.times_plus(factor, other_half * factor_of_other))


@cache
def _compiled(head_size: int) -> Compiled:
    module = ir.Module()
    kernel = Function(module, "rotate", ROTATE)
    _write_rotate(kernel, head_size)
    kernel.end()
    return Compiled(module)


def cpu_rotate(
    x: Float[Tensor, "T *rows d"], cos: Float[Tensor, "T half"], sin: Float[Tensor, "T half"], out: Tensor
) -> None:
    """Rotates rows of float32 numbers, pairing i with i + d/2, by the angles of their token.

    Args:
        x: Rows of each token.
        cos: Cosines.
        sin: Sines.
        out: Where the result is written: of the shape of ``x``, and the rows of a token one behind the other.
    """
    head_size = x.shape[-1]
    x, out = x.flatten(1), out.view(len(x), math.prod(x.shape[1:]))
    x, cos, sin = (y if y.stride(1) == 1 else y.contiguous() for y in (x, cos.contiguous(), sin.contiguous()))
    values = {
        "next_task": 0,
        "tokens": len(x),
        "rows": x.shape[1] // head_size,
        "x": x.data_ptr(),
        "x_stride": x.stride(0),
        "out": out.data_ptr(),
        "out_stride": out.stride(0),
        "cos": cos.data_ptr(),
        "sin": sin.data_ptr(),
    }
    _compiled(head_size).run("rotate", ROTATE, values)

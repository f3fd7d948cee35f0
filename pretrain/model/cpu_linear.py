"""Matrix products on CPUs with AVX-512 or AVX2, by kernels of the project's own.

Torch leaves them to MKL, which uses the registers of AVX-512 on Intel's CPUs only; there MKL is the faster one. The
order of loops, and the copies that lie in memory as they are read, are Goto and van de Geijn's ("Anatomy of
high-performance matrix multiplication", ACM TOMS 2008): of the left matrix some rows at a time, which stay in a core's
cache, and of the right one panels of COLUMNS columns. ROWS times COLUMNS of the product are sums in registers.

A number of the product is summed by one thread in a fixed order: results do not depend on the number of threads.
"""

from functools import cache
from typing import Any

import llvmlite.ir as ir
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.vector_code import LANES, REGISTERS, Array, Compiled, Expression, Function, transposed, vector

VECTORS = 2
COLUMNS = LANES * VECTORS
ROWS = 3 * REGISTERS // 8
"""With two registers for each of these, and two for numbers of the right matrix, 26 of 32 are in use, or 14 of 16."""
UNROLLED = 4
DEPTH = 640
"""Products that are summed up in a register, at most, before they are added to what is in memory: a longer sum would be
less exact, and its numbers would leave the cache."""
PANELS = 8
"""Largest number of panels, of ROWS rows each, that a task has of the left matrix."""
PACKED_ROWS = 64
"""Of the right matrix, that a thread copies at a time."""
LINE = 16
"""Numbers in a line of the cache."""
AHEAD = 16
"""How many rows ahead of the copy a row is asked for: each is in another page of memory, so that no cache would
foresee it."""
RIGHT_SIZE = 2**19
"""Numbers of the right matrix that are multiplied with before the next ones are copied, so that they stay in a cache;
more only if so many are in DEPTH of its rows."""

PACK = ("next_task", "columns", "depth", "right", "right_stride", "packed")
MULTIPLY = (
    *("next_task", "next_thread", "scratch", "scratch_size", "rows", "rows_of_task", "columns", "depth", "block"),
    *("left", "left_stride", "packed", "product", "product_stride", "bias", "added"),
)


def _pack_along_depth(
    kernel: Function, width: int, source: Array, stride: Expression, count: Expression, depth: Expression, packed: Array
) -> None:
    """Copies ``count`` rows of length ``depth``, with ``stride`` between two, into panels [depth, width], transposed.

    What is in the last panel beyond ``count`` is any number. Where a register is longer than a row of a panel, the next
    row is written over its end, and behind the last one there must be room.
    """
    whole = depth.divmod(LANES)[0] * LANES
    with kernel.loop(count, width) as panel:
        begin, there = source + panel * stride, packed + panel * depth
        for first in range(0, width, LANES):
            places = [kernel.number(i).min(count - panel - 1) for i in range(first, min(first + LANES, width))]
            rows = [begin + place * stride for place in places]
            with kernel.loop(whole, LANES) as k:
                for j, column in enumerate(transposed([(row + k).load(vector(LANES)) for row in rows])):
                    (there + k * width + (j * width + first)).store(column)
            with kernel.loop(depth - whole) as k:
                for i, row in enumerate(rows):
                    (there + (whole + k) * width + (first + i)).store((row + whole + k).load())


def _pack_across_depth(
    kernel: Function,
    width: int,
    source: Array,
    stride: Expression,
    count: Expression,
    depth: Expression,
    packed: Array,
    panel_depth: Expression,
) -> None:
    """Copies ``depth`` rows of length ``count``, with ``stride`` between two, into panels [panel_depth, width].

    What is in the last panel beyond ``count`` is zero.
    """
    with kernel.loop(depth) as k, kernel.loop(count, width) as panel:
        row, there = source + k * stride + panel, packed + panel * panel_depth + k * width
        for start in range(0, width, LANES):
            (row + stride * AHEAD + start).prefetch()
            numbers = (row + start).load_at((count - panel - start).first_places(LANES))
            (there + start).store(numbers.mixed(numbers, list(range(min(LANES, width - start)))))


def _write_pack(kernel: Function, along_depth: bool) -> None:
    columns, depth, stride = (kernel.integer(name) for name in ("columns", "depth", "right_stride"))
    right, packed = kernel.array("right"), kernel.array("packed")
    if along_depth:
        with kernel.each("next_task", _divided(columns, COLUMNS)) as panel:
            first = panel * COLUMNS
            count = (columns - first).min(COLUMNS)
            _pack_along_depth(kernel, COLUMNS, right + first * stride, stride, count, depth, packed + first * depth)
    else:
        with kernel.each("next_task", _divided(depth, PACKED_ROWS)) as task:
            first = task * PACKED_ROWS
            source, there = right + first * stride, packed + first * COLUMNS
            rows = (depth - first).min(PACKED_ROWS)
            _pack_across_depth(kernel, COLUMNS, source, stride, columns, rows, there, depth)


def _write_multiply(kernel: Function, along_depth: bool) -> None:
    scratch = kernel.array("scratch") + kernel.next("next_thread") * kernel.integer("scratch_size")
    tile, panels = scratch, scratch + ROWS * COLUMNS
    rows, rows_of_task, columns, depth = (kernel.integer(name) for name in ("rows", "rows_of_task", "columns", "depth"))
    block, stride, product_stride = (kernel.integer(name) for name in ("block", "left_stride", "product_stride"))

    with kernel.each("next_task", _divided(rows, rows_of_task)) as task:
        first = task * rows_of_task
        count = (rows - first).min(rows_of_task)
        with kernel.loop(depth, block) as start:
            length = (depth - start).min(block)
            if along_depth:
                source = kernel.array("left") + first * stride + start
                _pack_along_depth(kernel, ROWS, source, stride, count, length, panels)
            else:
                source = kernel.array("left") + start * stride + first
                _pack_across_depth(kernel, ROWS, source, stride, count, length, panels, length)

            with kernel.loop(columns, COLUMNS) as column:
                right = kernel.array("packed") + column * depth + start * COLUMNS
                places = [(columns - column - v * LANES).first_places(LANES) for v in range(VECTORS)]
                with kernel.loop(count, ROWS) as row:
                    product = kernel.array("product") + (first + row) * product_stride + column
                    for r in range(ROWS):  # ask for it now: what is in memory is added last
                        for line in range(0, COLUMNS, LINE):
                            (product + product_stride * r + line).prefetch()
                    sums = _sums_of_products(kernel, panels + row * length, right, length)

                    # A tile at an edge of the product is finished in memory of the thread's own.
                    here = count - row
                    inside = (here > ROWS - 1) & (columns - column > COLUMNS - 1)
                    at_edge = inside.choose(0, here.min(ROWS))
                    out, out_stride = inside.choose_array(product, tile), inside.choose(product_stride, COLUMNS)
                    with kernel.loop(at_edge) as i:
                        for v in range(VECTORS):
                            there = (product + i * product_stride + v * LANES).load_at(places[v])
                            (tile + i * COLUMNS + v * LANES).store(there)
                    later = start + kernel.integer("added") > 0
                    before = later.choose_array(out, kernel.array("bias") + column)
                    before_stride = later.choose(out_stride, 0)
                    for r, of_row in enumerate(sums):
                        for v, sum in enumerate(of_row):
                            number = (before + before_stride * r + v * LANES).load(vector(LANES))
                            (out + out_stride * r + v * LANES).store(sum + number)
                    with kernel.loop(at_edge) as i:
                        for v in range(VECTORS):
                            numbers = (tile + i * COLUMNS + v * LANES).load(vector(LANES))
                            (product + i * product_stride + v * LANES).store_at(places[v], numbers)


def _sums_of_products(kernel: Function, left: Array, right: Array, length: Expression) -> list[list[Expression]]:
    """[length, ROWS] and [length, COLUMNS], multiplied and summed over their length, in registers."""
    sums = [[kernel.variable(kernel.constant(LANES, 0.0)) for _ in range(VECTORS)] for _ in range(ROWS)]

    def add(k: Expression, count: int) -> None:
        for u in range(count):
            lanes = [(right + k * COLUMNS + (u * COLUMNS + v * LANES)).load(vector(LANES)) for v in range(VECTORS)]
            for i in range(ROWS):
                number = (left + k * ROWS + (u * ROWS + i)).load().spread(LANES)
                for v in range(VECTORS):
                    sums[i][v].store(number.times_plus(lanes[v], sums[i][v].load(vector(LANES))))

    whole = length.divmod(UNROLLED)[0] * UNROLLED
    with kernel.loop(whole, UNROLLED) as k:
        add(k, UNROLLED)
    with kernel.loop(length - whole) as k:
        add(whole + k, 1)
    return [[sum.load(vector(LANES)) for sum in of_row] for of_row in sums]


def _divided(count: Expression, size: Expression | int) -> Expression:
    return (count + size - 1).divmod(size)[0]


@cache
def _compiled() -> Compiled:
    module = ir.Module()
    for name, fields, write in (("pack", PACK, _write_pack), ("multiply", MULTIPLY, _write_multiply)):
        for along_depth in (False, True):
            kernel = Function(module, _name(name, along_depth), fields)
            write(kernel, along_depth)
            kernel.end()
    return Compiled(module)


def _name(name: str, along_depth: bool) -> str:
    return f"{name}_{'along' if along_depth else 'across'}_depth"


def product(
    left: Float[Tensor, "rows depth"], right: Float[Tensor, "depth columns"], bias: Float[Tensor, " columns"] | None
) -> Float[Tensor, "rows columns"]:
    """``left @ right + bias``, in float32.

    Args:
        left: A matrix, or a transposed one, of at least one row, column and number.
        right: Likewise.
        bias: What is added to each row.
    """
    (left, left_stride, left_along), (right, right_stride, right_along) = _strided(left), _strided(right.t())
    rows, depth = left.shape
    columns = len(right)
    threads, panels = torch.get_num_threads(), -(-columns // COLUMNS)
    result = left.new_empty(rows, columns)
    padded = left.new_zeros(COLUMNS * panels) if bias is None else F.pad(bias, (0, COLUMNS * panels - columns))
    rows_of_task = ROWS * _panels_of_task(-(-rows // ROWS), threads)
    scratch_size = -(-(ROWS * COLUMNS + rows_of_task * DEPTH) // LANES) * LANES + LANES
    scratch = left.new_empty(threads, scratch_size)
    block = -(-depth // -(-depth // DEPTH))
    together = block * max(1, RIGHT_SIZE // (COLUMNS * panels * block))
    packed = left.new_empty(COLUMNS * panels * min(depth, together))
    for start in range(0, depth, together):
        part = left[:, start : start + together], right[:, start : start + together]
        values = {
            "next_task": 0,
            "next_thread": 0,
            "scratch": scratch.data_ptr(),
            "scratch_size": scratch_size,
            "rows": rows,
            "rows_of_task": rows_of_task,
            "columns": columns,
            "depth": part[0].shape[1],
            "block": block,
            "left": part[0].data_ptr(),
            "left_stride": left_stride,
            "right": part[1].data_ptr(),
            "right_stride": right_stride,
            "packed": packed.data_ptr(),
            "product": result.data_ptr(),
            "product_stride": columns,
            "bias": padded.data_ptr(),
            "added": start,
        }
        _compiled().run(_name("pack", right_along), PACK, values)
        _compiled().run(_name("multiply", left_along), MULTIPLY, values)
    return result


def _panels_of_task(panels: int, threads: int) -> int:
    """So many that all threads end at about the same time; but the right matrix is read anew for each task."""

    def longest(of_task: int) -> float:
        return -(-panels // (of_task * threads)) * (of_task + 0.5)

    return min(range(PANELS, 0, -1), key=longest)


def _strided(vectors: Tensor) -> tuple[Tensor, int, bool]:
    """Vectors [count, depth], the stride that is not 1, and whether they lie along their depth."""
    if vectors.stride(1) != 1 and vectors.stride(0) == 1:
        return vectors, vectors.stride(1), False
    vectors = vectors if vectors.stride(1) == 1 else vectors.contiguous()
    return vectors, vectors.stride(0), True


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return product(x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(gradient, weight, None) if of_x else None,
            product(gradient.t(), x, None) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def cpu_linear(
    x: Float[Tensor, "T K"], weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None
) -> Float[Tensor, "T N"]:
    """See `pretrain.model.linear.linear`."""
    result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result

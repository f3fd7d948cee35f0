"""Variable-length attention on CPUs with AVX-512 or AVX2, by kernels that are compiled when a head size is first used.

Torch's CPU kernel leaves its products to a library that is slow at matrices as narrow as a head (16 or 24 numbers at
ESM-2 8M and 35M). Here a register holds 16 queries, or 8: maxima and sums are register by register, and any head size
fills the registers. The gradients of keys and values are sums over queries, so for them a register holds numbers of a
head. The backward pass computes the weights again from each query's log-sum (Dao 2023, FlashAttention-2, algorithm 2;
but with all keys of a sequence at a time).

One sequence and head are done by one thread in a fixed order: results do not depend on the number of threads.
"""

import math
from functools import cache
from typing import Any

import llvmlite.ir as ir
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.model.vector_code import LANES, REGISTERS, Array, Compiled, Expression, Function, transposed, vector

KEYS = REGISTERS // 4
"""Keys that queries are multiplied with at a time."""
VECTORS = 2 if REGISTERS == 32 else 3
"""Registers of queries side by side: each number of a key that is read serves all."""
QUERIES = LANES * VECTORS
SUMS = KEYS * VECTORS
"""Registers that sums are kept in: 16 of 32, or 12 of 16."""
ROOM = 16
"""Keys are filled up to a multiple of this."""

_ROWS = ("query", "key", "value", "attended")
_GRADIENTS = tuple(f"{name}_gradient" for name in _ROWS[:3])
_COMMON = (
    "next_task",
    "next_thread",
    "scratch",
    "scratch_size",
    "sequences",
    "heads",
    "queries",
    "cu_queries",
    "cu_keys",
)


def _with_strides(*rows: str) -> tuple[str, ...]:
    return (*rows, *(f"{name}_stride" for name in rows))


FORWARD = (*_COMMON, "maxima", "sums", *_with_strides(*_ROWS))
BACKWARD = (*_COMMON, "log_sums", *_with_strides(*_ROWS, "gradient", *_GRADIENTS))


class Kernel(Function):
    """A kernel being written, and the products that it consists of."""

    def __init__(self, module: Any, name: str, fields: tuple[str, ...], head_size: int) -> None:
        super().__init__(module, name, fields)
        self.head_size, self.row_type = head_size, vector(head_size)

    def power_of_two(self) -> Expression:
        """What a product of query and key is to be multiplied with for its weight to be a power of 2."""
        return self.constant(LANES, self.head_size**-0.5 / math.log(2))

    def registers(self, array: Array) -> list[Expression]:
        """Numbers of QUERIES queries."""
        return [(array + v * LANES).load(vector(LANES)) for v in range(VECTORS)]

    def sums(self, count: int, initial: float = 0.0) -> list[list[Array]]:
        """Variables, ``count`` for each of QUERIES queries."""
        return [[self.variable(self.constant(LANES, initial)) for _ in range(VECTORS)] for _ in range(count)]

    def columns_of(self, rows: Array, stride: Expression, count: Expression, columns: Array) -> None:
        """Transposes ``count`` rows, and the last one again as often as it takes, into [head size, QUERIES]."""
        for first in range(0, QUERIES, LANES):
            places = [rows + self.number(first + i).min(count - 1) * stride for i in range(LANES)]
            for start, size in self._pieces():
                filled = self.number(size).first_places(LANES)
                for j, column in enumerate(transposed([(place + start).load_at(filled) for place in places])[:size]):
                    (columns + ((start + j) * QUERIES + first)).store(column)

    def rows_of(self, columns: Array, rows: Array) -> None:
        """Transposes [head size, QUERIES] into [QUERIES, head size]."""
        for first in range(0, QUERIES, LANES):
            for start, size in self._pieces():
                numbers = [(columns + ((start + j) * QUERIES + first)).load(vector(LANES)) for j in range(size)]
                for i, row in enumerate(transposed(numbers)):
                    (rows + ((first + i) * self.head_size + start)).store(row.mixed(row, list(range(size))))

    def _pieces(self) -> list[tuple[int, int]]:
        """Where the part of a head that a register holds begins, and how many numbers it has."""
        return [(start, min(LANES, self.head_size - start)) for start in range(0, self.head_size, LANES)]

    def of_first(self, count: Expression) -> list[Expression]:
        """Which of QUERIES queries are among the first ``count``."""
        return [(count - v * LANES).first_places(LANES) for v in range(VECTORS)]

    def products(self, rows: Array, columns: Array) -> list[list[Expression]]:
        """KEYS rows times [head size, QUERIES]."""
        sums = self.sums(KEYS)
        step = math.gcd(self.head_size, 16)
        with self.loop(self.head_size, step) as start:
            for i in range(step):
                lanes = self.registers(columns + (start + i) * QUERIES)
                for j in range(KEYS):
                    number = (rows + start + (i + j * self.head_size)).load().spread(LANES)
                    _add_products(sums[j], number, lanes)
        return [[sum.load(vector(LANES)) for sum in of_key] for of_key in sums]

    def weighted(self, weights: Array, rows: Array, count: Expression, columns: Array) -> None:
        """``columns`` [head size, QUERIES] = ``rows`` [count, head size] summed by ``weights`` [count, QUERIES]."""
        parts = -(-self.head_size // ((REGISTERS - VECTORS - 1) // VECTORS))
        for part in range(parts):
            places = range(self.head_size * part // parts, self.head_size * (part + 1) // parts)
            sums = self.sums(len(places))
            with self.loop(count) as i:
                lanes = self.registers(weights + i * QUERIES)
                for j, sum in zip(places, sums, strict=True):
                    _add_products(sum, (rows + i * self.head_size + j).load().spread(LANES), lanes)
            for j, sum in zip(places, sums, strict=True):
                for v in range(VECTORS):
                    (columns + (j * QUERIES + v * LANES)).store(sum[v].load(vector(LANES)))

    def add_weighted(
        self, weights: Array, rows: Array, stride: Expression, count: Expression, sums: Array, room: Expression
    ) -> None:
        """Adds to each key's sum [room, head size] the queries' rows by their weights [room, QUERIES]."""
        all_pieces = [(start, vector(size)) for start, size in self._pieces()]
        parts = -(-len(all_pieces) * 4 // SUMS)
        for part in range(parts):
            pieces = all_pieces[len(all_pieces) * part // parts : len(all_pieces) * (part + 1) // parts]
            together = 2 ** int(math.log2(SUMS // len(pieces)))  # keys; ROOM is a multiple
            with self.loop(room, together) as key:
                places = [
                    [(sums + key * self.head_size + (j * self.head_size + start), kind) for start, kind in pieces]
                    for j in range(together)
                ]
                totals = [[self.variable(place.load(kind)) for place, kind in of_key] for of_key in places]
                with self.loop(count) as i:
                    row = [(rows + i * stride + start).load(kind) for start, kind in pieces]
                    for j in range(together):
                        weight = (weights + key * QUERIES + (i + j * QUERIES)).load()
                        for total, piece in zip(totals[j], row, strict=True):
                            _add_products([total], weight.spread(piece.value.type.count), [piece])
                for of_key, its_totals in zip(places, totals, strict=True):
                    for (place, kind), total in zip(of_key, its_totals, strict=True):
                        place.store(total.load(kind))


def _add_products(sums: list[Array], factor: Expression, factors: list[Expression]) -> None:
    for sum, other in zip(sums, factors, strict=True):
        sum.store(factor.times_plus(other, sum.load(other.value.type)))


class Task:
    """One sequence and head: where its rows lie, and memory of its own."""

    def __init__(self, kernel: Kernel, number: Expression, scratch: Array) -> None:
        self._kernel, self._scratch = kernel, scratch
        sequence, self._head = number.divmod(kernel.integer("heads"))
        self._first_query, self.queries = self._span("cu_queries", sequence)
        self._first_key, self.keys = self._span("cu_keys", sequence)
        self.room = (self.keys + (ROOM - 1)).divmod(ROOM)[0] * ROOM

    def of_queries(self, name: str) -> tuple[Array, Expression]:
        """Where its rows of a tensor [queries, heads, head size] begin, and the distance between two."""
        return self._rows(name, self._first_query)

    def of_keys(self, name: str) -> tuple[Array, Expression]:
        """The same of [keys, heads, head size]."""
        return self._rows(name, self._first_key)

    def by_query(self, name: str) -> Array:
        """Where its numbers of a tensor [heads, queries] begin."""
        kernel = self._kernel
        return kernel.array(name) + self._head * kernel.integer("queries") + self._first_query

    def reserve(self, size: Expression | int) -> Array:
        """Memory for ``size`` numbers."""
        reserved, self._scratch = self._scratch, self._scratch + size
        return reserved

    def copy_of_keys(self, name: str) -> Array:
        """Its rows, one behind the other, and the last one again up to ``room``."""
        kernel, (rows, stride) = self._kernel, self.of_keys(name)
        copy = self.reserve(self.room * kernel.head_size)
        with kernel.loop(self.room) as i:
            row = (rows + i.min(self.keys - 1) * stride).load(kernel.row_type)
            (copy + i * kernel.head_size).store(row)
        return copy

    def zeros_of_keys(self) -> Array:
        """A row of zeros for each key, up to ``room``."""
        kernel = self._kernel
        zeros = self.reserve(self.room * kernel.head_size)
        with kernel.loop(self.room) as i:
            (zeros + i * kernel.head_size).store(kernel.constant(kernel.head_size, 0.0))
        return zeros

    def _span(self, bounds: str, sequence: Expression) -> tuple[Expression, Expression]:
        place = self._kernel.array(bounds) + sequence
        first = self._kernel.index(place)
        return first, self._kernel.index(place + 1) - first

    def _rows(self, name: str, first: Expression) -> tuple[Array, Expression]:
        stride = self._kernel.integer(f"{name}_stride")
        return self._kernel.array(name) + first * stride + self._head * self._kernel.head_size, stride


def _scratch_size(head_size: int, max_seqlen: int) -> int:
    """Numbers that a task of either kernel reserves, at most."""
    room = -(-max_seqlen // ROOM) * ROOM
    return (4 * head_size + 2 * QUERIES) * room + (3 * head_size + 1) * QUERIES


def _write_forward(kernel: Kernel, task: Task) -> None:
    d, power = kernel.head_size, kernel.power_of_two()
    keys, values = task.copy_of_keys("key"), task.copy_of_keys("value")
    weights = task.reserve(task.room * QUERIES)
    columns, attended, factors = (task.reserve(QUERIES * size) for size in (d, d, 1))
    query, query_stride = task.of_queries("query")
    out, out_stride = task.of_queries("attended")

    with kernel.loop(task.queries, QUERIES) as start:
        count = (task.queries - start).min(QUERIES)
        kernel.columns_of(query + start * query_stride, query_stride, count, columns)

        (maximum,) = kernel.sums(1, -math.inf)
        with kernel.loop(task.room, KEYS) as key:
            for j, scores in enumerate(kernel.products(keys + key * d, columns)):
                for v in range(VECTORS):
                    (weights + key * QUERIES + (j * QUERIES + v * LANES)).store(scores[v])
                    maximum[v].store(maximum[v].load(vector(LANES)).max(scores[v]))

        shift = [maximum[v].load(vector(LANES)) * power for v in range(VECTORS)]
        (sum,) = kernel.sums(1)
        with kernel.loop(task.keys) as key:
            for v in range(VECTORS):
                place = weights + key * QUERIES + v * LANES
                weight = place.load(vector(LANES)).times_minus(power, shift[v]).exp2()
                place.store(weight)
                sum[v].store(sum[v].load(vector(LANES)) + weight)

        kernel.weighted(weights, values, task.keys, attended)
        kernel.rows_of(attended, columns)
        for v, places in enumerate(kernel.of_first(count)):
            total = sum[v].load(vector(LANES))
            (factors + v * LANES).store(kernel.constant(LANES, 1.0) / total)
            (task.by_query("maxima") + start + v * LANES).store_at(places, shift[v])
            (task.by_query("sums") + start + v * LANES).store_at(places, total)
        with kernel.loop(count) as i:
            row = (columns + i * d).load(kernel.row_type) * (factors + i).load().spread(d)
            (out + (start + i) * out_stride).store(row)


def _write_backward(kernel: Kernel, task: Task) -> None:
    d, scale, power = kernel.head_size, kernel.head_size**-0.5, kernel.power_of_two()
    keys, values = task.copy_of_keys("key"), task.copy_of_keys("value")
    key_sums, value_sums = task.zeros_of_keys(), task.zeros_of_keys()
    weights, of_scores = (task.reserve(task.room * QUERIES) for _ in range(2))
    columns, gradients, query_sums, means = (task.reserve(QUERIES * size) for size in (d, d, d, 1))
    query, query_stride = task.of_queries("query")
    attended, attended_stride = task.of_queries("attended")
    gradient, gradient_stride = task.of_queries("gradient")
    query_gradient, query_gradient_stride = task.of_queries("query_gradient")

    with kernel.loop(task.queries, QUERIES) as start:
        count = (task.queries - start).min(QUERIES)
        queries, of_attended = query + start * query_stride, gradient + start * gradient_stride
        kernel.columns_of(queries, query_stride, count, columns)
        kernel.columns_of(of_attended, gradient_stride, count, gradients)
        with kernel.loop(count) as i:
            row = (attended + (start + i) * attended_stride).load(kernel.row_type)
            (means + i).store((row * (of_attended + i * gradient_stride).load(kernel.row_type)).sum())

        log_sum = [
            (task.by_query("log_sums") + start + v * LANES).load_at(places)
            for v, places in enumerate(kernel.of_first(count))
        ]
        with kernel.loop(task.room, KEYS) as key:
            places = [[key * QUERIES + (j * QUERIES + v * LANES) for v in range(VECTORS)] for j in range(KEYS)]
            for place, scores in zip(places, kernel.products(keys + key * d, columns), strict=True):
                for v in range(VECTORS):
                    (weights + place[v]).store(scores[v].times_minus(power, log_sum[v]).exp2())
            mean = kernel.registers(means)
            for place, of_weights in zip(places, kernel.products(values + key * d, gradients), strict=True):
                for v in range(VECTORS):
                    weight = (weights + place[v]).load(vector(LANES))
                    (of_scores + place[v]).store(weight * (of_weights[v] - mean[v]))

        kernel.add_weighted(weights, of_attended, gradient_stride, count, value_sums, task.room)
        kernel.add_weighted(of_scores, queries, query_stride, count, key_sums, task.room)
        kernel.weighted(of_scores, keys, task.keys, query_sums)
        kernel.rows_of(query_sums, columns)
        with kernel.loop(count) as i:
            row = (columns + i * d).load(kernel.row_type) * scale
            (query_gradient + (start + i) * query_gradient_stride).store(row)

    for name, sums, factor in (("key_gradient", key_sums, scale), ("value_gradient", value_sums, 1.0)):
        rows, stride = task.of_keys(name)
        with kernel.loop(task.keys) as i:
            (rows + i * stride).store((sums + i * d).load(kernel.row_type) * factor)


@cache
def _compiled(head_size: int) -> Compiled:
    module = ir.Module()
    for name, fields, write in (("forward", FORWARD, _write_forward), ("backward", BACKWARD, _write_backward)):
        kernel = Kernel(module, name, fields, head_size)
        scratch = kernel.array("scratch") + kernel.next("next_thread") * kernel.integer("scratch_size")
        with kernel.each("next_task", kernel.integer("sequences") * kernel.integer("heads")) as number:
            write(kernel, Task(kernel, number, scratch))
        kernel.end()
    return Compiled(module)


def _run(name: str, fields: tuple[str, ...], longest: int, tensors: dict[str, Tensor]) -> None:
    threads = torch.get_num_threads()
    queries, heads, head_size = tensors["query"].shape
    size = -(-_scratch_size(head_size, longest) // LANES) * LANES
    tensors = {**tensors, "scratch": torch.empty(threads, size)}
    values = {"scratch_size": size, "sequences": len(tensors["cu_keys"]) - 1, "heads": heads, "queries": queries}
    values |= {"next_task": 0, "next_thread": 0}
    for field, tensor in tensors.items():
        values |= {field: tensor.data_ptr(), f"{field}_stride": tensor.stride(0)}
    _compiled(head_size).run(name, fields, values)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor, longest: int
    ) -> Tensor:
        query, key, value = (_with_heads_in_rows(x) for x in (query, key, value))
        attended = query.new_empty(query.shape)
        maxima, sums = query.new_empty(2, query.shape[1], query.shape[0])
        given = (query, key, value, attended, cu_queries, cu_keys)
        tensors = dict(zip((*_ROWS, "cu_queries", "cu_keys"), given, strict=True))
        _run("forward", FORWARD, longest, {**tensors, "maxima": maxima, "sums": sums})
        ctx.save_for_backward(*tensors.values(), maxima + sums.log2())
        ctx.longest = longest
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # under activation checkpointing they can be read only once
        tensors = dict(zip((*_ROWS, "cu_queries", "cu_keys", "log_sums"), saved, strict=True))
        gradients = {name: x.new_empty(x.shape) for name, x in zip(_GRADIENTS, saved, strict=False)}
        _run("backward", BACKWARD, ctx.longest, {**tensors, "gradient": _with_heads_in_rows(gradient), **gradients})
        return *gradients.values(), None, None, None


def _with_heads_in_rows(x: Tensor) -> Tensor:
    """``x``, or a copy if the numbers of a token's heads do not lie one behind the other."""
    return x if x.stride()[1:] == (x.shape[-1], 1) else x.contiguous()


def cpu_attention(
    query: Float[Tensor, "Q H d"],
    key: Float[Tensor, "T H d"],
    value: Float[Tensor, "T H d"],
    cu_queries: Int[Tensor, " bounds"],
    cu_keys: Int[Tensor, " bounds"],
    longest: int,
) -> Float[Tensor, "Q H d"]:
    """See `pretrain.model.attention.variable_length_attention`; in float32.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        cu_queries: Where the sequences begin in ``query``, and Q last; int32.
        cu_keys: The same of ``key`` and ``value``.
        longest: Keys of the longest sequence, or more.
    """
    attended: Tensor = _Attention.apply(query, key, value, cu_queries, cu_keys, longest)  # type: ignore[no-untyped-call]
    return attended

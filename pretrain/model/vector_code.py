"""Writing code for vector registers in Python, for LLVM to compile in memory: arithmetic, loops, loads and stores.

What is called on an `Expression` is not computed but written down, as an instruction of the function being written.
"""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import torch

from pretrain.model.cpu_kernels import has_avx512

FLOAT, I32, I64, POINTER = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.PointerType()

LANES, REGISTERS = (16, 32) if has_avx512() else (8, 16)
"""Numbers in a register of this CPU, and its registers: those of AVX-512, or of AVX2."""

EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)
"""2^x on [-0.5, 0.5] by its powers, highest first (Moshier, Cephes, ``exp2f``)."""


def vector(size: int) -> Any:
    """The type of ``size`` numbers side by side; LLVM divides it among registers."""
    return ir.VectorType(FLOAT, size)


class Expression:
    """An integer, a float32 number or a vector of them; an operand may also be a constant."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: "Expression | int | float") -> "Expression":
        return self._binary("add", other)

    def __sub__(self, other: "Expression | int | float") -> "Expression":
        return self._binary("sub", other)

    def __mul__(self, other: "Expression | int | float") -> "Expression":
        return self._binary("mul", other)

    def __truediv__(self, other: "Expression | int | float") -> "Expression":
        return self._new(self.builder.fdiv(self.value, self._operand(other)))

    def divmod(self, other: "Expression | int | float") -> "tuple[Expression, Expression]":
        """Quotient and remainder of integers, which are not negative."""
        quotient = self._new(self.builder.sdiv(self.value, self._operand(other)))
        return quotient, self - quotient * other

    def times_plus(self, factor: "Expression", summand: "Expression | int | float") -> "Expression":
        """``self * factor + summand``, rounded once."""
        return self._intrinsic("llvm.fma", self.value.type, [self.value, factor.value, self._operand(summand)])

    def times_minus(self, factor: "Expression", subtrahend: "Expression") -> "Expression":
        """``self * factor - subtrahend``, rounded once."""
        return self.times_plus(factor, self._new(self.builder.fneg(subtrahend.value)))

    def min(self, other: "Expression | int") -> "Expression":
        """The smaller of two integers."""
        bound = self._operand(other)
        return self._new(self.builder.select(self.builder.icmp_signed("<", self.value, bound), self.value, bound))

    def __gt__(self, other: "Expression | int") -> "Expression":
        return self._new(self.builder.icmp_signed(">", self.value, self._operand(other)))

    def __and__(self, other: "Expression") -> "Expression":
        return self._new(self.builder.and_(self.value, other.value))

    def choose(self, then: "Expression | int", otherwise: "Expression | int") -> "Expression":
        """One integer where this condition holds, the other where not."""
        values = [x.value if isinstance(x, Expression) else I64(x) for x in (then, otherwise)]
        return self._new(self.builder.select(self.value, *values))

    def choose_array(self, then: "Array", otherwise: "Array") -> "Array":
        """One place in memory where this condition holds, the other where not."""
        return Array(self.builder, self.builder.select(self.value, then.pointer, otherwise.pointer))

    def max(self, other: "Expression | int | float") -> "Expression":
        """The larger numbers; where ``self`` is NaN, NaN."""
        bound = self._operand(other)
        return self._new(self.builder.select(self.builder.fcmp_ordered(">", bound, self.value), bound, self.value))

    def sum(self) -> "Expression":
        """Of a vector's numbers."""
        values = [ir.Constant(FLOAT, 0.0), self.value]
        return self._intrinsic("llvm.vector.reduce.fadd", FLOAT, values, fastmath=["reassoc"])

    def spread(self, size: int) -> "Expression":
        """A number in every place of a vector."""
        undefined = ir.Constant(ir.VectorType(self.value.type, size), ir.Undefined)
        first = self.builder.insert_element(undefined, self.value, I32(0))
        places = ir.Constant(ir.VectorType(I32, size), [0] * size)
        return self._new(self.builder.shuffle_vector(first, undefined, places))

    def first_places(self, size: int) -> "Expression":
        """Whether a place of a vector is among as many first ones as this integer says."""
        count = self._new(self.builder.trunc(self.min(size).value, I32))
        places = ir.Constant(ir.VectorType(I32, size), list(range(size)))
        return self._new(self.builder.icmp_signed("<", places, count.spread(size).value))

    def mixed(self, other: "Expression", places: list[int]) -> "Expression":
        """A vector of numbers of this one, by their places, and of another, whose places are counted on."""
        places = ir.Constant(ir.VectorType(I32, len(places)), places)
        return self._new(self.builder.shuffle_vector(self.value, other.value, places))

    def _shifted_into_exponent(self, integer: "Expression") -> "Expression":
        """A vector times 2 to the power of ``integer``, which stands in the lowest bits of a vector's numbers."""
        bits = ir.VectorType(I32, self.value.type.count)
        exponent = self.builder.shl(self.builder.bitcast(integer.value, bits), self._constant(bits, 23))
        scaled = self.builder.add(self.builder.bitcast(self.value, bits), exponent)
        return self._new(self.builder.bitcast(scaled, self.value.type))

    def exp2(self) -> "Expression":
        """2 to the power of a vector's numbers, up to 127; 2^-126 where they are smaller."""
        power = self.max(-126.0)
        shifted = power + 1.5 * 2**23  # of this size float32 has no places behind the point
        fraction = power - (shifted - 1.5 * 2**23)
        series = self._new(self._constant(self.value.type, EXP2[0]))
        for coefficient in EXP2[1:]:
            series = series.times_plus(fraction, coefficient)
        return series._shifted_into_exponent(shifted)

    def _new(self, value: Any) -> "Expression":
        return Expression(self.builder, value)

    @staticmethod
    def _constant(kind: Any, number: int | float) -> Any:
        return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)

    def _operand(self, other: "Expression | int | float") -> Any:
        return other.value if isinstance(other, Expression) else self._constant(self.value.type, other)

    def _binary(self, name: str, other: "Expression | int | float") -> "Expression":
        instruction = name if isinstance(self.value.type, ir.IntType) else f"f{name}"
        return self._new(getattr(self.builder, instruction)(self.value, self._operand(other)))

    def _intrinsic(self, name: str, result: Any, values: list[Any], **options: Any) -> "Expression":
        kind = values[-1].type
        name = f"{name}.v{kind.count}f32" if isinstance(kind, ir.VectorType) else f"{name}.f32"
        module = self.builder.module
        signature = ir.FunctionType(result, [value.type for value in values])
        function = module.globals.get(name) or ir.Function(module, signature, name)
        return self._new(self.builder.call(function, values, **options))


def transposed(rows: list[Expression]) -> list[Expression]:
    """The columns of a square matrix, whose size is a power of 2; of its rows, the last may be left out."""
    size = rows[0].value.type.count
    undefined = Expression(rows[0].builder, ir.Constant(vector(size), ir.Undefined))
    rows = rows + [undefined] * (size - len(rows))
    step = 1
    while step < size:  # one bit of the row's number is exchanged for that of the column's
        first = [i + size - step if i & step else i for i in range(size)]
        second = [i + size if i & step else i + step for i in range(size)]
        pairs = [(rows[i & ~step], rows[i | step]) for i in range(size)]
        rows = [a.mixed(b, second if i & step else first) for i, (a, b) in enumerate(pairs)]
        step *= 2
    return rows


class Array:
    """A place in memory; offsets count float32 numbers."""

    def __init__(self, builder: Any, pointer: Any) -> None:
        self.builder, self.pointer = builder, pointer

    def __add__(self, offset: Expression | int) -> "Array":
        index = offset.value if isinstance(offset, Expression) else I64(offset)
        return Array(self.builder, self.builder.gep(self.pointer, [index], source_etype=FLOAT))

    def load(self, kind: Any = FLOAT) -> Expression:
        """The number here; or the vector, or whatever ``kind`` says."""
        return Expression(self.builder, self.builder.load(self.pointer, typ=kind, align=4))

    def store(self, expression: Expression) -> None:
        """Write a number or a vector here."""
        self.builder.store(expression.value, self.pointer, align=4)

    def prefetch(self) -> None:
        """Ask for the cache line here, which need not exist, to be read from later."""
        module, name = self.builder.module, "llvm.prefetch.p0"
        signature = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
        function = module.globals.get(name) or ir.Function(module, signature, name)
        to_be_read, everywhere, data = I32(0), I32(3), I32(1)
        self.builder.call(function, [self.pointer, to_be_read, everywhere, data])

    def load_at(self, places: Expression) -> Expression:
        """A vector's numbers at these places, zero elsewhere; memory is read only there."""
        kind = vector(places.value.type.count)
        zeros = ir.Constant(kind, [0.0] * kind.count)
        arguments = [self.pointer, I32(4), places.value, zeros]
        return Expression(self.builder, self._masked("load", kind, kind, arguments))

    def store_at(self, places: Expression, expression: Expression) -> None:
        """Write a vector's numbers at these places, and nothing elsewhere."""
        arguments = [expression.value, self.pointer, I32(4), places.value]
        self._masked("store", expression.value.type, ir.VoidType(), arguments)

    def _masked(self, name: str, kind: Any, result: Any, arguments: list[Any]) -> Any:
        module, name = self.builder.module, f"llvm.masked.{name}.v{kind.count}f32.p0"
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(module.globals.get(name) or ir.Function(module, signature, name), arguments)


class Function:
    """A function being written, of a pointer to named fields of 64 bits.

    Args:
        module: What it is to be part of.
        name: Its own.
        fields: Theirs, in order.
    """

    def __init__(self, module: Any, name: str, fields: tuple[str, ...]) -> None:
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
        self.builder = ir.IRBuilder(function.append_basic_block())
        self._arguments, self._fields = function.args[0], fields

    def integer(self, name: str) -> Expression:
        """A field that is an integer."""
        return Expression(self.builder, self.builder.load(self._field(name), typ=I64))

    def array(self, name: str) -> Array:
        """A field that is an address."""
        return Array(self.builder, self.builder.load(self._field(name), typ=POINTER))

    def next(self, name: str) -> Expression:
        """The integer in a field, which is then one higher for the next reader, in this thread or another."""
        return Expression(self.builder, self.builder.atomic_rmw("add", self._field(name), I64(1), "monotonic"))

    def index(self, array: Array) -> Expression:
        """An integer of 32 bits in memory."""
        return Expression(self.builder, self.builder.sext(array.load(I32).value, I64))

    def number(self, integer: int) -> Expression:
        """An integer."""
        return Expression(self.builder, I64(integer))

    def constant(self, size: int, number: int | float) -> Expression:
        """The same number everywhere in a vector."""
        return Expression(self.builder, ir.Constant(vector(size), [number] * size))

    def variable(self, initial: Expression) -> Array:
        """What changes in a loop; optimisation makes a register of it."""
        with self.builder.goto_entry_block():
            variable = Array(self.builder, self.builder.alloca(initial.value.type))
        variable.store(initial)
        return variable

    @contextmanager
    def loop(self, stop: Expression | int, step: Expression | int = 1) -> Iterator[Expression]:
        """What is written inside is done for 0, ``step``, ... below ``stop``."""
        index = self.variable(Expression(self.builder, I64(0)))
        with self._while_below(stop, lambda: index.load(I64)) as now:
            yield now
            index.store(now + step)

    @contextmanager
    def each(self, counter: str, stop: Expression) -> Iterator[Expression]:
        """What is written inside is done for every number below ``stop``, by whichever thread counts to it."""
        with self._while_below(stop, lambda: self.next(counter)) as number:
            yield number

    @contextmanager
    def _while_below(self, stop: Expression | int, index: Callable[[], Expression]) -> Iterator[Expression]:
        b = self.builder
        end = stop.value if isinstance(stop, Expression) else I64(stop)
        head, body, after = (b.append_basic_block() for _ in range(3))
        b.branch(head)
        b.position_at_end(head)
        now = index()
        b.cbranch(b.icmp_signed("<", now.value, end), body, after)
        b.position_at_end(body)
        yield now
        b.branch(head)
        b.position_at_end(after)

    def end(self) -> None:
        """Nothing more is written."""
        self.builder.ret_void()

    def _field(self, name: str) -> Any:
        return self.builder.gep(self._arguments, [I64(self._fields.index(name))], source_etype=I64)


class Compiled:
    """A module's functions as machine code for this CPU.

    Args:
        module: What was written.
    """

    def __init__(self, module: Any) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        # Some CPUs' models would halve the registers of AVX-512. Torch can be told to leave them alone.
        width = "-prefer-256-bit" if has_avx512() else "-avx512f"
        features = f"{llvm.get_host_cpu_features().flatten()},{width}"
        machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, opt=3)
        parsed = llvm.parse_assembly(str(module))
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(parsed, passes)
        self._engine = llvm.create_mcjit_compiler(parsed, machine)
        self._engine.finalize_object()
        written = (function.name for function in module.functions if not function.is_declaration)
        self._addresses = {name: self._engine.get_function_address(name) for name in written}

    def run(self, name: str, fields: tuple[str, ...], values: Mapping[str, int]) -> None:
        """Run a function in all of torch's threads, to each of which it passes the same fields.

        Args:
            name: Its name.
            fields: Its fields, as it was written with.
            values: What is in them.
        """
        arguments = (ctypes.c_int64 * len(fields))(*(values[field] for field in fields))
        _in_every_thread()(self._addresses[name], ctypes.addressof(arguments), torch.get_num_threads(), 0)


@cache
def _in_every_thread() -> Any:
    """OpenMP's call that runs a function in all threads of torch's own team: a second one would wait for its cores."""
    call = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return call

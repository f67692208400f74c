"""Compile loops with LLVM, by llvmlite: a function that emits instructions becomes machine code of this process.

A loop is a C function void(int64 *table) for `threads.run_loop`, which runs it on several threads without Python. It is
compiled in a tenth of a second or two, so nothing is kept in files. Whole numbers of the compiled code are `Int`, whose
operators emit instructions; a context manager emits a loop around what its body emits:

    with counting(builder, 0, rows) as row:
        store(builder, load(builder, x, row * LANES, FLOATS), y, row * LANES)

Importing this module imports llvmlite: import modules that need it only when the first product is computed.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Union

import llvmlite.binding as llvm
from llvmlite import ir

from gptq.compute.threads import SHARED

LONG, BYTE = ir.IntType(64), ir.IntType(8)
ARITHMETIC = frozenset(("fadd", "fsub", "fmul", "fdiv", "fcmp"))
_compiling = threading.Lock()
Whole = Union["Int", int]


class Int:
    """A 64-bit integer of the compiled code; // is for numbers that are not negative."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder = builder
        self.value = ir.Constant(LONG, value) if isinstance(value, int) else value

    def _with(self, operation: str, other: Whole) -> "Int":
        second = whole(self.builder, other)
        return Int(self.builder, getattr(self.builder, operation)(self.value, second.value))

    def __add__(self, other: Whole) -> "Int":
        return self._with("add", other)

    def __sub__(self, other: Whole) -> "Int":
        return self._with("sub", other)

    def __mul__(self, other: Whole) -> "Int":
        return self._with("mul", other)

    def __floordiv__(self, other: Whole) -> "Int":
        return self._with("udiv", other)

    def is_below(self, other: Whole) -> Any:
        """self < other, as a condition for `builder.if_then` and `builder.select`."""
        return self.builder.icmp_signed("<", self.value, whole(self.builder, other).value)


def whole(builder: Any, number: Whole) -> Int:
    return number if isinstance(number, Int) else Int(builder, number)


def smaller(a: Int, b: Int) -> Int:
    """min(a, b)."""
    return Int(a.builder, a.builder.select(a.is_below(b), a.value, b.value))


def larger(a: Int, b: Int) -> Int:
    """max(a, b)."""
    return Int(a.builder, a.builder.select(a.is_below(b), b.value, a.value))


@contextmanager
def counting(builder: Any, start: Whole, stop: Whole, step: int = 1) -> Iterator[Int]:
    """for i in range(start, stop, step)."""
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    first, last = whole(builder, start), whole(builder, stop)
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(LONG)
    i.add_incoming(first.value, before)
    builder.cbranch(Int(builder, i).is_below(last), body, after)
    builder.position_at_end(body)
    yield Int(builder, i)
    i.add_incoming((Int(builder, i) + step).value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)


def variable(builder: Any, initial: Any) -> Any:
    """Return a pointer to a variable on the stack, set to `initial`."""
    with builder.goto_entry_block():
        place = builder.alloca(initial.type)
    builder.store(initial, place)
    return place


@contextmanager
def scratch(builder: Any, number: Any, count: Whole) -> Iterator[Any]:
    """Memory for `count` numbers, as a pointer; it is freed after the body."""
    pointer = BYTE.as_pointer()
    take = declare(builder, "malloc", ir.FunctionType(pointer, [LONG]))
    free = declare(builder, "free", ir.FunctionType(ir.VoidType(), [pointer]))
    taken = builder.call(take, [(whole(builder, count) * BYTES_OF[str(number)]).value])
    yield builder.bitcast(taken, number.as_pointer())
    builder.call(free, [taken])


BYTES_OF = {"i8": 1, "i16": 2, "i32": 4, "float": 4, "i64": 8, "double": 8}


def declare(builder: Any, name: str, kind: ir.FunctionType) -> Any:
    """Return a function of C or of LLVM that the module calls."""
    found = builder.module.globals.get(name)
    return ir.Function(builder.module, kind, name) if found is None else found


class Arguments:
    """The table of a loop's arguments, read in the order in which `threads.run_loop` is given them."""

    def __init__(self, builder: Any, table: Any) -> None:
        self.builder, self.table, self.taken = builder, table, SHARED

    def integer(self) -> Int:
        self.taken += 1
        return self._entry(self.taken - 1)

    def integers(self, count: int) -> list[Int]:
        return [self.integer() for _ in range(count)]

    def array(self, number: Any) -> Any:
        """A pointer to the first number of an array."""
        return self.builder.inttoptr(self.integer().value, number.as_pointer())

    def _entry(self, i: int) -> Int:
        return Int(self.builder, self.builder.load(self.builder.gep(self.table, [ir.Constant(LONG, i)])))

    @contextmanager
    def shares(self) -> Iterator[tuple[Int, Int]]:
        """while there are shares: (start, stop) of one. Each thread increments the counter, by an atomic operation."""
        builder = self.builder
        share, end = self._entry(1), self._entry(2)
        head, body, after = (builder.append_basic_block(name) for name in ("next", "share", "end"))
        builder.branch(head)
        builder.position_at_end(head)
        number = Int(builder, builder.atomic_rmw("add", self.table, ir.Constant(LONG, 1), "monotonic"))
        start = number * share
        builder.cbranch(start.is_below(end), body, after)
        builder.position_at_end(body)
        yield start, smaller(start + share, end)
        builder.branch(head)
        builder.position_at_end(after)


def compile_loop(name: str, emit: Callable[[Any, Arguments], None]) -> int:
    """Compile what `emit(builder, arguments)` emits; return the address of the function.

    A product may be fused with the addition that follows it, and is where the CPU can; nothing else is reordered.
    """
    module = ir.Module(name)
    module.triple = llvm.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONG.as_pointer()]), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    emit(builder, Arguments(builder, function.args[0]))
    builder.ret_void()
    for block in function.blocks:
        for instruction in block.instructions:
            if instruction.opname in ARITHMETIC:
                instruction.flags.append("contract")
    with _compiling:
        machine, engine = _engine()
        parsed = llvm.parse_assembly(str(module))
        settings = llvm.create_pipeline_tuning_options(speed_level=3)
        passes = llvm.create_pass_builder(machine, settings)
        passes.getModulePassManager().run(parsed, passes)
        engine.add_module(parsed)
        engine.finalize_object()
        return int(engine.get_function_address(name))


@cache
def _engine() -> tuple[Any, Any]:
    """Return LLVM's description of this CPU, and what holds the compiled code."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3, jit=True)
    return machine, llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)

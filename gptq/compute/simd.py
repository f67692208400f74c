"""Vectors in compiled loops: what numba does not offer, written as LLVM's own instructions.

LLVM's vectorizer does not find these loops. Numbers are 32 bits wide and LANES of them a vector, which any CPU that
LLVM knows can be given; only `dot_pairs` wants AVX-512 with bfloat16 and `dot_shorts` AVX2 (see `matmul.has_pairs` and
`has_shorts`). numba is imported with this module, so modules that need it are imported when their first product is
computed.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
TILE = 16 * LANES  # outputs that loops over packed words take together
AHEAD = 128  # vectors of words that are on their way from memory, 8 KB, so that it never waits; found by trying
TALL, WIDE = 8, 2 * LANES  # of the sums that stay in registers while the pairs of a product go by, 16 vectors
INT, SHORT, FLOAT = ir.IntType(32), ir.IntType(16), ir.FloatType()
INTS, FLOATS, BYTES = (ir.VectorType(number, LANES) for number in (INT, FLOAT, ir.IntType(8)))
SHORTS = ir.VectorType(SHORT, 2 * LANES)


def digest(folder: Path) -> int:
    """Changes with every file in which there are compiled loops, or what they are made of."""
    texts = {file.name: file.read_bytes() for file in sorted(folder.rglob("*.py"))}
    loops = [text for name, text in texts.items() if name == "simd.py" or b"from gptq.compute.simd import" in text]
    return int.from_bytes(hashlib.sha256(b"".join(loops)).digest()[:7])


SOURCES = digest(Path(__file__).parents[1])  # the package, as loops lie in several of its rooms


def compiled(function: Callable[..., Any]) -> Any:
    """Compiled once for each CPU and kept in a file; anew where any loop has changed.

    numba by itself looks for changes in the function's own file only, and what loops are made of lies in others.
    """
    loop: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})(function)
    kept = getattr(getattr(loop, "_cache", None), "_cache_file", None)  # there is none with NUMBA_DISABLE_JIT
    if kept is not None:
        kept._source_stamp = SOURCES
    return loop


def _pointing(context, address, like):  # type: ignore[no-untyped-def]
    """The address of numbers of the same type as `like` as a pointer to them."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), emit


def _claiming(context, counter):  # type: ignore[no-untyped-def]
    """What the counter stands at; no other thread gets the same number."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), emit


pointer: Any = intrinsic(_pointing)
claim: Any = intrinsic(_claiming)


def constants(number: int) -> ir.Constant:
    """LANES times the same integer."""
    return ir.Constant(INTS, [ir.Constant(INT, number)] * LANES)


def data(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    """Where the elements of an array begin."""
    return context.make_array(signature.args[i])(context, builder, arguments[i]).data


def load(builder: Any, array: Any, offset: Any, vector: ir.VectorType) -> Any:
    loaded = builder.load(builder.bitcast(builder.gep(array, [offset]), vector.as_pointer()))
    loaded.align = _alignment(vector)
    return loaded


def load_bytes(builder: Any, array: Any, offset: Any) -> Any:
    """LANES numbers of 8 bits, unsigned, as FLOATS."""
    return builder.uitofp(load(builder, array, offset, BYTES), FLOATS)


def load_scales(builder: Any, array: Any, offset: Any) -> Any:
    """LANES numbers as FLOATS of an array of float32, or of int16 that are the bits of float16 numbers."""
    if array.type.pointee == FLOAT:
        return load(builder, array, offset, FLOATS)
    halves = load(builder, array, offset, ir.VectorType(SHORT, LANES))
    return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), LANES)), FLOATS)


def store(builder: Any, value: Any, array: Any, offset: Any) -> None:
    stored = builder.store(value, builder.bitcast(builder.gep(array, [offset]), value.type.as_pointer()))
    stored.align = _alignment(value.type)


def _alignment(vector: ir.VectorType) -> int:
    """Bytes: of single numbers, as vectors begin at any of them."""
    return {BYTES.element: 1, SHORT: 2}.get(vector.element, 4)


def fetch(builder: Any, array: Any, offset: Any) -> None:
    """Let the CPU bring what lies there, in or out of the array, to its second-level cache while it goes on."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    read, second, as_data = ir.Constant(INT, 0), ir.Constant(INT, 2), ir.Constant(INT, 1)
    builder.call(function, [builder.bitcast(builder.gep(array, [offset]), byte), read, second, as_data])


def splat(builder: Any, number: Any) -> Any:
    """LANES times the same number, which is only known when the loop runs."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(INT, 0))
    return builder.shuffle_vector(one, undefined, constants(0))


def chosen(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    """Those at `places` of the numbers of a and then of b, two vectors of the same type."""
    mask = ir.Constant(ir.VectorType(INT, len(places)), [ir.Constant(INT, place) for place in places])
    return builder.shuffle_vector(a, b, mask)


def unit_lines(builder: Any, words: Any, at: Any, bits: int, ahead: bool = False) -> list[Any]:
    """The `bits` vectors of words that hold 32 codes of LANES outputs; `ahead` sends for those that are read later."""
    steps = [ir.Constant(at.type, j * LANES) for j in range(bits)]
    for step in steps if ahead else ():
        fetch(builder, words, builder.add(builder.add(at, step), ir.Constant(at.type, AHEAD * LANES)))
    return [load(builder, words, builder.add(at, step), INTS) for step in steps]


def paired(bits: int) -> list[int]:
    """Which of a unit's 32 codes, of 2, 3, 4 or 8 bits, lie in the two halves of 32 bits, one pair after the other."""
    if bits == 3:  # those of `tens_of_three`, and the last two by themselves
        pairs = [(ten + i, ten + 5 + i) for ten in (0, 10, 20) for i in range(5)]
        return [code for pair in [*pairs, (30, 31)] for code in pair]
    word, half = 32 // bits, 16 // bits
    return [code for first in range(0, 32, word) for i in range(half) for code in (first + i, first + half + i)]


def tens_of_three(builder: Any, lines: list[Any]) -> list[Any]:
    """32 bits that begin one before a code hold five in each half, from bit 1 in the low and from bit 0 in the high."""
    first, second, third = lines
    begun = [builder.shl(first, constants(1))]
    for low, high, bit in ((first, second, 29), (second, third, 27)):
        begun.append(builder.or_(builder.lshr(low, constants(bit)), builder.shl(high, constants(32 - bit))))
    return begun


def multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """total + a b, rounded once where the CPU can."""
    return _call(builder, "fmuladd", [a, b, total])


def to_nearest(builder: Any, x: Any) -> Any:
    """x rounded to integers, ties to even."""
    return _call(builder, "nearbyint", [x])


def largest_of(builder: Any, numbers: Any) -> Any:
    """The largest of LANES signed integers."""
    return _reduced(builder, "smax", numbers)


def sum_of(builder: Any, numbers: Any) -> Any:
    """The sum of LANES integers."""
    return _reduced(builder, "add", numbers)


def _reduced(builder: Any, name: str, numbers: Any) -> Any:
    kind = ir.FunctionType(INT, [INTS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}i32")
    return builder.call(function, [numbers])


def _call(builder: Any, name: str, arguments: list[Any]) -> Any:
    """One of LLVM's own functions of vectors of float32 or float64, to which their result belongs too."""
    vector = arguments[0].type
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    suffix = f"v{LANES}f{32 if vector.element == FLOAT else 64}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), arguments)


def dot_pairs(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """total + a_0 b_0 + a_1 b_1, where each 32 bits of a and b are two bfloat16 numbers and total is float32.

    Products are exact; subnormal numbers count as zero (Intel's VDPBF16PS).
    """
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS, INTS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [total, a, b])


def dot_shorts(builder: Any, a: Any, b: Any) -> Any:
    """a_0 b_0 + a_1 b_1, where each 32 bits of a and b are two 16-bit integers (Intel's VPMADDWD, AVX2)."""
    eight, sixteen = ir.VectorType(INT, LANES // 2), ir.VectorType(SHORT, LANES)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(eight, [sixteen, sixteen]), "llvm.x86.avx2.pmadd.wd"
    )
    found = []
    for start in (0, LANES // 2):
        places = [*range(start, start + LANES // 2)]
        halves = (builder.bitcast(chosen(builder, x, x, places), sixteen) for x in (a, b))
        found.append(builder.call(function, [*halves]))
    low, high = found
    return chosen(builder, low, high, [*range(LANES)])


def sum_pairs(builder: Any, a: Any, a_step: int, b: Any, depth: Any) -> list[list[Any]]:
    """The sums of products of TALL pairs of a with WIDE pairs of b, over `depth` lines of both.

    Args:
        a, b: where the first lines begin; the next one of a is a_step pairs further, that of b is WIDE.
    Returns:
        where the vectors of sums are kept, for each pair of a those of b's.
    """

    def number(value: int) -> Any:
        return ir.Constant(depth.type, value)

    starts = range(0, WIDE, LANES)
    totals = [[cgutils.alloca_once_value(builder, ir.Constant(FLOATS, None)) for _ in starts] for _ in range(TALL)]
    with cgutils.for_range(builder, depth, intp=depth.type) as loop:
        a_line = builder.gep(a, [builder.mul(loop.index, number(a_step))])
        b_line = builder.gep(b, [builder.mul(loop.index, number(WIDE))])
        b_pairs = [load(builder, b_line, number(v), INTS) for v in starts]
        for i, row in enumerate(totals):
            a_pair = splat(builder, builder.load(builder.gep(a_line, [number(i)])))
            for total, b_pair in zip(row, b_pairs, strict=True):
                builder.store(dot_pairs(builder, a_pair, b_pair, builder.load(total)), total)
    return totals


@compiled
def place_of(output: int, unit: int, units: int, outputs: int, size: int) -> int:
    """Where the numbers of a unit of an output begin, in strips as `layout.Layout` has them, `size` for each."""
    strip = output // TILE * TILE
    return size * (strip * units + unit * min(TILE, outputs - strip) + output - strip)


def _adding_group(context, total, at, sums, x_sum, scale, zero, place, less):  # type: ignore[no-untyped-def]
    """total[at + i] += scale[place + i] (sums[at + i] - (zero[place + i] - less) x_sum) for LANES outputs i."""

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, x_sum, _, _, place, less = arguments
        total, sums, scale, zero = (data(context, builder, signature, arguments, i) for i in (0, 2, 4, 5))
        z = builder.fsub(load_bytes(builder, zero, place), splat(builder, less))
        inside = builder.fsub(load(builder, sums, at, FLOATS), builder.fmul(z, splat(builder, x_sum)))
        before = load(builder, total, at, FLOATS)
        store(builder, multiply_add(builder, load_scales(builder, scale, place), inside, before), total, at)
        return context.get_dummy_value()

    intp, number = types.intp, types.float32
    return types.void(total, intp, sums, number, scale, zero, intp, number), emit


def _leaving(context, total, at, y, y_at):  # type: ignore[no-untyped-def]
    """y[y_at + i] = total[at + i], LANES of them; y is float32, or int16 that get the bits of the nearest bfloat16."""
    as_floats = y.dtype == types.float32

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, y_at = arguments
        total, y = (data(context, builder, signature, arguments, i) for i in (0, 2))
        if as_floats:
            store(builder, load(builder, total, at, FLOATS), y, y_at)
            return context.get_dummy_value()
        bits = load(builder, builder.bitcast(total, INT.as_pointer()), at, INTS)
        odd = builder.and_(builder.lshr(bits, constants(16)), constants(1))  # of two as near, the even one
        rounded = builder.lshr(builder.add(builder.add(bits, constants(0x7FFF)), odd), constants(16))
        store(builder, builder.trunc(rounded, ir.VectorType(SHORT, LANES)), y, y_at)
        return context.get_dummy_value()

    return types.void(total, types.intp, y, types.intp), emit


add_group: Any = intrinsic(_adding_group)
leave: Any = intrinsic(_leaving)


def look_up(builder: Any, table: list[int], places: Any) -> Any:
    """For each 16 bits of `places` (INTS) the number at the place that its low bits name; 2, 4, ... 32 numbers."""
    numbers = ir.Constant(SHORTS, [ir.Constant(SHORT, table[i % len(table)]) for i in range(2 * LANES)])
    return builder.bitcast(permute(builder, numbers, builder.bitcast(places, SHORTS)), INTS)


def permute(builder: Any, numbers: Any, places: Any) -> Any:
    """For each of `places` the number there, whose low five bits count; all are SHORTS."""
    kind = ir.FunctionType(SHORTS, [SHORTS, SHORTS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.hi.512")
    return builder.call(function, [numbers, places])

"""SIMD building blocks for numba: functions that emit LLVM vector instructions.

Loops are vectorized by hand, because LLVM's vectorizer does not vectorize them. A vector has LANES numbers of 32 bits,
whatever the CPU; LLVM splits it into registers. Three functions need a particular CPU: `dot_bfloat16_pairs` and
`permute` need AVX-512 with bfloat16, `dot_int16_pairs` needs AVX2 (see `gptq.compute.cpu_features`). Importing this
module imports numba, which is slow: import modules that need it only when the first product is computed.

Docstrings state what the emitted code computes, in the manner of numpy. `array` is a pointer to the first element,
`offset` counts elements, and a[i : i + LANES] is a vector. Names ending in `_intrinsic` are numba's typing functions:
each returns the signature and the function that emits the code.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache, NullCache
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.extending import intrinsic

LANES = 16  # numbers in a vector
TILE = 16 * LANES  # outputs in a strip of packed words (see `gptq.inference.layout.Layout`)
PREFETCH_DISTANCE = 128  # vectors (8 KiB) between the words in use and those being prefetched; tuned by measurement
TALL, WIDE = 8, 2 * LANES  # rows and columns of the register tile: the sums of a matrix product held in 16 vectors
INT, SHORT, FLOAT = ir.IntType(32), ir.IntType(16), ir.FloatType()
INTS, FLOATS, BYTES = (ir.VectorType(number, LANES) for number in (INT, FLOAT, ir.IntType(8)))
SHORTS = ir.VectorType(SHORT, 2 * LANES)


def source_digest(folder: Path) -> int:
    """Return a hash of all files that contain compiled loops or their building blocks."""
    texts = {file.name: file.read_bytes() for file in sorted(folder.rglob("*.py"))}
    loops = [text for name, text in texts.items() if name == "simd.py" or b"from gptq.compute.simd import" in text]
    return int.from_bytes(hashlib.sha256(b"".join(loops)).digest()[:7], "big")


SOURCE_DIGEST = source_digest(Path(__file__).parents[1])  # of the whole package: several folders contain loops


class _ForgivingCache(FunctionCache):
    """numba's cache of machine code in files, which only saves time: without it, or if it is damaged, code is compiled.

    A damaged file is forgotten, so that the next process finds what this one has compiled.
    """

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)
        except Exception:  # of any type: the files are pickles
            with suppress(Exception):
                self.flush()
            return None

    def save_overload(self, *arguments: Any) -> None:
        with suppress(Exception):  # a full disk, or a folder that became read-only
            super().save_overload(*arguments)


def _cache_of(function: Callable[..., Any]) -> Any:
    """Return a cache of a function's machine code that is valid until any loop's source changes.

    numba itself invalidates its cache only when the function's own file changes; building blocks are in other files.
    Without a folder that can be written, nothing is cached.
    """
    try:
        cache = _ForgivingCache(function)
    except RuntimeError:  # "no locator available"
        return NullCache()
    cache._cache_file._source_stamp = SOURCE_DIGEST
    return cache


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with numba when it is first called, and cache the machine code."""
    loop: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})(function)
    if hasattr(loop, "_cache"):  # not if NUMBA_DISABLE_JIT is set
        loop._cache = _cache_of(function)
    return loop


def compiled_callback(signature: Any, function: Callable[..., Any]) -> Any:
    """Compile a function that C calls, and cache the machine code; `address` of the result is that of the function."""
    callback: Any = CFunc(function, normalize_signature(signature), locals={}, options={})
    callback._cache = _cache_of(function)
    callback.compile()
    return callback


def _pointer_intrinsic(context, address, like):  # type: ignore[no-untyped-def]
    """pointer(address, like): the integer address as a pointer to numbers of the type of `like`.

    ctypes.cast(address, POINTER(type(like)))
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), emit


def _fetch_and_increment_intrinsic(context, counter):  # type: ignore[no-untyped-def]
    """fetch_and_increment(counter): an atomic operation, so that every thread gets another number.

    value = counter[0]; counter[0] += 1; return value
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", arguments[0], ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.CPointer(types.int64)), emit


pointer: Any = intrinsic(_pointer_intrinsic)
fetch_and_increment: Any = intrinsic(_fetch_and_increment_intrinsic)


def constant_vector(number: int) -> ir.Constant:
    """np.full(LANES, number, np.int32), a constant of the compiled code."""
    return ir.Constant(INTS, [ir.Constant(INT, number)] * LANES)


def array_data(context: Any, builder: Any, signature: Any, arguments: Any, i: int) -> Any:
    """Return a pointer to the first element of the intrinsic's argument i, an array."""
    return context.make_array(signature.args[i])(context, builder, arguments[i]).data


def load(builder: Any, array: Any, offset: Any, vector: ir.VectorType) -> Any:
    """array[offset : offset + LANES], as a vector of the given type."""
    loaded = builder.load(builder.bitcast(builder.gep(array, [offset]), vector.as_pointer()))
    loaded.align = _alignment(vector)
    return loaded


def load_bytes(builder: Any, array: Any, offset: Any) -> Any:
    """array[offset : offset + LANES].astype(np.float32), of an array of uint8."""
    return builder.uitofp(load(builder, array, offset, BYTES), FLOATS)


def load_scales(builder: Any, array: Any, offset: Any) -> Any:
    """array[offset : offset + LANES].astype(np.float32), of an array of float32 or of float16 viewed as int16."""
    if array.type.pointee == FLOAT:
        return load(builder, array, offset, FLOATS)
    halves = load(builder, array, offset, ir.VectorType(SHORT, LANES))
    return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), LANES)), FLOATS)


def store(builder: Any, value: Any, array: Any, offset: Any) -> None:
    """array[offset : offset + LANES] = value."""
    stored = builder.store(value, builder.bitcast(builder.gep(array, [offset]), value.type.as_pointer()))
    stored.align = _alignment(value.type)


def _alignment(vector: ir.VectorType) -> int:
    """Return the alignment of a vector in bytes: that of one number, because a vector may begin at any element."""
    return {BYTES.element: 1, SHORT: 2}.get(vector.element, 4)


def prefetch(builder: Any, array: Any, offset: Any) -> None:
    """Start loading the cache line of array[offset] into the second-level cache; the offset may be out of bounds."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    read, second, as_data = ir.Constant(INT, 0), ir.Constant(INT, 2), ir.Constant(INT, 1)
    builder.call(function, [builder.bitcast(builder.gep(array, [offset]), byte), read, second, as_data])


def splat(builder: Any, number: Any) -> Any:
    """np.full(LANES, number): a scalar known at run time, broadcast to all lanes."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(INT, 0))
    return builder.shuffle_vector(one, undefined, constant_vector(0))


def shuffle(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    """np.concatenate([a, b])[places], of two vectors of the same type; `places` is constant."""
    mask = ir.Constant(ir.VectorType(INT, len(places)), [ir.Constant(INT, place) for place in places])
    return builder.shuffle_vector(a, b, mask)


def load_unit(builder: Any, words: Any, at: Any, bits: int, prefetch_later: bool = False) -> list[Any]:
    """Load the words of one unit, 32 codes of each of LANES outputs: a vector per word.

        [words[at + j * LANES : at + (j + 1) * LANES] for j in range(bits)]

    With `prefetch_later` also prefetch the words that lie PREFETCH_DISTANCE vectors further on.
    """
    steps = [ir.Constant(at.type, j * LANES) for j in range(bits)]
    for step in steps if prefetch_later else ():
        prefetch(builder, words, builder.add(builder.add(at, step), ir.Constant(at.type, PREFETCH_DISTANCE * LANES)))
    return [load(builder, words, builder.add(at, step), INTS) for step in steps]


def pair_order(bits: int) -> list[int]:
    """The order in which a unit's 32 codes of 2, 3, 4 or 8 bits are read as pairs.

    A pair is two codes at the same position of the low and of the high half of a 32-bit word, so one shift reads both.
    """
    if bits == 3:  # five pairs in each of `three_bit_windows`; codes 30 and 31 are extracted separately
        pairs = [(ten + i, ten + 5 + i) for ten in (0, 10, 20) for i in range(5)]
        return [code for pair in [*pairs, (30, 31)] for code in pair]
    word, half = 32 // bits, 16 // bits
    return [code for first in range(0, 32, word) for i in range(half) for code in (first + i, first + half + i)]


def three_bit_windows(builder: Any, lines: list[Any]) -> list[Any]:
    """Words of 32 bits in which ten 3-bit codes lie as five pairs; codes 30 and 31 of the unit are left over.

    Window n begins one bit before code 10 n. The low half then holds five codes from its bit 1 on, the high half the
    next five from its bit 0 on.
    """
    first, second, third = lines
    begun = [builder.shl(first, constant_vector(1))]
    for low, high, bit in ((first, second, 29), (second, third, 27)):
        begun.append(builder.or_(builder.lshr(low, constant_vector(bit)), builder.shl(high, constant_vector(32 - bit))))
    return begun


def multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """total + a * b, rounded once if the CPU has fused multiply-add."""
    return _call(builder, "fmuladd", [a, b, total])


def round_half_even(builder: Any, x: Any) -> Any:
    """np.rint(x)."""
    return _call(builder, "nearbyint", [x])


def reduce_max(builder: Any, numbers: Any) -> Any:
    """numbers.max(), of LANES signed integers."""
    return _reduce(builder, "smax", numbers)


def reduce_add(builder: Any, numbers: Any) -> Any:
    """numbers.sum(), of LANES integers."""
    return _reduce(builder, "add", numbers)


def _reduce(builder: Any, name: str, numbers: Any) -> Any:
    """Call one of LLVM's horizontal reductions of LANES integers."""
    kind = ir.FunctionType(INT, [INTS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.{name}.v{LANES}i32")
    return builder.call(function, [numbers])


def _call(builder: Any, name: str, arguments: list[Any]) -> Any:
    """Call an LLVM intrinsic whose arguments and result are vectors of one type, float32 or float64."""
    vector = arguments[0].type
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    suffix = f"v{LANES}f{32 if vector.element == FLOAT else 64}"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.{suffix}"), arguments)


def dot_bfloat16_pairs(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """Multiply pairs of bfloat16 and add up each pair, by Intel's VDPBF16PS.

        total + a[0::2] * b[0::2] + a[1::2] * b[1::2]     a, b: 2 * LANES bfloat16 viewed as INTS; total: FLOATS

    Products are exact; subnormal numbers count as zero.
    """
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS, INTS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512bf16.dpbf16ps.512")
    return builder.call(function, [total, a, b])


def dot_int16_pairs(builder: Any, a: Any, b: Any) -> Any:
    """Multiply pairs of 16-bit integers and add up each pair, by Intel's VPMADDWD of AVX2.

    a[0::2] * b[0::2] + a[1::2] * b[1::2]     a, b: 2 * LANES int16 viewed as INTS; the result is INTS
    """
    eight, sixteen = ir.VectorType(INT, LANES // 2), ir.VectorType(SHORT, LANES)
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(eight, [sixteen, sixteen]), "llvm.x86.avx2.pmadd.wd"
    )
    found = []
    for start in (0, LANES // 2):
        places = [*range(start, start + LANES // 2)]
        halves = (builder.bitcast(shuffle(builder, x, x, places), sixteen) for x in (a, b))
        found.append(builder.call(function, [*halves]))
    low, high = found
    return shuffle(builder, low, high, [*range(LANES)])


def sum_register_tile(builder: Any, a: Any, a_step: int, b: Any, depth: Any) -> list[list[Any]]:
    """Matrix product of one register tile, a (2 depth, TALL) and b (2 depth, WIDE) in bfloat16, sums in float32.

        sums = a.T @ b     (TALL, WIDE)

    Args:
        a, b: pointers to pairs, two consecutive rows of the same column in 32 bits. The next line of pairs is a_step
            pairs further on in a, WIDE pairs in b.
        depth: number of lines of pairs.
    Returns:
        stack slots of the sums: for each of the TALL columns of a, the WIDE / LANES vectors.
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
                builder.store(dot_bfloat16_pairs(builder, a_pair, b_pair, builder.load(total)), total)
    return totals


@compiled
def strip_offset(output: int, unit: int, units: int, outputs: int, size: int) -> int:
    """Offset of an output's numbers of a unit (or group) in a tensor in strips; see `layout.Layout`.

    Args:
        output: a multiple of LANES.
        unit, units: index and number of the units, or groups, of an output.
        outputs: number of all outputs, padded.
        size: numbers per unit and output: `bits` words, or 1 scale or zero.
    """
    strip = output // TILE * TILE
    return size * (strip * units + unit * min(TILE, outputs - strip) + output - strip)


def _add_group_intrinsic(context, total, at, sums, x_sum, scale, zero, place, less):  # type: ignore[no-untyped-def]
    """add_group(...): apply the scale and zero of a group to its sums and add it to the total, for LANES outputs i.

        total[at + i] += scale[place + i] * (sums[at + i] - (zero[place + i] - less) * x_sum)

    `less` is what was subtracted from the codes before they were multiplied by x; x_sum is the sum of the group's x.
    """

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, x_sum, _, _, place, less = arguments
        total, sums, scale, zero = (array_data(context, builder, signature, arguments, i) for i in (0, 2, 4, 5))
        z = builder.fsub(load_bytes(builder, zero, place), splat(builder, less))
        inside = builder.fsub(load(builder, sums, at, FLOATS), builder.fmul(z, splat(builder, x_sum)))
        before = load(builder, total, at, FLOATS)
        store(builder, multiply_add(builder, load_scales(builder, scale, place), inside, before), total, at)
        return context.get_dummy_value()

    intp, number = types.intp, types.float32
    return types.void(total, intp, sums, number, scale, zero, intp, number), emit


def _store_output_intrinsic(context, total, at, y, y_at):  # type: ignore[no-untyped-def]
    """store_output(...): y[y_at : y_at + LANES] = total[at : at + LANES].

    y is float32, or bfloat16 viewed as int16; then the numbers are rounded to nearest, ties to even.
    """
    as_floats = y.dtype == types.float32

    def emit(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        _, at, _, y_at = arguments
        total, y = (array_data(context, builder, signature, arguments, i) for i in (0, 2))
        if as_floats:
            store(builder, load(builder, total, at, FLOATS), y, y_at)
            return context.get_dummy_value()
        bits = load(builder, builder.bitcast(total, INT.as_pointer()), at, INTS)
        odd = builder.and_(builder.lshr(bits, constant_vector(16)), constant_vector(1))  # makes ties round to even
        rounded = builder.lshr(builder.add(builder.add(bits, constant_vector(0x7FFF)), odd), constant_vector(16))
        store(builder, builder.trunc(rounded, ir.VectorType(SHORT, LANES)), y, y_at)
        return context.get_dummy_value()

    return types.void(total, types.intp, y, types.intp), emit


add_group: Any = intrinsic(_add_group_intrinsic)
store_output: Any = intrinsic(_store_output_intrinsic)


def look_up(builder: Any, table: list[int], places: Any) -> Any:
    """np.array(table)[places % len(table)], of 2 * LANES places of 16 bits viewed as INTS, as is the result.

    The table has 2, 4, 8, 16 or 32 numbers of 16 bits; only the low bits of a place count.
    """
    numbers = ir.Constant(SHORTS, [ir.Constant(SHORT, table[i % len(table)]) for i in range(2 * LANES)])
    return builder.bitcast(permute(builder, numbers, builder.bitcast(places, SHORTS)), INTS)


def permute(builder: Any, numbers: Any, places: Any) -> Any:
    """numbers[places % 32], all SHORTS, by Intel's VPERMW of AVX-512."""
    kind = ir.FunctionType(SHORTS, [SHORTS, SHORTS])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.hi.512")
    return builder.call(function, [numbers, places])

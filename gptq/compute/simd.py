"""SIMD building blocks of compiled loops: functions that emit LLVM vector instructions.

Loops are vectorized by hand, because LLVM's vectorizer does not vectorize them. A vector has LANES numbers of 32 bits,
whatever the CPU; LLVM splits it into registers. Three functions need a particular CPU: `dot_bfloat16_pairs` and
`permute` need AVX-512 with bfloat16, `dot_int16_pairs` needs AVX2 (see `gptq.compute.cpu_features`). Loops are compiled
by `gptq.compute.machine_code`.

Docstrings state what the emitted code computes, in the manner of numpy. `array` is a pointer to the first element,
`offset` counts elements, and a[i : i + LANES] is a vector.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

from gptq.compute.machine_code import BYTE, Int, Whole, counting, declare, larger, smaller, variable, whole

LANES = 16  # numbers in a vector
TILE = 16 * LANES  # outputs in a strip of packed words (see `gptq.inference.layout.Layout`)
PREFETCH_DISTANCE = 128  # vectors (8 KiB) between the words in use and those being prefetched; tuned by measurement
TALL, WIDE = 8, 2 * LANES  # rows and columns of the register tile: the sums of a matrix product held in 16 vectors
INT, SHORT, FLOAT = ir.IntType(32), ir.IntType(16), ir.FloatType()
INTS, FLOATS, BYTES = (ir.VectorType(number, LANES) for number in (INT, FLOAT, BYTE))
SHORTS = ir.VectorType(SHORT, 2 * LANES)


def constant_vector(number: int) -> ir.Constant:
    """np.full(LANES, number, np.int32), a constant of the compiled code."""
    return ir.Constant(INTS, [ir.Constant(INT, number)] * LANES)


def element(builder: Any, array: Any, offset: Whole) -> Any:
    """&array[offset]."""
    return builder.gep(array, [whole(builder, offset).value])


def load(builder: Any, array: Any, offset: Whole, vector: ir.VectorType) -> Any:
    """array[offset : offset + LANES], as a vector of the given type."""
    loaded = builder.load(builder.bitcast(element(builder, array, offset), vector.as_pointer()))
    loaded.align = _alignment(vector)
    return loaded


def load_bytes(builder: Any, array: Any, offset: Whole) -> Any:
    """array[offset : offset + LANES].astype(np.float32), of an array of uint8."""
    return builder.uitofp(load(builder, array, offset, BYTES), FLOATS)


def load_scales(builder: Any, array: Any, offset: Whole) -> Any:
    """array[offset : offset + LANES].astype(np.float32), of an array of float32 or of float16 viewed as int16."""
    if array.type.pointee == FLOAT:
        return load(builder, array, offset, FLOATS)
    halves = load(builder, array, offset, ir.VectorType(SHORT, LANES))
    return builder.fpext(builder.bitcast(halves, ir.VectorType(ir.HalfType(), LANES)), FLOATS)


def store(builder: Any, value: Any, array: Any, offset: Whole) -> None:
    """array[offset : offset + LANES] = value."""
    stored = builder.store(value, builder.bitcast(element(builder, array, offset), value.type.as_pointer()))
    stored.align = _alignment(value.type)


def _alignment(vector: ir.VectorType) -> int:
    """Return the alignment of a vector in bytes: that of one number, because a vector may begin at any element."""
    return {BYTES.element: 1, SHORT: 2}.get(vector.element, 4)


def prefetch(builder: Any, array: Any, offset: Whole) -> None:
    """Start loading the cache line of array[offset] into the second-level cache; the offset may be out of bounds."""
    byte = BYTE.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
    function = declare(builder, "llvm.prefetch.p0i8", kind)
    read, second, as_data = ir.Constant(INT, 0), ir.Constant(INT, 2), ir.Constant(INT, 1)
    builder.call(function, [builder.bitcast(element(builder, array, offset), byte), read, second, as_data])


def splat(builder: Any, number: Any) -> Any:
    """np.full(LANES, number): a scalar known at run time, broadcast to all lanes."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(INT, 0))
    return builder.shuffle_vector(one, undefined, constant_vector(0))


def shuffle(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    """np.concatenate([a, b])[places], of two vectors of the same type; `places` is constant."""
    mask = ir.Constant(ir.VectorType(INT, len(places)), [ir.Constant(INT, place) for place in places])
    return builder.shuffle_vector(a, b, mask)


def load_unit(builder: Any, words: Any, at: Int, bits: int, prefetch_later: bool = False) -> list[Any]:
    """Load the words of one unit, 32 codes of each of LANES outputs: a vector per word.

        [words[at + j * LANES : at + (j + 1) * LANES] for j in range(bits)]

    With `prefetch_later` also prefetch the words that lie PREFETCH_DISTANCE vectors further on.
    """
    steps = [at + j * LANES for j in range(bits)]
    for step in steps if prefetch_later else ():
        prefetch(builder, words, step + PREFETCH_DISTANCE * LANES)
    return [load(builder, words, step, INTS) for step in steps]


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
    return builder.call(declare(builder, f"llvm.vector.reduce.{name}.v{LANES}i32", kind), [numbers])


def _call(builder: Any, name: str, arguments: list[Any]) -> Any:
    """Call an LLVM intrinsic whose arguments and result are vectors of one type, float32 or float64."""
    vector = arguments[0].type
    kind = ir.FunctionType(vector, [vector] * len(arguments))
    suffix = f"v{LANES}f{32 if vector.element == FLOAT else 64}"
    return builder.call(declare(builder, f"llvm.{name}.{suffix}", kind), arguments)


def dot_bfloat16_pairs(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """Multiply pairs of bfloat16 and add up each pair, by Intel's VDPBF16PS.

        total + a[0::2] * b[0::2] + a[1::2] * b[1::2]     a, b: 2 * LANES bfloat16 viewed as INTS; total: FLOATS

    Products are exact; subnormal numbers count as zero.
    """
    kind = ir.FunctionType(FLOATS, [FLOATS, INTS, INTS])
    return builder.call(declare(builder, "llvm.x86.avx512bf16.dpbf16ps.512", kind), [total, a, b])


def dot_int16_pairs(builder: Any, a: Any, b: Any) -> Any:
    """Multiply pairs of 16-bit integers and add up each pair, by Intel's VPMADDWD of AVX2.

    a[0::2] * b[0::2] + a[1::2] * b[1::2]     a, b: 2 * LANES int16 viewed as INTS; the result is INTS
    """
    eight, sixteen = ir.VectorType(INT, LANES // 2), ir.VectorType(SHORT, LANES)
    function = declare(builder, "llvm.x86.avx2.pmadd.wd", ir.FunctionType(eight, [sixteen, sixteen]))
    found = []
    for start in (0, LANES // 2):
        places = [*range(start, start + LANES // 2)]
        halves = (builder.bitcast(shuffle(builder, x, x, places), sixteen) for x in (a, b))
        found.append(builder.call(function, [*halves]))
    low, high = found
    return shuffle(builder, low, high, [*range(LANES)])


def sum_register_tile(builder: Any, a: Any, a_step: int, b: Any, depth: Int) -> list[list[Any]]:
    """Matrix product of one register tile, a (2 depth, TALL) and b (2 depth, WIDE) in bfloat16, sums in float32.

        sums = a.T @ b     (TALL, WIDE)

    Args:
        a, b: pointers to pairs, two consecutive rows of the same column in 32 bits. The next line of pairs is a_step
            pairs further on in a, WIDE pairs in b.
        depth: number of lines of pairs.
    Returns:
        stack slots of the sums: for each of the TALL columns of a, the WIDE / LANES vectors.
    """

    starts = range(0, WIDE, LANES)
    totals = [[variable(builder, ir.Constant(FLOATS, None)) for _ in starts] for _ in range(TALL)]
    with counting(builder, 0, depth) as line:
        b_pairs = [load(builder, b, line * WIDE + v, INTS) for v in starts]
        for i, row in enumerate(totals):
            a_pair = splat(builder, builder.load(element(builder, a, line * a_step + i)))
            for total, b_pair in zip(row, b_pairs, strict=True):
                builder.store(dot_bfloat16_pairs(builder, a_pair, b_pair, builder.load(total)), total)
    return totals


def strip_offset(output: Int, unit: Whole, units: Int, outputs: Int, size: int) -> Int:
    """Offset of an output's numbers of a unit (or group) in a tensor in strips; see `layout.Layout`.

    Args:
        output: a multiple of LANES.
        unit, units: index and number of the units, or groups, of an output.
        outputs: number of all outputs, padded.
        size: numbers per unit and output: `bits` words, or 1 scale or zero.
    """
    strip = output // TILE * TILE
    return (strip * units + smaller(outputs - strip, whole(output.builder, TILE)) * unit + output - strip) * size


@contextmanager
def parts_of_strips(start: Int, stop: Int) -> Iterator[tuple[Int, Int]]:
    """for each strip that holds some of the outputs from `start` to `stop`: the first of them, and their number."""
    builder = start.builder
    with counting(builder, start // TILE, (stop + (TILE - 1)) // TILE) as strip:
        low = larger(strip * TILE, start)
        yield low, smaller(strip * TILE + TILE, stop) - low


def fill_with_zeros(builder: Any, array: Any, count: Whole, vector: ir.VectorType) -> None:
    """array[:count] = 0; `count` is a multiple of LANES."""
    with counting(builder, 0, count, LANES) as i:
        store(builder, ir.Constant(vector, None), array, i)


def sum_in_order(builder: Any, numbers: Any) -> Any:
    """The sum of a vector's numbers, added one after the other to zero."""
    total = ir.Constant(numbers.type.element, 0.0)
    for i in range(numbers.type.count):
        total = builder.fadd(total, builder.extract_element(numbers, ir.Constant(INT, i)))
    return total


def add_group(
    builder: Any, total: Any, at: Int, sums: Any, x_sum: Any, scale: Any, zero: Any, place: Int, less: float
) -> None:
    """Apply the scale and zero of a group to its sums and add it to the total, for LANES outputs i.

        total[at + i] += scale[place + i] * (sums[at + i] - (zero[place + i] - less) * x_sum)

    `less` is what was subtracted from the codes before they were multiplied by x; x_sum is the sum of the group's x.
    """
    z = builder.fsub(load_bytes(builder, zero, place), splat(builder, ir.Constant(FLOAT, less)))
    inside = builder.fsub(load(builder, sums, at, FLOATS), builder.fmul(z, splat(builder, x_sum)))
    before = load(builder, total, at, FLOATS)
    store(builder, multiply_add(builder, load_scales(builder, scale, place), inside, before), total, at)


def store_output(builder: Any, total: Any, at: Int, y: Any, y_at: Int) -> None:
    """y[y_at : y_at + LANES] = total[at : at + LANES].

    y is float32, or bfloat16 viewed as int16; then the numbers are rounded to nearest, ties to even.
    """
    if y.type.pointee == FLOAT:
        store(builder, load(builder, total, at, FLOATS), y, y_at)
        return
    bits = load(builder, builder.bitcast(total, INT.as_pointer()), at, INTS)
    odd = builder.and_(builder.lshr(bits, constant_vector(16)), constant_vector(1))  # makes ties round to even
    rounded = builder.lshr(builder.add(builder.add(bits, constant_vector(0x7FFF)), odd), constant_vector(16))
    store(builder, builder.trunc(rounded, ir.VectorType(SHORT, LANES)), y, y_at)


def look_up(builder: Any, table: list[int], places: Any) -> Any:
    """np.array(table)[places % len(table)], of 2 * LANES places of 16 bits viewed as INTS, as is the result.

    The table has 2, 4, 8, 16 or 32 numbers of 16 bits; only the low bits of a place count.
    """
    numbers = ir.Constant(SHORTS, [ir.Constant(SHORT, table[i % len(table)]) for i in range(2 * LANES)])
    return builder.bitcast(permute(builder, numbers, builder.bitcast(places, SHORTS)), INTS)


def permute(builder: Any, numbers: Any, places: Any) -> Any:
    """numbers[places % 32], all SHORTS, by Intel's VPERMW of AVX-512."""
    kind = ir.FunctionType(SHORTS, [SHORTS, SHORTS])
    return builder.call(declare(builder, "llvm.x86.avx512.permvar.hi.512", kind), [numbers, places])

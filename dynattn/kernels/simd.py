"""What the CPU kernels are made of: vectors of numbers in numba, and a product of small matrices within registers.

    from dynattn.kernels.simd import exp2, load, multiply_add, store
    store(out, (n, t), exp2(load(logits, (n, t)) - top))           # as many numbers as a register holds, inside @njit

A `Vector` is a value like any other: + - * / with vectors and numbers, and the functions below. It says what LLVM does
not find by itself, and needs no compiler on the machine: LLVM's vector types go to the code generator that numba has.
An array that is read or written by vectors has contiguous rows, whole multiples of a register long (`padded`).
"""

import operator
from collections.abc import Callable
from contextlib import suppress
from math import factorial, log
from pathlib import Path

from llvmlite import binding, ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, overload, register_model

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set, and without a compiler there is no kernel")


def forget_stale_code(cache: str | Path) -> None:
    """Remove what numba keeps of kernels when any of their files is newer: it looks at the caller's file only."""
    folder = Path(__file__).parent
    newest = max(path.stat().st_mtime for path in (folder / "simd.py", *folder.glob("*_numba.py")))
    for index in Path(cache).glob("*.nbi"):
        if index.stat().st_mtime < newest:
            index.unlink(missing_ok=True)


def cache_folder() -> str | None:
    """Where numba keeps the compiled code of this folder; None where it finds no place: then each process compiles."""
    try:
        return njit(cache=True)(lambda: None)._cache.cache_path
    except RuntimeError:
        return None


CACHE = cache_folder()
if CACHE:
    with suppress(OSError):  # another process may be at it
        forget_stale_code(CACHE)

REGISTER_BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32
LANES = REGISTER_BYTES // 4  # float32 numbers in a register; float64 has half as many, so the same lengths fit
OPTIONS = {"nogil": True, "cache": bool(CACHE), "fastmath": {"contract"}}  # a * b + c may become one step


def compiled(function: Callable) -> Callable:
    """Compile a kernel, or a part of one.

    The width of a register is compiled in. It is also in the name under which numba keeps the code: processors of
    another kind may share the folder.
    """
    function.__qualname__ += f"_{REGISTER_BYTES}"
    return njit(**OPTIONS)(function)


@compiled
def padded(length: int) -> int:
    """The next whole multiple of a register's float32 numbers."""
    return -(-length // LANES) * LANES


# ---------------------------------------------------------------------------------------------------------------------
# Vectors
# ---------------------------------------------------------------------------------------------------------------------


class Vector(types.Type):
    """A register full of float32 or float64."""

    def __init__(self, dtype: types.Float):
        self.dtype, self.lanes = dtype, REGISTER_BYTES * 8 // dtype.bitwidth
        super().__init__(f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(manager.lookup(kind.dtype).get_value_type(), kind.lanes))


def _filled(context, builder, kind: Vector, number_type: types.Type, number: ir.Value) -> ir.Value:
    """A vector of one number."""
    number = context.cast(builder, number, number_type, kind.dtype)
    vector = ir.Constant(context.get_value_type(kind), ir.Undefined)
    vector = builder.insert_element(vector, number, ir.IntType(32)(0))
    return builder.shuffle_vector(
        vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), kind.lanes), [0] * kind.lanes)
    )


def _constant(context, kind: Vector, numbers) -> ir.Constant:
    """A vector of known numbers."""
    return ir.Constant(context.get_value_type(kind), [float(number) for number in numbers])


def _both(context, builder, sig, values) -> list[ir.Value]:
    """Two operands as vectors, whichever of them is a number."""
    kind = sig.return_type
    return [
        value if isinstance(given, Vector) else _filled(context, builder, kind, given, value)
        for given, value in zip(sig.args, values, strict=True)
    ]


def _arithmetic(symbol, instruction: str) -> None:
    """Teach numba an operator between vectors and numbers."""

    @infer_global(symbol)
    class Typing(AbstractTemplate):
        def generic(self, arguments, _):
            kinds = [kind for kind in arguments if isinstance(kind, Vector)]
            if len(arguments) == 2 and kinds and all(isinstance(a, types.Number) or a == kinds[0] for a in arguments):
                return signature(kinds[0], *arguments)

    def lower(context, builder, sig, values):
        return getattr(builder, instruction)(*_both(context, builder, sig, values), flags=("contract",))

    for left, right in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, left, right)(lower)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _arithmetic(_symbol, _instruction)


def _address(context, builder, array_type, array, index_type, index) -> ir.Value:
    """A pointer to an element, for an index that is a number or a pair."""
    view = context.make_array(array_type)(context, builder, array)
    indices = cgutils.unpack_tuple(builder, index) if isinstance(index_type, types.BaseTuple) else [index]
    kinds = list(index_type) if isinstance(index_type, types.BaseTuple) else [index_type]
    indices = [context.cast(builder, i, kind, types.intp) for i, kind in zip(indices, kinds, strict=True)]
    offset = ir.Constant(ir.IntType(64), 0)
    for i, stride in zip(indices, cgutils.unpack_tuple(builder, view.strides), strict=True):
        offset = builder.add(offset, builder.mul(i, stride))
    start = builder.bitcast(view.data, ir.IntType(8).as_pointer())
    return builder.gep(start, [offset])


@intrinsic
def lanes_of(typing, array):
    """How many numbers of an array's dtype a register holds: known when compiled."""
    lanes = Vector((array[0] if isinstance(array, types.BaseTuple) else array).dtype).lanes
    return types.intp(array), lambda context, builder, sig, values: ir.Constant(ir.IntType(64), lanes)


@intrinsic
def load(typing, array, index):
    """The vector that starts at array[index]; index a number, or (row, column)."""
    kind = Vector(array.dtype)

    def generate(context, builder, sig, values):
        pointer = _address(context, builder, array, values[0], index, values[1])
        value = builder.load(builder.bitcast(pointer, context.get_value_type(kind).as_pointer()))
        value.align = array.dtype.bitwidth // 8
        return value

    return kind(array, index), generate


@intrinsic
def store(typing, array, index, vector):
    """Write a vector to array[index] and what follows."""

    def generate(context, builder, sig, values):
        pointer = _address(context, builder, array, values[0], index, values[1])
        done = builder.store(values[2], builder.bitcast(pointer, values[2].type.as_pointer()))
        done.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, index, vector), generate


@intrinsic
def ramp(typing, array, start, step):
    """start, start + step, start + 2 step, ... in the dtype of an array."""
    kind = Vector(array.dtype)

    def generate(context, builder, sig, values):
        begin, by = (_filled(context, builder, kind, sig.args[n], values[n]) for n in (1, 2))
        return builder.fadd(begin, builder.fmul(by, _constant(context, kind, range(kind.lanes))))

    return kind(array, start, step), generate


@intrinsic
def leading(typing, vector, count):
    """The first `count` numbers of a vector, zeros behind them."""

    def generate(context, builder, sig, values):
        count_as_float = builder.sitofp(values[1], context.get_value_type(vector.dtype))
        count_vector = _filled(context, builder, vector, vector.dtype, count_as_float)
        inside = builder.fcmp_ordered("<", _constant(context, vector, range(vector.lanes)), count_vector)
        return builder.select(inside, values[0], _constant(context, vector, [0] * vector.lanes))

    return vector(vector, types.intp), generate


@intrinsic
def maximum(typing, one, other):
    """The larger of two numbers in every lane; where one is NaN, `one`."""

    def generate(context, builder, sig, values):
        left, right = _both(context, builder, sig, values)
        return builder.select(builder.fcmp_ordered("<", left, right), right, left)

    return one(one, other), generate


@intrinsic
def where_at_least(typing, x, y, yes, no):
    """`yes` in the lanes where x >= y, else `no`, also where one of them is NaN; all four are vectors."""

    def generate(context, builder, sig, values):
        return builder.select(builder.fcmp_ordered(">=", values[0], values[1]), values[2], values[3])

    return x(x, x, x, x), generate


@intrinsic
def bits_at_least(typing, x, y):
    """A number whose bit n tells whether x >= y in lane n."""

    def generate(context, builder, sig, values):
        bits = builder.bitcast(builder.fcmp_ordered(">=", *values), ir.IntType(x.lanes))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(x, x), generate


@intrinsic
def _floor(typing, vector):
    def generate(context, builder, sig, values):
        kind = values[0].type
        name = f"llvm.floor.v{vector.lanes}f{vector.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), name)
        return builder.call(function, values)

    return vector(vector), generate


@intrinsic
def _power_of_two(typing, vector):
    """2^x of whole numbers, by writing them into the exponents."""
    bits, mantissa = vector.dtype.bitwidth, {32: 23, 64: 52}[vector.dtype.bitwidth]

    def generate(context, builder, sig, values):
        kind = ir.VectorType(ir.IntType(bits), vector.lanes)
        bias, shift = (ir.Constant(kind, [n] * vector.lanes) for n in (2 ** (bits - mantissa - 2) - 1, mantissa))
        exponent = builder.add(builder.fptosi(values[0], kind), bias)
        return builder.bitcast(builder.shl(exponent, shift), values[0].type)

    return vector(vector), generate


@intrinsic
def shifted(typing, before, now):
    """A vector one place up: the last number of `before`, then all but the last of `now`."""

    def generate(context, builder, sig, values):
        places = list(range(now.lanes - 1, 2 * now.lanes - 1))
        return builder.shuffle_vector(*values, ir.Constant(ir.VectorType(ir.IntType(32), now.lanes), places))

    return now(before, now), generate


@intrinsic(prefer_literal=True)
def _precise(typing, vector):
    """Whether a vector's numbers are float64: known when compiled, so that a branch on it costs nothing."""
    double = vector.dtype.bitwidth == 64
    return types.boolean(vector), lambda context, builder, sig, values: ir.Constant(ir.IntType(1), int(double))


def _by_halves(vector: Vector, join: Callable) -> tuple:
    """What an intrinsic is that makes one number of a vector: join(builder, x, y) of its halves, and so on."""

    def generate(context, builder, sig, values):
        value, lanes = values[0], vector.lanes
        while lanes > 1:
            lanes //= 2
            index = lambda numbers: ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(numbers))  # noqa: E731, B023
            low, high = (builder.shuffle_vector(value, value, index(range(s, s + lanes))) for s in (0, lanes))
            value = join(builder, low, high)
        return builder.extract_element(value, ir.IntType(32)(0))

    return vector.dtype(vector), generate


@intrinsic
def total(typing, vector):
    """The sum of a vector's numbers."""
    return _by_halves(vector, lambda builder, x, y: builder.fadd(x, y))


@intrinsic
def largest(typing, vector):
    """The largest of a vector's numbers."""
    return _by_halves(vector, lambda builder, x, y: builder.select(builder.fcmp_ordered("<", x, y), y, x))


SERIES = tuple(log(2) ** n / factorial(n) for n in range(14))  # of 2^y; the next term is below half a last digit


@compiled
def exp2(x):
    """2^x of a vector, x at most 127, to the last digit: a whole power of two times the series on [-1/2, 1/2].

    Below the smallest normal number it stays there; NaN stays NaN.
    """
    x = maximum(x, -1022.0 if _precise(x) else -126.0)
    whole = _floor(x + 0.5)
    y = x - whole
    if _precise(x):
        high = y * SERIES[13] + SERIES[12]
        high = ((high * y + SERIES[11]) * y + SERIES[10]) * y + SERIES[9]
        high = ((high * y + SERIES[8]) * y + SERIES[7]) * y + SERIES[6]
    else:
        high = y * SERIES[7] + SERIES[6]
    low = ((high * y + SERIES[5]) * y + SERIES[4]) * y + SERIES[3]
    low = ((low * y + SERIES[2]) * y + SERIES[1]) * y + SERIES[0]
    return low * _power_of_two(whole)


# ---------------------------------------------------------------------------------------------------------------------
# Matrices; and some rows of one, wherever they lie: (matrix, numbers of rows)
# ---------------------------------------------------------------------------------------------------------------------


def shape_of(matrix):
    """Rows and columns of a matrix, or of some rows of one."""


@overload(shape_of)
def _shape_of(matrix):
    if isinstance(matrix, types.BaseTuple):
        return lambda matrix: (matrix[1].size, matrix[0].shape[1])
    return lambda matrix: matrix.shape


def _rows(context, builder, kind, value) -> tuple[Callable[[ir.Value], ir.Value], ir.Value]:
    """A function that points to a row, and the stride along a row."""
    numbers = None
    if isinstance(kind, types.BaseTuple):
        (kind, kind_of_numbers), (value, numbers) = kind, cgutils.unpack_tuple(builder, value)
    view = context.make_array(kind)(context, builder, value)
    down, along = cgutils.unpack_tuple(builder, view.strides)
    start = builder.bitcast(view.data, ir.IntType(8).as_pointer())

    def row(i: ir.Value) -> ir.Value:
        if numbers is not None:
            number = _address(context, builder, kind_of_numbers, numbers, types.intp, i)
            i = builder.load(builder.bitcast(number, ir.IntType(64).as_pointer()))
        return builder.gep(start, [builder.mul(i, down)])

    return row, along


@intrinsic
def _prefetch(typing, array, index):
    """Ask for the memory of array[index]."""

    def generate(context, builder, sig, values):
        pointer, number = _address(context, builder, array, values[0], index, values[1]), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, number(0), number(3), number(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, index), generate


@compiled
def prefetch(matrix):
    """Have the processor fetch a matrix while it does something else."""
    for i in range(matrix.shape[0]):
        for j in range(0, matrix.shape[1], lanes_of(matrix)):
            _prefetch(matrix, (i, j))


@intrinsic
def _transpose_square(typing, source, i, j, last, factor, target):
    """target[j : j + n, i : i + n] = source[i : i + n, j : j + n].T * factor, n as many numbers as a register holds.

    Behind row `last` this row is read again.
    """
    kind = Vector(target.dtype)
    n, width = kind.lanes, kind.dtype.bitwidth // 8

    def generate(context, builder, sig, values):
        vector, word = context.get_value_type(kind), ir.IntType(64)
        i, j, last = (context.cast(builder, values[p], sig.args[p], types.intp) for p in (1, 2, 3))

        def pointers(place, row, column, most=None):
            at, _ = _rows(context, builder, sig.args[place], values[place])
            for r in range(n):
                line = builder.add(row, word(r))
                line = line if most is None else builder.select(builder.icmp_signed("<", line, most), line, most)
                pointer = builder.gep(at(line), [builder.mul(column, word(width))])
                yield builder.bitcast(pointer, vector.as_pointer())

        by = _filled(context, builder, kind, sig.args[4], values[4])
        rows = [builder.fmul(builder.load(at, align=width), by) for at in pointers(0, i, j, last)]
        halves = [[half * n // 2 + lane // 2 + lane % 2 * n for lane in range(n)] for half in (0, 1)]
        halves = [ir.Constant(ir.VectorType(ir.IntType(32), n), places) for places in halves]
        for _ in range(n.bit_length() - 1):  # rows r and r + n / 2 merged, as cards are shuffled
            pairs = zip(rows[: n // 2], rows[n // 2 :], strict=True)
            rows = [builder.shuffle_vector(*pair, half) for pair in pairs for half in halves]
        for row, pointer in zip(rows, pointers(5, j, i), strict=True):
            builder.store(row, pointer, align=width)
        return context.get_dummy_value()

    return types.void(source, i, j, last, factor, target), generate


@compiled
def transpose(source, factor, target):
    """target[:, :M] = source.T * factor, source of M rows; rows of both are whole multiples of a register long."""
    M, N = shape_of(source)
    for i in range(0, M, lanes_of(target)):
        for j in range(0, N, lanes_of(target)):
            _transpose_square(source, i, j, M - 1, factor, target)


@intrinsic(prefer_literal=True)
def _block(typing, a, b, c, i, j, depth, rows, vectors, add):
    """c[i : i + rows, j : j + n] = a[i : i + rows] @ b[:, j : j + n], n as many numbers as `vectors` registers hold.

    The rows x vectors sums stay in registers while the inner index runs to depth. rows and vectors are constants. With
    `add` the sums start from c.
    """
    kind = Vector((b[0] if isinstance(b, types.BaseTuple) else b).dtype)
    rows_of, vectors_of = range(rows.literal_value), range(vectors.literal_value)

    def generate(context, builder, sig, values):
        vector, number = context.get_value_type(kind), context.get_value_type(kind.dtype)
        width, word = kind.dtype.bitwidth // 8, ir.IntType(64)
        i, j, depth = (context.cast(builder, values[p], sig.args[p], types.intp) for p in (3, 4, 5))
        (a_row, a_along), (b_row, _), (c_row, _) = (_rows(context, builder, sig.args[p], values[p]) for p in range(3))

        def read(pointer, what):
            value = builder.load(builder.bitcast(pointer, what.as_pointer()))
            value.align = width
            return value

        rows_i = [builder.add(i, word(r)) for r in rows_of]
        along_j = [builder.mul(builder.add(j, word(v * kind.lanes)), word(width)) for v in vectors_of]
        block = [[builder.gep(row, [along]) for along in along_j] for row in map(c_row, rows_i)]
        a_rows = [a_row(r) for r in rows_i]
        zero = _constant(context, kind, [0] * kind.lanes)
        start = lambda pointer: builder.select(values[8], read(pointer, vector), zero)  # noqa: E731
        sums = [[cgutils.alloca_once_value(builder, start(pointer)) for pointer in row] for row in block]
        with cgutils.for_range(builder, depth) as loop:
            b_line = b_row(loop.index)
            columns = [read(builder.gep(b_line, [along]), vector) for along in along_j]
            for line, row in zip(a_rows, sums, strict=True):
                one = read(builder.gep(line, [builder.mul(loop.index, a_along)]), number)
                one = _filled(context, builder, kind, kind.dtype, one)
                for sum_, column in zip(row, columns, strict=True):
                    product = builder.fmul(one, column, flags=("contract",))
                    builder.store(builder.fadd(builder.load(sum_), product, flags=("contract",)), sum_)
        for pointers, row in zip(block, sums, strict=True):
            for pointer, sum_ in zip(pointers, row, strict=True):
                builder.store(builder.load(sum_), builder.bitcast(pointer, vector.as_pointer())).align = width
        return context.get_dummy_value()

    return types.void(a, b, c, i, j, depth, rows, vectors, add), generate


# Blocks of rows x registers: the sums, a row of b and a number of a fit into 32 registers (AVX-512) or 16. Columns go
# in steps of WIDE, NARROW and one register, rows in the largest step for these, in steps of FEW_ROWS, and one by one.
if REGISTER_BYTES == 64:
    WIDE, WIDE_ROWS, NARROW, NARROW_ROWS = 3, 8, 2, 12
else:
    WIDE, WIDE_ROWS, NARROW, NARROW_ROWS = 2, 4, 1, 8
FEW_ROWS = 4


@compiled
def product(a, b, c, add):
    """c = a @ b, or with `add` c += a @ b; for small matrices, each of which may be some rows of one.

    a (M, K) of any strides, b (K, N) and c (M, N) by vectors. Sums run in order.
    """
    (M, N), (_, K), lanes = shape_of(c), shape_of(a), lanes_of(c)
    wide = N - N % (WIDE * lanes)
    narrow = N - (N - wide) % (NARROW * lanes)
    fours = M - M % FEW_ROWS
    whole = M - M % WIDE_ROWS
    for j in range(0, wide, WIDE * lanes):
        for i in range(0, whole, WIDE_ROWS):
            _block(a, b, c, i, j, K, WIDE_ROWS, WIDE, add)
        for i in range(whole, fours, FEW_ROWS):
            _block(a, b, c, i, j, K, FEW_ROWS, WIDE, add)
        for i in range(fours, M):
            _block(a, b, c, i, j, K, 1, WIDE, add)
    whole = M - M % NARROW_ROWS
    for j in range(wide, narrow, NARROW * lanes):
        for i in range(0, whole, NARROW_ROWS):
            _block(a, b, c, i, j, K, NARROW_ROWS, NARROW, add)
        for i in range(whole, fours, FEW_ROWS):
            _block(a, b, c, i, j, K, FEW_ROWS, NARROW, add)
        for i in range(fours, M):
            _block(a, b, c, i, j, K, 1, NARROW, add)
    for j in range(narrow, N, lanes):
        for i in range(0, whole, NARROW_ROWS):
            _block(a, b, c, i, j, K, NARROW_ROWS, 1, add)
        for i in range(whole, fours, FEW_ROWS):
            _block(a, b, c, i, j, K, FEW_ROWS, 1, add)
        for i in range(fours, M):
            _block(a, b, c, i, j, K, 1, 1, add)


@compiled
def multiply(a, b, c):
    """c = a @ b."""
    product(a, b, c, False)


@compiled
def multiply_add(a, b, c):
    """c += a @ b."""
    product(a, b, c, True)

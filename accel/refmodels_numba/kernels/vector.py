"""Vectors of sixteen floats for Numba: what its loops cannot be relied on to make.

An address is an integer. Each function here is an intrinsic that emits LLVM IR on `<16 x float>`; LLVM makes two AVX2
registers of it, one of AVX-512 or four of NEON, so one text serves every CPU. No order of summation is left to the compiler:
a sum over k goes from 0 on in every lane, whatever the shape of the tile, so that a row's result has the same bits alone and in
a batch.
"""

import os

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from refmodels_numba.layout import BFLOAT16, FLOAT16, FLOAT32, INT8, LANES, host_has

I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
VECTOR = ir.VectorType(F32, LANES)
HALF_IN_HARDWARE = host_has("f16c") or host_has("fullfp16") or host_has("neon")
BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, INT8: 1}


def lanes(element, count=LANES):
    return ir.VectorType(element, count)


def number(value, kind=I64):
    return ir.Constant(kind, value)


def const(vector, value):
    return ir.Constant(vector, [value] * vector.count)


def splat(builder, scalar, count=LANES):
    vector = lanes(scalar.type, count)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, number(0, I32))
    return builder.shuffle_vector(first, undefined, const(lanes(I32, count), 0))


def shuffled(builder, a, b, *order):
    return builder.shuffle_vector(a, b, ir.Constant(lanes(I32, len(order)), list(order)))


def call(builder, name, result, *args):
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def fma(builder, a, b, c):
    suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    return call(builder, f"llvm.fma.{suffix}", a.type, a, b, c)


def load(builder, address, kind):
    """A value of this type at any address: alignment is that of its elements."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    size = {I8: 1, I16: 2, F16: 2, I32: 4, F32: 4, I64: 8, F64: 8}[element]
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=size)


def store(builder, value, address):
    size = 4 if isinstance(value.type, ir.VectorType) else {I8: 1, I16: 2, F32: 4, I32: 4, I64: 8}[value.type]
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=size)


def offset(builder, address, index, size):
    """address + index * size; both may be Python integers."""
    scaled = number(index * size) if isinstance(index, int) else builder.mul(index, number(size))
    return builder.add(address, scaled)


# -- stored types to float32 ----------------------------------------------------------------------------------------------


def widened(builder, raw, kind):
    """Loaded elements of a stored type as float32. A scalar or a vector."""
    vector = isinstance(raw.type, ir.VectorType)

    def like(element):
        return lanes(element, raw.type.count) if vector else element

    def constant(value, element):
        return const(like(element), value) if vector else number(value, element)

    if kind == FLOAT32:
        return raw
    if kind == INT8:
        return builder.sitofp(builder.sext(raw, like(I32)), like(F32))
    if kind == BFLOAT16:
        return builder.bitcast(builder.shl(builder.zext(raw, like(I32)), constant(16, I32)), like(F32))
    if HALF_IN_HARDWARE:
        return builder.fpext(builder.bitcast(raw, like(F16)), like(F32))
    # By hand: the magnitude shifted to float32's places is 2**112 too small, and an exponent of all ones must stay one.
    bits = builder.zext(raw, like(I32))
    magnitude = builder.and_(bits, constant(0x7FFF, I32))
    finite = builder.bitcast(builder.shl(magnitude, constant(13, I32)), like(F32))
    finite = builder.bitcast(builder.fmul(finite, constant(2.0**112, F32)), like(I32))
    special = builder.or_(builder.shl(magnitude, constant(13, I32)), constant(0x7F800000, I32))
    special_at = builder.icmp_unsigned(">=", magnitude, constant(0x7C00, I32))
    sign = builder.shl(builder.and_(bits, constant(0x8000, I32)), constant(16, I32))
    return builder.bitcast(builder.or_(builder.select(special_at, special, finite), sign), like(F32))


def load_widened(builder, address, kind, count=LANES):
    element = {FLOAT32: F32, BFLOAT16: I16, FLOAT16: I16, INT8: I8}[kind]
    return widened(builder, load(builder, address, lanes(element, count) if count > 1 else element), kind)


def nibbles(builder, packed):
    """Sixteen bytes as the sixteen numbers from 0 to 15 in their low four bits and the sixteen in their high four."""
    return builder.and_(packed, const(lanes(I8), 15)), builder.lshr(packed, const(lanes(I8), 4))


def above(builder, numbers, zero):
    """The differences of sixteen bytes, from -15 to 15, as float32."""
    return builder.sitofp(builder.sext(builder.sub(numbers, zero), lanes(I32)), VECTOR)


# -- intrinsics -----------------------------------------------------------------------------------------------------------


def addresses(count, result=types.void):
    """Make an intrinsic of `count` integers out of a function of (builder, *values)."""

    def make(emit):
        names = ", ".join(f"a{i}" for i in range(count))

        def typed(result=result, count=count):
            signature = result(*[types.int64] * count)

            def codegen(context, builder, _, args):
                value = emit(builder, *args)
                return context.get_dummy_value() if value is None else value

            return signature, codegen

        namespace = {"typed": typed}
        exec(f"def {emit.__name__}(typingctx, {names}): return typed()", namespace)
        return intrinsic(namespace[emit.__name__])

    return make


def loop(builder, start, stop, step=1):
    return cgutils.for_range_slice(builder, start, stop, number(step), inc=True)


def make_tile(rows, panels, kind, *, fetch_next=False, unroll=4):
    """tile(x, x_stride, weights, panel_stride, out, k): out[r, p, lane] = sum over k of x[r, k] * weights[p, k, lane].

    `x_stride` in bytes from row to row; `out` is contiguous float32 [rows, panels * 16]. With `fetch_next` the panel behind is
    asked for meanwhile: several rows keep the core busy for long enough to hide the memory.
    """
    size = LANES * BYTES[kind]

    @addresses(6)
    def tile(builder, x, x_stride, weights, panel_stride, out, k):
        row = [builder.add(x, builder.mul(number(r), x_stride)) for r in range(rows)]
        panel = [builder.add(weights, builder.mul(number(p), panel_stride)) for p in range(panels)]
        sums = [[cgutils.alloca_once_value(builder, const(VECTOR, 0.0)) for _ in panel] for _ in row]

        def step(i):
            loaded = [load_widened(builder, offset(builder, p, i, size), kind) for p in panel]
            if fetch_next:
                behind = builder.add(builder.mul(builder.add(i, k), number(size)), panel[0])
                flags = (number(flag, I32) for flag in (0, 2, 1))  # to read, into the second cache, data
                pointer = builder.inttoptr(behind, I8.as_pointer())
                call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer, *flags)
            for r, address in enumerate(row):
                value = splat(builder, load(builder, offset(builder, address, i, 4), F32))
                for p, weight in enumerate(loaded):
                    builder.store(fma(builder, value, weight, builder.load(sums[r][p])), sums[r][p])

        main = builder.and_(k, number(-unroll))
        with loop(builder, number(0), main, unroll) as (i, _):
            for u in range(unroll):
                step(builder.add(i, number(u)))
        with loop(builder, main, k) as (i, _):
            step(i)
        for r in range(rows):
            for p in range(panels):
                store(builder, builder.load(sums[r][p]), offset(builder, out, (r * panels + p) * LANES, 4))

    return tile


def make_int4_tile(panels):
    """tile(x, weights, panel_stride, scales, zeros, groups, block, out, k), one row: groups of `block` (even) along k.

    A byte of a panel [k/2, 16] holds two numbers of one column, the even one low, each 8 more than it stands for; so are zeros,
    int8 [panel, group, 16]. scales are float32 [panel, group, 16]. The sum of a group is scaled as a whole.
    """

    @addresses(9)
    def tile(builder, x, weights, panel_stride, scales, zeros, groups, block, out, k):
        def of_panel(base, stride):
            return [builder.add(base, builder.mul(number(p), stride)) for p in range(panels)]

        panel = of_panel(weights, panel_stride)
        scale, zero = (of_panel(base, builder.mul(groups, number(size))) for base, size in ((scales, 64), (zeros, 16)))
        totals = [offset(builder, out, p * LANES, 4) for p in range(panels)]
        sums = [cgutils.alloca_once(builder, VECTOR) for _ in range(panels)]
        for place in totals:
            store(builder, const(VECTOR, 0.0), place)

        def add(p, value, weight):
            builder.store(fma(builder, value, weight, builder.load(sums[p])), sums[p])

        with loop(builder, number(0), groups) as (g, _):
            z = [load(builder, offset(builder, zero[p], g, LANES), lanes(I8)) for p in range(panels)]
            for place in sums:
                builder.store(const(VECTOR, 0.0), place)
            first = builder.mul(g, block)
            end = builder.add(first, block)
            end = builder.select(builder.icmp_signed("<", end, k), end, k)
            pairs, last = builder.sdiv(first, number(2)), builder.sdiv(end, number(2))
            with loop(builder, pairs, last) as (i, _):
                even, odd = (
                    splat(builder, load(builder, offset(builder, builder.add(x, number(4 * u)), i, 8), F32)) for u in (0, 1)
                )
                for p in range(panels):
                    low, high = nibbles(builder, load(builder, offset(builder, panel[p], i, LANES), lanes(I8)))
                    add(p, even, above(builder, low, z[p]))
                    add(p, odd, above(builder, high, z[p]))
            with builder.if_then(builder.icmp_signed("<", builder.mul(last, number(2)), end)):  # k is odd
                value = splat(builder, load(builder, offset(builder, x, builder.mul(last, number(2)), 4), F32))
                for p in range(panels):
                    low, _ = nibbles(builder, load(builder, offset(builder, panel[p], last, LANES), lanes(I8)))
                    add(p, value, above(builder, low, z[p]))
            for p, place in enumerate(totals):
                s = load(builder, offset(builder, scale[p], g, 4 * LANES), VECTOR)
                store(builder, fma(builder, s, builder.load(sums[p]), load(builder, place, VECTOR)), place)

    return tile


def make_widening(kind):
    """widen(panel, out, k): a panel [k, 16] of a stored type as float32."""

    @addresses(3)
    def widen(builder, panel, out, k):
        with loop(builder, number(0), k) as (i, _):
            value = load_widened(builder, offset(builder, panel, i, LANES * BYTES[kind]), kind)
            store(builder, value, offset(builder, out, i, 4 * LANES))

    return widen


def make_widening_int4():
    """widen(panel, out, zeros, block, k): a panel of int4 numbers in groups as float32, without their scales."""

    @addresses(5)
    def widen(builder, panel, out, zeros, block, k):
        with loop(builder, number(0), k) as (i, _):
            z = load(builder, offset(builder, zeros, builder.sdiv(i, block), LANES), lanes(I8))
            low, high = nibbles(builder, load(builder, offset(builder, panel, builder.sdiv(i, number(2)), LANES), lanes(I8)))
            odd = builder.trunc(builder.and_(i, number(1)), I1)
            store(builder, above(builder, builder.select(odd, high, low), z), offset(builder, out, i, 4 * LANES))

    return widen


def make_integer_tile(rows, panels):
    """tile(x, x_stride, weights, panel_stride, out, pairs): exact int32 sums of int8 products.

    x is int16 [rows, 2 * pairs]; a panel is int8 [pairs, 16, 2], so that two neighbours along k stand side by side; out is
    contiguous int32 [rows, panels * 16].
    """
    wide, half = lanes(I32, 2 * LANES), lanes(I16, 2 * LANES)

    @addresses(6)
    def tile(builder, x, x_stride, weights, panel_stride, out, pairs):
        row = [builder.add(x, builder.mul(number(r), x_stride)) for r in range(rows)]
        panel = [builder.add(weights, builder.mul(number(p), panel_stride)) for p in range(panels)]
        sums = [[cgutils.alloca_once_value(builder, const(lanes(I32), 0)) for _ in panel] for _ in row]

        def product(a, b):
            # Neighbouring products added: LLVM has an instruction for this form on x86 (pmaddwd).
            both = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
            even, odd = (shuffled(builder, both, both, *range(start, 2 * LANES, 2)) for start in (0, 1))
            return builder.add(even, odd)

        with loop(builder, number(0), pairs) as (i, _):
            loaded = [builder.sext(load(builder, offset(builder, p, i, 2 * LANES), lanes(I8, 2 * LANES)), half) for p in panel]
            for r, address in enumerate(row):
                value = builder.bitcast(splat(builder, load(builder, offset(builder, address, i, 4), I32)), half)
                for p, weight in enumerate(loaded):
                    builder.store(builder.add(builder.load(sums[r][p]), product(value, weight)), sums[r][p])
        for r in range(rows):
            for p in range(panels):
                store(builder, builder.load(sums[r][p]), offset(builder, out, (r * panels + p) * LANES, 4))

    return tile


@addresses(6)
def finish_vectors(builder, sums, count, bias, relu, residual, out):
    """out[j] = residual[j] + relu(sums[j] + bias[j]) for `count` floats, a multiple of 16; 0 for what is not there."""
    zero = const(VECTOR, 0.0)
    with loop(builder, number(0), count, LANES) as (i, _):
        value = cgutils.alloca_once(builder, VECTOR)
        builder.store(load(builder, offset(builder, sums, i, 4), VECTOR), value)
        with builder.if_then(builder.icmp_signed("!=", bias, number(0))):
            builder.store(builder.fadd(builder.load(value), load(builder, offset(builder, bias, i, 4), VECTOR)), value)
        with builder.if_then(builder.icmp_signed("!=", relu, number(0))):
            given = builder.load(value)
            positive = builder.fcmp_unordered(">", given, zero)  # NaN stays
            builder.store(builder.select(positive, given, zero), value)
        with builder.if_then(builder.icmp_signed("!=", residual, number(0))):
            before = load(builder, offset(builder, residual, i, 4), VECTOR)
            builder.store(builder.fadd(before, builder.load(value)), value)
        store(builder, builder.load(value), offset(builder, out, i, 4))


def folded(builder, vector):
    """Sixteen lanes as four: halves are added to halves."""
    for width in (8, 4):
        low = shuffled(builder, vector, vector, *range(width))
        high = shuffled(builder, vector, vector, *range(width, 2 * width))
        vector = builder.fadd(low, high)
    return vector


def sums_of_four(builder, a, b, c, d):
    """<4 x float> of the sums of four times four lanes, each as (0 + 1) + (2 + 3)."""

    def pairs(x, y):
        even, odd = shuffled(builder, x, y, 0, 4, 2, 6), shuffled(builder, x, y, 1, 5, 3, 7)
        return builder.fadd(even, odd)  # x01 y01 x23 y23

    ab, cd = pairs(a, b), pairs(c, d)
    return builder.fadd(shuffled(builder, ab, cd, 0, 1, 4, 5), shuffled(builder, ab, cd, 2, 3, 6, 7))


def make_dots(kind):
    """dots(x, rows, stride, count, size, out): out[j] = x . row j for j below `count`; stride in bytes, `size` elements each.

    Lane l adds the products of the elements l, l + 16, ...; then the lanes are added as a tree, then the elements behind the
    last sixteen.
    """
    width = BYTES[kind]

    @addresses(6)
    def dots(builder, x, rows, stride, count, size, out):
        main = builder.and_(size, number(-LANES))
        results = cgutils.alloca_once(builder, lanes(F32, 4))
        with loop(builder, number(0), count, 4) as (j, _):
            left = builder.sub(builder.sub(count, j), number(1))

            def row(u):
                here = builder.select(builder.icmp_signed("<", left, number(u)), left, number(u))  # the last again, not past it
                return builder.add(rows, builder.mul(builder.add(j, here), stride))

            row = [row(u) for u in range(4)]
            sums = [cgutils.alloca_once(builder, VECTOR) for _ in range(4)]
            for place in sums:
                builder.store(const(VECTOR, 0.0), place)
            with loop(builder, number(0), main, LANES) as (i, _):
                value = load(builder, offset(builder, x, i, 4), VECTOR)
                for address, place in zip(row, sums, strict=True):
                    other = load_widened(builder, offset(builder, address, i, width), kind)
                    builder.store(fma(builder, value, other, builder.load(place)), place)
            builder.store(sums_of_four(builder, *(folded(builder, builder.load(place)) for place in sums)), results)
            with loop(builder, main, size) as (i, _):
                value = load(builder, offset(builder, x, i, 4), F32)
                for u, address in enumerate(row):
                    other = load_widened(builder, offset(builder, address, i, width), kind, 1)
                    four = builder.load(results)
                    one = fma(builder, value, other, builder.extract_element(four, number(u, I32)))
                    builder.store(builder.insert_element(four, one, number(u, I32)), results)
            four = builder.load(results)
            for u in range(4):
                with builder.if_then(builder.icmp_signed(">=", left, number(u))):
                    one = builder.extract_element(four, number(u, I32))
                    store(builder, one, offset(builder, builder.add(out, number(4 * u)), j, 4))

    return dots


def transposed(builder, rows):
    """Eight vectors of eight floats as their columns: shuffles within four lanes, which are cheap, and one of whole fours."""

    def shuffles(a, b, *orders):
        return [shuffled(builder, a, b, *order) for order in orders]

    pairs = ((0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15))
    fours = ((0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
    halves = ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
    columns = []  # of the rows 0 to 3 and 4 to 7: parts of the columns 0 and 4, 1 and 5, 2 and 6, 3 and 7
    for first in (0, 4):
        above, below = (shuffles(rows[i], rows[i + 1], *pairs) for i in (first, first + 2))
        columns.append([part for a, b in zip(above, below, strict=True) for part in shuffles(a, b, *fours)])
    low, high = zip(*(shuffles(a, b, *halves) for a, b in zip(*columns, strict=True)), strict=True)
    return [*low, *high]


def make_turning(kind):
    """turn(rows, stride, count, size, out): sixteen rows as a panel, out[i, l] = row l [i] in float32 for i below `size`.

    `stride` in bytes; lanes from `count` on hold the last row again.
    """
    width, half = BYTES[kind], LANES // 2

    @addresses(5)
    def turn(builder, rows, stride, count, size, out):
        last, main = builder.sub(count, number(1)), builder.and_(size, number(-half))
        with loop(builder, number(0), number(LANES), half) as (lane, _):
            row = []
            for u in range(half):
                here = builder.add(lane, number(u))
                here = builder.select(builder.icmp_signed("<", here, last), here, last)
                row.append(builder.add(rows, builder.mul(here, stride)))
            place = offset(builder, out, lane, 4)
            with loop(builder, number(0), main, half) as (i, _):
                given = [load_widened(builder, offset(builder, address, i, width), kind, half) for address in row]
                for u, column in enumerate(transposed(builder, given)):
                    store(builder, column, offset(builder, place, builder.add(i, number(u)), 4 * LANES))
            with loop(builder, main, size) as (i, _):
                for u, address in enumerate(row):
                    value = load_widened(builder, offset(builder, address, i, width), kind, 1)
                    store(builder, value, offset(builder, builder.add(place, number(4 * u)), i, 4 * LANES))

    return turn


def make_dots_tile(rows):
    """tile(x, x_stride, panel, out, out_stride, size): out[q, l] = x[q] . key l for `rows` vectors x and a panel of keys.

    The panel, float32 [size, 16], is from `make_turning`. A key has a lane here and not a vector as in `make_dots`, yet its
    sums are those of `make_dots`, added in the same order: of every sixteenth element, then as a tree, then what is left over.
    """

    @addresses(6)
    def tile(builder, x, x_stride, panel, out, out_stride, size):
        row = [builder.add(x, builder.mul(number(r), x_stride)) for r in range(rows)]
        main, by_four = (builder.and_(size, number(-multiple)) for multiple in (LANES, 4 * LANES))

        def step(i, sums):
            keys = load(builder, offset(builder, panel, i, 4 * LANES), VECTOR)
            for address, place in zip(row, sums, strict=True):
                value = splat(builder, load(builder, offset(builder, address, i, 4), F32))
                builder.store(fma(builder, value, keys, builder.load(place)), place)

        def sums_from(first, apart):
            """The sum of the elements whose number is `first` and a multiple of `apart` more, in the order of the tree."""
            if apart < LANES:
                ways = (sums_from(first + way * apart, 2 * apart) for way in (0, 1))
                return [builder.fadd(a, b) for a, b in zip(*ways, strict=True)]
            sums = [cgutils.alloca_once(builder, VECTOR) for _ in row]
            for place in sums:
                builder.store(const(VECTOR, 0.0), place)
            with loop(builder, number(first), by_four, 4 * LANES) as (i, _):
                for u in range(4):
                    step(builder.add(i, number(u * LANES)), sums)
            with loop(builder, builder.add(by_four, number(first)), main, LANES) as (i, _):
                step(i, sums)
            return [builder.load(place) for place in sums]

        # Halves are added to halves down to four sums; of these neighbours.
        fours = [sums_from(first, 4) for first in range(4)]
        pairs = [[builder.fadd(a, b) for a, b in zip(*two, strict=True)] for two in (fours[:2], fours[2:])]
        totals = [cgutils.alloca_once_value(builder, builder.fadd(a, b)) for a, b in zip(*pairs, strict=True)]
        with loop(builder, main, size) as (i, _):
            step(i, totals)
        for r, total in enumerate(totals):
            store(builder, builder.load(total), builder.add(out, builder.mul(number(r), out_stride)))

    return tile


def make_weighted_sum(kind, width, queries=1):
    """add(weights, weight_stride, rows, stride, count, out, out_stride): out[q, :width] += weights[q, j] * row j for j < count.

    From j = 0 on. Strides in bytes; width 1 or times 16. Several queries share every load of a row.
    """
    size = BYTES[kind]
    parts = max(width // LANES, 1)
    element = F32 if width == 1 else VECTOR

    @addresses(7)
    def add(builder, weights, weight_stride, rows, stride, count, out, out_stride):
        given = [builder.add(weights, builder.mul(number(q), weight_stride)) for q in range(queries)]
        starts = [builder.add(out, builder.mul(number(q), out_stride)) for q in range(queries)]
        places = [[offset(builder, start, part * LANES, 4) for part in range(parts)] for start in starts]
        sums = [[cgutils.alloca_once_value(builder, load(builder, place, element)) for place in row] for row in places]
        with loop(builder, number(0), count) as (j, _):
            row = builder.add(rows, builder.mul(j, stride))
            others = [
                load_widened(builder, offset(builder, row, part * LANES, size), kind, 1 if width == 1 else LANES)
                for part in range(parts)
            ]
            for address, of_query in zip(given, sums, strict=True):
                value = load(builder, offset(builder, address, j, 4), F32)
                value = value if width == 1 else splat(builder, value)
                for other, total in zip(others, of_query, strict=True):
                    builder.store(fma(builder, value, other, builder.load(total)), total)
        for row, of_query in zip(places, sums, strict=True):
            for place, total in zip(row, of_query, strict=True):
                store(builder, builder.load(total), place)

    return add


def make_reduction(term, combine, initial):
    """reduce(x, n, bits) over x[:n] by term(builder, x, c, so far): sixteen lanes, then a tree, then what is left over.

    `bits` are those of the float32 c; combine(builder, a, b) joins two partial results.
    """

    def joined(builder, vector):
        for width in (8, 4, 2, 1):
            halves = (shuffled(builder, vector, vector, *range(start, start + width)) for start in (0, width))
            vector = combine(builder, *halves)
        return builder.extract_element(vector, number(0, I32))

    @addresses(3, types.float32)
    def reduce(builder, x, n, bits):
        c = builder.bitcast(builder.trunc(bits, I32), F32)
        main = builder.and_(n, number(-LANES))
        lanes_so_far = cgutils.alloca_once_value(builder, const(VECTOR, initial))
        with loop(builder, number(0), main, LANES) as (i, _):
            value = load(builder, offset(builder, x, i, 4), VECTOR)
            builder.store(term(builder, value, splat(builder, c), builder.load(lanes_so_far)), lanes_so_far)
        result = cgutils.alloca_once_value(builder, joined(builder, builder.load(lanes_so_far)))
        with loop(builder, main, n) as (i, _):
            value = load(builder, offset(builder, x, i, 4), F32)
            builder.store(term(builder, value, c, builder.load(result)), result)
        return builder.load(result)

    return reduce


def _sum(builder, a, b):
    return builder.fadd(a, b)


def _larger(builder, a, b):
    suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
    return call(builder, f"llvm.maxnum.{suffix}", a.type, a, b)


def _square(builder, value, c, so_far):
    deviation = builder.fsub(value, c)
    return fma(builder, deviation, deviation, so_far)


sum_of = make_reduction(lambda builder, value, _, so_far: _sum(builder, so_far, value), _sum, 0.0)
sum_of_squares = make_reduction(_square, _sum, 0.0)
"""Of x - c."""
largest_of = make_reduction(lambda builder, value, _, so_far: _larger(builder, so_far, value), _larger, float("-inf"))
largest_magnitude_of = make_reduction(
    lambda builder, value, _, so_far: _larger(
        builder,
        so_far,
        call(builder, f"llvm.fabs.{'v16f32' if isinstance(value.type, ir.VectorType) else 'f32'}", value.type, value),
    ),
    _larger,
    0.0,
)
"""NaN is passed over by both."""


# -- numbers and their bits -----------------------------------------------------------------------------------------------


def _cast(result, argument, emit):
    @intrinsic
    def cast(typingctx, value):
        def codegen(context, builder, _, args):
            return emit(builder, args[0])

        return result(argument), codegen

    return cast


bits_of = _cast(types.int32, types.float32, lambda builder, x: builder.bitcast(x, I32))
float_of = _cast(types.float32, types.int32, lambda builder, x: builder.bitcast(x, F32))
double_of = _cast(types.float64, types.int64, lambda builder, x: builder.bitcast(x, F64))
nearest = _cast(types.float32, types.float32, lambda builder, x: call(builder, "llvm.rint.f32", F32, x))
magnitude = _cast(types.float32, types.float32, lambda builder, x: call(builder, "llvm.fabs.f32", F32, x))


def _view(element):
    @intrinsic
    def view(typingctx, address, count):
        array = types.Array(element, 1, "C")
        size = element.bitwidth // 8

        def codegen(context, builder, _, args):
            address, count = args
            result = context.make_array(array)(context, builder)
            data = builder.inttoptr(address, result.data.type)
            one = ir.Constant(I64, size)
            populate_array(result, data, cgutils.pack_array(builder, [count]), cgutils.pack_array(builder, [one]), one, None)
            return result._getvalue()

        return array(types.int64, types.int64), codegen

    return view


floats, doubles, integers, bytes_, shorts, halves, words = map(
    _view, (types.float32, types.float64, types.int32, types.uint8, types.int16, types.uint16, types.int64)
)
"""`floats(address, count)`: what stands at an address, as an array; the others likewise of other elements."""


def _ternary(name):
    @intrinsic
    def operation(typingctx, a, b, c):
        def codegen(context, builder, _, args):
            return call(builder, name, F32, *args)

        return types.float32(types.float32, types.float32, types.float32), codegen

    return operation


def _binary(name):
    @intrinsic
    def operation(typingctx, a, b):
        def codegen(context, builder, _, args):
            return call(builder, name, F32, *args)

        return types.float32(types.float32, types.float32), codegen

    return operation


multiply_add = _ternary("llvm.fma.f32")
smaller, larger = _binary("llvm.minnum.f32"), _binary("llvm.maxnum.f32")


# -- threads --------------------------------------------------------------------------------------------------------------


@addresses(2, types.int64)
def fetch_add(builder, address, value):
    """Add to the integer at this address; gives what it was. Everything written before is seen by whoever reads it after."""
    return builder.atomic_rmw("add", builder.inttoptr(address, I64.as_pointer()), value, "seq_cst")


@addresses(1, types.int64)
def fetch(builder, address):
    """The integer at this address, with everything that was written before it."""
    return builder.load_atomic(builder.inttoptr(address, I64.as_pointer()), "seq_cst", 8)


@addresses(0)
def pause(builder):
    """Tell the core that this thread waits for another."""
    if host_has("sse2"):
        call(builder, "llvm.x86.sse2.pause", ir.VoidType())


@addresses(0)
def yield_thread(builder):
    """Let another thread of the machine run."""
    call(builder, "SwitchToThread" if os.name == "nt" else "sched_yield", I32)

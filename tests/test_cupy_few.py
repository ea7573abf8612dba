"""Products of a few rows in one launch, as decoding makes them: each kind of weights, what follows the sums, planted faults."""

import numpy as np
import pytest
from emulated import DoesNotCompile, Emulated, EmulationError
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.linear import MOST, Products
from refmodels_cupy.quantize import rows_to_int8
from refmodels_cupy.source import DIRECTORY
from refmodels_cupy.weights import int4_matrix

from refmodels import use
from refmodels.numerics import judge
from refmodels.ops.linear import linear
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.quantize import dequantized_groups, linear_int4, linear_int8, linear_weight_int8, quantize_rows, row_scale
from refmodels.quantization import quantization, quantized_tree

KINDS = [
    *((x, w) for x in ("float16", "bfloat16") for w in (x, "int8", "int4/128", "int4/1000")),
    ("int8", "int8"),
    *(("float32", w) for w in ("float32", "bfloat16", "int8", "int4/8")),
]
"""Types of rows and weights; of int4 with the length of a group."""

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.fixture
def device(compiled):
    return Emulated(compiled)


# -- the ops ------------------------------------------------------------------------------------------------------------------


def call(x_type, w_type, rows, k, n, seed=0):
    """An op and its arguments: a product of so many rows, with a bias."""
    generator = np.random.default_rng(seed)
    x, w = (generator.standard_normal(shape).astype(np.float32) for shape in ((rows, k), (k, n)))
    bias = generator.standard_normal(n).astype(np.float32)
    kind, _, block = w_type.partition("/")
    if kind not in ("int8", "int4"):
        return linear, (x.astype(numpy_dtype(x_type)), w.astype(numpy_dtype(w_type)), bias), {}
    how = quantization("int4", int(block)) if block else quantization("int8", None, x_type != "int8")
    p = quantized_tree({"layer.kernel": w}, how)["layer"]
    if kind == "int4":
        parts = (p["kernel"], p["kernel_scale"], p["kernel_zero"], p["g_idx"])
        return linear_int4, (x.astype(numpy_dtype(x_type)), *parts, bias), {}
    if x_type == "int8":
        scale = row_scale.reference(x)
        return (
            linear_int8,
            (quantize_rows.reference(x, scale), scale, p["kernel"], p["kernel_scale"], bias),
            {"dtype": "float16"},
        )
    return linear_weight_int8, (x.astype(numpy_dtype(x_type)), p["kernel"], p["kernel_weight_only_scale"], bias), {}


@pytest.mark.parametrize(("x_type", "w_type"), KINDS)
@pytest.mark.parametrize(("k", "n"), [(333, 21), (1, 1), (520, 67)])
def test_conformance(device, x_type, w_type, k, n):
    for rows in (1, 8, 9, 16, 17, 33, 64) if k == 333 else (2, 33):
        op, args, kwargs = call(x_type, w_type, rows, k, n)
        with use(Cupy(device)):
            got = op(*args, **kwargs)
        assert judge(op, args, kwargs, got), (rows, str(judge(op, args, kwargs, got)))


def test_many_rows_of_int4_weights_are_few_rows_again(device):
    op, args, kwargs = call("bfloat16", "int4/128", MOST + 3, 300, 21)
    with use(Cupy(device)):
        assert judge(op, args, kwargs, op(*args, **kwargs))
    assert device.launches == {"matmul_few<64, 16, bf16, int4x2>": 1, "matmul_few<8, 16, bf16, int4x2>": 1}


def test_what_cannot_be_counted_stays_in_its_row(device):
    """The zeros behind a row's end are no row's business: neither infinity nor the NaN that it gives goes elsewhere."""
    op, (x, *others), kwargs = call("float16", "int4/128", 9, 333, 21)
    x[3, 5], x[4, 332] = np.inf, np.nan
    with use(Cupy(device)):
        got = op(x, *others, **kwargs)
    assert judge(op, (x, *others), kwargs, got)


# -- a layer in one launch ----------------------------------------------------------------------------------------------------


class Layer:
    """Two matrices (k, n), their scales if they are int8, and what they stand for in float64."""

    def __init__(self, device, kind, k, n, seed=1):
        generator, products = np.random.default_rng(seed), Products(device)
        self.matrices, self.scales, self.wanted = [], [], []
        for _ in range(2):
            w, scale = generator.standard_normal((k, n)).astype(np.float32), None
            if kind == "int8":
                w, scale = (
                    generator.integers(-127, 128, (k, n)).astype(np.int8),
                    generator.uniform(50, 90, n).astype(np.float32),
                )
            if kind.startswith("int4"):
                p = quantized_tree({"layer.kernel": w}, quantization("int4", int(kind[5:])))["layer"]
                parts = (p["kernel"], p["kernel_scale"], p["kernel_zero"], p["g_idx"])
                self.matrices.append(int4_matrix(device, *parts, by_rows=False, axis=-1))
                self.wanted.append(dequantized_groups(*parts, np.dtype(np.float64)))
            else:
                w = w if kind == "int8" else w.astype(numpy_dtype(kind))
                self.matrices.append(products.matrix(w))
                self.wanted.append(w.astype(np.float64) / (1 if scale is None else scale))
            self.scales.append(scale)


def fused(device, x, layer, k, *, y_type="float32", row_scale=None, **how):
    """`Products.fused` into a new array, of rows filled up to the pitch. `gated`: with the second matrix as gate."""
    filled = np.zeros((len(x), layer.matrices[0].pitch), x.dtype)
    filled[:, :k] = x
    if how.pop("gated", False):
        how |= {"gate": layer.matrices[1], "gate_scale": layer.scales[1]}
    y = device.empty((len(x), layer.matrices[0].n), numpy_dtype(y_type))
    Products(device).fused(filled, layer.matrices[0], y, row_scale=row_scale, scale=layer.scales[0], **how)
    return y


def rows_of(x_type, rows, k, seed=2):
    generator = np.random.default_rng(seed)
    if x_type == "int8":
        return generator.integers(-127, 128, (rows, k)).astype(np.int8), generator.uniform(30, 60, rows).astype(np.float32)
    return generator.standard_normal((rows, k)).astype(numpy_dtype(x_type)), None


def difference(y, x, by, layer, *, bias, residual, factor, activation, gated, slack=3e-6):
    """The largest error of a layer beside float64, in units of what float32 sums may have."""
    x = x.astype(np.float64) / (1 if by is None else by[:, None])
    w, gate = layer.wanted
    b = 0 if bias is None else bias.astype(np.float64)
    r = 0 if residual is None else residual.astype(np.float64)
    wanted = r + ACTIVATIONS[activation](factor * x @ w + b) * (x @ gate if gated else 1)
    most = np.abs(r) + (factor * np.abs(x) @ np.abs(w) + np.abs(b)) * (np.abs(x) @ np.abs(gate) if gated else 1)
    return (np.abs(y - wanted) / (slack * most)).max()


COMBINATIONS = {
    "all": {"bias": True, "residual": True, "factor": 0.5, "activation": "silu", "gated": True},
    "gate alone": {"bias": False, "residual": False, "factor": 1.0, "activation": "linear", "gated": True},
    "bias and activation": {"bias": True, "residual": False, "factor": 1.0, "activation": "relu", "gated": False},
    "residual": {"bias": False, "residual": True, "factor": 0.25, "activation": "linear", "gated": False},
}


@pytest.mark.parametrize(("x_type", "w_type"), KINDS)
def test_what_follows_the_sums(device, x_type, w_type):
    k, n = 150, 37
    layer, generator = Layer(device, w_type, k, n), np.random.default_rng(3)
    for rows, (name, how) in zip((1, 9, 33, 2), COMBINATIONS.items(), strict=True):
        x, by = rows_of(x_type, rows, k)
        how = how | {
            "bias": generator.standard_normal(n).astype(numpy_dtype("bfloat16")) if how["bias"] else None,
            "residual": generator.standard_normal((rows, n)).astype(np.float32) if how["residual"] else None,
        }
        y = fused(device, x, layer, k, row_scale=by, **how)
        assert difference(y, x, by, layer, **how) < 1, name


@pytest.mark.parametrize(("x_type", "y_type"), [("float16", "float32"), ("float32", "float16"), ("bfloat16", "bfloat16")])
def test_the_result_is_rounded_once_to_its_type(device, x_type, y_type):
    layer, (x, _) = Layer(device, x_type, 64, 24), rows_of(x_type, 9, 64)
    wide, narrow = (fused(device, x, layer, 64, y_type=form, activation="gelu") for form in ("float32", y_type))
    assert narrow.tobytes() == wide.astype(narrow.dtype).tobytes()


@pytest.mark.parametrize(
    ("x_type", "w_type"), [kind for kind in KINDS if kind[0] != "float32" and kind != ("bfloat16", "int4/1000")]
)
def test_a_row_has_the_same_bits_in_every_batch(compiled, x_type, w_type):
    """Whatever the number of rows or outputs of a block is."""
    k, device = 600, Emulated(compiled, orders=(2,))
    x, by = rows_of(x_type, MOST, k)
    results = {}
    for n in (40, 70):
        layer = Layer(device, w_type, k, 70)
        for matrix in layer.matrices if n == 40 else ():
            object.__setattr__(matrix, "n", n)  # the first outputs
        for rows in (1, 8, 9, 32, 33, MOST):
            y = fused(device, x[:rows], layer, k, row_scale=None if by is None else by[:rows], gated=True)
            results[n, rows] = y[:1, :40].tobytes(), y[rows - 1, :40].tobytes()
            last = results[n, MOST] if rows == MOST else None
    assert len({first for first, _ in results.values()}) == 1
    assert last == results[40, MOST]
    tiles = {form.split("<")[1].rsplit(",", 2)[0] for form in device.launches}
    assert tiles == {"8, 16", "32, 32", "64, 16"} | (set() if w_type.startswith("int4") else {"64, 32"})


def test_every_row_of_a_batch_has_its_own_sums(device):
    x, _ = rows_of("float16", MOST, 64)
    layer = Layer(device, "float16", 64, 70)
    whole = fused(device, x, layer, 64)
    assert [fused(device, row[None], layer, 64).tobytes() for row in x] == [row[None].tobytes() for row in whole]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_become_int8_in_one_launch(device, dtype):
    x = np.random.default_rng(4).standard_normal((3, 300)).astype(numpy_dtype(dtype))
    x[1, 290], x[2] = 8, np.nan
    values, scale = device.empty((3, 304), np.int8), device.empty(3, np.float32)
    rows_to_int8(device, x, scale, values)
    assert scale.tobytes() == row_scale.reference(x).tobytes()
    assert values[:, :300].tobytes() == quantize_rows.reference(x, scale).tobytes()
    assert not values[:, 300:].any()


# -- planted faults -----------------------------------------------------------------------------------------------------------

HALVES = "bfloat16", "bfloat16", 2, 2225
EIGHT_BITS = "bfloat16", "int8", 2, 2225
FOUR_BITS = "float16", "int4/128", 2, 4445
BOTH_EIGHT_BITS = "int8", "int8", 2, 2225
MANY_ROWS = "float16", "float16", 9, 3008
"""Types, rows and inputs of a layer: of the last, two warps have a tile less, and write where the others still read."""

NEXT_PASS = "        __syncthreads();  // the gate's weights may take the place of the sums\n"
USED = "        __syncthreads();  // all weights of the queue have been used\n"
THERE = "lane] = sums[m][r][i];\n"

FAULTS = {
    "no barrier before the queue is used for sums": (USED, "", MANY_ROWS),
    "no barrier before the sums are added": (THERE + "        __syncthreads();\n", THERE, HALVES),
    "no barrier before the gate's weights": (NEXT_PASS, "", MANY_ROWS),
    "weights that nobody awaited": ("await_copies<SLOTS - 1>();", "await_copies<SLOTS>();", HALVES),
    "the last tile is left out": ("(pitch + TILE - 1) / TILE", "pitch / TILE", HALVES),
    "a tile of another warp": ("begin(tile + SLOTS * WARPS, slot);", "begin(tile + SLOTS * WARPS + 1, slot);", HALVES),
    "the next piece of x": ("row + k + p * EACH", "row + (k + EACH) % pitch + p * EACH", HALVES),
    "another order of k in x": ("{b[r][i], b[r][i + 1]}", "{b[r][i + 1], b[r][i]}", HALVES),
    "upper and lower outputs change places": ("{upper[i], lower[i],", "{lower[i], upper[i],", HALVES),
    "rows of a lane change places": ("8 * r + 2 * (l % 4) + i % 2;", "8 * r + 2 * (l % 4) + (i + 1) % 2;", HALVES),
    "the sums of seven warps": ("from < WARPS; ++from", "from < WARPS - 1; ++from", HALVES),
    "the layer's scale for the gate": ("over = pass ? gate_scale : scale;", "over = scale;", EIGHT_BITS),
    "the scale of another output": ("over : nullptr, column)", "over : nullptr, first)", EIGHT_BITS),
    "bytes in another order": ("0x4342 : 0x4140", "0x4243 : 0x4041", EIGHT_BITS),
    "int8 numbers without a sign": ("two & 0xff80ff80", "0x43004300", EIGHT_BITS),
    "int4 numbers in another order": ("(second, x[3], 0x7632)", "(second, x[3], 0x3276)", FOUR_BITS),
    "the layer's zeros for the gate": ("pass ? gate_zero : zero", "zero", FOUR_BITS),
    "the first group's scale": ("min(tile * TILE / block, groups - 1)", "0", FOUR_BITS),
    "the row scale of another row": ("row_scale, row,", "row_scale, 0,", BOTH_EIGHT_BITS),
    "the gate takes the place of the layer": ("gate ? layer[place] : sum, gate ? sum", "sum, gate ? layer[place]", HALVES),
}


@pytest.mark.parametrize("layer", sorted({layer for _, _, layer in FAULTS.values()}), ids=str)
def test_without_a_fault_a_layer_is_right(compiled, layer):
    assert near(compiled, {}, *layer)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(compiled, fault):
    right, wrong, layer = FAULTS[fault]
    source = (DIRECTORY / "matmul_few.cu").read_text()
    assert source.count(right) == 1
    assert not near(compiled, {"matmul_few.cu": source.replace(right, wrong)}, *layer)


def near(compiled, sources, x_type, w_type, rows, k, n=37):
    """Whether a gated layer is right on a device with these sources."""
    device = Emulated(compiled, sources=sources)
    layer, (x, by) = Layer(device, w_type, k, n), rows_of(x_type, rows, k)
    how = {"bias": np.ones(n, np.float32), "residual": None, "factor": 1.0, "activation": "relu", "gated": True}
    try:
        y = fused(device, x, layer, k, row_scale=by, **how)
    except DoesNotCompile:
        raise
    except EmulationError:
        return False
    return difference(y, x, by, layer, **how) < 1

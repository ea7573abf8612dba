"""The CuPy accelerator but for attention, on a device that is this CPU: conformance, weights, planted faults."""

import numpy as np
import pytest
from emulated import ORDERS, DoesNotCompile, Emulated, EmulationError
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.linear import MOST, OUTPUTS
from refmodels_cupy.source import DIRECTORY
from refmodels_cupy.weights import Matrix

from refmodels import use
from refmodels.conformance import check_accelerator
from refmodels.numerics import judge
from refmodels.op import OPS
from refmodels.ops.elementwise import relu
from refmodels.ops.linear import embedding, linear
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.quantize import (
    embedding_int4,
    linear_int4,
    linear_int8,
    linear_weight_int8,
    quantize_rows,
    row_scale,
)
from refmodels.parameters import copy_containers, flatten, grown
from refmodels.quantization import quantization, quantized_tree

ATTENTION = {"attention_scores", "masked_softmax", "attention_context"}
SAMPLING = {"greedy_token", "sample_token"}

BY_KERNELS = (
    "add", "multiply", "scaled", "relu", "gelu", "gelu_approximate", "silu", "linear", "logits_from_embeddings", "embedding",
    "row_scale", "quantize_rows", "linear_int8", "logits_int8", "linear_weight_int8", "logits_weight_int8", "linear_int4",
    "logits_int4", "embedding_int8", "embedding_int4", "layer_norm", "rms_norm",
)  # fmt: skip
COMPOSITES = ("dense", "token_vectors", "token_scores", "key_value_cache")


@pytest.fixture
def cupy(compiled):
    return Cupy(Emulated(compiled))


def test_every_op_has_a_kernel_but_attentions(cupy):
    assert {name for name, op in OPS.items() if not op.composite and not cupy.kernels(op)} <= ATTENTION


@pytest.mark.parametrize("name", [*BY_KERNELS, *COMPOSITES])
def test_conformance(compiled, name):
    # Products have no barrier, and no memory that threads share: one order of threads will do, and the examples are large.
    cupy = Cupy(Emulated(compiled, orders=(2,) if "linear" in name or "logits" in name else ORDERS))
    [checked] = check_accelerator(cupy, ops=[name], examples=5 if name in BY_KERNELS else 8)
    assert [str(failure) for failure in checked.failures] == []
    assert checked.examples
    assert name in COMPOSITES or checked.taken == checked.examples
    assert not cupy.crossings


# -- products -----------------------------------------------------------------------------------------------------------------


def layer(form, k, n, seed=1):
    """The leaves of a dense layer (k, n): a plain type, `int8`, or `int4`."""
    generator = np.random.default_rng(seed)
    plain = generator.standard_normal((k, n)).astype(np.float32)
    if form in ("int8", "weight_int8", "int4"):
        how = quantization("int4", 16) if form == "int4" else quantization("int8", None, form == "weight_int8")
        return quantized_tree({"layer.kernel": plain}, how)["layer"]
    return {"kernel": plain.astype(numpy_dtype(form))}


def product(form, x, p):
    if form == "int4":
        return linear_int4(x, p["kernel"], p["kernel_scale"], p["kernel_zero"], p["g_idx"])
    if form == "weight_int8":
        return linear_weight_int8(x, p["kernel"], p["kernel_weight_only_scale"])
    return linear(x, p["kernel"])


@pytest.mark.parametrize("form", ["float32", "bfloat16", "weight_int8", "int4"])
@pytest.mark.parametrize(("k", "n"), [(300, 19), (64, 5)])
def test_a_row_has_the_same_bits_in_every_batch_of_few(cupy, form, k, n):
    x = np.random.default_rng(0).standard_normal((17, k)).astype(np.float32)
    p = cupy.load({"layer": layer(form, k, n)})["layer"]
    with use(cupy):
        alone = [product(form, row[None], p)[0].tobytes() for row in x]
        for count in (2, 3, 4, 7, 8, 9, 17):
            assert [row.tobytes() for row in product(form, x[:count], p)] == alone[:count]
    assert {launched.split(",")[0].split("<")[1].rstrip(">") for launched in cupy.device.launches if "matvec" in launched} == {
        str(rows) for rows in OUTPUTS
    }


@pytest.mark.parametrize("form", ["float32", "bfloat16", "weight_int8", "int4"])
def test_many_rows_of_any_shape(cupy, form):
    x = (
        np.random.default_rng(0)
        .standard_normal((2, MOST, 48))
        .astype(numpy_dtype("bfloat16" if form == "bfloat16" else "float32"))
    )
    p = cupy.load({"layer": layer(form, 48, 5)})["layer"]
    with use(cupy):
        y, flat = product(form, x, p), product(form, x.reshape(-1, 48), p)
    assert y.shape == (2, MOST, 5)
    assert y.tobytes() == flat.tobytes()


def test_integer_sums_are_exact(cupy):
    """Sums that float32 could not hold: of the largest numbers, all of one sign but for one."""
    k = 3000
    values, kernel = np.full((3, k), -127, np.int8), np.full((k, 2), -127, np.int8)
    kernel[1, 0], ones = 1, np.ones(3, np.float32)
    for rows in (3, MOST + 1):
        given = np.resize(values, (rows, k)), np.resize(ones, rows)
        with use(cupy):
            y = linear_int8(*given, kernel, ones[:2], dtype="float32")
        wanted = np.float32(given[0].astype(np.int64) @ kernel.astype(np.int64))
        assert y.tobytes() == wanted.tobytes()


# -- weights ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["float32", "float16", "bfloat16", "int8", "weight_int8", "int4/3", "int4/8", "int4/128"])
@pytest.mark.parametrize(("k", "n", "v"), [(24, 16, 40), (17, 9, 11), (1, 1, 1)])
def test_weights_come_back_bit_for_bit(cupy, form, k, n, v):
    generator = np.random.default_rng(3)
    names = {
        "a.kernel": (k, n),
        "a.bias": (n,),
        "token_embedding.embeddings": (v, k),
        "token_embedding.reverse_embeddings": (k, v),
    }
    leaves = {path: generator.standard_normal(shape).astype(np.float32) for path, shape in names.items()}
    mode, _, block = form.partition("/")
    if mode in ("int8", "weight_int8", "int4"):
        how = quantization("int4", int(block)) if block else quantization("int8", None, mode == "weight_int8")
        tree = quantized_tree(leaves, how)
    else:
        tree = grown((path, leaf.astype(numpy_dtype(form))) for path, leaf in leaves.items())
    wanted = {path: (leaf.shape, leaf.dtype, leaf.tobytes()) for path, leaf in flatten(tree)}
    for move in (cupy.load, cupy.take):
        there = move(copy_containers(tree))
        assert isinstance(there["a"]["kernel"], Matrix)
        assert isinstance(there["token_embedding"]["embeddings"], Matrix)
        assert {path: (leaf.shape, leaf.dtype) for path, leaf in flatten(there)} == {p: form[:2] for p, form in wanted.items()}
        back = cupy.unload(copy_containers(there))
        assert {path: (leaf.shape, leaf.dtype, leaf.tobytes()) for path, leaf in flatten(back)} == wanted


def test_a_tree_that_is_taken_leaves_nothing_behind(cupy):
    tree = {"layers": [layer("float32", 8, 8)], "token_embedding": {"embeddings": np.ones((3, 8), np.float32)}}
    given = tree["layers"][0]
    cupy.take(tree)
    assert tree == {}
    assert given == {}


@pytest.mark.parametrize("form", ["float32", "bfloat16", "weight_int8", "int8", "int4"])
def test_query_key_and_value_are_one_matrix(cupy, form):
    parts = {name: layer(form, 64, 5, seed) for seed, name in enumerate(("query", "key", "value"))}
    p = cupy.load({"self_attention": parts})["self_attention"]
    rows = p["_joint"]["kernel"].rows
    assert len(rows) == 15
    assert all(np.shares_memory(p[name]["kernel"].rows, rows[5 * i : 5 * i + 5]) for i, name in enumerate(parts))
    adapted = parts | {"key": parts["key"] | {"lora_kernel_a": np.ones((64, 1, 2), np.float32)}}
    assert "_joint" not in cupy.load({"self_attention": adapted})["self_attention"]


# -- planted faults -----------------------------------------------------------------------------------------------------------


def quantised_table():
    table = quantized_tree(
        {"token_embedding.embeddings": np.random.default_rng(2).standard_normal((7, 40))}, quantization("int4", 8)
    )
    p = table["token_embedding"]
    ids = np.array([3, 0, 6])
    return embedding_int4, (ids, p["embeddings"], p["embeddings_scale"], p["embeddings_zero"], p["g_idx"]), {"dtype": "float32"}


def rows(count, k=300):
    return np.random.default_rng(0).standard_normal((count, k)).astype(np.float32)


def plain(count, k=300, n=19):
    return linear, (rows(count, k), layer("float32", k, n)["kernel"], rows(1, n)[0]), {}


def four_bits(count):
    p = layer("int4", 300, 19)
    return linear_int4, (rows(count), p["kernel"], p["kernel_scale"], p["kernel_zero"], p["g_idx"]), {}


def eight_bits(count):
    p, x = layer("int8", 300, 19), rows(count)
    scale = row_scale.reference(x)
    given = quantize_rows.reference(x, scale), scale, p["kernel"], p["kernel_scale"], rows(1, 19)[0]
    return linear_int8, given, {"dtype": "float32"}


def weight_eight_bits(count):
    p = layer("weight_int8", 300, 19)
    return linear_weight_int8, (rows(count), p["kernel"], p["kernel_weight_only_scale"]), {}


def with_ties():
    return quantize_rows, ((np.arange(-9, 9) / 2).astype(np.float32)[None], np.ones(1, np.float32)), {}


def one_large_value():
    x = np.zeros((2, 300), np.float32)
    x[0, 290], x[1, 40] = -8, 5
    return row_scale, (x,), {}


def not_a_number():
    return relu, (np.array([np.nan, -1, 2], np.float32),), {}


def a_table():
    return embedding, (np.array([2, 0, 1]), rows(3, 150)), {}


FAULTS = {
    "the tail of a row is left out": ("matvec.cu", "begin < pitch; begin +=", "begin + VALUES * 31 < pitch; begin +=",
        plain(3)),
    "a piece ahead is left out": ("matvec.cu", "part < AHEAD * P::PARTS", "part < P::PARTS", plain(1)),
    "lanes and rows are mixed up": ("matvec.cu", "lane % ROWS;", "lane / OUTPUTS % ROWS;", plain(7)),
    "another row's values": ("matvec.cu", "min(first + r, rows - 1)", "first", plain(2)),
    "rows behind the first eight are the first": ("matvec.cu", "x + int64_t(min(first + r", "x + int64_t(min(r", plain(9)),
    "the gate in place of the layer": ("matvec.cu", "finish(row, column, layer, gated)", "finish(row, column, gated, layer)",
        plain(1)),
    "lanes are not added up": ("matvec.cu", "= warp_sum(sums[o][r])", "= sums[o][r]", plain(1)),
    "half-precision sums": ("matvec.cu", "__fmaf_rn(values[e], weights[o][e], sum)",
                            "widen(narrow<f16>(__fmaf_rn(values[e], weights[o][e], sum)))", plain(1)),
    "nibbles in the wrong order": ("matvec.cu", ">> (4 * e)", ">> (4 * (e ^ 1))", four_bits(1)),
    "nibbles without a sign": ("matvec.cu", "^ 0x4b000008", "| 0x4b000000", four_bits(1)),
    "no zero": ("matvec.cu", "8388616.0f + float(zero[group])", "8388616.0f", four_bits(2)),
    "the group of the piece's first value": ("matvec.cu", "min(i / block", "min(begin / block", four_bits(1)),
    "no scale": ("matvec.cu", "Piece<W>::PARTS == 2 ? over", "Piece<W>::PARTS == 3 ? over", weight_eight_bits(1)),
    "int8 without a sign": ("matvec.cu", "^ 0x80808080", "", weight_eight_bits(1)),
    "one scale for all rows": ("matmul_few.cu", "row_scale, row,", "row_scale, 0,", eight_bits(4)),
    "the first column's scale": ("epilogue.cu", "row_scale, row, scale, j", "row_scale, row, scale, 0", eight_bits(MOST + 1)),
    "bias of another type": ("epilogue.cu", "{bias, bias_type,", "{bias, 1,", plain(MOST + 1)),
    "ties away from zero": ("quantize.cu", "rintf(", "roundf(", with_ties()),
    "a warp's largest value": ("quantize.cu", "block_max<THREADS>(largest)", "warp_max(largest)", one_large_value()),
    "high and low nibbles": ("embedding.cu", "j % 2 ?", "j % 2 == 0 ?", quantised_table()),
    "the first group's scale": ("embedding.cu", "scale[group]", "scale[group - j / block]", quantised_table()),
    "the next row": ("embedding.cu", "table + id * pitch", "table + (id + 1) % v * pitch", a_table()),
    "a row's first 128 values": ("embedding.cu", "j < n; j += THREADS", "j < n && j < THREADS; j += THREADS", a_table()),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(compiled, fault):
    file, right, wrong, (op, args, kwargs) = FAULTS[fault]
    source = (DIRECTORY / file).read_text()
    assert source.count(right) == 1
    assert judged(compiled, {}, op, args, kwargs)
    assert not judged(compiled, {file: source.replace(right, wrong)}, op, args, kwargs)


def judged(compiled, sources, op, args, kwargs):
    """Whether the kernel's result is within the bound, on a device with these sources."""
    device = Emulated(compiled, sources=sources)
    try:
        with use(Cupy(device)):
            got = op(*args, **kwargs)
    except DoesNotCompile:
        raise
    except EmulationError:
        return False
    assert device.launches
    return bool(judge(op, args, kwargs, got))


def test_rows_that_begin_anywhere(cupy):
    """The kernels read 16 bytes at once, which no GPU does from another address."""
    numbers = np.random.default_rng(2).standard_normal(40).astype(numpy_dtype("bfloat16"))
    weights = np.random.default_rng(3).standard_normal((32, 24)).astype(numpy_dtype("bfloat16"))
    with use(cupy):
        found = [linear(x, weights) for x in (numbers[1:33], numbers[1:33].copy())]
    assert found[0].tobytes() == found[1].tobytes()


def test_nan_is_no_zero(cupy):
    op, args, kwargs = not_a_number()
    with use(cupy):
        assert judge(op, args, kwargs, op(*args, **kwargs))


def test_a_row_that_is_not_there_is_nan(cupy):
    with use(cupy):
        y = embedding(np.array([1, 3, -1]), np.ones((3, 4), np.float32))
    assert np.isnan(y[1:]).all()
    assert (y[0] == 1).all()

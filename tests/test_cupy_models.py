"""The models on the CuPy accelerator, on a device that is this CPU: composites, the captured decode step, planted faults."""

from functools import partial

import numpy as np
import pytest
from emulated import ORDERS, DoesNotCompile, Emulated, EmulationError
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.decoding import AHEAD, Decoding, Graph
from refmodels_cupy.linear import MOST
from refmodels_cupy.recorder import Recorder, RecordingError
from refmodels_cupy.source import DIRECTORY

from refmodels import BloomBackbone, BloomCausalLM, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM
from refmodels.conformance import check_accelerator, drawing
from refmodels.generate import select_rows
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.sampling import greedy_token, sample_token
from refmodels.opt import opt_backbone
from refmodels.parameters import build_tree, replace_leaves

ONE_ORDER = (2,)
"""Of threads. In three orders each kernel is run by the tests of its own."""


# -- composites ---------------------------------------------------------------------------------------------------------------

COMPOSITES = {
    "opt_decoder_layer": "bfloat16",
    "opt_backbone": "float32",
    "opt_decode_step": "float32",
    "bloom_decoder_layer": "float32",
    "bloom_backbone": "bfloat16",
    "bloom_decode_step": "float16",
    "t5_self_attention": "float32",
    "t5_cross_attention": "bfloat16",
    "t5_feedforward": "float16",
    "t5_encoder": "float16",
    "t5_decoder": "float32",
    "t5_decode_step": "bfloat16",
    "opt/ahead": "bfloat16",
    "bloom/ahead": "float32",
    "t5/ahead": "float16",
}
"""Composite, or law of models -> the type it is tried in."""


@pytest.mark.parametrize("name", COMPOSITES)
def test_conformance(compiled, monkeypatch, name):
    monkeypatch.setattr(drawing, "ROOM", 2**9)  # a thread costs a microsecond here
    monkeypatch.setattr(drawing, "TILES", (8, 16))
    cupy = Cupy(Emulated(compiled, orders=ONE_ORDER))
    cupy.tiles = ()
    [checked] = check_accelerator(cupy, ops=[name], dtypes=[COMPOSITES[name]], examples=3)
    assert [str(failure) for failure in checked.failures] == []
    assert checked.taken
    assert not cupy.crossings


PRESETS = {
    "opt_tiny_stdlib": (OPTCausalLM, "import"),
    "bloom_tiny_stdlib": (BloomCausalLM, "def f"),
    "t5_tiny_numbers": (T5Seq2SeqLM, "spell: 42"),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dtype", "mode"), [("float32", None), ("bfloat16", None), ("float32", "int8"), ("float32", "int4")])
def test_models_say_the_same(compiled, preset, dtype, mode):
    cls, prompt = PRESETS[preset]
    cupy = Cupy(Emulated(compiled, orders=ONE_ORDER))
    here, there = (cls.from_preset(preset, dtype=dtype, accelerator=accelerator) for accelerator in (None, cupy))
    for model in (here, there):
        if mode:
            model.quantize(mode)
    assert there.generate(prompt, max_new_tokens=4) == here.generate(prompt, max_new_tokens=4)
    assert not cupy.crossings
    assert cupy.device.launches["advance"] == 3  # the first token is chosen by the prefill's scores


# -- the captured step --------------------------------------------------------------------------------------------------------

BACKBONES = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
SOURCE = np.array([[5, 2, 1, 9, 3], [7, 4, 4, 1, 0], [6, 1, 2, 3, 8]])
PROMPTS = np.array([[3, 1, 4, 1], [5, 9, 0, 0], [2, 6, 5, 0]])
LENGTHS = np.array([4, 2, 3])
ROWS = len(PROMPTS)


class Counting(Emulated):
    """Counts what a captured step may not do, while it is played."""

    def __init__(self, cache, **how):
        super().__init__(cache, **how)
        self.playing, self.plays, self.allocated, self.forbidden = False, 0, 0, []

    def _may(self, what):
        if self.playing:
            self.forbidden.append(what)

    def empty(self, shape, dtype):
        self._may("empty")
        self.allocated += 1
        return super().empty(shape, dtype)

    def to_host(self, array):
        self._may("to_host")
        return super().to_host(array)

    def to_device(self, array):
        self._may("to_device")
        return super().to_device(array)

    def product(self, *args, **kwargs):
        self._may("product")
        return super().product(*args, **kwargs)

    def captured(self, launches):
        play = super().captured(launches)

        def counted():
            self.playing, self.plays = True, self.plays + 1
            try:
                play()
            finally:
                self.playing = False

        return counted


def model(family, accelerator=None, dtype="float32", **config):
    """A small model whose next tokens are no close call: hidden states of about 1, and no two scores alike."""
    sizes = {"vocabulary_size": 24, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
    sizes["tie_embedding_weights"] = False  # a tied head says again what it is given
    if family == "opt":
        sizes["max_sequence_length"] = 64
    backbone = BACKBONES[family](**sizes | config, dtype=dtype, accelerator=accelerator)
    rng = np.random.default_rng(4)

    def leaf(parameter):
        values = rng.standard_normal(parameter.shape) / np.sqrt(parameter.shape[0] if "kernel" in parameter.path else 1)
        values = values / 10 if parameter.path.endswith(("bias", "beta", "gamma", "weight")) else values
        return (values + parameter.path.endswith(("gamma", "weight"))).astype(numpy_dtype(backbone.variable_dtype))

    backbone.params = build_tree(backbone.plain_parameters(), leaf)
    return backbone


def prefilled(backbone, capacity=12, prompts=PROMPTS):
    """A cache with the prompts in it."""
    with backbone.running():
        rows = () if backbone.family != "t5" else (backbone.on_device(SOURCE), backbone.on_device(SOURCE > 0))
        cache = backbone.new_cache(*rows or (ROWS,), capacity)
    backbone.prefill(prompts, np.arange(prompts.shape[1]) < LENGTHS[:, None], LENGTHS, cache)
    return cache


def one_by_one(backbone, cache, tokens, positions, remaining, count, uniform=None, **settings):
    """What `decode_tokens` is to give, step by step by the reference's choice."""
    found = []
    for i in range(count):
        scores = backbone.decode_step(
            tokens[:, None], np.ones((len(tokens), 1), bool), positions + np.minimum(i, remaining), cache
        )
        scores = np.asarray(scores)
        tokens = greedy_token(scores) if uniform is None else sample_token(scores, uniform[i], **settings)
        found.append(tokens)
    return np.stack(found, 1)


DRAWS = {
    "greedy": {},
    "sampled": {
        "uniform": np.random.default_rng(8).random((6, ROWS)),
        "temperature": np.array([0.7, 1.0, 1.6]),
        "top_k": np.array([5, 24, 9]),
        "top_p": np.array([np.inf, 0.8, 0.9]),
        "min_p": np.array([0.0, 0.0, 0.1]),
    },
    "with a temperature alone": {
        "uniform": np.random.default_rng(8).random((6, ROWS)),
        "temperature": np.array([0.7, 1.0, 1.6]),
    },
}

BEGIN, REMAINING = np.array([3, 7, 1]), np.array([6, 0, 2])  # a row that goes on, one that has ended, one that ends meanwhile


def ahead(compiled, family, *, sources=None, orders=ONE_ORDER, dtype="float32", choice="greedy", count=6, **config):
    """Tokens by the graph, tokens one by one by the reference, and the device."""
    device = Counting(compiled, sources=sources, orders=orders)
    here, there = model(family, dtype=dtype, **config), model(family, Cupy(device), dtype=dtype, **config)
    cache, given = prefilled(there), (BEGIN, LENGTHS, REMAINING)
    got = there.decode_tokens(*given, cache, count=count, **DRAWS[choice])
    return got, one_by_one(here, prefilled(here), *given, count, **DRAWS[choice]), device


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("choice", DRAWS)
def test_tokens_ahead_are_those_one_by_one(compiled, family, choice):
    got, wanted, device = ahead(compiled, family, choice=choice)
    assert got.tolist() == wanted.tolist()
    assert len(set(got[0].tolist())) > 1
    assert device.plays == 6
    assert device.forbidden == []


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 8, "tie_embedding_weights": True}),
        ("opt", {"hidden_dim": 18, "intermediate_dim": 7}),  # rows that are no whole pieces
        ("bloom", {"num_heads": 3, "hidden_dim": 24}),
        ("t5", {"activation": "gelu_approximate", "use_gated_activation": False, "key_value_dim": 5}),
        ("t5", {"tie_embedding_weights": True, "num_layers": 3}),
    ],
)
def test_variants(compiled, family, config):
    got, wanted, device = ahead(compiled, family, count=3, **config)
    assert got.tolist() == wanted.tolist()
    assert device.forbidden == []


def test_vectors_at_any_address(compiled):
    """Products read 16 bytes at once, and nothing says where the rows begin that a layer is given."""
    backbone = model("opt", Cupy(Emulated(compiled, orders=ONE_ORDER)), word_embed_proj_dim=8, tie_embedding_weights=True)
    ids, real = np.zeros((2, 3), np.int64), np.ones((2, 3), bool)
    aside = np.random.default_rng(6).standard_normal(49).astype(np.float32)[1:].reshape(2, 3, 8)
    with backbone.running():
        got, wanted = (
            opt_backbone(ids, real, backbone.device_params, backbone.config, embeddings=x) for x in (aside, aside.copy())
        )
    assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("mode", ["int8", "weight_int8", "int4"])
def test_quantised_models(compiled, family, mode):
    device = Counting(compiled, orders=ONE_ORDER)
    here, there = model(family), model(family, Cupy(device))
    for backbone in (here, there):
        backbone.quantize(
            mode.removeprefix("weight_"), **({"block_size": 8} if mode == "int4" else {"weight_only": "w" in mode})
        )
    caches, given = (prefilled(here), prefilled(there)), (BEGIN[:, None], np.ones((ROWS, 1), bool), LENGTHS)
    wanted, got = (np.asarray(b.decode_step(*given, cache)) for b, cache in zip((here, there), caches, strict=True))
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-3)  # a rounded integer may fall on the other side
    assert device.plays == 1
    assert device.forbidden == []


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_prompts_of_many_rows(compiled, family, mode):
    """More rows than the kernels for a few take at once, and so many that the last part is smaller."""
    got, generator = [], np.random.default_rng(3)
    ids, real = generator.integers(0, 24, (ROWS, 23)), np.ones((ROWS, 23), bool)
    for accelerator in (None, Cupy(Counting(compiled, orders=ONE_ORDER))):
        backbone = model(family, accelerator, "bfloat16")
        if mode:
            backbone.quantize(mode, **({"block_size": 128} if mode == "int4" else {}))
        with backbone.running():
            rows = (backbone.on_device(SOURCE), backbone.on_device(SOURCE > 0)) if family == "t5" else (ROWS,)
            cache = backbone.new_cache(*rows, 23)
        got.append(np.asarray(backbone.prefill(ids, real, np.full(ROWS, 23), cache), np.float32))
    wanted, found = got
    assert np.linalg.norm(found - wanted) < 0.03 * np.linalg.norm(wanted)  # bfloat16, whose roundings flip int8's


@pytest.mark.parametrize("family", BACKBONES)
def test_parameters_that_lie_column_after_column(compiled, family):
    found = []
    for order in "CF":
        backbone = model(family, Cupy(Emulated(compiled, orders=ONE_ORDER)))
        backbone.params = replace_leaves(model(family).params, partial(np.array, order=order))
        cache = prefilled(backbone)
        found.append(backbone.decode_step(PROMPTS[:, :1], np.ones((ROWS, 1), bool), LENGTHS, cache))
    assert np.array_equal(*map(backbone.on_host, found))


@pytest.fixture(scope="module")
def opt(compiled):
    """A model on the device, and the same without."""
    return model("opt", Cupy(Counting(compiled, orders=ONE_ORDER))), model("opt")


def test_a_step_is_captured_once(opt):
    there, here = opt
    device, cache = there.accelerator.device, prefilled(there)
    plays, real, wanted = device.plays, np.ones((ROWS, 1), bool), prefilled(here)
    for i in range(3):
        got = there.decode_step(BEGIN[:, None], real, LENGTHS + i, cache)
        np.testing.assert_allclose(got, here.decode_step(BEGIN[:, None], real, LENGTHS + i, wanted), rtol=1e-4, atol=1e-4)
    (graph,) = cache["_graphs"].values()
    assert device.plays - plays == 3
    there.decode_tokens(BEGIN, LENGTHS + 3, REMAINING, cache, count=2)
    assert set(cache["_graphs"]) == {None, ()}
    assert cache["_graphs"][None] is graph


def test_scores_are_not_written_to_by_the_next_step(opt):
    there, _ = opt
    cache, real = prefilled(there), np.ones((ROWS, 1), bool)
    first = there.decode_step(BEGIN[:, None], real, LENGTHS, cache)
    before = first.copy()
    there.decode_step(BEGIN[:, None] + 1, real, LENGTHS + 1, cache)
    assert first.tobytes() == before.tobytes()


def test_two_caches_at_once(opt):
    there, _ = opt
    alone = there.decode_tokens(BEGIN, LENGTHS, REMAINING, prefilled(there), count=4)
    one, other = prefilled(there), prefilled(there, prompts=PROMPTS + 7)
    first = there.decode_tokens(BEGIN, LENGTHS, REMAINING, one, count=2)
    there.decode_tokens(BEGIN + 2, LENGTHS, REMAINING, other, count=2)
    second = there.decode_tokens(first[:, -1], LENGTHS + np.minimum(2, REMAINING), REMAINING - 2, one, count=2)
    going = REMAINING >= 2  # a row that has ended takes its last position again
    assert np.concatenate([first, second], 1)[going].tolist() == alone[going].tolist()


def test_selected_rows_have_a_graph_of_their_own(opt):
    order, real = np.array([2, 0, 2]), np.ones((ROWS, 1), bool)
    got = []
    for backbone in opt:
        cache = prefilled(backbone)
        backbone.decode_step(BEGIN[:, None], real, LENGTHS, cache)
        with backbone.running():
            chosen = select_rows(cache, order)
        assert "_graphs" not in chosen
        backbone.decode_step(BEGIN[:, None], real, LENGTHS + 1, cache)  # the old one goes on by itself
        got.append(np.asarray(backbone.decode_step(BEGIN[:, None], real, (LENGTHS + 1)[order], chosen)))
    np.testing.assert_allclose(*got, rtol=1e-4, atol=1e-4)


def test_the_end_of_the_cache(opt):
    there, here = opt
    last = 4 - LENGTHS  # steps until a row takes the last position
    got = there.decode_tokens(BEGIN, LENGTHS, last, prefilled(there, 5), count=4)
    assert got.tolist() == one_by_one(here, prefilled(here, 5), BEGIN, LENGTHS, last, 4).tolist()
    with pytest.raises(ValueError, match="position 5 is outside the cache's 5"):
        there.decode_tokens(BEGIN, LENGTHS, last + 1, prefilled(there, 5), count=4)
    with pytest.raises(ValueError, match="position 5 is outside the cache's 5"):
        there.decode_step(BEGIN[:, None], np.ones((ROWS, 1), bool), np.array([4, 5, 0]), prefilled(there, 5))


def test_a_token_that_is_not_real(opt):
    """A row without a real key looks at all keys up to the last position of the batch."""
    got = []
    for backbone in opt:
        with backbone.running():
            cache = backbone.new_cache(ROWS, 8)
        nothing = np.zeros((ROWS, 3), bool)
        nothing[0] = True
        backbone.prefill(PROMPTS[:, :3], nothing, np.full(ROWS, 3), cache)
        real = np.array([[True], [False], [False]])
        got.append(np.asarray(backbone.decode_step(BEGIN[:, None], real, np.array([5, 3, 3]), cache)))
    np.testing.assert_allclose(*got, rtol=1e-4, atol=1e-4)


def test_other_parameters_have_another_graph(compiled):
    there = model("opt", Cupy(Counting(compiled, orders=ONE_ORDER)))
    cache, given = prefilled(there), (BEGIN[:, None], np.ones((ROWS, 1), bool), LENGTHS)
    before = np.asarray(there.decode_step(*given, cache))
    params = there.params
    params["token_embedding"]["embeddings"] *= 2
    there.params = params
    assert not np.allclose(there.decode_step(*given, cache), before)


def test_what_a_layer_allocates_serves_the_next(compiled):
    sizes = []
    for layers in (2, 3):
        device = Counting(compiled, orders=ONE_ORDER)
        there = model("opt", Cupy(device), num_layers=layers)
        cache, before = prefilled(there), device.allocated
        there.decode_step(BEGIN[:, None], np.ones((ROWS, 1), bool), LENGTHS, cache)
        sizes.append(device.allocated - before)
    assert sizes[0] == sizes[1]


def test_a_recorder_refuses_what_no_graph_can_do(compiled):
    recorder, x = Recorder(Emulated(compiled)), np.ones((2, 8), np.float32)
    with pytest.raises(RecordingError, match="may not call cuBLAS"):
        recorder.product(x, x, transposed=True)
    with pytest.raises(RecordingError, match="may not be waited for"):
        recorder.to_host(x)


# -- what is run op by op -----------------------------------------------------------------------------------------------------


def reasons(backbone, rows=ROWS, **how):
    """Why the accelerator declines a step of so many rows."""
    accelerator, params = backbone.accelerator, how.pop("params", None) or backbone.device_params
    with backbone.running():
        cache = backbone.new_cache(rows, 8)
    step = np.zeros((rows, 1), np.int64), np.ones((rows, 1), bool), np.zeros(rows, np.int64)
    return accelerator.reasons(backbone.decode_op, (*step, params, cache, backbone.config), {})


def test_what_is_no_graph_says_why(compiled):
    there = model("opt", Cupy(Counting(compiled, orders=ONE_ORDER)))
    assert reasons(there) == []
    assert reasons(there, params=model("opt").params) == ["parameters that were not loaded: op by op"]
    assert reasons(there, rows=MOST + 1) == [f"{MOST + 1} rows: more than one graph is for"]
    assert reasons(model("opt", there.accelerator, "float64")) == ["float64: the reference's"]
    there.enable_lora(2)
    assert reasons(there) == ["a layer has an adapter: op by op"]
    given = BEGIN, LENGTHS, REMAINING, prefilled(there)
    assert there.decode_tokens(*given, count=2) is None
    assert there.decode_tokens(*given, count=AHEAD + 1) is None


def test_rows_are_what_a_launch_has_limits_for_and_tokens_are_not(compiled):
    there = model("opt", Cupy(Counting(compiled, orders=ONE_ORDER)))
    for shape, wanted in (((40, 2048), []), ((65536, 1), ["heads of 8 numbers, 2 of them, 65536 rows: op by op"])):
        given = np.zeros(shape, np.int64), np.ones(shape, bool), there.device_params, there.config
        assert there.accelerator.reasons(opt_backbone, given, {}) == wanted


def test_an_adapter_is_not_forgotten(compiled):
    """Parameters that had a graph, then get an adapter."""
    backbones, got = (model("opt"), model("opt", Cupy(Counting(compiled, orders=ONE_ORDER)))), []
    for backbone in backbones:
        cache, real = prefilled(backbone), np.ones((ROWS, 1), bool)
        backbone.decode_step(BEGIN[:, None], real, LENGTHS, cache)
        backbone.enable_lora(2)
        params, rng = backbone.params, np.random.default_rng(1)
        for layer in params["layers"]:
            for part in layer["self_attention"].values():
                if "lora_kernel_b" in part:
                    part["lora_kernel_b"][...] = rng.standard_normal(part["lora_kernel_b"].shape)
                    part["lora_kernel_a"][...] = rng.standard_normal(part["lora_kernel_a"].shape)
        backbone.params = params
        got.append(np.asarray(backbone.decode_step(BEGIN[:, None], real, LENGTHS + 1, cache)))
    np.testing.assert_allclose(*got, rtol=1e-3, atol=1e-3)


def test_t5_in_float16_does_not_overflow(compiled):
    """T5-C8: a residual stream of more than 65504, float16's largest number."""
    backbones, got = (model("t5", dtype="float16"), model("t5", Cupy(Counting(compiled, orders=ONE_ORDER)), "float16")), []
    for backbone in backbones:
        params = backbone.params
        for stack in ("encoder", "decoder"):
            for layer in params[stack]["layers"]:
                layer["input_projector"]["kernel"] *= 20
                layer["output_projector"]["kernel"] *= 2000
        backbone.params = params
        cache, real = prefilled(backbone), np.ones((ROWS, 1), bool)
        got.append(np.asarray(backbone.decode_step(BEGIN[:, None], real, LENGTHS, cache), np.float32))
    assert np.isfinite(got[1]).all()
    np.testing.assert_allclose(*got, rtol=2e-2, atol=2e-2)


# -- planted faults -----------------------------------------------------------------------------------------------------------

FAULTS = {
    "the counter stays": ("advance.cu", "*step = now + 1", "*step = now"),
    "the counter goes on before all have read it": ("advance.cu", "    __syncthreads();", "    //"),
    "a row goes on that has none remaining": ("advance.cu", "now < remaining[row]", "now <= remaining[row]"),
    "a position is left out": ("advance.cu", "+= now < remaining[row]", "+= 2 * (now < remaining[row])"),
    "the same token comes in again": ("advance.cu", "ids[row] = int(chosen[row]);", ""),
    "the first row's token": ("advance.cu", "ids[row] = int(chosen[row])", "ids[row] = int(chosen[0])"),
    "keys of another row": ("cache.cu", "(int64_t(row) * capacity + position)", "(int64_t(row / 2) * capacity + position)"),
    "keys one position further": ("cache.cu", "start[row] : 0)", "start[row] + 1 : 0)"),
    "values in place of keys": ("cache.cu", "(blockIdx.y ? second : x)", "(second ? second : x)"),
    "a row's first 8 values": ("cache.cu", "i < width; i +=", "i < width && i < 8; i +="),
    "a key too few": ("cache.cu", "min(last + 1, capacity)", "min(last, capacity)"),
    "a token that nobody sees": ("cache.cu", "+ position] = is_real", "+ position] = false"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(compiled, fault):
    file, right, wrong = FAULTS[fault]
    source = (DIRECTORY / file).read_text()
    assert source.count(right) == 1
    # The second step is the first to see what the first has left.
    try:
        got, wanted, _ = ahead(compiled, "opt", sources={file: source.replace(right, wrong)}, orders=ORDERS, count=3)
    except DoesNotCompile:
        raise
    except EmulationError:
        return
    assert got.tolist() != wanted.tolist()


def one_graph_for_every_cache(decoding, params, cache, config, choice):
    graphs = params.setdefault("_graphs", {})
    if choice not in graphs:
        graphs[choice] = Graph(decoding.device, decoding._scores, params, cache, config, choice)
    return graphs[choice]


def a_layer_writes_to_what_it_is_given(recorder, device, begin=Recorder.__init__):
    begin(recorder, device)
    recorder._of_a_layer = []


HOST_FAULTS = {
    "none": None,
    "one graph for every cache": (Decoding, "_graph", one_graph_for_every_cache),
    "a layer writes to what it is given": (Recorder, "__init__", a_layer_writes_to_what_it_is_given),
}


@pytest.mark.parametrize("fault", HOST_FAULTS)
def test_a_fault_of_the_host_is_found(compiled, monkeypatch, fault):
    if HOST_FAULTS[fault]:
        monkeypatch.setattr(*HOST_FAULTS[fault])
    here, there = model("opt"), model("opt", Cupy(Counting(compiled, orders=ONE_ORDER)))
    there.decode_tokens(BEGIN, LENGTHS, REMAINING, prefilled(there, prompts=PROMPTS + 7), count=2)
    got = there.decode_tokens(BEGIN, LENGTHS, REMAINING, prefilled(there), count=3)
    wanted = one_by_one(here, prefilled(here), BEGIN, LENGTHS, REMAINING, 3)
    assert (got.tolist() == wanted.tolist()) == (fault == "none")

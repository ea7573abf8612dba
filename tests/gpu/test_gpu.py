"""The CuPy accelerator on a GPU: `pytest -m gpu`, from a checkout, without a network, in less than eight minutes.

It needs CuPy, hypothesis and pytest beside refmodels' own packages; refmodels itself need not be installed. What a machine
without a GPU can show of the same kernels is in `tests/test_cupy_*.py`. NVIDIA's sanitizers look at each access that a kernel
makes, and slow it a hundredfold; the tests named `every_kind_of_kernel` are the small set for them:

    compute-sanitizer --tool memcheck python -m pytest -m gpu -k every_kind_of_kernel     # or racecheck, initcheck, synccheck
"""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import test_goldens
import test_quantize
import test_samplers

from refmodels import Accelerator, BloomBackbone, OPTBackbone, T5Backbone, use
from refmodels.backbone import Backbone
from refmodels.bench_worker import drawn_quickly
from refmodels.conformance import check_accelerator
from refmodels.conformance.check import subjects
from refmodels.generate import Sampling, decode
from refmodels.numerics import calibrated, compare
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import copy_containers, replace_leaves
from refmodels.task import Task

pytestmark = pytest.mark.gpu

EXAMPLES = 24
"""Of each op in each type: the reference's side of them takes most of the time, on one core."""

PROMPTS = {
    "opt_tiny_stdlib": ["def main(", "import os, "],
    "bloom_tiny_stdlib": ["class Stack:", "for i in"],
    "t5_tiny_numbers": ["spell: 4207", "roman: 1994"],
}
SMALL = {"vocabulary_size": 301, "num_layers": 2, "num_heads": 2, "intermediate_dim": 200, "seed": 2}
MODELS = {
    "opt": (OPTBackbone, {**SMALL, "hidden_dim": 128, "max_sequence_length": 400}),
    "opt, heads of 80": (OPTBackbone, {**SMALL, "hidden_dim": 160, "max_sequence_length": 400}),
    "bloom": (BloomBackbone, {**SMALL, "hidden_dim": 128}),
    "t5": (T5Backbone, {**SMALL, "hidden_dim": 96, "key_value_dim": 64}),
    "t5, gated": (T5Backbone, {**SMALL, "hidden_dim": 96, "activation": "gelu_approximate", "use_gated_activation": True}),
}
FORMS = ("float32", "float16", "bfloat16", "int8", "int8 weights", "int4")
SIZES = {
    "opt-125m": (OPTBackbone, Backbone.from_preset("opt_125m_en", load_weights=False).get_config()),
    "a layer of opt-6.7b": (OPTBackbone, Backbone.from_preset("opt_6.7b_en", load_weights=False).get_config()),
    "a layer of bloom-3b": (BloomBackbone, Backbone.from_preset("bloom_3b_multi", load_weights=False).get_config()),
    "a layer of flan-xl": (T5Backbone, Backbone.from_preset("t5_1.1_xl", load_weights=False).get_config()),
}


def made(name, form, accelerator):
    """A small random model, the same whatever the accelerator."""
    cls, arguments = MODELS[name]
    plain = form.startswith("float") or form.startswith("bfloat")
    model = cls(**arguments, dtype=form if plain else "bfloat16", accelerator=accelerator)
    if not plain:
        mode = form.split()[0]
        model.quantize(mode, weight_only=True if form.endswith("weights") else None, block_size=32 if mode == "int4" else None)
    return model


def scores(model, ids, steps):
    """The scores after prompts ids (b, t), and after each of so many steps that take greedy tokens: (1 + steps, b, v)."""
    batch, length = ids.shape
    with model.running():
        if model.family == "t5":
            cache = model.new_cache(*(model.on_device(array) for array in (ids, np.ones(ids.shape, bool))), 1 + steps)
            ids, length = np.zeros((batch, 1), np.int64), 1
        else:
            cache = model.new_cache(batch, length + steps)
    mask, positions = np.ones(ids.shape, bool), np.full(batch, length)
    found = [model.on_host(model.prefill(ids, mask, positions, cache))]
    for i in range(steps):
        tokens = np.arange(batch)[:, None] + i  # the same for every precision
        found.append(model.on_host(model.decode_step(tokens, np.ones(tokens.shape, bool), positions + i, cache)))
    return np.stack(found)


def tokens(model, prompts, count):
    """Greedy tokens after prompts (b, t) of a decoder: (b, count). Chosen on the device, several at a time."""
    with model.running():
        cache = model.new_cache(len(prompts), prompts.shape[1] + count)
    rows = [Sampling()] * len(prompts)
    steps = decode(model, cache, prompts.tolist(), [count] * len(prompts), frozenset(), rows)
    return np.array(list(steps)).T


# -- what the suite draws, and what the peers computed -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [subject.name for subject in subjects(Accelerator("nothing"))])
def test_conformance(cupy, name):
    (checked,) = check_accelerator(cupy, ops=[name], examples=EXAMPLES)
    assert [str(failure) for failure in checked.failures] == []
    assert checked.skipped in (None, "")


@pytest.mark.parametrize("name", [f"hf/{name}" for name in test_goldens.HUGGING_FACE] + test_goldens.KERAS_HUB)
def test_goldens_of_the_peers(cupy, name):
    test_goldens.judge_accelerator(name, cupy)


@pytest.mark.parametrize("name", test_quantize.GOLDENS)
def test_quantised_goldens_of_the_peers(cupy, name):
    test_quantize.judge_accelerator(name, cupy)


@pytest.mark.parametrize("name", [f"keras_hub_0.32/{family}_lora" for family in ("opt", "bloom")])
def test_goldens_with_adapters(cupy, name):
    given = test_goldens.arrays(name, "in.")
    models = [Backbone.from_preset(test_goldens.GOLDENS / name, dtype=dtype) for dtype in ("float64", "float32")]
    models.append(Backbone.from_preset(test_goldens.GOLDENS / name, dtype="float32", accelerator=cupy))
    for model in models:
        model.load_lora_weights(test_goldens.GOLDENS / name / "adapter.lora.h5")
    truth, own, found = (model(given) for model in models)
    verdict = compare(found, truth, calibrated(4), wanted=own, name=name)
    assert verdict, verdict


@pytest.mark.parametrize("kind", ["greedy", "beam4"])
@pytest.mark.parametrize("name", test_goldens.HUGGING_FACE)
def test_generation_of_the_peers(cupy, name, kind):
    with use(cupy):
        test_goldens.test_transformers_generation(name, kind, {"num_beams": 4} if kind == "beam4" else {})


@pytest.mark.parametrize("name", sorted(test_samplers.KERAS_HUB))
def test_samplers_of_the_peers(cupy, name):
    _, inputs = test_samplers.keras_hub_prompt(name)
    task = Task.from_preset(test_goldens.GOLDENS / name, dtype="float32", accelerator=cupy)
    for golden in test_samplers.KERAS_HUB[name]:
        output = task.generate(inputs, stop_token_ids=None, sampler=golden["sampler"])
        assert output["token_ids"].tolist() == np.concatenate(golden["tokens"], 0).reshape(-1, 20).tolist()


# -- models ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"top_p": 0.9, "seed": 3}], ids=["greedy", "beams", "top_p"])
@pytest.mark.parametrize("preset", PROMPTS)
def test_a_preset_says_what_it_says_on_the_reference(cupy, preset, settings):
    fast, exact = (Task.from_preset(preset, dtype="float32", accelerator=where) for where in (cupy, None))
    options = {"max_new_tokens": 40, **settings}
    assert fast.generate(PROMPTS[preset], **options) == exact.generate(PROMPTS[preset], **options)


@pytest.mark.parametrize("form", ["float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("preset", PROMPTS)
def test_a_preset_in_few_bits(cupy, preset, form):
    task = Task.from_preset(preset, dtype=form if "float" in form else "bfloat16", accelerator=cupy)
    if form.startswith("int"):
        task.backbone.quantize(form)
    answers = task.generate(PROMPTS[preset], max_new_tokens=24)
    assert answers == task.generate(PROMPTS[preset], max_new_tokens=24)
    if preset == "t5_tiny_numbers" and form != "int4":
        assert answers == ["four thousand two hundred seven", "MCMXCIV"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_kernel_gives_the_same_bits_again(cupy, name, form):
    ids = np.random.default_rng(0).integers(0, 301, (3, 70))
    model = made(name, form, cupy)
    found = scores(model, ids, 3)
    assert np.isfinite(found.astype(np.float32)).all()
    assert scores(model, ids, 3).tobytes() == found.tobytes()
    assert scores(made(name, form, cupy), ids, 3).tobytes() == found.tobytes()


@pytest.mark.parametrize(
    ("name", "form"), [("opt-125m", "float32"), ("opt-125m", "float16"), *((name, "bfloat16") for name in SIZES)]
)
def test_a_real_size_beside_the_reference(cupy, name, form):
    cls, config = SIZES[name]
    if name.startswith("a layer"):
        config = config | {"num_layers": 1, "vocabulary_size": 1000}
    weights = drawn_quickly(cls(**config | {"dtype": form}))
    ids = np.random.default_rng(0).integers(0, 1000, (2, 40))
    found = {}
    for dtype, where in (("float64", None), (form, None), (form, cupy)):
        model = cls(**config | {"dtype": dtype, "accelerator": where})
        model.adopt(replace_leaves(copy_containers(weights), lambda leaf, dtype=dtype: leaf.astype(numpy_dtype(dtype))))
        found[dtype, where] = scores(model, ids, 2)
    truth, own, fast = found.values()
    verdict = compare(fast, truth, calibrated(4), wanted=own, name=name)
    assert verdict, verdict


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_graph_decodes_past_its_pieces_as_the_reference_does(cupy, name):
    """300 tokens: several pieces of keys, and many times as many tokens as are chosen ahead."""
    prompts = np.random.default_rng(4).integers(0, 301, (2, 9))
    wanted = tokens(made(name, "float32", None), prompts, 300)
    assert tokens(made(name, "float32", cupy), prompts, 300).tolist() == wanted.tolist()


def test_a_cache_is_recorded_once(cupy, monkeypatch):
    recorded = []
    captured = cupy.device.captured
    monkeypatch.setattr(cupy.device, "captured", lambda launches: recorded.append(len(launches)) or captured(launches))
    tokens(made("opt", "bfloat16", cupy), np.ones((1, 5), np.int64), 60)
    assert len(recorded) == 1


def test_nothing_crosses_to_the_host(cupy):
    before = dict(cupy.crossings)
    for name in MODELS:
        scores(made(name, "bfloat16", cupy), np.ones((2, 20), np.int64), 2)
    assert dict(cupy.crossings) == before


# -- several at once, and afterwards -----------------------------------------------------------------------------------------


def test_threads_share_a_model(cupy):
    model = made("opt", "bfloat16", cupy)
    prompts = [np.random.default_rng(i).integers(0, 301, (1 + i % 3, 5 + i)) for i in range(12)]
    wanted = [tokens(model, prompt, 40).tolist() for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda prompt: tokens(model, prompt, 40).tolist(), prompts))
    assert found == wanted


def test_models_at_once(cupy):
    models = [made(name, form, cupy) for name in MODELS for form in ("bfloat16", "int8")]
    ids = np.random.default_rng(0).integers(0, 301, (2, 30))
    wanted = [scores(model, ids, 2).tobytes() for model in models]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda model: scores(model, ids, 2).tobytes(), models))
    assert found == wanted


def test_memory_comes_back(cupy):
    """Of a model that nobody holds, after two rounds as after one; and of an accelerator of its own, to the driver."""

    def free():
        gc.collect()
        return cupy.device.room()[0]

    def used():
        model = OPTBackbone(1000, 4, 8, 1024, 4096, dtype="bfloat16", seed=0, accelerator=cupy)
        tokens(model, np.ones((2, 9), np.int64), 20)

    used()
    before = free()
    used()
    assert abs(free() - before) < 2**20
    own = cupy.configured(device=0)
    tokens(made("opt", "bfloat16", own), np.ones((1, 9), np.int64), 20)
    own.close()
    assert abs(free() - before) < 2**26  # the driver keeps some of a context for itself


def test_several_gpus(cupy):
    count = cupy.device.xp.cuda.runtime.getDeviceCount()
    if count == 1:
        pytest.skip("one GPU is here")
    ids = np.random.default_rng(0).integers(0, 301, (2, 30))
    wanted = scores(made("t5", "bfloat16", cupy), ids, 2).tobytes()
    for index in range(1, count):
        assert scores(made("t5", "bfloat16", cupy.configured(device=index)), ids, 2).tobytes() == wanted


def test_the_hardware_is_told_and_measured(cupy):
    assert {"device", "driver", "CUDA runtime", "cupy"} <= set(cupy.hardware())
    reads, multiplies = cupy.limits()
    assert reads > 2e11
    assert multiplies > 2e13

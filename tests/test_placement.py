"""Where parameters are: taken by an accelerator that packs them, and back on the host, the same bits and never twice."""

import copy
import gc
import threading
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from packing import Packed, Packing
from test_loopback import MODELS, TASKS, assert_same_bits, inputs

from refmodels import AcceleratorError, Backbone, OPTBackbone, use
from refmodels.accelerator import Accelerator
from refmodels.lora import adapters
from refmodels.parameters import flatten


def with_adapters(model):
    """Adapters that do something; nobody has seen the tree."""
    model.enable_lora(2)
    model._attach({path: replace(each, b=each.b + np.float32(0.5)) for path, each in adapters(model).items()})


FORMS = {
    "plain": lambda model: None,
    "int8": lambda model: model.quantize("int8"),
    "int8 for weights": lambda model: model.quantize("int8", weight_only=True),
    "int4": lambda model: model.quantize("int4", block_size=4),
    "with adapters": with_adapters,
    "int8 with adapters": lambda model: (model.quantize("int8"), with_adapters(model)),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_form = pytest.mark.parametrize("form", FORMS)


def build(name="opt", form="plain", accelerator=None, **changes):
    cls, arguments = MODELS[name]
    model = cls(**{**arguments, **changes}, accelerator=accelerator)
    FORMS[form](model)
    return model


def held(tree):
    """Weak references to the arrays of a tree."""
    return [weakref.ref(leaf) for _, leaf in flatten(tree)]


def alive(references):
    gc.collect()
    return sum(reference() is not None for reference in references)


def host_arrays(model):
    """Weak references to the host's matrices, got behind the model's back: reading `params` would say that we keep them."""
    model.placement.fill(model._drawn)
    return [weakref.ref(leaf) for _, leaf in flatten(model.placement._state.host) if leaf.ndim == 2]


def assert_same_tree(found, wanted):
    found, wanted = dict(flatten(found)), dict(flatten(wanted))
    assert list(found) == list(wanted)
    for path, leaf in found.items():
        assert_same_bits(leaf, wanted[path])


# -- one place at a time ----------------------------------------------------------------------------------------------


@every_form
@every_model
def test_a_tree_is_taken_and_comes_back(name, form):
    packing = Packing()
    model, wanted = build(name, form, packing), build(name, form)
    matrices = host_arrays(model)
    result = model(inputs(name))
    assert_same_bits(result, wanted(inputs(name)))
    assert (packing.taken, packing.loaded) == (1, 0)
    assert alive(matrices) == 0
    assert packing.most == 1  # of the host's leaves, the one in hand alone was there twice
    assert model.paths() == wanted.paths()
    assert model.has_lora == ("adapters" in form)
    assert model.trainable_parameters() == wanted.trainable_parameters()
    model.summary(print_fn=lambda line: None)
    model.count_params()
    model.get_config()
    assert_same_bits(model(inputs(name)), result)
    assert (packing.taken, packing.unloaded) == (1, 0)  # none of it moved a leaf
    assert_same_tree(model.params, wanted.params)


@every_form
@every_model
def test_what_is_saved_is_the_same(name, form, tmp_path):
    pytest.importorskip("h5py")
    pytest.importorskip("safetensors")
    packing = Packing()
    model, wanted = build(name, form, packing, intermediate_dim=48), build(name, form, intermediate_dim=48)
    model(inputs(name))
    if form == "int8 with adapters":
        with pytest.raises(ValueError, match="a quantised kernel cannot take in its adapter"):
            model.save_to_preset(tmp_path / "found")
    else:
        model.save_to_preset(tmp_path / "found")
        wanted.save_to_preset(tmp_path / "wanted")
        found = Backbone.from_preset(tmp_path / "found", accelerator=packing)
        again = Backbone.from_preset(tmp_path / "wanted")
        assert_same_bits(found(inputs(name)), again(inputs(name)))
        assert_same_tree(found.params, again.params)
    if "int" not in form:
        model.save_to_hf(tmp_path / "hf found")
        wanted.save_to_hf(tmp_path / "hf wanted")
        assert (tmp_path / "hf found/model.safetensors").read_bytes() == (tmp_path / "hf wanted/model.safetensors").read_bytes()
        other = Packing()
        Backbone.from_preset(tmp_path / "hf found", accelerator=other)(inputs(name))
        assert (other.taken, other.loaded) == (1, 0)
    if "adapters" in form:
        model.save_lora_weights(tmp_path / "found.safetensors")
        wanted.save_lora_weights(tmp_path / "wanted.safetensors")
        assert (tmp_path / "found.safetensors").read_bytes() == (tmp_path / "wanted.safetensors").read_bytes()
    assert isinstance(model.device_params["token_embedding"]["embeddings"], Packed)
    assert packing.loaded == 0
    assert packing.taken == 1 + (form != "int8 with adapters")  # the model that was loaded
    assert not any(isinstance(leaf, np.ndarray) and leaf.ndim == 2 for _, leaf in flatten(model.device_params))


STEPS = {
    "quantize": lambda model: model.quantize("int8"),
    "dequantize": lambda model: model.dequantize(),
    "enable_lora": lambda model: model.enable_lora(2),
    "merge_lora": lambda model: model.merge_lora(),
}


@pytest.mark.parametrize(
    "steps",
    [("quantize", "dequantize"), ("enable_lora", "merge_lora"), ("quantize", "enable_lora", "dequantize", "merge_lora")],
)
@every_model
def test_the_accelerator_gets_the_new_tree(name, steps):
    packing = Packing()
    model, wanted = build(name, accelerator=packing), build(name)
    for count, step in enumerate(("", *steps), start=1):
        if step:
            STEPS[step](model)
            STEPS[step](wanted)
        assert_same_bits(model(inputs(name)), wanted(inputs(name)))
        assert (packing.taken, packing.loaded) == (count, 0)
    assert_same_tree(model.params, wanted.params)


def test_peak_memory():
    """The first call needs the weights, one leaf, and little more; reading all a layer more; quantising what is new, too."""
    sizes = {"vocabulary_size": 64, "num_layers": 8, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512}
    tracemalloc.start()
    try:
        packing = Packing()
        model = build(accelerator=packing, **sizes)
        model.placement.fill(model._drawn)
        weights = tracemalloc.get_traced_memory()[0]
        assert weights > 4 * model.count_params()
        leaf = 4 * 128 * 512

        def extra(call):
            """The most memory beyond the weights while this runs."""
            gc.collect()
            tracemalloc.reset_peak()
            call()
            return tracemalloc.get_traced_memory()[1] - weights

        with model.running():
            assert extra(lambda: model.device_params) < leaf + 100_000
        assert packing.most == 1
        layer = weights // 8

        def read_all():
            with model.leaves() as leaves:
                for path in leaves:
                    leaves[path]

        assert extra(read_all) < layer + leaf + 100_000
        assert extra(lambda: model.quantize("int8")) < layer + weights // 4 + 2 * leaf + 100_000
    finally:
        tracemalloc.stop()


# -- what somebody else may hold --------------------------------------------------------------------------------------


def test_a_tree_that_was_assigned_is_loaded_and_left_alone():
    packing, source = Packing(), build()
    tree = copy.deepcopy(source.params)
    kept = copy.deepcopy(tree)
    model = build(accelerator=packing)
    model.params = tree
    model(inputs("opt"))
    assert (packing.taken, packing.loaded) == (0, 1)
    assert model.params is tree
    assert_same_tree(tree, kept)


def test_a_tree_that_was_read_is_loaded_and_left_alone():
    packing = Packing()
    model = build(accelerator=packing)
    tree = model.params
    kept = copy.deepcopy(tree)
    model(inputs("opt"))
    assert (packing.taken, packing.loaded) == (0, 1)
    assert model.params is tree
    assert_same_tree(tree, kept)


def test_a_table_that_was_read_is_left_alone():
    packing = Packing()
    model = build(accelerator=packing)
    table = model.token_embedding.embeddings
    model(inputs("opt"))
    assert (packing.taken, packing.loaded) == (0, 1)
    assert model.params["token_embedding"]["embeddings"] is table


@pytest.mark.parametrize(
    "changes", [("quantize",), ("quantize", "dequantize"), ("enable_lora",), ("enable_lora", "merge_lora")]
)
def test_what_is_passed_on_of_a_shared_tree_is_not_written_to(changes):
    """An accelerator that writes into everything it takes."""

    class Overwriting(Packing):
        def take(self, params):
            for _, leaf in flatten(params):
                leaf[...] = 7
            return super().take(params)

    model = build()
    tree = model.params
    kept = copy.deepcopy(tree)
    for change in changes:
        STEPS[change](model)
    model.accelerator = Overwriting()
    model(inputs("opt"))
    assert_same_tree(tree, kept)


@pytest.mark.parametrize("own", [True, False])
def test_what_is_changed_in_a_tree_that_was_read_is_seen(own):
    packing, wanted = Packing(), build()
    model = build(accelerator=packing if own else None)
    for times in range(3):
        result = wanted(inputs("opt"))
        with use(packing):
            assert_same_bits(model(inputs("opt")), result)
            assert_same_bits(model(inputs("opt")), result)
        assert (packing.taken, packing.loaded) == (own, times + (not own))
        for each in (model, wanted):
            each.params["layers"][1]["feedforward_output_dense"]["kernel"][...] *= 2


def test_a_block_around_a_model_without_an_accelerator_loads():
    packing, model = Packing(), build()
    wanted = model(inputs("opt"))
    with use(packing):
        assert_same_bits(model(inputs("opt")), wanted)
    assert (packing.taken, packing.loaded) == (0, 1)
    assert_same_bits(model(inputs("opt")), wanted)


def test_another_accelerator_and_none():
    """The tree goes from one to the next by the host."""
    first, second = Packing(), Packing()
    model, wanted = build(accelerator=first), build()
    result = wanted(inputs("opt"))
    for accelerator in (first, second, None, first):
        model.accelerator = accelerator
        assert_same_bits(model(inputs("opt")), result)
    assert (first.taken, second.taken, first.loaded, second.loaded) == (2, 1, 0, 0)
    assert_same_tree(model.params, wanted.params)


def test_an_accelerator_that_does_not_take_keeps_the_host_tree():
    class Loading(Accelerator):
        def load(self, params):
            return dict(params)

    model = build(accelerator=Loading("loading"))
    matrices = host_arrays(model)
    model(inputs("opt"))
    assert alive(matrices) == len(matrices)


def test_a_copy_has_the_parameters_of_its_own():
    model = build()
    model(inputs("opt"))
    other = copy.deepcopy(model)
    assert_same_tree(other.params, model.params)
    other.params["final_layer_norm" if "final_layer_norm" in other.params else "layer_norm"]["gamma"][...] = 3
    with pytest.raises(AssertionError):
        assert_same_tree(other.params, model.params)


# -- the layer of token embeddings ------------------------------------------------------------------------------------


@every_model
def test_token_embeddings_run_where_the_model_does(name):
    packing = Packing()
    model, wanted = build(name, accelerator=packing), build(name)
    vectors = model.token_embedding(inputs(name)[next(iter(inputs(name)))])
    assert_same_bits(vectors, wanted.token_embedding(inputs(name)[next(iter(inputs(name)))]))
    assert_same_bits(model.token_embedding(vectors, reverse=True), wanted.token_embedding(vectors, reverse=True))
    assert (packing.taken, packing.loaded) == (1, 0)
    table = model.token_embedding.embeddings
    assert_same_bits(table, wanted.token_embedding.embeddings)
    assert not table.flags.writeable  # a copy: writing to it would change nothing
    assert packing.taken == 1
    task = TASKS[name](build(name))
    tokens = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
    plain = task.embed(tokens)
    with use(Packing()):
        assert_same_bits(task.embed(tokens), plain)


def read_leaves(model):
    with model.leaves() as leaves:
        list(leaves.values())


@pytest.mark.parametrize("meanwhile", [read_leaves, lambda model: model.params, STEPS["quantize"], STEPS["enable_lora"]])
def test_a_call_keeps_the_tree_that_it_began_with(meanwhile):
    """Whatever becomes of the model's parameters."""
    model = build(accelerator=Packing())
    tree = model.device_params
    meanwhile(model)
    leaves = dict(flatten(tree))
    assert all(isinstance(leaves[path], Packed) for path in model.paths() if path.endswith((".kernel", "embeddings")))


def test_private_entries_are_handed_over_as_they_are():
    """A call in another thread may be writing to one."""

    class InUse(dict):
        def items(self):
            raise RuntimeError("dictionary changed size during iteration")

        keys = values = __iter__ = items

    class Busy(Packing):
        def _with_private(self, node):
            return {**node, "_programs": InUse(linear=1)}

    model = build(accelerator=Busy())
    assert isinstance(model.device_params["layers"][0]["self_attention"]["_programs"], InUse)
    read_leaves(model)
    assert_same_tree(model.params, build().params)


def test_a_layer_is_unloaded_once_to_be_saved(tmp_path):
    pytest.importorskip("h5py")
    packing = Packing()
    model = build(num_layers=5, accelerator=packing)
    model(inputs("opt"))
    model.save_to_preset(tmp_path / "saved")
    assert packing.unloaded == 5 + 3  # the layers, two tables and a norm
    model.quantize("int8")
    assert packing.unloaded == 8 + 8 + 1  # to look for infinities, and to let go


@pytest.mark.parametrize("sampling", [{}, {"num_beams": 3}, {"sampler": "contrastive", "top_k": 3}, {"top_p": 0.8, "seed": 1}])
@every_form
@every_model
def test_packed_leaves_go_everywhere(name, form, sampling):
    """To every search, from the first step to the last, and to scores."""
    packing = Packing()
    found, wanted = (TASKS[name](build(name, form, accelerator)) for accelerator in (packing, None))
    tokens = {key: value for key, value in inputs(name).items() if not key.startswith("decoder")}
    settings = {"stop_token_ids": [7], "max_new_tokens": 5, **sampling}
    assert_same_bits(found.generate(tokens, **settings), wanted.generate(tokens, **settings))
    assert_same_bits(found.score(inputs(name)).log_probs, wanted.score(inputs(name)).log_probs)
    assert (packing.taken, packing.loaded, packing.unloaded) == (1, 0, 0)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), ValueError("a fault")])
def test_an_interrupted_move_leaves_no_random_weights(error):
    packing = Packing()
    model = build(accelerator=packing)
    packing.fail = error
    with pytest.raises(type(error)):
        model(inputs("opt"))
    packing.fail = None
    for use_again in (
        lambda: model(inputs("opt")),
        lambda: model.params,
        lambda: model.quantize("int8"),
        lambda: model.has_lora,
        lambda: model.token_embedding.embeddings,
    ):
        with pytest.raises(RuntimeError, match="parameters are lost: moving them to accelerator 'packing' did not come to its"):
            use_again()
    model.params = build().params
    assert_same_bits(model(inputs("opt")), build()(inputs("opt")))


def test_a_failing_load_leaves_everything_as_it_was():
    class Failing(Accelerator):
        def load(self, params):
            raise MemoryError

    model = build(accelerator=Failing("failing"))
    with pytest.raises(MemoryError):
        model(inputs("opt"))
    model.accelerator = None
    assert_same_bits(model(inputs("opt")), build()(inputs("opt")))


def test_a_change_that_fails_leaves_everything_as_it_was():
    packing = Packing()
    model = build("opt", "int8 with adapters", packing)
    result = model(inputs("opt"))
    with pytest.raises(ValueError, match="quantised kernel"):
        model.merge_lora()
    assert model.has_lora
    assert_same_bits(model(inputs("opt")), result)
    assert packing.taken == 1


@pytest.mark.parametrize(
    ("unload", "said"),
    [
        (lambda self, tree: None, "takes parameters, but does not unload them"),
        (lambda self, tree: {}, "as nothing, wanted an array"),
        (lambda self, tree: tree, "as Packed"),
        (lambda self, tree: {**Packing.unload(self, tree), "_private": np.ones(1)}, "_private as ndarray"),
    ],
)
def test_an_accelerator_that_does_not_give_back_what_it_took(unload, said):
    broken = type("Broken", (Packing,), {"unload": unload})()
    model = build(accelerator=broken)
    result = model(inputs("opt"))
    with pytest.raises(AcceleratorError, match=said):
        _ = model.params
    assert_same_bits(model(inputs("opt")), result)


# -- threads ----------------------------------------------------------------------------------------------------------


def together(*calls):
    """All calls at once, each in a thread of its own; their results."""
    start, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(i):
        start.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class Slow(Packing):
    """Time for other threads in the middle of a move."""

    def _take(self, node):
        super()._take(node)
        threading.Event().wait(0.001)


@pytest.mark.parametrize("drawn", [True, False])
def test_first_calls_at_once(drawn):
    packing = Slow()
    model, wanted = build(accelerator=packing), build()(inputs("opt"))
    if drawn:
        model.placement.fill(model._drawn)
    for result in together(*[lambda: model(inputs("opt"))] * 4):
        assert_same_bits(result, wanted)
    assert (packing.taken, packing.loaded) == (1, 0)


def test_calls_and_readers_at_once():
    for _ in range(5):
        packing, wanted = Slow(), build()
        model = build(accelerator=packing)
        model.placement.fill(model._drawn)
        call, result = lambda model=model: model(inputs("opt")), wanted(inputs("opt"))
        table = lambda model=model: np.array(model.token_embedding.embeddings)  # noqa: E731
        *results, tree, embeddings = together(call, call, call, lambda model=model: model.params, table)
        for found in results:
            assert_same_bits(found, result)
        assert_same_tree(tree, wanted.params)
        assert_same_bits(embeddings, wanted.token_embedding.embeddings)
        assert_same_bits(model(inputs("opt")), result)
        assert model.params is tree


def test_nothing_is_taken_while_leaves_are_read():
    packing = Packing()
    model = build(accelerator=packing)
    with model.leaves() as leaves:
        thread = threading.Thread(target=model, args=(inputs("opt"),))
        thread.start()
        thread.join(0.05)
        assert packing.taken == 0
        found = {path: np.array(leaf) for path, leaf in leaves.items()}
    thread.join()
    assert packing.taken == 1
    assert found.keys() == set(build().paths())
    with pytest.raises(RuntimeError, match="after the block"):
        leaves["token_embedding.embeddings"]


def test_no_cycle_keeps_a_model_alive():
    """Its memory goes with the last reference, not with the next collection."""
    model = OPTBackbone(**MODELS["opt"][1], accelerator=Packing())
    model(inputs("opt"))
    matrices = [weakref.ref(leaf) for _, leaf in flatten(model.device_params) if isinstance(leaf, Packed)]
    gc.disable()
    try:
        del model
        assert not any(reference() for reference in matrices)
    finally:
        gc.enable()

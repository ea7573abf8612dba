"""The machinery around an op: shape errors that teach, observers, accelerators, plug-ins."""

import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext

import ml_dtypes  # noqa: F401 -- registers bfloat16
import numpy as np
import pytest

from refmodels.accelerator import Accelerator, AcceleratorError, find, installed, use
from refmodels.numerics import calibrated, exact
from refmodels.op import OPS, Array, Bool, Float, Int, Op, Shape, ShapeError, executing, op, watching
from refmodels.ops.attention import attention, attention_scores, masked_softmax
from refmodels.ops.cache import cache_allocate, cache_append
from refmodels.ops.elementwise import add, multiply, relu
from refmodels.ops.heads import split_heads
from refmodels.ops.linear import embedding, last_rows, linear
from refmodels.ops.mask import causal_mask, key_mask
from refmodels.ops.norm import layer_norm
from refmodels.ops.position import token_positions
from refmodels.ops.sampling import likeliest_tokens
from refmodels.opt import OPTBackbone, OPTCausalLM

ONE, TWO = np.ones((2, 3)), np.full((2, 3), 2.0)


@pytest.fixture
def define():
    """`op`, whose ops leave the table with the test."""
    before = dict(OPS)
    yield op
    for name in set(OPS) - set(before):
        del OPS[name]


@pytest.fixture
def doubled_then_added(define):
    @define(composite=True)
    def doubled_then_added(x: Float[Array, "*b n"], y: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
        """2x + y, by two primitives."""
        return add(add(x, x), y)

    return doubled_then_added


# -- the record -------------------------------------------------------------------------------------------------------


def test_an_op_is_its_function_and_its_contract(define):
    @define(error=exact(), laws=("rowwise",), mutates=("y",), source="nobody 2020")
    def contract(x: Float[Array, "*b n"], ids: Int[Array, "b t"], y: Bool[Array, "n"] | None = None, *, k: int = 3) -> Array:
        """What it says."""
        return k

    assert isinstance(contract, Op)
    assert OPS["contract"] is contract
    assert contract.name == contract.__name__ == "contract"
    assert contract.__doc__ == "What it says."
    assert contract.__module__ == __name__
    assert (contract.laws, contract.mutates, contract.source) == (("rowwise",), ("y",), "nobody 2020")
    assert not contract.composite
    assert contract.error == exact()
    assert list(contract.signature.parameters) == ["x", "ids", "y", "k"]
    assert contract.shapes == {
        "x": Shape("float", ("*b", "n")),
        "ids": Shape("int", ("b", "t")),
        "y": Shape("bool", ("n",), optional=True),
    }
    assert str(contract.shapes["x"]) == "[*b n]"
    assert contract(ONE, np.zeros((1, 1), int)) == 3
    assert "contract" in repr(contract)


def test_the_error_model_is_calibrated_unless_said(define):
    @define()
    def unsaid(x):
        """Anything."""

    assert unsaid.error == calibrated()


def test_a_name_is_given_once(define):
    define()(_named("twice", lambda x: x))
    with pytest.raises(ValueError, match="op 'twice' is defined twice"):
        define()(_named("twice", lambda x: x + 1))
    assert OPS["twice"](1) == 1
    with pytest.raises(ValueError, match="'linear' is defined twice"):
        define()(_named("linear", lambda x: x))


def _named(name, function):
    function.__name__ = name
    return function


def test_every_op_says_what_it_does():
    for entry in OPS.values():
        assert entry.__doc__, entry
        assert entry.reference.__module__.startswith("refmodels."), entry
        assert set(entry.mutates) <= set(entry.signature.parameters), entry


# -- shapes -----------------------------------------------------------------------------------------------------------

F = np.zeros
I = lambda *shape: np.zeros(shape, int)  # noqa: E731, E741
B = lambda *shape: np.zeros(shape, bool)  # noqa: E731


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear(F((2, 16)), F((12, 5))), "linear: kernel[k n]: k = 12, but x[*b k] has k = 16"),
        (lambda: linear(F((2, 16)), F((16, 5)), F(4)), "linear: bias[n]: n = 4, but kernel[k n] has n = 5"),
        (lambda: linear(F((2, 16)), F((16, 5)), bias=F(4)), "linear: bias[n]: n = 4, but kernel[k n] has n = 5"),
        (lambda: linear(F((2, 16)), F(16)), "linear: kernel[k n]: has 1 axes (16,), wanted 2"),
        (lambda: linear(F(()), F((16, 5))), "linear: x[*b k]: has 0 axes (), wanted 1 or more"),
        (lambda: layer_norm(F((2, 7)), F(7), F(8)), "layer_norm: beta[n]: n = 8, but x[*b n] has n = 7"),
        (lambda: layer_norm(F((2, 7)), F((1, 7)), F(7)), "layer_norm: gamma[n]: has 2 axes (1, 7), wanted 1"),
        (lambda: multiply(F((2, 3, 4)), F((2, 5, 4))), "multiply: y[*b n]: b = (2, 5), but x[*b n] has b = (2, 3)"),
        (lambda: multiply(F((2, 4)), F((2, 5))), "multiply: y[*b n]: n = 5, but x[*b n] has n = 4"),
        (lambda: embedding(F((2, 3)), F((9, 4))), "embedding: ids[*b]: wants integers, got float64"),
        (lambda: embedding(B(2, 3), F((9, 4))), "embedding: ids[*b]: wants integers, got bool"),
        (lambda: key_mask(I(2, 3)), "key_mask: padding_mask[b s]: wants booleans, got int64"),
        (lambda: causal_mask(I(1, 3), F((2, 3))), "causal_mask: key_mask[#b s]: wants booleans, got float64"),
        (lambda: token_positions(I(2, 3), I(3)), "token_positions: start[b]: b = 3, but ids[b t] has b = 2"),
        (lambda: token_positions(I(2, 3), F(2)), "token_positions: start[b]: wants integers, got float64"),
        (lambda: last_rows(F((2, 3, 4)), I(1)), "last_rows: lengths[b]: b = 1, but x[b t n] has b = 2"),
        (
            lambda: attention_scores(F((2, 3, 4, 5)), F((2, 6, 4, 7))),
            "attention_scores: key[b s h d]: d = 7, but query[b t h d] has d = 5",
        ),
        (
            lambda: attention_scores(F((2, 3, 4, 5)), F((2, 6, 4, 5)), F((2, 4, 3, 7))),
            "attention_scores: bias[#b h t s]: s = 7, but key[b s h d] has s = 6",
        ),
        (
            lambda: attention(*(F((2, 3, 4, 5)),) * 3, B(2, 4, 3, 3)),
            "attention: mask[#b 1 #t s]: axis 1 is 4, wanted 1",
        ),
    ],
)
def test_a_shape_error_names_op_argument_letter_and_both_sizes(call, message):
    with pytest.raises(ShapeError) as caught:
        call()
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_axes_that_may_be_one():
    scores = F((2, 4, 3, 5))
    for shape in [(2, 1, 3, 5), (1, 1, 3, 5), (2, 1, 1, 5), (1, 1, 1, 5)]:
        assert masked_softmax(scores, B(*shape)).shape == scores.shape
    for shape, letter in [((3, 1, 3, 5), "b"), ((2, 1, 2, 5), "t"), ((2, 1, 3, 1), "s")]:
        with pytest.raises(ShapeError, match=rf"masked_softmax: mask\[#b 1 #t s\]: {letter} = "):
            masked_softmax(scores, B(*shape))


def test_leading_axes_that_may_be_one():
    for shape in [(2, 3, 4), (1, 3, 4), (2, 1, 4), (1, 1, 4)]:
        assert add(F((2, 3, 4)), F(shape)).shape == (2, 3, 4)
    for shape in [(3, 3, 4), (2, 2, 4), (3, 4), (1, 2, 3, 4), (4,)]:
        with pytest.raises(ShapeError, match=r"add: y\[\*#b n\]: b = "):
            add(F((2, 3, 4)), F(shape))


def test_optional_arguments_may_be_left_out_or_none():
    x, kernel = F((2, 4)), F((4, 3))
    for y in (linear(x, kernel), linear(x, kernel, None), linear(x, kernel, bias=None), linear(x, kernel, dtype=None)):
        assert y.shape == (2, 3)
    assert linear(kernel=kernel, x=x).shape == (2, 3)
    with pytest.raises(TypeError, match="kernel"):
        linear(x)
    with pytest.raises(TypeError, match="knrel"):
        linear(x, kernel, knrel=1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_every_floating_type_is_a_float(dtype):
    assert relu(np.ones((1, 2), dtype)).dtype == dtype
    assert embedding(np.zeros((1, 2), np.uint8), np.ones((3, 4), dtype)).dtype == dtype


def test_a_composite_checks_its_shapes(doubled_then_added):
    with pytest.raises(ShapeError, match=r"doubled_then_added: y\[\*b n\]: n = 4, but x\[\*b n\] has n = 3"):
        doubled_then_added(ONE, np.ones((2, 4)))


def test_a_check_looks_at_shape_and_dtype_alone():
    """So that any array type passes through."""

    class Stranger:
        shape, dtype = (2, 16), np.dtype("float32")

    linear.check(Stranger(), F((16, 3)))
    with pytest.raises(ShapeError, match="k = 12, but x"):
        linear.check(Stranger(), F((12, 3)))


# -- observers --------------------------------------------------------------------------------------------------------


def recorder(log, label=""):
    def observer(op, args, kwargs, proceed):
        log.append(f"{label}{op.name}")
        result = proceed()
        log.append(f"{label}/{op.name}")
        return result

    return observer


def test_watching_sees_composites_and_primitives_in_order(doubled_then_added):
    log = []
    with watching(recorder(log)):
        doubled_then_added(ONE, TWO)
        relu(ONE)
    assert log == ["doubled_then_added", "add", "/add", "add", "/add", "/doubled_then_added", "relu", "/relu"]


def test_observers_nest_the_last_innermost():
    log = []
    with watching(recorder(log, "a:")), watching(recorder(log, "b:")):
        relu(ONE)
    assert log == ["a:relu", "b:relu", "b:/relu", "a:/relu"]


def test_an_observer_sees_the_arguments_and_may_replace_the_result(doubled_then_added):
    def observer(op, args, kwargs, proceed):
        if op is add:
            assert args[0].shape == (2, 3)
            return proceed() * 10
        return proceed()

    with watching(observer):
        np.testing.assert_array_equal(doubled_then_added(ONE, TWO), 10 * (20 * ONE + TWO))
    with watching(lambda op, args, kwargs, proceed: "never ran" if op is relu else proceed()):
        assert relu(ONE) == "never ran"


def test_an_observer_sees_keyword_arguments():
    seen = []
    with watching(lambda op, args, kwargs, proceed: (seen.append((len(args), sorted(kwargs))), proceed())[1]):
        linear(ONE, kernel=np.ones((3, 4)), dtype="float32")
    assert seen == [(1, ["dtype", "kernel"])]


def test_an_observer_is_gone_after_its_block():
    log = []
    with watching(recorder(log)):
        pass
    relu(ONE)
    assert log == []
    with pytest.raises(ShapeError), watching(recorder(log)):
        add(ONE, np.ones((2, 4)))
    relu(ONE)
    assert log == ["add"]


def test_an_observer_that_fails_is_heard():
    def observer(op, args, kwargs, proceed):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), watching(observer):
        relu(ONE)
    np.testing.assert_array_equal(relu(ONE), ONE)


def test_observers_stay_in_their_thread():
    log = []
    with watching(recorder(log)):
        thread = threading.Thread(target=lambda: relu(ONE))
        thread.start()
        thread.join()
    assert log == []


# -- accelerators -----------------------------------------------------------------------------------------------------


@pytest.fixture
def half():
    """An accelerator whose add gives half the sum: a wrong kernel shows that it ran."""
    accelerator = Accelerator("half")

    @accelerator.kernel(add)
    def half_add(x, y):
        return (x + y) / 2

    return accelerator


def test_use_runs_the_kernels_and_ends(half):
    with use(half) as found:
        assert found is half
        np.testing.assert_array_equal(add(ONE, TWO), 1.5 * ONE)
        np.testing.assert_array_equal(relu(-ONE), 0 * ONE)  # no kernel: the reference
    np.testing.assert_array_equal(add(ONE, TWO), 3 * ONE)


def test_use_nests(half):
    negative = Accelerator("negative")
    negative.kernel(add)(lambda x, y: -(x + y))
    with use(half):
        with use(negative):
            np.testing.assert_array_equal(add(ONE, TWO), -3 * ONE)
            with use(None):
                np.testing.assert_array_equal(add(ONE, TWO), 3 * ONE)
            with executing(None), use("reference"):
                np.testing.assert_array_equal(add(ONE, TWO), 3 * ONE)
        np.testing.assert_array_equal(add(ONE, TWO), 1.5 * ONE)


def test_use_ends_after_an_exception(half):
    with pytest.raises(ShapeError), use(half):
        relu(np.ones(()))
    np.testing.assert_array_equal(add(ONE, TWO), 3 * ONE)


def test_use_stays_in_its_thread(half):
    entered, leave, results = threading.Event(), threading.Event(), {}

    def worker():
        results["before"] = add(ONE, TWO)
        with use(half):
            entered.set()
            leave.wait(5)
            results["inside"] = add(ONE, TWO)

    with use(half):
        thread = threading.Thread(target=worker)
        thread.start()
    entered.wait(5)
    np.testing.assert_array_equal(add(ONE, TWO), 3 * ONE)  # the worker's use is not ours
    leave.set()
    thread.join()
    np.testing.assert_array_equal(results["before"], 3 * ONE)  # and ours was not the worker's
    np.testing.assert_array_equal(results["inside"], 1.5 * ONE)


def test_a_composite_without_a_kernel_runs_its_body_on_the_kernels(half, doubled_then_added):
    with use(half):
        np.testing.assert_array_equal(doubled_then_added(ONE, TWO), 1.5 * ONE)


def test_a_kernel_of_a_composite_takes_its_place(half, doubled_then_added):
    half.kernel(doubled_then_added)(lambda x, y: "whole")
    with use(half):
        assert doubled_then_added(ONE, TWO) == "whole"


def test_observers_see_accelerated_calls(half):
    log = []
    with use(half), watching(recorder(log)):
        add(ONE, TWO)
    assert log == ["add", "/add"]


@pytest.mark.parametrize("kernel", [lambda x: x, lambda y, x: x, lambda x, y, z=1: x, lambda a, b: a, lambda *args: args])
def test_a_kernel_with_other_parameters_is_refused(kernel):
    accelerator = Accelerator("mine")
    with pytest.raises(AcceleratorError, match=r"mine: kernel of add takes \(.*\), wanted \(x, y\)"):
        accelerator.kernel(add)(kernel)
    assert accelerator.pick(add, (ONE, TWO), {}) is None


def test_when_may_decline(half):
    @half.kernel(relu, when=lambda x: "only for one row" if len(x) > 1 else True)
    def first(x):
        return "first"

    @half.kernel(relu, when=lambda x: x.shape[1] == 3)
    def second(x):
        return "second"

    with use(half):
        assert relu(np.ones((1, 3))) == "first"
        assert relu(np.ones((2, 3))) == "second"
        np.testing.assert_array_equal(relu(np.ones((2, 4))), np.ones((2, 4)))
    assert half.pick(relu, (np.ones((1, 3)),), {}) is first
    assert half.pick(relu, (np.ones((2, 4)),), {}) is None


def test_a_kernel_that_is_declined_beforehand(half):
    half.kernel(relu, when="no such unit")(lambda x: "never")
    half.kernel(relu, when=False)(lambda x: "nor this")
    with use(half):
        np.testing.assert_array_equal(relu(-ONE), 0 * ONE)
    assert half.reasons(relu, (ONE,), {}) == ["no such unit", "not on this machine"]
    half.kernel(relu, when=True)(lambda x: "always")
    with use(half):
        assert relu(ONE) == "always"
    assert [entry.when for entry in half.kernels(relu)] == ["no such unit", "not on this machine", None]


def test_reasons_are_those_of_the_kernels_asked_before_one_accepts(half):
    def few(x):
        return len(x) < 2

    half.kernel(relu, when=few)(lambda x: "few")
    half.kernel(relu, when=lambda x: True if len(x) < 4 else f"{len(x)} rows")(lambda x: "some")
    half.kernel(relu, when="never asked before the others")(lambda x: "none")
    assert half.reasons(relu, (ONE[:1],), {}) == []
    assert half.reasons(relu, (), {"x": ONE}) == ["<lambda> declines"]
    assert half.reasons(relu, (np.ones((5, 2)),), {}) == ["<lambda> declines", "5 rows", "never asked before the others"]
    assert half.reasons(layer_norm, (), {}) == []


def test_when_gives_a_truth_or_a_reason(half):
    """NumPy's truth, too; None is what a function gives that forgot to say."""
    half.kernel(relu, when=lambda x: (x > 0).all())(lambda x: "positive")
    with use(half):
        assert relu(ONE) == "positive"
        np.testing.assert_array_equal(relu(-ONE), 0 * ONE)
    half.kernel(relu, when=lambda x: None)(lambda x: x)
    with use(half), pytest.raises(AcceleratorError, match="half: when= of relu gave None, wanted True, False or a reason"):
        relu(-ONE)


@pytest.mark.parametrize(
    "when",
    [
        lambda x: True,
        lambda x, kernel, bias, *, dtype: True,
        lambda x, kernel, *bias, dtype=None: True,
        lambda a, b, bias=None, *, dtype=None: True,
        lambda x, kernel, bias=None: True,
        lambda *args: True,
        lambda **kwargs: True,
    ],
)
def test_when_must_take_every_call_of_its_op(when):
    """By name and by place, with and without what may be left out: found when it is registered, not in the middle of a run."""
    accelerator = Accelerator("mine")
    with pytest.raises(AcceleratorError, match=r"mine: when= of linear must take its \(x, kernel, bias=, \*dtype=\): "):
        accelerator.kernel(linear, when=when)(lambda x, kernel, bias=None, *, dtype=None: x)
    assert accelerator.kernels(linear) == ()


@pytest.mark.parametrize("when", [lambda x, *_, **__: True, lambda *_, **__: True, lambda x, kernel, bias=0, *, dtype=0: True])
def test_when_may_take_more(when):
    accelerator = Accelerator("mine")
    accelerator.kernel(linear, when=when)(lambda x, kernel, bias=None, *, dtype=None: "kernel")
    with use(accelerator):
        assert linear(ONE, kernel=ONE, dtype="float32") == "kernel"


def test_a_declined_kernel_still_meets_the_shape_check(half):
    with use(half), pytest.raises(ShapeError, match="linear: kernel"):
        linear(ONE, np.ones((4, 4)))


class Foreign:
    """An array of another kind."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.shape, self.dtype = self.values.shape, self.values.dtype


class Device(Accelerator):
    def asarray(self, x):
        return Foreign(x)

    def asnumpy(self, x):
        return x.values if isinstance(x, Foreign) else x


def test_a_host_crossing_is_counted(doubled_then_added):
    device = Device("device")
    with use(device):
        result = doubled_then_added(Foreign(ONE), TWO)
        assert isinstance(result, Foreign)
        np.testing.assert_array_equal(result.values, 4 * ONE)
        assert device.crossings == {"add": 2}
        linear(ONE, kernel=Foreign(np.ones((3, 4))))
        assert device.crossings == {"add": 2, "linear": 1}
        assert isinstance(relu(ONE), np.ndarray)  # nothing foreign: no crossing
        assert device.crossings == {"add": 2, "linear": 1}
        with pytest.raises(ShapeError):
            add(Foreign(ONE), np.ones((2, 4)))


def test_strict_refuses_to_cross(doubled_then_added):
    device = Device("device", strict=True)
    device.kernel(relu)(lambda x: "kernel")
    with use(device):
        assert relu(Foreign(ONE)) == "kernel"
        with pytest.raises(AcceleratorError, match="device has no kernel for add here, and strict is set"):
            doubled_then_added(Foreign(ONE), TWO)
        np.testing.assert_array_equal(add(ONE, TWO), 3 * ONE)
    assert device.crossings == {}


def test_strict_says_why_the_kernels_declined():
    device = Device("device", strict=True)
    device.kernel(relu, when="no such unit")(lambda x: x)
    device.kernel(relu, when=lambda x: "only for one row")(lambda x: x)
    with use(device), pytest.raises(AcceleratorError, match=r"relu here \(no such unit; only for one row\), and strict"):
        relu(Foreign(ONE))


def test_every_part_of_a_result_comes_back_over_the_bridge():
    device = Device("device")
    with use(device):
        found = likeliest_tokens(Foreign(np.array([[1.0, 3.0, 2.0]])), 2)
    assert isinstance(found, tuple)
    assert [type(part) for part in found] == [Foreign, Foreign]
    assert found[1].values.tolist() == [[1, 2]]
    assert device.crossings == {"likeliest_tokens": 1}


def test_crossings_are_counted_from_every_thread():

    class Slow(Counter):
        def __getitem__(self, name):
            count = super().__getitem__(name)
            time.sleep(1e-5)  # another thread's turn
            return count

    device, x = Device("device"), Foreign(ONE)
    device.crossings = Slow()

    def worker():
        with use(device):
            for _ in range(30):
                relu(x)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(device.crossings.items()) == {"relu": 120}


def test_private_entries_and_leaves_of_another_kind():
    """What `load` may add and replace: every dictionary that ops take whole, and every leaf."""

    class Packed(Foreign):
        pass

    class Packing(Device):
        def load(self, params):
            if isinstance(params, list):
                return [self.load(part) for part in params]
            if not isinstance(params, dict):
                return Packed(params)
            leaves = {"kernel", "gamma"} & params.keys()
            private = {} if leaves or "embeddings" in params else {"_packed": object()}
            return {name: self.load(part) for name, part in params.items()} | private

        def foreign(self, value):
            return isinstance(value, Foreign)

    packing, arguments = (
        Packing("packing"),
        {"num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4, "seed": 1},
    )
    accelerated, plain = OPTBackbone(9, **arguments, accelerator=packing), OPTBackbone(9, **arguments)
    np.testing.assert_array_equal(accelerated({"token_ids": [[1, 2, 3]]}), plain({"token_ids": [[1, 2, 3]]}))
    assert isinstance(accelerated.device_params["layers"][0]["self_attention"]["query"]["kernel"], Packed)
    assert "_packed" in accelerated.device_params["layers"][0]["self_attention"]
    assert "_packed" not in plain.params["layers"][0]["self_attention"]
    assert packing.crossings["linear"] == 6


def test_a_cache_of_another_kind():
    """A device's own allocation and writing; the rest may cross."""
    device = Device("device")

    @device.kernel(cache_allocate)
    def allocate(shape, dtype):
        return Foreign(cache_allocate.reference(shape, dtype))

    @device.kernel(cache_append)
    def append(cache, new, start=None):
        return Foreign(cache_append.reference(cache.values, device.asnumpy(new), None if start is None else start.values))

    arguments = {"num_layers": 2, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4, "seed": 1}
    accelerated, plain = (OPTCausalLM(OPTBackbone(9, **arguments, accelerator=which)) for which in (device, None))
    for settings in ({}, {"num_beams": 2}):
        wanted = plain.generate({"token_ids": [[1, 2, 3]]}, max_new_tokens=5, stop_token_ids=None, **settings)
        got = accelerated.generate({"token_ids": [[1, 2, 3]]}, max_new_tokens=5, stop_token_ids=None, **settings)
        np.testing.assert_array_equal(got["token_ids"], wanted["token_ids"])
    assert device.crossings["cache_select"] > 0


def test_a_kernel_may_go_back_to_the_body(half, doubled_then_added):
    """`op.reference`; the ops in it are dispatched as always."""
    half.kernel(doubled_then_added)(lambda x, y: doubled_then_added.reference(x, y) + 1)
    with use(half):
        np.testing.assert_array_equal(doubled_then_added(ONE, TWO), 2.5 * ONE)


def test_an_op_that_writes_does_not_cross():
    """It would write to the copy on the host."""
    with use(Device("device")), pytest.raises(AcceleratorError, match="cache_append writes to cache"):
        cache_append(Foreign(np.zeros((1, 2))), np.ones((1, 1)))


def test_a_model_has_an_accelerator_of_its_own(half):
    arguments = {"vocabulary_size": 9, "num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4, "seed": 1}
    ids = {"token_ids": [[1, 2, 3]]}
    plain, accelerated = OPTBackbone(**arguments), OPTBackbone(**arguments, accelerator=half)
    reference = plain(ids)
    wrong = accelerated(ids)
    assert not np.array_equal(reference, wrong)
    np.testing.assert_array_equal(plain(ids), reference)
    with use(half):
        np.testing.assert_array_equal(plain(ids), wrong)  # a model without one leaves the choice to the block
    with use(Accelerator("nothing")):
        np.testing.assert_array_equal(accelerated(ids), wrong)


def test_load_is_asked_once_for_each_tree():
    loads = []

    class Loading(Accelerator):
        def load(self, params):
            loads.append(params)
            return params

    model = OPTBackbone(9, 1, 1, 4, 4, seed=1, accelerator=Loading("loading"))
    for _ in range(2):
        model({"token_ids": [[1, 2]]})
    assert len(loads) == 1
    model.params = OPTBackbone(9, 1, 1, 4, 4, seed=2).params
    model({"token_ids": [[1, 2]]})
    assert len(loads) == 2


# -- finding them -----------------------------------------------------------------------------------------------------


def test_find_takes_names_objects_and_none(half):
    assert find(None) is None
    assert find("reference") is None
    assert find(half) is half
    with pytest.raises(AcceleratorError, match="no accelerator 'nonesuch' is installed; here: reference"):
        find("nonesuch")
    with pytest.raises(TypeError, match="accelerator must be a name, an Accelerator or None, got int"):
        find(3)
    with pytest.raises(AcceleratorError, match="nonesuch"), use("nonesuch"):
        pass
    with pytest.raises(AcceleratorError, match="nonesuch"):
        OPTBackbone(9, 1, 1, 4, 4, accelerator="nonesuch")


PLUGIN = """
from refmodels import Accelerator
from refmodels.ops.elementwise import add

class Absent(Accelerator):
    def missing(self):
        return "no such device in this machine"

here, absent, number = Accelerator("here"), Absent("absent"), 7

@here.kernel(add)
def plugged_add(x, y):
    return "plugged in"
"""


def test_a_plugin_is_found_by_its_entry_point_and_imported_when_asked_for(plugin):
    plugin(PLUGIN, {"here": "here", "absent": "absent"})
    assert {"here", "absent"} <= set(installed())
    with pytest.raises(AcceleratorError, match=r"here: reference, .*absent.*here"):
        find("nonesuch")
    assert "plugged_in" not in sys.modules
    with use("here") as accelerator:
        assert "plugged_in" in sys.modules
        assert accelerator.name == "here"
        assert add(ONE, TWO) == "plugged in"


def test_a_plugin_says_why_it_cannot_run(plugin):
    plugin(PLUGIN, {"absent": "absent"})
    with pytest.raises(AcceleratorError, match="'absent' cannot run here: no such device in this machine"):
        find("absent")


def test_a_plugin_that_cannot_be_imported_says_why(plugin):
    plugin("import a_package_that_is_not_there", {"broken": "here"})
    with pytest.raises(AcceleratorError, match=r"'broken' cannot be imported: No module named 'a_package_that_is_not_there'"):
        find("broken")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('driver\\nmismatch')", "RuntimeError: driver mismatch"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("", "AttributeError: module 'plugged_in' has no attribute 'here'"),
        ("here = ", "SyntaxError: invalid syntax"),
        ("raise ImportError", "ImportError"),
    ],
)
def test_whatever_a_plugin_raises_is_said_of_it(plugin, source, said):
    plugin(source, {"broken": "here"})
    with pytest.raises(AcceleratorError, match=f"^accelerator 'broken' cannot be imported: {said}") as caught:
        find("broken")
    assert "\n" not in str(caught.value)


def test_a_plugin_that_cannot_say_whether_it_can_run(plugin):
    plugin(PLUGIN.replace('return "no such', 'raise OSError("no such').replace('machine"', 'machine")'), {"absent": "absent"})
    with pytest.raises(AcceleratorError, match="'absent' cannot say whether it can run here: OSError: no such device"):
        find("absent")


def test_an_entry_point_to_something_else_is_refused(plugin):
    plugin(PLUGIN, {"number": "number"})
    with pytest.raises(AcceleratorError, match="'number' is a int, wanted an Accelerator"):
        find("number")


def test_executing_takes_anything_that_runs():
    class Counting:
        calls = 0

        def run(self, op, args, kwargs):
            self.calls += 1
            return op.reference(*args, **kwargs)

    counting = Counting()
    with executing(counting), nullcontext():
        add(ONE, TWO)
        relu(ONE)
    assert counting.calls == 2


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool"])
def test_a_float_argument_takes_no_integers(dtype):
    with pytest.raises(ShapeError, match=rf"relu: x\[\*b n\]: wants floating-point numbers, got {dtype}"):
        relu(np.ones((2, 3), dtype))


def test_a_kernel_must_leave_out_what_its_op_may_leave_out():
    """Else a call that the op takes would fail inside the kernel."""
    accelerator = Accelerator("mine")
    with pytest.raises(AcceleratorError, match=r"takes \(x, gamma, beta, \*epsilon\), wanted \(x, gamma, beta, \*epsilon=\)"):
        accelerator.kernel(layer_norm)(lambda x, gamma, beta, *, epsilon: x)
    with pytest.raises(TypeError, match="takes an op such as"):
        accelerator.kernel(5)


def test_arguments_out_of_range_are_named():
    table, ids = np.ones((3, 2), np.float32), np.array([0, 3])
    with pytest.raises(ValueError, match=r"embedding: ids are 0 to 3, wanted 0 to 2"):
        embedding(ids, table)
    with pytest.raises(ValueError, match=r"embedding: ids are -1 to 0"):
        embedding(ids - np.array([1, 3]), table)
    x = np.ones((2, 3, 7), np.float32)
    with pytest.raises(ValueError, match=r"split_heads: x\[b t n\] has n = 7, wanted a multiple of num_heads = 2"):
        split_heads(x, 2)
    for lengths in ([0, 1], [1, 4]):
        with pytest.raises(ValueError, match=r"last_rows: lengths are \d to \d, wanted 1 to 3"):
            last_rows(x, np.array(lengths))
    cache = np.zeros((2, 5, 7), np.float32)
    for start in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"cache_append: position -?\d is outside the cache's 5"):
            cache_append(cache, x, np.array(start))
    for new, start in ((x[:1], [0, 0]), (x[..., :6], [0, 0]), (x, [0])):
        with pytest.raises(ShapeError, match=r"cache_append: cache \(2, 5, 7\), new .* only the positions, axis 1, may differ"):
            cache_append(cache, new, np.array(start))
    assert not cache.any()


def test_a_signature_reads_like_the_spec():
    assert "x: float[*b n], gamma: float[n]" in repr(layer_norm)

"""The backbones as classes: arguments, inputs, configs, random weights, counting, and the layer of token embeddings."""

import itertools
import json
import math

import numpy as np
import pytest

from refmodels import Backbone, BloomBackbone, BloomCausalLM, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM
from refmodels.ops.precision import POLICIES, numpy_dtype
from refmodels.parameters import flatten, grown

BACKBONES = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
SIZES = {"vocabulary_size": 13, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 12}
OTHERS = {
    "opt": {"dropout": 0.25, "max_sequence_length": 9},
    "bloom": {"dropout": 0.25, "layer_norm_epsilon": 0.5},
    "t5": {
        "activation": "gelu",
        "key_value_dim": 3,
        "dropout": 0.25,
        "use_gated_activation": False,
        "layer_norm_epsilon": 0.5,
        "tie_embedding_weights": False,
    },
}
"""For each family every other argument, none at its default."""

IDS = np.array([[5, 9, 2, 12, 7], [11, 3, 3, 8, 1]])

families = pytest.mark.parametrize("family", BACKBONES)


def model_of(family, **arguments):
    return BACKBONES[family](**{**SIZES, "seed": 3, **arguments})


def both(family, **inputs):
    """The inputs of a decoder; for T5 the same ones for its encoder and decoder."""
    if family != "t5":
        return inputs
    return {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in inputs.items()}


def outputs(family, result):
    """Every array of a result."""
    return list(result.values()) if family == "t5" else [result]


def assert_equal(results, others):
    for result, other in zip(results, others, strict=True):
        np.testing.assert_array_equal(result, other)


# -- arguments --------------------------------------------------------------------------------------------------------

SIZE = "{} must be a positive integer"
EVERY_CLASS = [
    *(({name: 0}, SIZE.format(name)) for name in SIZES),
    *(({name: -1}, SIZE.format(name)) for name in SIZES),
    *(({name: True}, SIZE.format(name) + ".*got True") for name in SIZES),
    *(({name: 2.0}, SIZE.format(name)) for name in SIZES),
    *(({name: None}, SIZE.format(name)) for name in SIZES),
    ({"dropout": 1}, r"dropout must be a number in \[0, 1\), got 1"),
    ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), got -0.1"),
    ({"dropout": math.nan}, r"dropout must be a number in \[0, 1\), got nan"),
    ({"dropout": True}, r"dropout must be a number in \[0, 1\), got True"),
    ({"dropout": None}, r"dropout must be a number in \[0, 1\), got None"),
    ({"hidden_dim": 9}, "hidden_dim must be divisible by num_heads, got 9 and 2"),
    (
        {"dtype": "float8"},
        "dtype must be one of float32, float16, bfloat16, float64, mixed_float16, mixed_bfloat16, got 'float8'",
    ),
    ({"dtype": np.int32}, "dtype must be one of float32.*got 'int32'"),
    ({"dtype": 7}, "dtype must be one of float32.*got 7"),
    ({"dtype": {"class_name": "QuantizedDTypePolicy", "config": {"name": "int8"}}}, "mode is None, wanted 'int8'"),
    ({"dtype": {"class_name": "DTypePolicy", "config": {}}}, "wanted a DTypePolicy with a name"),
]
EPSILON = [
    ({"layer_norm_epsilon": value}, f"layer_norm_epsilon must be a positive number, got {value}")
    for value in (0, -1e-5, math.nan, math.inf, True)
]
OWN = {
    "opt": [({"max_sequence_length": value}, SIZE.format("max_sequence_length")) for value in (0, -1, True)],
    "bloom": EPSILON,
    "t5": [
        *EPSILON,
        *(({"key_value_dim": value}, SIZE.format("key_value_dim")) for value in (0, -1, True)),
        ({"use_gated_activation": 1}, "use_gated_activation must be true or false, got 1"),
        ({"tie_embedding_weights": None}, "tie_embedding_weights must be true or false, got None"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu, gelu_approximate, silu, linear, got 'tanh'"),
    ],
}


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [(family, *case) for family in BACKBONES for case in [*EVERY_CLASS, *OWN[family]]],
    ids=str,
)
def test_bad_arguments(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(family, **arguments)


@families
def test_an_unknown_argument_is_refused_with_those_there_are(family):
    names = ["vocabulary_size", "num_layers", *OTHERS[family], "dtype", "name", "trainable"]
    with pytest.raises(TypeError, match="has no argument 'hidden_size'; it has: ") as caught:
        model_of(family, hidden_size=8)
    known = str(caught.value).partition("it has: ")[2].split(", ")
    assert set(names) <= set(known)
    assert "layer_norm_epsilon" in known if family != "opt" else "layer_norm_epsilon" not in known


def test_the_size_of_a_head_makes_division_unnecessary():
    model = model_of("t5", hidden_dim=9, key_value_dim=5)
    assert model.params["encoder"]["layers"][0]["self_attention"]["query"]["kernel"].shape == (9, 2 * 5)


@families
def test_every_argument_is_an_attribute(family):
    arguments = {**SIZES, **OTHERS[family], "name": "mine", "trainable": False}
    model = BACKBONES[family](**arguments)
    assert {name: getattr(model, name) for name in arguments} == arguments
    with pytest.raises(AttributeError, match="has no attribute 'hidden_size'"):
        _ = model.hidden_size


@families
def test_presets_of_a_class_are_its_own(family):
    start = {"opt": ("opt_",), "bloom": ("bloom",), "t5": ("t5_", "flan_")}[family]
    everything, own = Backbone.presets, BACKBONES[family].presets
    assert list(own) == [name for name in everything if name.startswith(start)]
    assert len(own) >= 3
    assert all(set(preset) == {"metadata", "kaggle_handle"} for preset in own.values())
    assert model_of(family).presets == own
    assert set(everything) == {name for backbone in BACKBONES.values() for name in backbone.presets}


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.5, 2, -1, math.nan])
@families
def test_a_mask_of_anything_but_0_and_1_is_refused(family, value):
    model, mask = model_of(family), np.ones(IDS.shape)
    mask[1, 3] = value
    prefix = "encoder_" if family == "t5" else ""
    with pytest.raises(ValueError, match=rf"{prefix}padding_mask\[1, 3\] is {value}.*, wanted 0 \(padding\) or 1 \(real\)"):
        model(both(family, token_ids=IDS, padding_mask=mask))


@families
def test_masks_of_any_type_are_equal(family):
    model, mask = model_of(family), np.arange(5) < np.array([[5], [2]])
    want = outputs(family, model(both(family, token_ids=IDS, padding_mask=mask)))
    for other in (
        mask.astype(np.float32),
        mask.astype(np.int8),
        mask.astype(np.uint64),
        mask.tolist(),
        mask.astype(int).tolist(),
    ):
        assert_equal(outputs(family, model(both(family, token_ids=IDS, padding_mask=other))), want)
    whole = outputs(family, model(both(family, token_ids=IDS)))
    assert_equal(outputs(family, model(both(family, token_ids=IDS, padding_mask=np.ones(IDS.shape)))), whole)
    assert (whole[-1][1] != want[-1][1]).any()  # the mask does matter


@families
def test_bad_inputs(family):
    model, prefix = model_of(family), "encoder_" if family == "t5" else ""

    def refused(message, error=ValueError, **inputs):
        with pytest.raises(error, match=message):
            model(both(family, **inputs))

    refused(f"missing input '{prefix}token_ids'", padding_mask=np.ones((2, 5)))
    for place, value in (((0, 2), 13), ((1, 4), -1)):
        ids = IDS.copy()
        ids[place] = value
        refused(rf"{prefix}token_ids\[{place[0]}, {place[1]}\] is {value}, wanted 0 to 12", token_ids=ids)
    refused(rf"{prefix}token_ids must have shape \(batch, length\), got \(5,\)", token_ids=IDS[0])
    refused(rf"{prefix}token_ids must have shape \(batch, length\), got \(1, 2, 5\)", token_ids=IDS[None])
    refused(rf"{prefix}token_ids must hold integers, got float64", token_ids=IDS.astype(float))
    refused(
        rf"{prefix}padding_mask has shape \(2, 4\), wanted \(2, 5\) like its token ids",
        token_ids=IDS,
        padding_mask=np.ones((2, 4)),
    )
    refused(rf"{prefix}padding_mask has shape \(2,\), wanted \(2, 5\)", token_ids=IDS, padding_mask=np.ones(2))
    with pytest.raises(TypeError, match=rf"inputs must be a dictionary with {prefix}token_ids"):
        model(IDS)


def test_both_sides_of_t5_have_one_batch_size():
    model = model_of("t5")
    with pytest.raises(ValueError, match=r"different batch sizes: encoder_token_ids \(2, 5\).*decoder_token_ids \(1, 5\)"):
        model({"encoder_token_ids": IDS, "decoder_token_ids": IDS[:1]})
    with pytest.raises(ValueError, match="missing input 'decoder_token_ids'"):
        model({"encoder_token_ids": IDS})
    encoded, decoded = model({"encoder_token_ids": IDS, "decoder_token_ids": IDS[:, :2]}).values()
    assert (encoded.shape, decoded.shape) == ((2, 5, 8), (2, 2, 8))


@families
def test_an_unknown_input_is_ignored_with_a_warning(family):
    model = model_of(family)
    want = outputs(family, model(both(family, token_ids=IDS)))
    with pytest.warns(UserWarning, match=r"ignores input 'segment_ids'; it takes .*padding_mask, .*token_ids"):
        got = model({**both(family, token_ids=IDS), "segment_ids": IDS})
    assert_equal(outputs(family, got), want)


@families
def test_the_warning_of_an_unknown_input_shows_the_line_of_the_caller(family):
    model = model_of(family)
    tasks = {"t5": T5Seq2SeqLM, "opt": OPTCausalLM, "bloom": BloomCausalLM}
    task, inputs = tasks[family](model), {**both(family, token_ids=IDS), "segment_ids": IDS}
    calls = [model, task.score]
    if family != "t5":
        calls.append(lambda inputs: task.generate(inputs, stop_token_ids=None, max_new_tokens=1))
    for call in calls:
        with pytest.warns(UserWarning, match="segment_ids") as caught:
            call(inputs)
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
@families
def test_an_empty_batch_gives_an_empty_output(family, shape):
    ids = np.zeros(shape, int)
    results = outputs(family, model_of(family, dtype="float64")(both(family, token_ids=ids)))
    assert [(result.shape, result.dtype) for result in results] == [((*shape, 8), np.dtype("float64"))] * len(results)


def test_opt_stays_in_its_table_of_positions():
    model = model_of("opt", max_sequence_length=4)
    with pytest.raises(ValueError, match="sequence length 5 is more than max_sequence_length 4"):
        model({"token_ids": IDS})
    # position_ids inside the table do not make a longer sequence fit
    with pytest.raises(ValueError, match="sequence length 5 is more than max_sequence_length 4"):
        model({"token_ids": IDS, "position_ids": IDS * 0})
    for value in (4, -1):
        with pytest.raises(ValueError, match=rf"position_ids\[0, 2\] is {value}, wanted 0 to 3 \(max_sequence_length 4\)"):
            model({"token_ids": [[5, 9, 2]], "position_ids": [[0, 1, value]]})
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 2\), wanted \(1, 3\)"):
        model({"token_ids": [[5, 9, 2]], "position_ids": [[0, 1]]})
    assert model({"token_ids": IDS[:, :4]}).shape == (2, 4, 8)


def test_opt_takes_the_length_of_its_first_input():
    model = model_of("opt", max_sequence_length=None)
    assert model.max_sequence_length is None
    with pytest.raises(ValueError, match="max_sequence_length is None"):
        model.count_params()
    with pytest.raises(ValueError, match=r"token_ids\[0, 1\] is 13"):
        model({"token_ids": [[5, 13]]})
    assert model.max_sequence_length is None  # what is refused settles nothing
    first = model({"token_ids": IDS[:, :4]})
    assert model.max_sequence_length == 4
    assert model.get_config()["max_sequence_length"] == 4
    np.testing.assert_array_equal(first, model_of("opt", max_sequence_length=4)({"token_ids": IDS[:, :4]}))
    with pytest.raises(ValueError, match="sequence length 5 is more than max_sequence_length 4"):
        model({"token_ids": IDS})
    assert model({"token_ids": IDS[:, :3]}).shape == (2, 3, 8)


# -- configuration ----------------------------------------------------------------------------------------------------

KEYS = {
    "opt": "vocabulary_size num_layers num_heads hidden_dim intermediate_dim dropout max_sequence_length",
    "bloom": "vocabulary_size num_layers num_heads hidden_dim intermediate_dim dropout layer_norm_epsilon",
    "t5": "vocabulary_size hidden_dim intermediate_dim num_layers num_heads activation key_value_dim dropout "
    "use_gated_activation layer_norm_epsilon tie_embedding_weights",
}


@pytest.mark.parametrize("dtype", POLICIES)
@families
def test_a_config_makes_the_same_backbone(family, dtype):
    arguments = {**SIZES, **OTHERS[family], "name": "mine", "trainable": False, "dtype": dtype}
    config = BACKBONES[family](**arguments).get_config()
    assert config == arguments
    assert list(config) == ["name", "trainable", "dtype", *KEYS[family].split()]
    again = BACKBONES[family].from_config(json.loads(json.dumps(config)))
    assert type(again) is BACKBONES[family]
    assert again.get_config() == config
    assert {name: getattr(again, name) for name in SIZES | OTHERS[family]} == SIZES | OTHERS[family]
    assert (again.name, again.trainable) == ("mine", False)
    again.params = BACKBONES[family](**arguments, seed=1).params
    computed = dtype.removeprefix("mixed_")
    stored = dtype if dtype == computed else "float32"
    assert (again.variable_dtype, again.compute_dtype) == (stored, computed)
    assert outputs(family, again(both(family, token_ids=IDS)))[-1].dtype == numpy_dtype(computed)


@families
def test_defaults_are_those_of_keras_hub(family):
    config = BACKBONES[family](**SIZES).get_config()
    defaults = {
        "opt": {"dropout": 0.1, "max_sequence_length": 2048},
        "bloom": {"dropout": 0.0, "layer_norm_epsilon": 1e-5},
        "t5": {
            "activation": "relu",
            "key_value_dim": None,
            "dropout": 0.1,
            "use_gated_activation": True,
            "layer_norm_epsilon": 1e-6,
            "tie_embedding_weights": True,
        },
    }[family]
    assert config == {"name": f"{family}_backbone", "trainable": True, "dtype": "float32", **SIZES, **defaults}


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (None, "float32"),
        (np.float16, "float16"),
        (np.dtype("float64"), "float64"),
        ({"class_name": "DTypePolicy", "config": {"name": "bfloat16"}}, "bfloat16"),
        (
            {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "mixed_float16"}, "registered_name": None},
            "mixed_float16",
        ),
        ({"module": "keras", "class_name": "FloatDTypePolicy", "config": {"name": "bfloat16"}}, "bfloat16"),
    ],
    ids=str,
)
@families
def test_a_dtype_has_several_forms(family, dtype, name):
    model = model_of(family, dtype=dtype)
    assert model.get_config()["dtype"] == name
    assert {leaf.dtype for _, leaf in flatten(model.params)} == {numpy_dtype(model.variable_dtype)}


# -- random weights ---------------------------------------------------------------------------------------------------


def leaves(model):
    return dict(flatten(model.params))


def drawn(tree):
    """The tensors that are not all zeros or all ones."""
    return {path: leaf for path, leaf in tree.items() if leaf.ndim == 2}


@families
def test_a_seed_is_a_tree(family):
    arguments = {**OTHERS[family], "num_layers": 3}
    first, same, other = (leaves(model_of(family, **{**arguments, "seed": seed})) for seed in (1, 1, 2))
    assert list(first) == list(same)
    for path, leaf in first.items():
        assert leaf.tobytes() == same[path].tobytes(), path
    for path, leaf in drawn(first).items():
        assert (leaf != other[path]).mean() > 0.9, path
    # No two of one shape are alike, not even in a corner or scaled.
    for (path, leaf), (other_path, other_leaf) in itertools.combinations(drawn(first).items(), 2):
        if leaf.shape == other_leaf.shape:
            assert abs(np.corrcoef(leaf.ravel(), other_leaf.ravel())[0, 1]) < 0.8, (path, other_path)


@families
def test_without_a_seed_the_weights_are_random_but_stay(family):
    one, other = (model_of(family, seed=None) for _ in range(2))
    assert one.params is one.params
    assert all((leaf != leaves(other)[path]).any() for path, leaf in drawn(leaves(one)).items())


@families
def test_one_layer_more_changes_no_other(family):
    small, large = (leaves(model_of(family, num_layers=layers)) for layers in (2, 3))
    assert set(small) < set(large)
    for path, leaf in small.items():
        assert leaf.tobytes() == large[path].tobytes(), path


V, D, H, K, F = 500, 64, 4, 48, 160
INNER = H * K


def t5_std(path):
    """T5 (Raffel et al. 2020): normal; projections are scaled for an attention that is not."""
    part = path.split(".")[-2]
    if path.startswith("token_embedding"):
        return 1.0
    return {
        "query": (INNER * K) ** -0.5,
        "input_projector": D**-0.5,
        "gate_projector": D**-0.5,
        "output_projector": F**-0.5,
    }.get(part, INNER**-0.5)


def rule(family, path, shape):
    """(distribution, its scale) as the original draws this parameter."""
    if path.endswith(("gamma", ".weight")):
        return "ones", 1.0
    if path.endswith(("bias", "beta")):
        return "zeros", 0.0
    if family == "opt":
        return "truncated", 0.02
    if family == "t5":
        return "normal", t5_std(path)
    return ("normal", 0.02) if path.startswith("token_embedding") else ("uniform", math.sqrt(6 / sum(shape)))


@families
def test_weights_are_drawn_as_the_originals_draw_them(family):
    own = {
        "opt": {"max_sequence_length": 300},
        "bloom": {},
        "t5": {"key_value_dim": K, "tie_embedding_weights": False},
    }[family]
    sizes = {"vocabulary_size": V, "hidden_dim": D, "num_heads": H, "intermediate_dim": F, "num_layers": 2}
    tree = leaves(BACKBONES[family](**sizes, **own, seed=11))
    # The deviation of a normal distribution cut at two is 0.8796 of its scale, of a uniform one 1/sqrt(3) of its bound.
    deviation = {"truncated": 0.8796, "normal": 1.0, "uniform": 3**-0.5}
    cut = {"truncated": 2.0, "normal": math.inf, "uniform": 1.0}
    seen = set()
    for path, leaf in tree.items():
        kind, scale = rule(family, path, leaf.shape)
        seen.add(kind)
        if kind in ("zeros", "ones"):
            assert (leaf == scale).all(), path
            assert leaf.ndim == 1, path
            continue
        values, n, std = leaf.astype(np.float64), leaf.size, scale * deviation[kind]
        assert abs(values.mean()) < 6 * std / math.sqrt(n), path
        assert abs(values.std() / std - 1) < 6 / math.sqrt(2 * n), path
        largest = np.abs(values).max() / scale
        assert largest <= cut[kind] * (1 + 1e-6), path
        if n > 2000:  # a tail that is there, and one that is not cut
            assert largest > {"truncated": 1.9, "normal": 2.8, "uniform": 0.98}[kind], path
    assert (
        seen
        == {"opt": {"truncated", "zeros", "ones"}, "bloom": {"normal", "uniform", "zeros", "ones"}, "t5": {"normal", "ones"}}[
            family
        ]
    )


# -- counting ---------------------------------------------------------------------------------------------------------


def decoder_layer(d, f):
    """Four projections, two dense layers, all with biases, and two norms."""
    return 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d


def closed_form(family, model):
    v, d, f = model.vocabulary_size, model.hidden_dim, model.intermediate_dim
    n, h = model.num_layers, model.num_heads
    if family == "opt":
        return v * d + model.max_sequence_length * d + n * decoder_layer(d, f) + 2 * d
    if family == "bloom":
        return v * d + 2 * d + n * decoder_layer(d, f) + 2 * d
    inner = h * (model.key_value_dim or d // h)
    tables = 1 if model.tie_embedding_weights else 2
    dense = 3 if model.use_gated_activation else 2
    encoder = 4 * d * inner + dense * d * f + 2 * d
    decoder = 8 * d * inner + dense * d * f + 3 * d
    return v * d * tables + n * (encoder + decoder) + 2 * 32 * h + 2 * d


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("opt", {}),
        ("opt", {"num_layers": 1, "max_sequence_length": 5}),
        ("bloom", {}),
        ("bloom", {"num_layers": 3, "intermediate_dim": 7}),
        *(
            ("t5", {"tie_embedding_weights": tied, "use_gated_activation": gated, "key_value_dim": size})
            for tied, gated, size in itertools.product([True, False], [True, False], [None, 7])
        ),
    ],
    ids=str,
)
def test_parameters_are_counted(family, arguments):
    model, lines = model_of(family, **arguments), []
    assert model.count_params() == closed_form(family, model)
    model.summary(print_fn=lines.append)
    assert f" {model.count_params():,} " in lines[-1]
    assert "total" in lines[-1]
    assert model.placement.empty  # neither of them drew a parameter
    assert model.count_params() == sum(leaf.size for leaf in leaves(model).values())


def test_the_largest_model_is_counted_without_drawing_it():
    model = OPTBackbone(50272, 96, 96, 12288, 49152)
    assert model.count_params() == closed_form("opt", model) > 170e9
    assert model.placement.empty


# -- token embeddings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "tied"), [("opt", True), ("bloom", True), ("t5", True), ("t5", False)])
def test_the_layer_of_token_embeddings(family, tied):
    model = model_of(family, dtype="float64", **({"tie_embedding_weights": tied} if family == "t5" else {}))
    layer = model.token_embedding
    assert (layer.input_dim, layer.output_dim, layer.tie_weights) == (13, 8, tied)
    table = model.params["token_embedding"]["embeddings"]
    assert layer.embeddings is table
    np.testing.assert_array_equal(layer(IDS), table[IDS])
    with pytest.raises(ValueError, match=r"token_ids\[0, 0\] is 13, wanted 0 to 12"):
        layer([[13]])
    hidden = np.random.default_rng(0).standard_normal((2, 5, 8))
    if tied:
        reverse = table.T
        with pytest.raises(AttributeError, match="the embedding is tied"):
            _ = layer.reverse_embeddings
    else:
        reverse = layer.reverse_embeddings
        assert reverse is model.params["token_embedding"]["reverse_embeddings"]
        assert reverse.shape == (8, 13)
        assert (reverse != table.T).any()
    np.testing.assert_allclose(layer(hidden, reverse=True), hidden @ reverse, rtol=1e-12, atol=1e-14)
    model.params = leaves_doubled(model.params)
    np.testing.assert_array_equal(layer(IDS), 2 * table[IDS])  # the layer follows the parameters


def leaves_doubled(tree):
    if isinstance(tree, dict):
        return {name: leaves_doubled(child) for name, child in tree.items()}
    return [leaves_doubled(child) for child in tree] if isinstance(tree, list) else 2 * tree


# -- training ---------------------------------------------------------------------------------------------------------


@families
def test_training_needs_a_generator_only_where_something_is_dropped(family):
    inputs = both(family, token_ids=IDS)
    with pytest.raises(ValueError, match=r"training with dropout 0\.25 needs rng"):
        model_of(family, dropout=0.25)(inputs, training=True)
    dropping, still = model_of(family, dropout=0.25), model_of(family, dropout=0)
    assert_equal(outputs(family, dropping(inputs)), outputs(family, still(inputs, training=True)))
    trained = outputs(family, dropping(inputs, training=True, rng=np.random.default_rng(0)))
    assert all((one != two).any() for one, two in zip(trained, outputs(family, still(inputs)), strict=True))


@families
def test_a_tree_that_does_not_fit_is_refused_and_changes_nothing(family):
    model = model_of(family)
    before, leaves = model.params, dict(flatten(model.params))
    name = next(path for path in leaves if path.endswith("layers.1.self_attention.query.kernel"))
    for change, message in (
        ({name: leaves[name][:, :-1]}, rf"params: {name} has shape \(8, \d\), wanted \(8, \d\)"),
        ({name: None}, rf"params: {name} is missing, wanted \(8, \d\)"),
        ({"token_embedding.scale": np.ones(1)}, "params: token_embedding.scale is no parameter of this model"),
    ):
        with pytest.raises(ValueError, match=message):
            model.params = grown((path, leaf) for path, leaf in {**leaves, **change}.items() if leaf is not None)
        assert model.params is before

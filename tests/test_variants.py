"""What the classes hold beyond KerasHub's: opt-350m and its parts, every kind of head, vectors in place of token ids."""

import itertools
import json
import logging
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as package
from loopback import Loopback
from test_laws import Subject, config_of, holds, mapped, scrambled

from refmodels import Backbone, BloomBackbone, OPTBackbone, T5Backbone
from refmodels.bloom import bloom_logits
from refmodels.files import CheckpointError
from refmodels.numerics import calibrated, compare
from refmodels.ops.precision import POLICIES
from refmodels.opt import opt_logits
from refmodels.parameters import flatten
from refmodels.t5 import t5_logits
from refmodels.weights import huggingface, keras_config
from refmodels.weights.tensor import Tensor

GOLDENS = Path(__file__).parent / "data" / "goldens" / "hf"
BACKBONES = {"opt": OPTBackbone, "bloom": BloomBackbone, "t5": T5Backbone}
IDS = np.array([[5, 9, 2, 10, 7], [1, 3, 3, 8, 1]])

VARIANTS = {
    "350m": {"word_embed_proj_dim": 4, "do_layer_norm_before": False},
    "narrow": {"word_embed_proj_dim": 4},
    "wide": {"word_embed_proj_dim": 9, "tie_embedding_weights": False},
    "norms last": {"do_layer_norm_before": False},
    "norms last, no final norm": {"do_layer_norm_before": False, "remove_final_layer_norm": True},
    "no final norm": {"remove_final_layer_norm": True},
    "untied": {"tie_embedding_weights": False},
    "all": {
        "word_embed_proj_dim": 3,
        "do_layer_norm_before": False,
        "remove_final_layer_norm": True,
        "tie_embedding_weights": False,
    },
}
BEYOND = [("opt", VARIANTS["all"]), ("bloom", {"tie_embedding_weights": False}), ("t5", {"scale_logits": False})]

variants = pytest.mark.parametrize("variant", VARIANTS)
families = pytest.mark.parametrize("family", BACKBONES)


def model_of(family, **arguments):
    """A small model whose every parameter matters."""
    return scrambled(BACKBONES[family](**{**config_of(family), "seed": 1, **arguments}), np.random.default_rng(2))


# -- OPT ------------------------------------------------------------------------------------------------------------------


def plain_opt(model, ids):
    """Scores and hidden states of one row of ids, written down once more: one head and one query after the other."""
    c, p = model.config, model.params

    def norm(x, g):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g["gamma"] + g["beta"]

    def affine(x, w):
        return x @ w["kernel"] + w["bias"]

    def attend(x, w):
        q, k, v = (affine(x, w[name]) for name in ("query", "key", "value"))
        out, d = np.zeros_like(q), c.hidden_dim // c.num_heads
        for i in range(len(ids)):
            for head in range(c.num_heads):
                own = slice(head * d, head * d + d)
                scores = np.exp(np.array([q[i, own] @ k[j, own] / d**0.5 for j in range(i + 1)]))
                out[i, own] = scores / scores.sum() @ v[: i + 1, own]
        return affine(out, w["output"])

    def widen(x, w):
        return affine(np.maximum(affine(x, w["feedforward_intermediate_dense"]), 0), w["feedforward_output_dense"])

    table = p["token_embedding"]["embeddings"]
    x = table[ids] @ p["project_in"]["kernel"] if c.word_embed_proj_dim else table[ids]
    x = x + p["position_embedding"]["embeddings"][: len(ids)]
    for layer in p["layers"]:
        parts = [lambda y, w=layer: attend(y, w["self_attention"]), lambda y, w=layer: widen(y, w)]
        for part, name in zip(parts, ("self_attention_layer_norm", "feedforward_layer_norm"), strict=True):
            x = x + part(norm(x, layer[name])) if c.do_layer_norm_before else norm(x + part(x), layer[name])
    if c.do_layer_norm_before and not c.remove_final_layer_norm:
        x = norm(x, p["layer_norm"])
    if c.word_embed_proj_dim:
        x = x @ p["project_out"]["kernel"]
    return x @ (table.T if c.tie_embedding_weights else p["token_embedding"]["reverse_embeddings"]), x


@variants
def test_opt_is_its_equations(variant):
    model = model_of("opt", **VARIANTS[variant])
    hidden, exact = model({"token_ids": IDS}), OPTBackbone(**config_of("opt"), **VARIANTS[variant], dtype="float64")
    exact.params = mapped(model.params, lambda x: x.astype(np.float64))
    logits = opt_logits(hidden, model.params)
    for row, ids in enumerate(IDS):
        for got, wanted, truth in zip((logits[row], hidden[row]), plain_opt(model, ids), plain_opt(exact, ids), strict=True):
            assert compare(got, truth, calibrated(), wanted=wanted, name=variant)
    np.testing.assert_array_equal(model.token_embedding(hidden, reverse=True), logits)


@variants
def test_any_chunking_with_the_cache_equals_the_whole_sequence(variant):
    subject = Subject("opt", {**config_of("opt"), **VARIANTS[variant]}, 3, (3, 7))

    def law(subject):
        cache, parts = subject.new_cache(8), []
        for begin, end in itertools.pairwise([0, 3, 4, 7]):
            columns = slice(begin, end)
            parts.append(subject.step(subject.ids[:, columns], subject.mask[:, columns], cache, np.full(3, begin)))
        return np.concatenate(parts, 1)[subject.mask], subject.whole()[subject.mask]

    holds(law, subject)


@variants
def test_prefill_and_one_token_a_step(variant):
    subject = Subject("opt", {**config_of("opt"), **VARIANTS[variant]}, 4, (2, 5))
    more = np.array([[4, 2], [8, 0]])

    def law(subject):
        model, cache, ones = subject.model, subject.new_cache(9), np.ones((2, 1), bool)
        got = [model.prefill(subject.ids, subject.mask, subject.lengths, cache, np.zeros(2, int))]
        got += [model.decode_step(more[:, i : i + 1], ones, subject.lengths + i, cache) for i in range(2)]
        wanted = []
        for row, length in enumerate(subject.lengths):
            ids = np.concatenate([subject.ids[row, :length], more[row]])[None]
            wanted.append(subject.logits(subject.whole(ids, np.ones(ids.shape, bool)))[0, length - 1 :])
        return np.stack(got, 1), np.stack(wanted)

    holds(law, subject)


@variants
def test_no_line_touches_an_array(variant):
    model = model_of("opt", **VARIANTS[variant])
    opaque = OPTBackbone(**config_of("opt"), **VARIANTS[variant], accelerator=Loopback())
    opaque.params = model.params
    assert opaque({"token_ids": IDS}).tobytes() == model({"token_ids": IDS}).tobytes()


@variants
def test_parameters_are_counted(variant):
    model, lines = OPTBackbone(**config_of("opt"), **VARIANTS[variant]), []
    plain = OPTBackbone(**config_of("opt"))
    v, n, e = 11, 6, VARIANTS[variant].get("word_embed_proj_dim", 6)
    final = 0 if {"remove_final_layer_norm", "do_layer_norm_before"} & VARIANTS[variant].keys() else 2 * n
    tables = 1 if model.tie_embedding_weights else 2
    projections = 2 * n * e if e != n else 0
    assert model.count_params() == plain.count_params() - v * n - 2 * n + tables * v * e + projections + final
    model.summary(print_fn=lines.append)
    assert any("project_in" in line for line in lines) == (e != n)
    assert f" {model.count_params():,} " in lines[-1]
    assert model.placement.empty
    assert sum(leaf.size for _, leaf in flatten(model.params)) == model.count_params()


def test_opt_350m_is_counted():
    model = OPTBackbone(50272, 24, 16, 1024, 4096, word_embed_proj_dim=512, do_layer_norm_before=False)
    assert model.count_params() == 331_196_416 - 2 * 1024  # facebook/opt-350m has two more rows in its table of positions
    assert (model.embedding_dim, model.token_embedding.output_dim, model.hidden_dim) == (512, 512, 1024)


def test_a_width_equal_to_that_of_the_hidden_state_is_no_projection():
    model = OPTBackbone(**config_of("opt"), word_embed_proj_dim=6)
    assert "word_embed_proj_dim" not in model.get_config()
    assert "project_in" not in model.params


@pytest.mark.parametrize("dtype", POLICIES)
def test_types_follow_the_policy(dtype):
    model = OPTBackbone(**config_of("opt"), **VARIANTS["350m"], dtype=dtype, seed=1)
    hidden = model({"token_ids": IDS})
    assert hidden.dtype == opt_logits(hidden, model.params).dtype == POLICIES[dtype][1]


# -- constructors and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        *(
            ("opt", {"word_embed_proj_dim": value}, f"OPT word_embed_proj_dim must be a positive integer.*got {value}")
            for value in (0, -1, True, 2.0)
        ),
        *(
            (family, {name: value}, f"{name} must be true or false, got {value}")
            for family, name in [
                ("opt", "do_layer_norm_before"),
                ("opt", "remove_final_layer_norm"),
                ("opt", "tie_embedding_weights"),
                ("bloom", "tie_embedding_weights"),
            ]
            for value in (None, 1, 0)
        ),
        ("t5", {"scale_logits": 1}, "T5 scale_logits must be true or false, got 1"),
    ],
    ids=str,
)
def test_bad_arguments(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        BACKBONES[family](**{**config_of(family), **arguments})


def test_the_documented_positions_of_arguments_stay():
    assert OPTBackbone(11, 2, 3, 6, 7, 0.2, 40, "float64").config.dtype == "float64"
    with pytest.raises(TypeError, match="positional"):
        OPTBackbone(11, 2, 3, 6, 7, 0.2, 40, "float64", 4)


@families
def test_a_config_has_them_only_where_they_are_not_at_their_defaults(family):
    """So a config of a model that KerasHub can hold is KerasHub's."""
    name, (_, arguments) = f"{BACKBONES[family].__name__}", next(each for each in BEYOND if each[0] == family)
    plain, other = BACKBONES[family](**config_of(family)), BACKBONES[family](**config_of(family), **arguments)
    assert not arguments.keys() & plain.get_config().keys() - {"tie_embedding_weights"}
    assert keras_config.keras_hub_can_hold(name, plain.get_config())
    assert {key: value for key, value in other.get_config().items() if key in arguments} == arguments
    assert not keras_config.keras_hub_can_hold(name, other.get_config())
    again = BACKBONES[family].from_config(json.loads(json.dumps(other.get_config())))
    assert again.config == other.config
    assert {key: getattr(again, key) for key in arguments} == arguments


def test_a_scale_that_is_as_tied_is_none():
    for tied in (True, False):
        same = T5Backbone(**config_of("t5"), tie_embedding_weights=tied, scale_logits=tied)
        assert same.config == T5Backbone(**config_of("t5"), tie_embedding_weights=tied).config
        other = T5Backbone(**config_of("t5"), tie_embedding_weights=tied, scale_logits=not tied)
        assert other.get_config()["scale_logits"] is (not tied)


@pytest.mark.parametrize(("family", "arguments"), BEYOND, ids=lambda value: value if isinstance(value, str) else "")
def test_a_preset_of_our_own_class_is_read(tmp_path, family, arguments):
    model = BACKBONES[family](**config_of(family), **arguments, dtype="bfloat16")
    written = {"registered_name": f"refmodels>{type(model).__name__}", "config": model.get_config()}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert Backbone.from_preset(tmp_path, load_weights=False).get_config() == model.get_config()
    name = next(iter(arguments))
    written["config"][name] = "yes"
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=f"field '{name}' is 'yes'"):
        Backbone.from_preset(tmp_path, load_weights=False)


# -- heads ------------------------------------------------------------------------------------------------------------------

# What Transformers 5.23 does with such files: (tied, scaled); None where it ties nothing and leaves the head at random, or
# where the files say two things, of which Transformers 4 and 5 take one each.
DECIDED = {
    # model_type, lm_head.weight, scale_decoder_outputs, tie_word_embeddings, transformers_version
    ("t5", "absent", ..., ..., ...): (True, True),
    ("t5", "absent", ..., True, "4.30.0"): (True, True),
    ("t5", "absent", ..., False, "4.30.0"): (True, False),
    ("t5", "absent", True, True, "5.23.0"): (True, True),
    ("t5", "absent", False, True, "5.23.0"): (True, False),
    ("t5", "equal", ..., ..., ...): (True, True),
    ("t5", "equal", ..., False, ...): (True, False),
    ("t5", "equal", False, True, "5.23.0"): (True, False),
    ("t5", "equal", True, False, "5.23.0"): (True, True),
    ("t5", "other", ..., ..., ...): None,
    ("t5", "other", ..., True, "4.30.0"): None,
    ("t5", "other", ..., True, "5.23.0"): None,
    ("t5", "other", ..., False, "4.30.0"): (False, False),
    ("t5", "other", True, True, "5.23.0"): (False, True),
    ("t5", "other", False, True, "5.23.0"): (False, False),
    ("t5", "other", True, False, ...): (False, True),
    ("mt5", "absent", ..., ..., ...): (True, False),
    ("mt5", "absent", ..., False, "4.30.0"): (True, False),
    ("mt5", "absent", ..., True, "5.23.0"): (True, False),
    ("mt5", "absent", True, True, "5.23.0"): (True, False),
    ("mt5", "absent", True, ..., ...): (True, False),
    ("mt5", "equal", ..., True, "5.23.0"): (True, False),
    ("mt5", "other", ..., ..., ...): (False, False),
    ("mt5", "other", ..., False, "4.10.0.dev0"): (False, False),
    ("mt5", "other", ..., True, "5.23.0"): (False, False),
    ("mt5", "other", ..., True, "4.30.0"): None,
    **{(family, "absent", ..., tie, ...): (True, False) for family in ("opt", "bloom") for tie in (..., True)},
    **{(family, "absent", ..., False, ...): None for family in ("opt", "bloom")},
    **{(family, "equal", ..., tie, ...): (True, False) for family in ("opt", "bloom") for tie in (..., True, False)},
    **{(family, "other", ..., tie, ...): None for family in ("opt", "bloom") for tie in (..., True)},
    **{(family, "other", ..., False, ...): (False, False) for family in ("opt", "bloom")},
}
TABLES = {"t5": "shared.weight", "opt": "model.decoder.embed_tokens.weight", "bloom": "transformer.word_embeddings.weight"}


@pytest.mark.parametrize("case", DECIDED, ids=lambda case: "-".join("none" if part is ... else str(part) for part in case))
def test_the_tensors_and_the_config_decide_about_the_head(case):
    kind, head, *fields = case
    family = kind.removeprefix("m")
    names = ("scale_decoder_outputs", "tie_word_embeddings", "transformers_version")
    config = {"model_type": kind} | {name: value for name, value in zip(names, fields, strict=True) if value is not ...}
    arrays = {TABLES[family]: np.ones((5, 2))}
    if head != "absent":
        arrays["lm_head.weight"] = np.full((5, 2), {"equal": 1.0, "other": 2.0}[head])
    tensors = {name: Tensor(Path("f"), name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
    if DECIDED[case] is None:
        with pytest.raises(CheckpointError, match=r"^dir/f: tensor 'lm_head.weight' .* field 'tie_word_embeddings' is "):
            huggingface.tied(tensors, config, "dir/f")
        return
    tied, scaled = DECIDED[case]
    assert huggingface.tied(tensors, config, "dir/f") is tied
    if family == "t5":
        assert huggingface.logits_scaled(config, "c") is scaled


def test_two_tables_that_differ_are_refused():
    arrays = {"shared.weight": np.ones((5, 2)), "encoder.embed_tokens.weight": np.zeros((5, 2))}
    tensors = {name: Tensor(Path("f"), name, x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
    with pytest.raises(CheckpointError, match=r"^f: tensor 'encoder.embed_tokens.weight' differs from 'shared.weight'"):
        huggingface.tied(tensors, {"model_type": "t5"}, "f")


@pytest.mark.parametrize(
    ("golden", "words"),
    [
        ("opt", "head tied (no lm_head.weight)"),
        ("t5_relu_tied", "head tied (no lm_head.weight), logits scaled"),
        ("t5_gated_gelu_untied", "head untied (lm_head.weight differs from shared.weight), logits not scaled"),
    ],
)
def test_what_was_decided_about_the_head_is_logged(golden, words, caplog):
    with caplog.at_level(logging.INFO, "refmodels"):
        Backbone.from_preset(GOLDENS / golden)
    file = GOLDENS / golden / "model.safetensors"
    assert [record.getMessage() for record in caplog.records if "head" in record.getMessage()] == [f"{file}: {words}"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scaled", [None, True, False])
def test_the_head_of_t5_scales_the_hidden_state_or_does_not(tied, scaled):
    model = model_of("t5", tie_embedding_weights=tied, scale_logits=scaled)
    layer, scaled = model.token_embedding, tied if scaled is None else scaled
    assert_scores(model, layer.embeddings.T if tied else layer.reverse_embeddings, 6**-0.5 if scaled else 1.0)


def assert_scores(model, table, factor):
    """The scores of this float32 model are those of hidden * factor @ table."""
    hidden = np.random.default_rng(5).standard_normal((2, 3, model.embedding_dim), np.float32)
    wanted, truth = (hidden.astype(dtype) * dtype(factor) @ table.astype(dtype) for dtype in (np.float32, np.float64))
    assert compare(scores_of(model, hidden), truth, calibrated(), wanted=wanted, name="logits")


def scores_of(model, hidden):
    if model.family == "t5":
        return t5_logits(hidden, model.params, model.config)
    return (opt_logits if model.family == "opt" else bloom_logits)(hidden, model.params)


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(golden, head, **fields): a copy with `lm_head.weight` as told, absent, equal or other; (directory, head)."""

    def make(golden, head, **fields):
        directory = tmp_path / "checkpoint"
        shutil.copytree(GOLDENS / golden, directory)
        config = json.loads((directory / "config.json").read_text()) | fields
        config = {name: value for name, value in config.items() if value is not ...}
        (directory / "config.json").write_text(json.dumps(config))
        stored = package.load_file(directory / "model.safetensors")
        table = next(stored[name] for name in TABLES.values() if name in stored)
        stored.pop("lm_head.weight", None)
        weight = table if head != "other" else np.random.default_rng(1).standard_normal(table.shape, np.float32)
        if head != "absent":
            stored["lm_head.weight"] = weight.copy()
        package.save_file(stored, directory / "model.safetensors")
        return directory, weight

    return make


@pytest.mark.parametrize("head", ["absent", "equal", "other"])
@pytest.mark.parametrize(
    ("golden", "fields", "scaled"),
    [
        ("opt", {"tie_word_embeddings": None}, False),
        ("opt_350m_style", {"tie_word_embeddings": None}, False),
        ("bloom", {"tie_word_embeddings": None}, False),
        ("t5_relu_tied", {"scale_decoder_outputs": True}, True),
        ("t5_relu_tied", {"scale_decoder_outputs": False}, False),
        ("t5_gated_gelu_untied", {"scale_decoder_outputs": True}, True),
        ("t5_gated_gelu_untied", {"scale_decoder_outputs": False}, False),
    ],
    ids=str,
)
def test_every_head_loads_and_scores(checkpoint, golden, fields, scaled, head):
    if "tie_word_embeddings" in fields:
        fields = {"tie_word_embeddings": head != "other"}
    directory, weight = checkpoint(golden, head, **fields)
    model = Backbone.from_preset(directory)
    assert model.tie_embedding_weights is (head != "other")
    assert_scores(model, weight.T, model.hidden_dim**-0.5 if scaled else 1.0)


def test_without_shared_weight_the_decoder_s_table_is_taken(checkpoint):
    """As in madlad400; never the head."""
    directory, head = checkpoint("t5_gated_gelu_untied", "other", scale_decoder_outputs=..., tie_word_embeddings=False)
    stored = package.load_file(directory / "model.safetensors")
    table = stored.pop("shared.weight")
    stored["decoder.embed_tokens.weight"] = table
    package.save_file(stored, directory / "model.safetensors")
    model = Backbone.from_preset(directory)
    np.testing.assert_array_equal(model.params["token_embedding"]["embeddings"], table)
    np.testing.assert_array_equal(model.params["token_embedding"]["reverse_embeddings"], head.T)


def test_the_caller_settles_what_the_files_do_not(checkpoint):
    directory, head = checkpoint("opt", "other", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="or pass tie_embedding_weights"):
        Backbone.from_preset(directory)
    assert Backbone.from_preset(directory, tie_embedding_weights=True).tie_embedding_weights
    model = Backbone.from_preset(directory, tie_embedding_weights=False)
    np.testing.assert_array_equal(model.params["token_embedding"]["reverse_embeddings"], head.T)
    assert Backbone.from_preset(directory, load_weights=False).tie_embedding_weights


@families
@pytest.mark.parametrize("tied", [True, False])
def test_the_layer_of_token_embeddings(family, tied):
    model = model_of(family, dtype="float64", tie_embedding_weights=tied)
    layer, hidden = model.token_embedding, np.random.default_rng(0).standard_normal((2, 5, 6))
    assert layer.tie_weights is tied
    reverse = layer.embeddings.T if tied else layer.reverse_embeddings
    assert tied or (reverse != layer.embeddings.T).any()
    np.testing.assert_allclose(layer(hidden, reverse=True), hidden @ reverse, rtol=1e-12, atol=1e-14)


# -- vectors in place of token ids ------------------------------------------------------------------------------------------


def inputs_of(family, ids):
    return {f"{side}token_ids": ids for side in (("encoder_", "decoder_") if family == "t5" else ("",))}


def last(result):
    return result["decoder_sequence_output"] if isinstance(result, dict) else result


def table_of(model):
    return model.params["token_embedding"]["embeddings"]


def vectors_of(model, ids=IDS):
    """The same input with the table's rows in place of the ids, which are zeros."""
    inputs = inputs_of(model.family, np.zeros_like(ids))
    return inputs | {name.replace("token_ids", "embeddings"): table_of(model)[ids] for name in inputs}


@pytest.mark.parametrize("dtype", POLICIES)
@pytest.mark.parametrize(("family", "arguments"), [*((family, {}) for family in BACKBONES), ("opt", VARIANTS["350m"])], ids=str)
def test_the_rows_of_the_table_give_what_the_ids_give(family, arguments, dtype):
    """Bitwise; and what the ids are does not matter."""
    model = model_of(family, dtype=dtype, **arguments)
    wanted = last(model(inputs_of(family, IDS)))
    assert last(model(vectors_of(model))).tobytes() == wanted.tobytes()
    other = {**vectors_of(model), **inputs_of(family, IDS[::-1])}
    assert last(model(other)).tobytes() == wanted.tobytes()


@families
def test_vectors_are_followed_position_by_position(family):
    """A soft prompt: from the changed vector on everything changes, before it nothing."""
    model = model_of(family)
    given = vectors_of(model)
    name = next(name for name in reversed(given) if "embeddings" in name)
    before = last(model(given))
    given[name] = given[name] + np.outer(np.arange(5) == 3, np.arange(6))
    after = last(model(given))
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert (after[:, 3:] != before[:, 3:]).any(-1).all()


@pytest.mark.parametrize("accelerator", [None, Loopback], ids=["reference", "loopback"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "float16"])
@families
def test_prefill_takes_vectors(family, dtype, accelerator):
    model = model_of(family, dtype=dtype)
    if accelerator is not None:
        params, model = model.params, BACKBONES[family](**config_of(family), dtype=dtype, accelerator=accelerator())
        model.params = params
    lengths, mask = np.array([5, 3]), np.arange(5) < np.array([[5], [3]])

    def scores(ids, vectors):
        with model.running():
            source = (model.on_device(ids), model.on_device(mask))
            cache = model.new_cache(*source, 7, vectors) if family == "t5" else model.new_cache(2, 7)
            first = model.prefill(ids, mask, lengths, cache, np.zeros(2, int), embeddings=vectors)
            second = model.decode_step(np.array([[4], [2]]), np.ones((2, 1), bool), lengths, cache)
            return [np.asarray(model.on_host(x)).tobytes() for x in (first, second)]

    wanted = scores(IDS, None)
    assert scores(np.zeros_like(IDS), table_of(model)[IDS]) == wanted
    assert scores(np.zeros_like(IDS), table_of(model)[IDS[::-1]]) != wanted


@families
def test_vectors_of_any_float_type(family):
    model, given = model_of(family, dtype="float64"), {}
    table = table_of(model).astype(ml_dtypes.bfloat16)
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64):
        given = {name: x.astype(np.float32) for name, x in vectors_of(model).items() if "embeddings" in name}
        given = {name: table[IDS].astype(dtype) for name in given}
        got = last(model({**inputs_of(family, IDS), **given}))
        if dtype is ml_dtypes.bfloat16:
            wanted = got
        if dtype is not np.float16:  # whose smallest numbers are larger than bfloat16's
            np.testing.assert_array_equal(got, wanted)


@families
def test_bad_vectors(family):
    model = model_of(family)
    name = "decoder_embeddings" if family == "t5" else "embeddings"
    good = np.zeros((2, 5, 6), np.float32)

    def refused(value, message):
        with pytest.raises(ValueError, match=message):
            model({**inputs_of(family, IDS), name: value})

    refused(good[:, :4], rf"{name} has shape \(2, 4, 6\), wanted \(2, 5, 6\)")
    refused(good[..., :5], rf"{name} has shape \(2, 5, 5\), wanted \(2, 5, 6\)")
    refused(good.astype(int), f"{name} must hold floats, got int64")
    refused(good.astype(complex), f"{name} must hold floats, got complex128")
    refused(good.astype(str), f"{name} must hold floats, got <U")
    for value in (np.nan, np.inf):
        bad = good.copy()
        bad[1, 2, 3] = value
        refused(bad, rf"{name}\[1, 2, 3\] is {value}, wanted a finite number")
    with pytest.raises(ValueError, match=r"embeddings has shape \(2, 5, 5\), wanted \(2, 5, 6\)"):
        model.prefill(IDS, np.ones((2, 5), bool), np.array([5, 5]), {}, np.zeros(2, int), embeddings=good[..., :5])
    if family == "t5":
        with pytest.raises(ValueError, match=r"embeddings has shape \(2, 5, 5\), wanted \(2, 5, 6\)"):
            model.new_cache(IDS, np.ones((2, 5), bool), 7, good[..., :5])


def test_opt_takes_vectors_of_the_width_of_its_table():
    model = model_of("opt", **VARIANTS["350m"])
    with pytest.raises(ValueError, match=r"embeddings has shape \(2, 5, 6\), wanted \(2, 5, 4\)"):
        model({"token_ids": IDS, "embeddings": np.zeros((2, 5, 6), np.float32)})


@families
def test_vectors_are_no_input_that_must_be_there(family):
    """KerasHub's inputs stay as they are: None is as if it were not there."""
    model, inputs = model_of(family), inputs_of(family, IDS)
    none = {name.replace("token_ids", "embeddings"): None for name in inputs}
    np.testing.assert_array_equal(last(model({**inputs, **none})), last(model(inputs)))
    assert all("embeddings" not in name for names in BACKBONES[family].inputs.values() for name in names)

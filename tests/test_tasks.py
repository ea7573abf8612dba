"""Tasks: their preprocessor and tokenizer, the two texts of T5, vectors in place of tokens, KerasHub's task.json."""

import numpy as np
import pytest

from refmodels import (
    BloomBackbone,
    BloomCausalLM,
    BloomCausalLMPreprocessor,
    OPTBackbone,
    OPTCausalLM,
    OPTCausalLMPreprocessor,
    OPTTokenizer,
    T5Backbone,
    T5Seq2SeqLM,
    T5Seq2SeqLMPreprocessor,
)
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import build_tree
from refmodels.task import Task

SIZES = {"vocabulary_size": 23, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 20, "seed": 3}
TASKS = {"t5": (T5Seq2SeqLM, T5Backbone), "opt": (OPTCausalLM, OPTBackbone), "bloom": (BloomCausalLM, BloomBackbone)}
PRESETS = {"t5": "t5_tiny_numbers", "opt": "opt_tiny_stdlib", "bloom": "bloom_tiny_stdlib"}
TEXTS = {"t5": ["spell: 7", "roman: 1994"], "opt": ["import os\n", "def f("], "bloom": ["import os\n", "def f("]}
SETTINGS = [
    {},
    {"temperature": 1.5, "seed": 3},
    {"num_beams": 3},
    {"sampler": "contrastive"},
    {"num_return_sequences": 2, "sampler": "random", "seed": 4},
]

families = pytest.mark.parametrize("family", TASKS)


def task_of(family, dtype="float32"):
    """A random model with weights large enough that it does not say one token again and again."""
    task, backbone = TASKS[family]
    model, rng = backbone(**SIZES, dtype=dtype), np.random.default_rng(5)
    kind = numpy_dtype(model.variable_dtype)

    def leaf(parameter):
        if len(parameter.shape) > 1:
            return rng.normal(0, 0.5, parameter.shape).astype(kind)
        return np.full(parameter.shape, parameter.path.endswith(("gamma", "weight")), kind)  # scales 1, biases 0

    model.params = build_tree(model.parameters(), leaf)
    return task(model)


@pytest.fixture(scope="module")
def presets():
    return {family: Task.from_preset(name) for family, name in PRESETS.items()}


# -- preprocessor and tokenizer -----------------------------------------------------------------------------------------


@families
def test_a_task_has_a_preprocessor_and_its_tokenizer(family, presets):
    task = presets[family]
    kinds = {"t5": T5Seq2SeqLMPreprocessor, "opt": OPTCausalLMPreprocessor, "bloom": BloomCausalLMPreprocessor}
    assert type(task.preprocessor) is kinds[family]
    assert task.tokenizer is task.preprocessor.tokenizer
    again = type(task)(task.backbone, tokenizer=task.tokenizer)
    assert again.preprocessor.get_config() == task.preprocessor.get_config()
    assert type(task)(task.backbone, task.preprocessor).preprocessor is task.preprocessor
    assert task_of(family).tokenizer is None


def test_what_is_no_preprocessor_is_refused(presets):
    task = presets["opt"]
    with pytest.raises(TypeError, match="OPTCausalLM takes OPTCausalLMPreprocessor or None, got OPTTokenizer"):
        OPTCausalLM(task.backbone, task.tokenizer)
    with pytest.raises(TypeError, match="OPTCausalLM takes OPTCausalLMPreprocessor or None, got BloomCausalLMPreprocessor"):
        OPTCausalLM(task.backbone, presets["bloom"].preprocessor)
    with pytest.raises(TypeError, match="takes a preprocessor or a tokenizer, got both"):
        OPTCausalLM(task.backbone, task.preprocessor, tokenizer=task.tokenizer)


def test_from_preset_takes_another_preprocessor(presets):
    assert T5Seq2SeqLM.from_preset("t5_tiny_numbers", preprocessor=None).preprocessor is None
    mine = T5Seq2SeqLMPreprocessor(presets["t5"].tokenizer, 20, 5)
    task = T5Seq2SeqLM.from_preset("t5_tiny_numbers", preprocessor=mine, dropout=0.0)
    assert (task.preprocessor, task.backbone.dropout) == (mine, 0.0)


@families
def test_the_preprocessors_length_is_the_default_limit(family, presets):
    task = presets[family]
    short = type(task)(task.backbone, type(task.preprocessor).from_preset(PRESETS[family]))
    short.preprocessor.sequence_length = 6
    for text in TEXTS[family]:
        assert short.generate(text, stop_token_ids=None) == task.generate(text, max_length=6, stop_token_ids=None)
    pieces = short.stream(TEXTS[family][0], stop_token_ids=None)
    assert len(list(pieces)) == 6 - (1 if family == "t5" else len(pieces.prompt_ids)) + 1


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_the_start_token_is_settable(family, presets):
    task, text = presets[family], TEXTS[family][0]
    assert task.stream(text).prompt_ids == [task.tokenizer.start_token_id, *task.tokenizer(text)]
    bare = type(task)(task.backbone, type(task.preprocessor)(task.tokenizer, add_start_token=False))
    assert bare.stream(text).prompt_ids == task.tokenizer(text)
    ids = bare.generate({"token_ids": [task.tokenizer(text)]}, max_new_tokens=5)
    assert bare.generate(text, max_new_tokens=5) == task.tokenizer.detokenize(ids["token_ids"][0][ids["padding_mask"][0] == 1])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        bare.generate("")


@families
def test_ids_of_the_preprocessor_give_what_its_text_gives(family, presets):
    """`generate` is generate_preprocess, the token loop, generate_postprocess."""
    task, texts = presets[family], TEXTS[family]
    arrays = task.preprocessor.generate_preprocess(texts, sequence_length=20)
    assert task.preprocessor.generate_postprocess(task.generate(arrays)) == task.generate(texts, max_length=20)


# -- T5's two texts --------------------------------------------------------------------------------------------------------


def test_t5_goes_on_from_decoder_text(presets):
    task = presets["t5"]
    pair = {"encoder_text": "spell: 4207", "decoder_text": "four thousand"}
    assert task.generate(pair) == "four thousand two hundred seven"
    assert task.generate(pair, strip_prompt=True).strip() == "two hundred seven"
    several = {"encoder_text": ["spell: 4207", "spell: 85"], "decoder_text": ["four thousand", "eighty"]}
    assert task.generate(several) == ["four thousand two hundred seven", "eighty-five"]
    assert task.generate({"encoder_text": ["spell: 85"]}) == task.generate(["spell: 85"])
    assert task.generate({"encoder_text": "spell: 85"}) == task.generate("spell: 85")


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"encoder_text": ["a", "b"], "decoder_text": ["c"]}, ValueError, "encoder_text holds 2 texts and decoder_text 1"),
        ({"encoder_text": ["a"], "decoder_text": "c"}, ValueError, "wanted as many"),
        ({"encoder_text": 7}, TypeError, "must be a string"),
        ({"encoder_text": []}, TypeError, "must be a string"),
        ({"encoder_text": "a", "encoder_token_ids": [[1]]}, ValueError, "nothing else, got 'encoder_token_ids'"),
    ],
    ids=str,
)
def test_bad_pairs(inputs, error, message, presets):
    with pytest.raises(error, match=message):
        presets["t5"].generate(inputs)


# -- vectors in place of tokens --------------------------------------------------------------------------------------------


def inputs_of(family):
    prompts = [[5, 9, 2, 14, 7], [11], [3, 3, 8]]
    mask = np.arange(5) < np.array([[len(prompt)] for prompt in prompts])
    ids = np.array([prompt + [0] * (5 - len(prompt)) for prompt in prompts])
    prefix = "encoder_" if family == "t5" else ""
    return {f"{prefix}token_ids": ids, f"{prefix}padding_mask": mask}


def tokens(output):
    """Row by row, the real ids of what `generate` gives for a dictionary."""
    prefix = "decoder_" if "decoder_token_ids" in output else ""
    ids, mask = output[f"{prefix}token_ids"], output[f"{prefix}padding_mask"]
    return [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]


@families
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_vectors_of_tokens_give_what_the_tokens_give(family, settings):
    task, inputs = task_of(family), inputs_of(family)
    limits = {"stop_token_ids": [1], "max_new_tokens": 7}
    wanted = tokens(task.generate(inputs, **limits, strip_prompt=family != "t5", **settings))
    assert tokens(task.generate(task.embed(inputs), **limits, **settings)) == wanted


@families
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16", "float64"])
def test_vectors_of_every_type(family, dtype):
    task, inputs = task_of(family, dtype), inputs_of(family)
    wanted = tokens(task.generate(inputs, stop_token_ids=None, max_new_tokens=5, strip_prompt=family != "t5"))
    assert tokens(task.generate(task.embed(inputs), stop_token_ids=None, max_new_tokens=5)) == wanted


@families
def test_vectors_of_text(family, presets):
    task, texts = presets[family], TEXTS[family]
    vectors = task.embed(texts)
    assert all(len(value) == 2 for value in vectors.values())
    new = tokens(task.generate(vectors, max_new_tokens=6))
    assert task.tokenizer.detokenize(new) == task.generate(texts, max_new_tokens=6, strip_prompt=True)
    assert len(next(iter(task.embed(texts[0]).values()))) == 1


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_a_prefix_of_free_vectors(family):
    """What soft prompts are for: other vectors, padded on the left here, say something else."""
    task, inputs = task_of(family), inputs_of(family)
    vectors = task.embed(inputs)
    prefix = np.random.default_rng(0).standard_normal((3, 2, 12)).astype(np.float32)
    longer = {
        "embeddings": np.concatenate([prefix, vectors["embeddings"]], 1),
        "padding_mask": np.concatenate([np.ones((3, 2), int), vectors["padding_mask"]], 1),
    }
    found = tokens(task.generate(longer, stop_token_ids=None, max_new_tokens=8))
    assert found != tokens(task.generate(vectors, stop_token_ids=None, max_new_tokens=8))
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in longer.items()}
        assert tokens(task.generate(one, stop_token_ids=None, max_new_tokens=8)) == [found[i]]


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_with_token_ids_the_prompt_is_shown_and_looked_at(family):
    task, inputs = task_of(family), inputs_of(family)
    both = inputs | {"embeddings": task.embed(inputs)["embeddings"]}
    for settings in ({}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}):
        wanted = tokens(task.generate(inputs, stop_token_ids=None, max_new_tokens=6, **settings))
        assert tokens(task.generate(both, stop_token_ids=None, max_new_tokens=6, **settings)) == wanted


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_vectors_alone_repeat_nothing(family):
    """A placeholder is no token that the repetition penalty could hold against the row."""
    task = task_of(family)
    seen = []
    task.generate(
        task.embed(inputs_of(family)),
        stop_token_ids=None,
        max_new_tokens=2,
        constraint=lambda row, ids: seen.append((row, len(ids))),
    )
    assert seen == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_bad_vectors():
    opt, t5 = task_of("opt"), task_of("t5")
    with pytest.raises(ValueError, match=r"embeddings has shape \(2, 12\), wanted \(batch, length, 12\)"):
        opt.generate({"embeddings": np.zeros((2, 12))}, stop_token_ids=None)
    with pytest.raises(ValueError, match=r"embeddings has shape \(1, 2, 11\), wanted \(1, 2, 12\)"):
        opt.generate({"embeddings": np.zeros((1, 2, 11))}, stop_token_ids=None)
    with pytest.raises(ValueError, match=r"encoder_embeddings has shape \(1, 2, 11\), wanted \(1, 2, 12\)"):
        t5.generate({"encoder_embeddings": np.zeros((1, 2, 11))}, stop_token_ids=None, max_new_tokens=2)
    vectors = np.zeros((1, 2, 12))
    vectors[0, 1, 3] = np.nan
    with pytest.raises(ValueError, match=r"embeddings\[0, 1, 3\] is nan, wanted a finite number"):
        opt.generate({"embeddings": vectors}, stop_token_ids=None)
    with pytest.raises(ValueError, match="embeddings must hold floats, got int64"):
        opt.generate({"embeddings": np.zeros((1, 2, 12), int)}, stop_token_ids=None)
    with pytest.raises(ValueError, match="padding_mask has shape"):
        opt.generate({"embeddings": np.zeros((1, 2, 12)), "padding_mask": [[1]]}, stop_token_ids=None)
    with pytest.raises(ValueError, match="embeddings go into generate alone"):
        opt.embed({"token_ids": [[1]], "embeddings": np.zeros((1, 1, 12))})


# -- KerasHub's object -----------------------------------------------------------------------------------------------------


@families
def test_the_object_of_task_json(family, presets):
    task = presets[family]
    found = task.keras_object({"class_name": "Backbone"})
    modules = {"t5": "t5.t5_seq_2_seq_lm", "opt": "opt.opt_causal_lm", "bloom": "bloom.bloom_causal_lm"}
    names = {"t5": "t5_seq2_seq_lm", "opt": "opt_causal_lm", "bloom": "bloom_causal_lm"}
    assert found["module"] == f"keras_hub.src.models.{modules[family]}"
    assert found["registered_name"] == f"keras_hub>{type(task).__name__}"
    assert found["config"]["name"] == names[family]
    preprocessor = found["config"]["preprocessor"]
    assert preprocessor["module"] == f"{found['module']}_preprocessor"
    assert preprocessor["config"]["name"] == f"{names[family]}_preprocessor"
    assert task_of(family).keras_object({})["config"]["preprocessor"] is None


@families
def test_a_saved_task_is_the_same_task(family, presets, tmp_path):
    task = presets[family]
    task.preprocessor.sequence_length = 33
    try:
        task.save_to_preset(tmp_path / "saved")
    finally:
        task.preprocessor.sequence_length = 1024
    again = Task.from_preset(tmp_path / "saved")
    assert type(again) is type(task)
    assert again.preprocessor.get_config() == task.preprocessor.get_config() | (
        {"decoder_sequence_length": 33} if family == "t5" else {"sequence_length": 33}
    )
    assert again.generate(TEXTS[family], max_length=20) == task.generate(TEXTS[family], max_length=20)
    (tmp_path / "bare").mkdir()
    type(task)(task.backbone).save_to_preset(tmp_path / "bare")
    assert Task.from_preset(tmp_path / "bare").preprocessor is None


def test_the_tokenizer_class_is_public():
    assert OPTTokenizer.family == "opt"

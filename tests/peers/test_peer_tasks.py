"""Preprocessors and saved tasks, against KerasHub's."""

import json

import numpy as np
import pytest

import refmodels
from refmodels.presets import data_directory
from refmodels.task import Task

PRESETS = {"opt": "opt_tiny_stdlib", "bloom": "bloom_tiny_stdlib", "t5": "t5_tiny_numbers"}
CAUSAL = {"opt": "OPTCausalLMPreprocessor", "bloom": "BloomCausalLMPreprocessor"}
TEXTS = ["import", "return self", "x", ""]
"""Words that fall into tokens alike with and without a rule that splits text, which KerasHub 0.32 applies to no text."""


def their_tokenizer(keras_hub, family):
    kind = {"opt": "OPTTokenizer", "bloom": "BloomTokenizer", "t5": "T5Tokenizer"}[family]
    return getattr(keras_hub.models, kind).from_preset(str(data_directory() / PRESETS[family]))


def same(ours, theirs):
    """Equal arrays, in tuples and dictionaries of one form; ids of the same type."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            same(value, theirs[name])
    elif isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    else:
        other = np.asarray(theirs)
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
        assert np.array_equal(ours, other)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize(("start", "end"), [(True, True), (False, True), (True, False), (False, False)])
def test_text_to_continue(keras_hub, family, length, start, end):
    tokenizer = their_tokenizer(keras_hub, family)
    ours = getattr(refmodels, CAUSAL[family])(refmodels.Tokenizer.from_preset(PRESETS[family]), length, start, end)
    theirs = getattr(keras_hub.models, CAUSAL[family])(tokenizer, length, start, end)
    for text in (TEXTS[1], TEXTS):
        same(ours(text), theirs(text))
        if start:  # theirs always adds the start token here
            arrays = ours.generate_preprocess(text, sequence_length=4)
            same(arrays, theirs.generate_preprocess(text, sequence_length=4))
            back = theirs.generate_postprocess(arrays)
            assert ours.generate_postprocess(arrays) == (back if isinstance(back, str) else list(back))


@pytest.mark.parametrize(("start", "end"), [(True, True), (False, True), (True, False), (False, False)])
def test_t5_preprocessor(keras_hub, start, end):
    tokenizer = their_tokenizer(keras_hub, "t5")
    for length in (2, 40):
        ours = refmodels.T5Preprocessor(refmodels.Tokenizer.from_preset(PRESETS["t5"]), length, start, end)
        theirs = keras_hub.models.T5Preprocessor(tokenizer, length, start, end)
        for text in ("spell: 4207", ["spell: 4207", "roman: 4"]):
            same(ours(text), theirs(text))


@pytest.mark.parametrize(("width", "length"), [(1, 1), (3, 8), (20, 4), (20, 20)])
def test_t5_seq_2_seq_preprocessor(keras_hub_new, width, length):
    tokenizer = their_tokenizer(keras_hub_new, "t5")
    ours = refmodels.T5Seq2SeqLMPreprocessor(refmodels.Tokenizer.from_preset(PRESETS["t5"]), width, length)
    theirs = keras_hub_new.models.T5Seq2SeqLMPreprocessor(tokenizer, width, length)
    pair = {"encoder_text": ["spell: 4207", "roman: 4"], "decoder_text": ["four thousand", "IV"]}
    one = {name: texts[0] for name, texts in pair.items()}
    for x in (pair, one):
        same(ours(x), theirs(x))
        same(ours.generate_preprocess(x), theirs.generate_preprocess(x))
        same(ours.generate_preprocess(x["encoder_text"]), theirs.generate_preprocess(x["encoder_text"]))
        lengths = {"encoder_sequence_length": 7, "decoder_sequence_length": 6}
        same(ours(x, **lengths), theirs(x, **lengths))
        same(ours.generate_preprocess(x, sequence_length=6), theirs.generate_preprocess(x, sequence_length=6))


def their_task(keras_hub, family, directory):
    kind = keras_hub.models.Seq2SeqLM if family == "t5" else keras_hub.models.CausalLM
    return kind.from_preset(str(directory))


@pytest.mark.parametrize("family", PRESETS)
def test_what_we_save_is_what_they_save(keras_hub_new, family, tmp_path):
    """task.json and preprocessor.json, to the last entry, but for what KerasHub writes about types and takes from a set."""
    import keras

    keras.backend.clear_session()  # else its objects' names have numbers, for those that other tests made
    Task.from_preset(PRESETS[family]).save_to_preset(tmp_path / "ours")
    their_task(keras_hub_new, family, data_directory() / PRESETS[family]).save_to_preset(str(tmp_path / "theirs"))

    def found(who, file):
        def ordered(entry):
            entry.pop("unsplittable_tokens", None)
            if "vocabulary_size" in entry:
                entry.pop("dtype", None)
            return entry

        return json.loads((tmp_path / who / file).read_text(), object_hook=ordered)

    for file in ("task.json", "preprocessor.json", "tokenizer.json"):
        assert found("ours", file) == found("theirs", file)


@pytest.mark.parametrize("family", PRESETS)
def test_they_load_what_we_save(keras_hub, family, tmp_path):
    if family == "t5" and not hasattr(keras_hub.models, "T5Seq2SeqLM"):
        pytest.skip("this KerasHub has no T5Seq2SeqLM")
    task = Task.from_preset(PRESETS[family])
    task.preprocessor.sequence_length = 24
    task.save_to_preset(tmp_path / "saved")
    theirs = their_task(keras_hub, family, tmp_path / "saved")
    assert theirs.preprocessor.sequence_length == 24
    theirs.compile(sampler="greedy")
    x = "spell: 42" if family == "t5" else ["import", "x"]
    arrays = task.preprocessor.generate_preprocess([x] if family == "t5" else x)
    theirs.preprocessor = None
    new = theirs.generate({name: value.copy() for name, value in arrays.items()}, stop_token_ids=None)
    ours = task.generate(arrays, stop_token_ids=None)
    prefix = "decoder_" if family == "t5" else ""
    assert np.array_equal(ours[f"{prefix}token_ids"], np.asarray(new[f"{prefix}token_ids"]))


@pytest.mark.parametrize("family", PRESETS)
def test_we_load_what_they_save(keras_hub, family, tmp_path):
    if family == "t5" and not hasattr(keras_hub.models, "T5Seq2SeqLM"):
        pytest.skip("this KerasHub has no T5Seq2SeqLM")
    theirs = their_task(keras_hub, family, data_directory() / PRESETS[family])
    if family != "t5":
        theirs.preprocessor.sequence_length = 17
        theirs.preprocessor.add_end_token = False
    theirs.save_to_preset(str(tmp_path / "saved"))
    task = Task.from_preset(tmp_path / "saved")
    assert task.preprocessor.sequence_length == (1024 if family == "t5" else 17)
    assert getattr(task.preprocessor, "add_end_token", None) is (None if family == "t5" else False)
    x = "spell: 42" if family == "t5" else "import"
    assert task.generate(x, max_length=16) == Task.from_preset(PRESETS[family]).generate(x, max_length=16)


@pytest.mark.parametrize("family", PRESETS)
def test_a_task_without_a_preprocessor(keras_hub, family, tmp_path):
    if family == "t5" and not hasattr(keras_hub.models, "T5Seq2SeqLM"):
        pytest.skip("this KerasHub has no T5Seq2SeqLM")
    Task.from_preset(PRESETS[family], preprocessor=None).save_to_preset(tmp_path / "saved")
    assert their_task(keras_hub, family, tmp_path / "saved").preprocessor is None

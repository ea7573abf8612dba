"""Preprocessors: what they pack, and what they read from and write to KerasHub's files."""

import json
import logging
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import refmodels
from refmodels import (
    BloomCausalLMPreprocessor,
    CausalLMPreprocessor,
    OPTCausalLMPreprocessor,
    Seq2SeqLMPreprocessor,
    T5Preprocessor,
    T5Seq2SeqLMPreprocessor,
    Tokenizer,
)
from refmodels.files import CheckpointError
from refmodels.preprocessors import PREPROCESSORS, Preprocessor
from refmodels.presets import data_directory
from refmodels.task import Task

PRESETS = {"opt": "opt_tiny_stdlib", "bloom": "bloom_tiny_stdlib", "t5": "t5_tiny_numbers"}
TOKENIZERS = {family: Tokenizer.from_preset(name) for family, name in PRESETS.items()}
CAUSAL = {"opt": OPTCausalLMPreprocessor, "bloom": BloomCausalLMPreprocessor}

causal = pytest.mark.parametrize("family", CAUSAL)


def packed(tokens, length, pad, start=(), end=()):
    """[start] tokens [end] padding, token by token."""
    row = list(start)
    for token in tokens:
        if len(row) + len(end) < length:
            row.append(token)
    row += end
    return row + [pad] * (length - len(row)), [i < len(row) for i in range(length)]


@causal
@given(data=st.data())
def test_text_to_continue(family, data):
    tokenizer = TOKENIZERS[family]
    text = data.draw(st.text(st.sampled_from("def main(self):\n"), max_size=30))
    length, starts, ends = data.draw(st.integers(2, 20)), data.draw(st.booleans()), data.draw(st.booleans())
    preprocessor = CAUSAL[family](tokenizer, length, starts, ends)
    start, end = [tokenizer.start_token_id] * starts, [tokenizer.end_token_id] * ends
    ids, mask = packed(tokenizer(text), length + 1, tokenizer.pad_token_id, start, end)
    x, y, weight = preprocessor(text)
    assert (x["token_ids"].tolist(), x["padding_mask"].tolist()) == (ids[:-1], mask[:-1])
    assert (y.tolist(), weight.tolist()) == (ids[1:], mask[1:])
    assert (x["token_ids"].dtype, y.dtype, x["padding_mask"].dtype, weight.dtype) == (np.int32, np.int32, bool, bool)
    ids, mask = packed(tokenizer(text), length, tokenizer.pad_token_id, start)
    to_generate = preprocessor.generate_preprocess(text)
    assert {name: value.tolist() for name, value in to_generate.items()} == {"token_ids": ids, "padding_mask": mask}
    shorter = preprocessor.generate_preprocess(text, sequence_length=1)
    assert shorter["token_ids"].tolist() == ids[:1]
    cut = tokenizer.detokenize(tokenizer(text)[: length - starts])
    assert preprocessor.generate_postprocess(to_generate) == cut


@given(data=st.data())
def test_texts_for_t5(data):
    tokenizer = TOKENIZERS["t5"]
    texts = [data.draw(st.text(st.sampled_from("spell: 4207"), max_size=12)) for _ in range(4)]
    sources, targets = texts[:2], texts[2:]
    width, length = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    preprocessor = T5Seq2SeqLMPreprocessor(tokenizer, width, length)
    x, y, weight = preprocessor({"encoder_text": sources, "decoder_text": targets})
    again = preprocessor.generate_preprocess({"encoder_text": sources, "decoder_text": targets})
    for i in range(2):
        ids, mask = packed(tokenizer(sources[i]), width, 0, end=[1])
        for arrays in (x, again):
            assert (arrays["encoder_token_ids"][i].tolist(), arrays["encoder_padding_mask"][i].tolist()) == (ids, mask)
        ids, mask = packed(tokenizer(targets[i]), length + 1, 0, [0], [1])
        assert (x["decoder_token_ids"][i].tolist(), x["decoder_padding_mask"][i].tolist()) == (ids[:-1], mask[:-1])
        assert (y[i].tolist(), weight[i].tolist()) == (ids[1:], mask[1:])
        ids, mask = packed(tokenizer(targets[i]), length, 0, [0])
        assert (again["decoder_token_ids"][i].tolist(), again["decoder_padding_mask"][i].tolist()) == (ids, mask)
    assert preprocessor.generate_postprocess(again) == [tokenizer.detokenize(tokenizer(t)[: length - 1]) for t in targets]


def test_t5_takes_the_encoders_text_alone():
    preprocessor = T5Seq2SeqLMPreprocessor(TOKENIZERS["t5"], 9, 4)
    alone, pair = preprocessor.generate_preprocess("spell: 7"), {"encoder_text": "spell: 7", "decoder_text": ""}
    assert all(np.array_equal(alone[name], value) for name, value in preprocessor.generate_preprocess(pair).items())
    assert alone["decoder_token_ids"].tolist() == [0, 0, 0, 0]
    assert alone["decoder_padding_mask"].tolist() == [True, False, False, False]
    assert preprocessor.generate_preprocess(["1", "2"], sequence_length=3)["decoder_token_ids"].shape == (2, 3)
    preprocessor.sequence_length = 7
    assert (preprocessor.decoder_sequence_length, preprocessor.encoder_sequence_length) == (7, 9)


def test_t5_preprocessor():
    tokenizer = TOKENIZERS["t5"]
    preprocessor = T5Preprocessor(tokenizer)
    x = preprocessor(["spell: 7", "4"])
    assert x["token_ids"].shape == (2, 256)
    for i, text in enumerate(["spell: 7", "4"]):
        assert (x["token_ids"][i].tolist(), x["padding_mask"][i].tolist()) == packed(tokenizer(text), 256, 0, end=[1])
    assert T5Preprocessor(tokenizer, 4, True, False)("spell: 7")["token_ids"].tolist() == [1, *tokenizer("spell: 7")[:3]]
    assert preprocessor("4", y="label")[1] == "label"
    assert preprocessor("4", "label", 0.5)[1:] == ("label", 0.5)
    with pytest.raises(ValueError, match="a sequence length of 1 has no room for a start and an end token"):
        T5Preprocessor(tokenizer, 1, True, True)("4")


@causal
def test_no_texts_and_empty_texts(family):
    preprocessor = CAUSAL[family](TOKENIZERS[family], 5)
    assert preprocessor.generate_preprocess([])["token_ids"].shape == (0, 5)
    assert preprocessor.generate_preprocess([""])["padding_mask"].sum() == 1
    assert preprocessor.generate_postprocess(preprocessor.generate_preprocess(["", "a"])) == ["", "a"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "sequence_length must be an integer from 1 to 10000000, got 0"),
        ((1.5,), "sequence_length must be an integer"),
        ((True,), "sequence_length must be an integer"),
        ((10**9,), "sequence_length must be an integer"),
        ((8, "yes"), "add_start_token must be true or false, got 'yes'"),
        ((8, True, 1), "add_end_token must be true or false, got 1"),
    ],
    ids=str,
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        OPTCausalLMPreprocessor(TOKENIZERS["opt"], *arguments)


def test_bad_arguments():
    t5 = T5Seq2SeqLMPreprocessor(TOKENIZERS["t5"])
    with pytest.raises(TypeError, match="OPTCausalLMPreprocessor takes a tokenizer, got str"):
        OPTCausalLMPreprocessor("opt_tiny_stdlib")
    with pytest.raises(TypeError, match="CausalLMPreprocessor is a base class"):
        CausalLMPreprocessor(TOKENIZERS["opt"])
    with pytest.raises(TypeError, match="foo"):
        OPTCausalLMPreprocessor(TOKENIZERS["opt"], foo=1)
    with pytest.raises(TypeError, match='x must be a dictionary with "encoder_text" and "decoder_text", got str'):
        t5("spell: 7")
    with pytest.raises(ValueError, match="encoder_text is a list of 2 and decoder_text one text"):
        t5({"encoder_text": ["1", "2"], "decoder_text": "3"})
    with pytest.raises(ValueError, match="wanted \\(batch, length\\) twice"):
        t5.generate_postprocess({"decoder_token_ids": [[1, 2]], "decoder_padding_mask": [[1]]})
    with pytest.raises(TypeError, match='x must be a dictionary with "decoder_token_ids" and "decoder_padding_mask", got dec'):
        t5.generate_postprocess({"decoder_token_ids": [[1, 2]]})
    with pytest.raises(TypeError, match="OPTCausalLMPreprocessor takes a tokenizer of opt, got T5Tokenizer"):
        OPTCausalLMPreprocessor(TOKENIZERS["t5"])
    for text in (5, None, b"text", [5]):
        with pytest.raises(TypeError, match="tokenize needs a str or a list of str"):
            OPTCausalLMPreprocessor(TOKENIZERS["opt"])(text)
    with pytest.raises(ValueError, match="sequence_length must be an integer from 1"):
        t5.sequence_length = 0


def test_a_cut_encoder_text_is_said(caplog):
    preprocessor = T5Seq2SeqLMPreprocessor(TOKENIZERS["t5"], encoder_sequence_length=4)
    with caplog.at_level(logging.WARNING, "refmodels"):
        (row,) = preprocessor.encoder_rows(["spell: 4207"])
        assert row == [*TOKENIZERS["t5"]("spell: 4207")[:3], 1]
        assert "the encoder reads the first 3 of" in caplog.text


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path):
    """A copy of a shipped preset, to add files to."""

    def make(family):
        return shutil.copytree(data_directory() / PRESETS[family], tmp_path / family)

    return make


SAVED = [
    OPTCausalLMPreprocessor(TOKENIZERS["opt"], 99, True, False),
    BloomCausalLMPreprocessor(TOKENIZERS["bloom"], 8, False, True, name="mine"),
    T5Preprocessor(TOKENIZERS["t5"], 77, True, False),
    T5Seq2SeqLMPreprocessor(TOKENIZERS["t5"], 7, 9),
    T5Seq2SeqLMPreprocessor(TOKENIZERS["t5"]),
]


@pytest.mark.parametrize("preprocessor", SAVED, ids=lambda preprocessor: preprocessor.name)
def test_saved_and_loaded(preprocessor, tmp_path):
    preprocessor.save_to_preset(tmp_path)
    again = type(preprocessor).from_preset(tmp_path)
    assert type(again) is type(preprocessor)
    assert again.get_config() == preprocessor.get_config()
    assert {file.name for file in tmp_path.iterdir()} == {"preprocessor.json", "tokenizer.json", "assets"}
    assert again.tokenizer.get_vocabulary() == preprocessor.tokenizer.get_vocabulary()


def test_settings_of_a_file_and_of_the_call(preset):
    directory = preset("opt")
    OPTCausalLMPreprocessor(TOKENIZERS["opt"], 99, add_end_token=False).save_to_preset(directory)
    found = CausalLMPreprocessor.from_preset(directory, sequence_length=5)
    assert (type(found), found.sequence_length, found.add_start_token, found.add_end_token) == (
        OPTCausalLMPreprocessor,
        5,
        True,
        False,
    )


@pytest.mark.parametrize("family", PRESETS)
def test_without_a_file_the_defaults_hold(family):
    for kind in PREPROCESSORS:
        if kind.family == family:
            found = kind.from_preset(PRESETS[family])
            assert (type(found), found.get_config()) == (kind, kind(TOKENIZERS[family]).get_config())


def test_a_file_for_another_preprocessor_of_the_family_is_passed_over(tmp_path):
    T5Seq2SeqLMPreprocessor(TOKENIZERS["t5"], 7, 9).save_to_preset(tmp_path)
    assert T5Preprocessor.from_preset(tmp_path).sequence_length == 256
    assert Seq2SeqLMPreprocessor.from_preset(tmp_path).sequence_length == 9


def test_classes_that_do_not_fit():
    with pytest.raises(ValueError, match="t5_tiny_numbers holds T5Tokenizer, which CausalLMPreprocessor does not take"):
        CausalLMPreprocessor.from_preset("t5_tiny_numbers")
    with pytest.raises(ValueError, match=r"Preprocessor\.from_preset does not say for what"):
        Preprocessor.from_preset("t5_tiny_numbers")
    with pytest.raises(ValueError, match=r"holds T5Tokenizer, not OPTTokenizer: call T5Tokenizer\.from_preset"):
        refmodels.OPTTokenizer.from_preset("t5_tiny_numbers")
    assert refmodels.T5Tokenizer.from_preset("t5_tiny_numbers", sequence_length=3)("4207") == TOKENIZERS["t5"]("4207")[:3]


def test_a_subclass_keeps_its_class(preset):
    class Mine(OPTCausalLMPreprocessor):
        pass

    directory = preset("opt")
    OPTCausalLMPreprocessor(TOKENIZERS["opt"], 99).save_to_preset(directory)
    found = Mine.from_preset(directory)
    assert (type(found), found.sequence_length) == (Mine, 99)


WRONG = [
    (
        lambda o: o.update(class_name="BloomCausalLMPreprocessor"),
        "'class_name' is 'BloomCausalLMPreprocessor', wanted 'OPTCausal",
    ),
    (lambda o: o.update(class_name="A" * 900), "'class_name' is 'AAA"),
    (lambda o: o.update(class_name=7), "'class_name' is '7', wanted a string"),
    (lambda o: o.pop("class_name"), "'class_name' is missing"),
    (lambda o: o.update(config=[1]), "'config' is '\\[1\\]', wanted an object"),
    (lambda o: o["config"].update(sequence_length="long"), "'sequence_length' is 'long', wanted a whole number from 1"),
    (lambda o: o["config"].update(sequence_length=10**12), "'sequence_length' is '1000000000000'"),
    (lambda o: o["config"].update(sequence_length=-1), "'sequence_length' is '-1'"),
    (lambda o: o["config"].update(add_start_token=1), "'add_start_token' is '1', wanted true or false"),
    (lambda o: o["config"].update(add_stop_token=True), "'add_stop_token' is unknown, wanted sequence_length, add_start_token"),
    (lambda o: o["config"].update(name=["x"]), "'name' is"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
@pytest.mark.parametrize("file", ["preprocessor.json", "task.json"])
def test_what_is_wrong_in_a_file_is_named(change, message, file, preset):
    directory = preset("opt")
    found = OPTCausalLMPreprocessor(TOKENIZERS["opt"], 99).keras_object()
    change(found)
    written = found if file == "preprocessor.json" else {"class_name": "OPTCausalLM", "config": {"preprocessor": found}}
    (directory / file).write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match=message) as caught:
        Task.from_preset(directory)
    assert str(caught.value).startswith(str(directory / file))


def test_the_task_file_rules(preset):
    directory = preset("opt")
    OPTCausalLMPreprocessor(TOKENIZERS["opt"], 99).save_to_preset(directory)
    assert Task.from_preset(directory).preprocessor.sequence_length == 99
    found = OPTCausalLMPreprocessor(TOKENIZERS["opt"], 55).keras_object()
    task = {"class_name": "OPTCausalLM", "config": {"backbone": {}, "preprocessor": found, "name": "x"}}
    (directory / "task.json").write_text(json.dumps(task))
    assert Task.from_preset(directory).preprocessor.sequence_length == 55
    task["config"]["preprocessor"] = None
    (directory / "task.json").write_text(json.dumps(task))
    assert Task.from_preset(directory).preprocessor is None
    for wrong in ({**task, "class_name": "BloomCausalLM"}, {**task, "config": 1}, [], {}):
        (directory / "task.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=r"task\.json"):
            Task.from_preset(directory)


def test_a_tokenizer_of_another_family_is_refused(preset):
    directory = preset("opt")
    shutil.rmtree(directory / "assets")
    TOKENIZERS["bloom"].save_to_preset(directory)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json describes a BloomTokenizer, wanted 'OPTTokenizer'"):
        Task.from_preset(directory)


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        OPTCausalLMPreprocessor(TOKENIZERS["opt"]).save_to_preset(tmp_path)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []

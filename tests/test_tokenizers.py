"""refmodels.tokenizers against the ids that sentencepiece and Hugging Face's tokenizers gave for the same files."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refmodels import files
from refmodels.tokenizer_files import load_tokenizer
from refmodels.tokenizers import BloomTokenizer, OPTTokenizer, T5Tokenizer, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data" / "tokenizers"
CLASSES = {"t5": T5Tokenizer, "opt": OPTTokenizer, "bloom": BloomTokenizer}
CASES = {f: json.loads((DATA / f / "cases.json").read_text(encoding="utf-8"))["cases"] for f in CLASSES}
ALL_CASES = [pytest.param(f, case, id=f"{f}-{n}") for f, cases in CASES.items() for n, case in enumerate(cases)]
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def keras_hub_preset(directory: Path, family: str, **config: object) -> Path:
    """A preset directory with KerasHub's names, made from the Hugging Face files."""
    assets = directory / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    names = {"spiece.model": "vocabulary.spm"} if family == "t5" else {"vocab.json": "vocabulary.json", "merges.txt": ""}
    for source, name in names.items():
        shutil.copyfile(DATA / family / source, assets / (name or source))
    dtype = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "int32"}, "registered_name": None}
    common = {"name": f"{family}_tokenizer", "trainable": True, "dtype": dtype, "config_file": "tokenizer.json"}
    own = {"proto": None, "add_bos": False, "add_eos": False} if family == "t5" else {"add_prefix_space": False}
    name = CLASSES[family].__name__
    envelope = {"module": "keras_hub", "class_name": name, "registered_name": f"keras_hub>{name}"}
    envelope |= {"config": common | {"sequence_length": None} | own | config}
    (directory / "tokenizer.json").write_text(json.dumps(envelope))
    return directory


def hugging_face(directory: Path, family: str, *files: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    for file in files or ("spiece.model",):
        shutil.copyfile(DATA / family / file, directory / file)
    return directory


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tokenizer]]:
    """Every family from every kind of directory; "saved" is what `save` wrote."""
    root = tmp_path_factory.mktemp("directories")
    result: dict[str, dict[str, Tokenizer]] = {}
    for family in CLASSES:
        kinds = {"keras_hub": load_tokenizer(keras_hub_preset(root / family, family))}
        if family == "t5":
            kinds["hugging_face"] = load_tokenizer(hugging_face(root / "hf_t5", family))
            kinds["unigram"] = load_tokenizer(hugging_face(root / "unigram_t5", family, "tokenizer.json"))
        else:
            kinds["hugging_face"] = load_tokenizer(hugging_face(root / f"hf_{family}", family, "tokenizer.json"))
            kinds["vocab_merges"] = load_tokenizer(hugging_face(root / f"vm_{family}", family, "vocab.json", "merges.txt"))
        kinds["hugging_face"].save_to_preset(root / f"saved_{family}")
        kinds["saved"] = load_tokenizer(root / f"saved_{family}")
        result[family] = kinds
    return result


@pytest.mark.parametrize(("family", "case"), ALL_CASES)
def test_golden(family: str, case: dict, loaded: dict) -> None:
    for tokenizer in loaded[family].values():
        assert type(tokenizer) is CLASSES[family]
        ids = tokenizer(case["text"])
        assert ids == case["ids"]
        # T5 ends with </s>, OPT begins with it, BLOOM adds nothing
        end = [tokenizer.end_token_id] if family == "t5" else []
        start = [tokenizer.start_token_id] if family == "opt" else []
        assert start + ids + end == case["ids_with_specials"]
        assert tokenizer.detokenize(ids, skip_special_tokens=False) == case["decoded"]
        if not set(ids) & set(tokenizer.special_token_ids):
            assert tokenizer.detokenize(case["ids_with_specials"]) == case["decoded"]


@pytest.mark.parametrize("case", CASES["t5"], ids=range(len(CASES["t5"])))
def test_t5_add_eos_is_the_golden_special_rule(case: dict) -> None:
    assert T5Tokenizer(DATA / "t5/spiece.model", add_eos=True)(case["text"]) == case["ids_with_specials"]


def reference(family: str) -> "tokenizers.Tokenizer":
    """The library's own tokenizer, splitting rule included, from Hugging Face's file."""
    return tokenizers.Tokenizer.from_file(str(DATA / family / "tokenizer.json"))


CODE = "my_f = 0x10 - 1 else: print(self.__x('a'))"


def test_a_wrong_splitting_rule_is_caught() -> None:
    data = json.loads((DATA / "bloom/tokenizer.json").read_text(encoding="utf-8"))
    assert data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == BloomTokenizer.splitting_pattern
    for family, right, wrong in (("opt", OPTTokenizer, BloomTokenizer), ("bloom", BloomTokenizer, OPTTokenizer)):
        files = DATA / family / "vocab.json", DATA / family / "merges.txt"
        ids = reference(family).encode(CODE, add_special_tokens=False).ids
        assert right(*files)(CODE) == ids
        assert wrong(*files)(CODE) != ids
        if family == "opt":  # BLOOM's recorded cases happen to be the same under both rules
            assert [c["text"] for c in CASES[family] if wrong(*files)(c["text"]) != c["ids"]]


def test_bloom_splits_as_its_rule_says(loaded: dict) -> None:
    splits = loaded["bloom"]["keras_hub"]._bpe.pre_tokenizer.pre_tokenize_str("Hello world, don't 12345\n\n ok (a|b)")
    assert [piece for piece, _ in splits] == [
        "Hello",
        "Ġworld",
        ",",
        "Ġdon't",
        "Ġ12345",
        "ĊĊ",
        "Ġok",
        "Ġ(",
        "a",
        "|",
        "b",
        ")",
    ]


def test_special_tokens(loaded: dict) -> None:
    t5, opt, bloom = (loaded[f]["keras_hub"] for f in CLASSES)
    assert (t5.start_token_id, t5.end_token_id, t5.pad_token_id) == (1, 1, 0)
    assert (opt.start_token_id, opt.end_token_id, opt.pad_token_id) == (2, 2, 1)
    assert (bloom.start_token_id, bloom.end_token_id, bloom.pad_token_id) == (1, 2, 3)
    assert t5.special_tokens == ["</s>", "<pad>"]
    assert dict(zip(opt.special_tokens, opt.special_token_ids, strict=True)) == {
        "</s>": 2,
        "<pad>": 1,
        "<s>": 0,
        "<unk>": 3,
    }
    assert bloom("a</s>b<s>") == [*bloom("a"), 2, *bloom("b"), 1]
    assert bloom.detokenize(bloom("a</s>b<s>")) == "ab"
    assert bloom.detokenize(bloom("a</s>b<s>"), skip_special_tokens=False) == "a</s>b<s>"


def test_calls_and_lookups(loaded: dict) -> None:
    for family, kinds in loaded.items():
        tokenizer = kinds["keras_hub"]
        ids = tokenizer("The quick brown fox.")
        assert tokenizer.tokenize(["The quick brown fox.", ""]) == [ids, []]
        assert tokenizer.detokenize(np.array([ids, ids])) == ["The quick brown fox."] * 2
        assert tokenizer.detokenize([np.int32(i) for i in ids]) == "The quick brown fox."
        assert tokenizer.detokenize([]) == ""
        assert tokenizer.detokenize([*ids, 700, 250_879]) == "The quick brown fox."  # rows the model padded
        assert tokenizer.vocabulary_size() == len(tokenizer.get_vocabulary()) == 700
        assert [tokenizer.token_to_id(t) for t in tokenizer.get_vocabulary()] == list(range(700))
        assert tokenizer.id_to_token(tokenizer.end_token_id) == "</s>"
        config = tokenizer.get_config()
        assert config["name"] == f"{family}_tokenizer"
        assert config["sequence_length"] is None
        for bad in ([-1], [1.0], ["a"], [True], [[1], 2.5], np.array([1.5])):
            with pytest.raises(ValueError, match="must be an integer"):
                tokenizer.detokenize(bad)
        for bad in (1, b"text", None, ["a", 1], [["a"]]):
            with pytest.raises(TypeError, match="needs a str"):
                tokenizer.tokenize(bad)
        with pytest.raises(ValueError, match="surrogates"):
            tokenizer("\ud800")
        with pytest.raises(ValueError, match="700 is not in the vocabulary"):
            tokenizer.id_to_token(700)
        with pytest.raises(ValueError, match="'no such piece' is not"):
            tokenizer.token_to_id("no such piece")


@pytest.mark.parametrize("family", CLASSES)
def test_sequence_length(family: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(keras_hub_preset(tmp_path / "p", family, sequence_length=6))
    long, short = tokenizer(["The quick brown fox.", "."])
    assert len(long) == len(short) == 6
    assert short[-1] == tokenizer.pad_token_id
    assert load_tokenizer(tmp_path / "p", sequence_length=None)("The quick brown fox.")[:6] == long
    with pytest.raises(ValueError, match="positive integer"):
        load_tokenizer(tmp_path / "p", sequence_length=0)


def test_prefix_space_and_unsplittable_tokens(tmp_path: Path) -> None:
    for cls, family in ((OPTTokenizer, "opt"), (BloomTokenizer, "bloom")):
        files = DATA / family / "vocab.json", DATA / family / "merges.txt"
        plain, prefixed = cls(*files), cls(*files, add_prefix_space=True)
        for text in ("Hello world, (a)", " x", "\tx", ""):
            space = " " if text and not text[0].isspace() else ""
            assert prefixed(text) == plain(space + text)
        vocabulary = json.loads(files[0].read_text()) | {"[é x]": 700}
        tokenizer = cls(vocabulary, files[1], unsplittable_tokens=["[é x]"])
        assert tokenizer("a[é x]b") == [*plain("a"), 700, *plain("b")]
        assert tokenizer.detokenize(tokenizer("a[é x]b")) == "a[é x]b"
        tokenizer.save_to_preset(tmp_path / family)
        assert load_tokenizer(tmp_path / family)("a[é x]b") == tokenizer("a[é x]b")


@pytest.mark.parametrize("family", ["opt", "bloom"])
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<sep>": 700}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"700": {"content": "<sep>", "lstrip": False, "special": False}}}),
    ],
)
def test_added_tokens_beside_vocab_json(family: str, file: str, content: dict, tmp_path: Path) -> None:
    """As Transformers saves a tokenizer that has no tokenizer.json."""
    directory = hugging_face(tmp_path, family, "vocab.json", "merges.txt")
    plain = load_tokenizer(directory)
    (directory / file).write_text(json.dumps(content))
    tokenizer = load_tokenizer(directory)
    assert tokenizer("a<sep> b") == [*plain("a"), 700, *plain(" b")]
    assert tokenizer.detokenize([700]) == "<sep>"


def added(**flags: object) -> dict:
    return {"added_tokens": [{"content": "<sep>", "id": 700, "special": False} | flags]}


BLOOM_WORDS, BLOOM_BYTES = json.loads((DATA / "bloom/tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", added(lstrip=True), "'<sep>' has 'lstrip', which OPTTokenizer does not do"),
        ("bloom", added(rstrip=True), "'<sep>' has 'rstrip', which BloomTokenizer does not do"),
        ("bloom", added(single_word=True), "'<sep>' has 'single_word'"),
        (
            "bloom",
            {"normalizer": {"type": "Lowercase"}},
            "tokenizer.json: its normalizer and its pre_tokenizer are not BLOOM's",
        ),
        ("bloom", {"pre_tokenizer": None}, "are not BLOOM's"),
        ("bloom", {"pre_tokenizer": BLOOM_BYTES}, "are not BLOOM's"),
        ("bloom", {"pre_tokenizer": [BLOOM_WORDS, BLOOM_BYTES | {"add_prefix_space": True}]}, "are not BLOOM's"),
        ("bloom", {"pre_tokenizer": [BLOOM_WORDS | {"pattern": {"String": " "}}, BLOOM_BYTES]}, "are not BLOOM's"),
    ],
)
def test_steps_that_our_tokenizer_does_not_do(family: str, changes: dict, message: str, tmp_path: Path) -> None:
    directory = hugging_face(tmp_path, family, "tokenizer.json")
    data = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").write_text(json.dumps(data | changes))
    with pytest.raises(files.CheckpointError, match=message):
        load_tokenizer(directory)


def test_t5_has_no_tokens_beside_its_pieces(tmp_path: Path) -> None:
    directory = hugging_face(tmp_path, "t5")
    decoder = {
        "2": {"content": "<unk>"},
        **{str(700 + n): {"content": f"<extra_id_{2 - n}>", "lstrip": True} for n in range(3)},
    }
    settings = directory / "tokenizer_config.json"
    settings.write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert load_tokenizer(directory)("<extra_id_0>") == [702]
    settings.write_text(json.dumps({"added_tokens_decoder": decoder | {"703": {"content": "<sep>"}}}))
    with pytest.raises(files.CheckpointError, match=r"the added token '<sep>' is no piece of spiece\.model"):
        load_tokenizer(directory)
    settings.write_text(json.dumps({"added_tokens_decoder": {"x": {}}}))
    with pytest.raises(files.CheckpointError, match=r'tokenizer_config\.json must hold "added_tokens_decoder"'):
        load_tokenizer(directory)
    settings.unlink()
    (directory / "added_tokens.json").write_text('{"<sep>": 700}')
    with pytest.raises(files.CheckpointError, match="the added token '<sep>'"):
        load_tokenizer(directory)


def test_text_without_symbols_is_not_dropped() -> None:
    vocabulary = {"</s>": 0, "<pad>": 1, "a": 2}
    assert OPTTokenizer(vocabulary, [])("aa</s>") == [2, 2, 0]
    with pytest.raises(ValueError, match="neither all symbols"):
        OPTTokenizer(vocabulary, [])("ab")
    assert OPTTokenizer(vocabulary | {"<unk>": 9}, [])("ab") == [2, 9]
    # merges as strings and as pairs are the same
    vocabulary |= {"b": 3, "ab": 7}
    assert OPTTokenizer(vocabulary, ["a b"])("ab") == OPTTokenizer(vocabulary, [("a", "b")])("ab") == [7]


def test_t5_extra_ids(tmp_path: Path) -> None:
    proto = (DATA / "t5/spiece.model").read_bytes()
    directory = hugging_face(tmp_path, "t5")
    assert load_tokenizer(directory).vocabulary_size() == 700  # not T5's own 32000 pieces: nothing is assumed
    listed = {"additional_special_tokens": [f"<extra_id_{n}>" for n in range(5)]}
    (directory / "special_tokens_map.json").write_text(json.dumps(listed))
    assert load_tokenizer(directory).vocabulary_size() == 705
    (directory / "tokenizer_config.json").write_text('{"extra_ids": 100}')
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, T5Tokenizer)
    assert tokenizer.token_to_id("<extra_id_0>") == 799
    assert tokenizer.id_to_token(700) == "<extra_id_99>"
    plain = T5Tokenizer(proto)
    ids = tokenizer("The <extra_id_0> fox <extra_id_10>.<extra_id_100>")
    assert ids == [*plain("The"), 799, *plain("fox"), 789, *plain(".<extra_id_100>")]
    assert tokenizer.detokenize([799, *plain("fox"), 700]) == "<extra_id_0> fox<extra_id_99>"
    for case in CASES["t5"]:
        assert tokenizer(case["text"]) == case["ids"]
    tokenizer.save_to_preset(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")("a <extra_id_3>") == tokenizer("a <extra_id_3>")
    assert len(plain("<extra_id_0>")) > 1
    # 32000 pieces: the default is Hugging Face's, ids 32099 down to 32000
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    filler = b"".join(b"\x0a" + bytes([len(e)]) + e for e in (b"\x0a\x07@%06d\x18\x04" % n for n in range(31_300)))
    (tmp_path / "spiece.model").write_bytes(proto + filler)
    assert load_tokenizer(tmp_path).token_to_id("<extra_id_0>") == 32099
    assert load_tokenizer(tmp_path, extra_ids=0).vocabulary_size() == 32000


def unigram(directory: Path, **changes: object) -> Path:
    """A directory with the tokenizer.json that Transformers 5 writes for T5, and no spiece.model."""
    hugging_face(directory, "t5", "tokenizer.json")
    data = json.loads((directory / "tokenizer.json").read_text())
    data["model"] |= {name: changes.pop(name) for name in ("vocab", "unk_id", "byte_fallback", "type") if name in changes}
    (directory / "tokenizer.json").write_text(json.dumps(data | changes))
    return directory


def test_t5_from_tokenizer_json(tmp_path: Path) -> None:
    whole = load_tokenizer(hugging_face(tmp_path / "whole", "t5"))
    tokenizer = load_tokenizer(unigram(tmp_path / "json"))
    assert isinstance(tokenizer, T5Tokenizer)
    assert tokenizer.get_vocabulary() == whole.get_vocabulary()
    assert tokenizer.special_token_ids == whole.special_token_ids
    (tmp_path / "json" / "config.json").write_text('{"model_type": "mt5"}')
    assert load_tokenizer(tmp_path / "json")("The fox") == whole("The fox")
    vocabulary = json.loads((DATA / "t5/tokenizer.json").read_text())["model"]["vocab"]
    extra = [[f"<extra_id_{n}>", 0.0] for n in (2, 1, 0)]
    of_converter = {"type": "Sequence", "normalizers": [{"type": "Strip"}, {"type": "Replace"}]}  # as Transformers 4 writes it
    metaspace = {"type": "Metaspace", "replacement": "\u2581"}
    other = unigram(tmp_path / "extra", vocab=vocabulary + extra, normalizer=of_converter, pre_tokenizer=metaspace)
    found = load_tokenizer(other)
    assert found("a <extra_id_0> b") == [*whole("a"), 702, *whole("b")]
    added = [{"content": piece, "id": 700 + i, "special": True} for i, (piece, _) in enumerate(extra)]
    assert load_tokenizer(unigram(tmp_path / "added", added_tokens=added)).vocabulary_size() == 703
    bytewise = [["<pad>", 0], ["</s>", 0], ["<unk>", 0], *([f"<0x{n:02X}>", 0] for n in range(256)), ["\u2581", -1.0]]
    special = [{"content": piece, "id": i, "special": True} for i, (piece, _) in enumerate(bytewise[:3])]
    changes = {"vocab": bytewise, "byte_fallback": True, "added_tokens": special, "normalizer": None}
    assert load_tokenizer(unigram(tmp_path / "bytes", **changes))("\xe9") == [259, 3 + 0xC3, 3 + 0xA9]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "BPE"}, 'tokenizer.json must hold a Unigram "model"'),
        ({"vocab": [["a", True]]}, 'must hold a Unigram "model"'),
        ({"vocab": [["a", 10**400]]}, 'must hold a Unigram "model"'),
        ({"vocab": [["\ud800", 1.0], ["<unk>", 0]], "added_tokens": [], "unk_id": 1}, "tokenizer.json: .*surrogates"),
        ({"unk_id": 10**400}, 'tokenizer.json must hold "unk_id" as an id of its "vocab"'),
        ({"added_tokens": [7]}, 'must hold "added_tokens" as a list'),
        ({"added_tokens": [{"content": "<mine>", "id": 700}]}, "tokenizer.json: token '<mine>' has id 700, wanted None"),
        ({"added_tokens": [{"content": "<extra_id_1>", "id": 700}]}, "token '<extra_id_1>' has id 700, wanted None"),
        ({"normalizer": {"type": "Lowercase"}}, "tokenizer.json: step 'Lowercase' is none of 'Precompiled'"),
        ({"pre_tokenizer": [{"type": "ByteLevel"}]}, "step 'ByteLevel' is none of 'Metaspace'"),
        ({"normalizer": {"type": ["Strip"]}}, "is none of 'Precompiled'"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "\u00e9"}}, "is not base64"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": [1]}}, "is not base64"),
    ],
)
def test_bad_t5_tokenizer_json(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(files.CheckpointError, match=message) as caught:
        load_tokenizer(unigram(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_older_envelopes(tmp_path: Path) -> None:
    for family, cls in CLASSES.items():
        root = keras_hub_preset(tmp_path / family, family)
        own = {"proto": None} if family == "t5" else {"add_prefix_space": False}
        config = {"name": "x", "trainable": True, "dtype": "int32", "sequence_length": None} | own
        data = {"module": "keras_nlp.src.models", "class_name": cls.__name__, "config": config}
        data |= {"registered_name": f"keras_nlp>{cls.__name__}", "assets": ["assets/tokenizer/x"], "weights": None}
        (root / "tokenizer.json").write_text(json.dumps(data))
        tokenizer = load_tokenizer(root)
        assert tokenizer.name == "x"
        assert tokenizer("Hello world") == CASES[family][0]["ids"]


# Streaming


def byte_fallback(**options: bool) -> T5Tokenizer:
    """A sentencepiece model with byte pieces, which T5's own has not."""
    model = io.BytesIO()
    text = ["hello world", "the quick brown fox"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=300, byte_fallback=True, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, **options,
    )  # fmt: skip
    return T5Tokenizer(model.getvalue(), extra_ids=3)


@pytest.fixture(scope="module")
def references() -> dict:
    return {family: reference(family) for family in ("opt", "bloom")}


@pytest.fixture(scope="module")
def streamers(loaded: dict) -> list[Tokenizer]:
    files = DATA / "opt/vocab.json", DATA / "opt/merges.txt"
    odd = {"é": 700, "日Ġ": 701, "\0": 702} | json.loads(files[0].read_text())
    return [
        *(loaded[f]["keras_hub"] for f in CLASSES),
        OPTTokenizer(odd, files[1], unsplittable_tokens=["日Ġ"]),
        byte_fallback(),
        byte_fallback(remove_extra_whitespaces=False),
        byte_fallback(add_dummy_prefix=False),
    ]


def stream(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> list[str]:
    decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
    return [*(decoder.push(i) for i in ids), decoder.finish()]


@quick
@given(st.data(), st.booleans())
def test_stream_is_detokenize(streamers: list[Tokenizer], data: st.DataObject, skip: bool) -> None:
    for tokenizer in streamers:
        # half of the ids from the first 270, where the bytes and the special tokens are
        ids = data.draw(st.lists(st.integers(0, 270) | st.integers(0, tokenizer.vocabulary_size() + 3), max_size=12))
        assert "".join(stream(tokenizer, ids, skip)) == tokenizer.detokenize(ids, skip)


@quick
@given(st.lists(st.sampled_from(["a", "é", "日", "🎉", "👍🏽", " ", "\n", "�", "The", "hello"]), max_size=8).map("".join))
def test_stream_never_shows_half_a_character(streamers: list[Tokenizer], text: str) -> None:
    for tokenizer in streamers:
        ids, shown = tokenizer(text), ""
        whole = tokenizer.detokenize(ids)
        for piece in stream(tokenizer, ids):
            shown += piece
            assert whole.startswith(shown)
        assert shown == whole


def test_stream_of_byte_pieces(streamers: list[Tokenizer]) -> None:
    tokenizer = streamers[4]
    e3, x81, x82 = (tokenizer.token_to_id(f"<0x{byte}>") for byte in ("E3", "81", "82"))
    word = next(t for t in tokenizer.get_vocabulary() if t.startswith("▁") and len(t) > 1)
    next_id, text = tokenizer.token_to_id(word), word.replace("▁", " ")
    assert stream(tokenizer, [e3, x81, x82, next_id]) == ["", "", "あ", text, ""]
    # spaces are dropped before the first text, and a broken character is text
    space = tokenizer.token_to_id("▁")
    assert stream(tokenizer, [space, e3, x81, next_id, e3]) == ["", "", "", "\ufffd\ufffd" + text, "", "\ufffd"]
    assert tokenizer.detokenize([space, e3, x81, next_id, e3]) == f"\ufffd\ufffd{text}\ufffd"


def test_stream_holds_back_and_cost_does_not_grow(loaded: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, t5 = loaded["opt"]["keras_hub"], loaded["t5"]["keras_hub"]
    assert stream(opt, opt("日!")) == ["", "", "日", "!", ""]
    assert stream(opt, opt("日")[:2]) == ["", "", "�"]
    assert stream(opt, [*opt("日")[:2], *opt("a")]) == ["", "", "�a", ""]
    decoder = t5.stream_decoder()
    assert [decoder.push(i) for i in t5("The The")] == ["The", " The"]
    assert decoder.finish() == ""
    assert decoder.push(t5("The")[0]) == "The"
    with pytest.raises(ValueError, match="must be an integer"):
        decoder.push(-1)
    longest = []
    decode = T5Tokenizer._decode
    monkeypatch.setattr(T5Tokenizer, "_decode", lambda self, ids: longest.append(len(ids)) or decode(self, ids))
    stream(t5, [3] * 300 + [207, 2, 3, 0] * 300)
    assert max(longest) <= 2


# Any text


words = st.sampled_from([" ", "\n", "\t", "'t", "_f", "0x", " else:", ".", "(", "），", "。", "…", "|", "The", "qu", "9", "é"])


@quick
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(words, max_size=20).map("".join))
def test_any_text(loaded: dict, references: dict, text: str) -> None:
    for family in ("opt", "bloom"):
        tokenizer = loaded[family]["keras_hub"]
        ids = tokenizer(text)
        assert ids == references[family].encode(text, add_special_tokens=False).ids
        assert ids == loaded[family]["saved"](text)
        if not any(token in text for token in tokenizer.special_tokens):
            assert tokenizer.detokenize(ids) == text
            assert "".join(stream(tokenizer, ids)) == text


# Errors


def test_import_needs_neither_library() -> None:
    code = "import sys, refmodels.tokenizers; sys.exit(bool({'sentencepiece', 'tokenizers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_unknown_argument_lists_the_known() -> None:
    with pytest.raises(TypeError, match="T5Tokenizer has no argument 'foo'; it takes 'proto', 'sequence_length'"):
        T5Tokenizer(DATA / "t5/spiece.model", foo=1)
    with pytest.raises(TypeError, match="BloomTokenizer has no argument 'proto'; it takes 'vocabulary', 'merges'"):
        BloomTokenizer({}, [], proto=1)


@pytest.mark.parametrize("library", ["sentencepiece", "tokenizers"])
def test_missing_library_names_what_to_install(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    family = "t5" if library == "sentencepiece" else "opt"
    with pytest.raises(ImportError, match=f"{CLASSES[family].__name__} needs {library}: pip install {library}"):
        load_tokenizer(DATA / family, family)


def test_bad_arguments() -> None:
    proto = DATA / "t5/spiece.model"
    with pytest.raises(ValueError, match=r"add_bos needs .*spiece.model has none"):
        T5Tokenizer(proto, add_bos=True)
    with pytest.raises(ValueError, match="extra_ids must be"):
        T5Tokenizer(proto, extra_ids=-1)
    with pytest.raises(ValueError, match="dtype must name an integer type"):
        T5Tokenizer(proto, dtype="string")
    with pytest.raises(FileNotFoundError, match=r"nowhere.spm: no such file"):
        T5Tokenizer("nowhere.spm")


@pytest.mark.parametrize(
    ("vocabulary", "merges", "message"),
    [
        ([], [], "vocabulary must hold a dict of str to int, found list"),
        ({"</s>": 0}, [], "vocabulary lacks the special token '<pad>'"),
        ({"</s>": 0, "<pad>": 0}, [], "its own id, found 0 for '</s>' and '<pad>'"),
        ({"</s>": 0, "<pad>": "1"}, [], "integer id from 0 on, found '<pad>': '1'"),
        ({"</s>": 0, "<pad>": -1}, [], "integer id from 0 on, found '<pad>': -1"),
        ({"</s>": 0, "<pad>": True}, [], "found '<pad>': True"),
        ({"</s>": 0, "<pad>": 2**31}, [], "found '<pad>': 2147483648"),
        ({"</s>": 0, "<pad>": 1}, "missing.txt", "missing.txt: no such file"),
        ({"</s>": 0, "<pad>": 1}, {}, "merges must be a list of pairs, found dict"),
        ({"</s>": 0, "<pad>": 1}, ["a"], "merges, entry 1: found 'a', wanted two parts"),
        ({"</s>": 0, "<pad>": 1, "a": 2}, ["a b"], "merges, entry 1: the vocabulary lacks 'b'"),
        ({"</s>": 0, "<pad>": 1, "a": 2}, ["a a"], "merges, entry 1: the vocabulary lacks 'aa'"),
    ],
)
def test_bad_vocabulary_and_merges(vocabulary: object, merges: object, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        OPTTokenizer(vocabulary, merges)
    with pytest.raises(ValueError, match="vocabulary lacks the unsplittable token '\\[x\\]'"):
        OPTTokenizer({"</s>": 0, "<pad>": 1}, [], unsplittable_tokens=["[x]"])


@pytest.mark.parametrize(
    ("family", "file", "content", "message"),
    [
        ("t5", "assets/tokenizer/vocabulary.spm", None, "vocabulary.spm: no such file"),
        ("t5", "assets/tokenizer/vocabulary.spm", b"", "vocabulary.spm is empty, wanted a sentencepiece"),
        ("t5", "assets/tokenizer/vocabulary.spm", b"no model", "vocabulary.spm is not a sentencepiece model"),
        ("opt", "assets/tokenizer/merges.txt", None, "merges.txt: no such file"),
        ("opt", "assets/tokenizer/merges.txt", b"#version\na\n", "merges.txt, entry 2: found 'a', wanted two parts"),
        ("opt", "assets/tokenizer/merges.txt", b"a b\n\xff", "merges.txt is not UTF-8"),
        ("opt", "assets/tokenizer/vocabulary.json", None, "vocabulary.json: no such file"),
        ("opt", "assets/tokenizer/vocabulary.json", b"{", "vocabulary.json: not valid JSON"),
        (
            "opt",
            "assets/tokenizer/vocabulary.json",
            b"[1]",
            "vocabulary.json: wanted a JSON object, found list",
        ),
        (
            "opt",
            "assets/tokenizer/vocabulary.json",
            b'{"a": 0}',
            "vocabulary.json lacks the special token '</s>', '<pad>'",
        ),
        ("opt", "tokenizer.json", b"[" * 100_000, "tokenizer.json: not valid JSON"),
        ("opt", "tokenizer.json", b"[]", "tokenizer.json: wanted a JSON object, found list"),
        ("opt", "tokenizer.json", b'{"a": 1}', 'tokenizer.json has neither "class_name"'),
        ("opt", "tokenizer.json", b'{"class_name": "X"}', "describes a X, wanted 'T5Tokenizer', 'OPTTokenizer'"),
        ("opt", "tokenizer.json", b'{"class_name": "OPTTokenizer"}', 'must hold "config" as an object, found NoneType'),
        ("opt", "tokenizer.json", b'{"class_name": "OPTTokenizer", "config": {"foo": 1}}', "unknown setting 'foo'"),
        ("opt", "tokenizer.json", b'{"model": {"type": "WordPiece"}}', "names 'nothing' as the family"),
    ],
)
def test_bad_preset_files(family: str, file: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    root = keras_hub_preset(tmp_path / "preset", family)
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_tokenizer(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": [], "merges": []}}, 'must hold a BPE "model"'),
        ({"model": {"type": "BPE", "vocab": {}}}, 'must hold a BPE "model"'),
        ({"model": {"vocab": [], "merges": []}}, "tokenizer.json: vocab must hold a dict"),
        ({"model": {"vocab": {}, "merges": []}}, "tokenizer.json: vocabulary lacks the special token"),
        ({"model": {"vocab": {}, "merges": []}, "added_tokens": [1]}, 'must hold "added_tokens" as a list'),
        ({"model": {"vocab": {}, "merges": []}, "added_tokens": [{"content": "x"}]}, "found 'x': None"),
    ],
)
def test_bad_hugging_face_tokenizer_json(content: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path, "opt")


def test_directory_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="family must be one of 't5', 'opt', 'bloom', not 'gpt'"):
        load_tokenizer(tmp_path, "gpt")
    with pytest.raises(ValueError, match=r"config.json names 'nothing' as the family, wanted 't5', 'opt', 'bloom'"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vocab.json: no such file"):
        load_tokenizer(tmp_path, "bloom")
    preset = keras_hub_preset(tmp_path / "preset", "opt")
    with pytest.raises(ValueError, match="describes a OPTTokenizer, wanted 'BloomTokenizer'"):
        load_tokenizer(preset, "bloom")
    with pytest.raises(TypeError, match="has no argument 'foo'"):
        load_tokenizer(preset, foo=1)
    hf = hugging_face(tmp_path / "hf", "bloom", "tokenizer.json")
    with pytest.raises(ValueError, match=r"config.json names 'bloom' as the family, wanted 'opt'"):
        load_tokenizer(hf, "opt")
    (hf / "config.json").write_text('{"class_name": "BloomBackbone", "registered_name": "keras_hub>BloomBackbone"}')
    assert type(load_tokenizer(hf)) is BloomTokenizer
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"vocabulary.json: 8351 bytes, wanted at most 1000"):
        load_tokenizer(preset)


def test_links_stay_inside(tmp_path: Path) -> None:
    preset = keras_hub_preset(tmp_path / "preset", "opt")
    merges = preset / "assets/tokenizer/merges.txt"
    merges.rename(preset / "real.txt")
    merges.symlink_to(preset / "real.txt")
    load_tokenizer(preset)
    (preset / "real.txt").rename(tmp_path / "outside.txt")
    merges.unlink()
    merges.symlink_to(tmp_path / "outside.txt")
    with pytest.raises(ValueError, match=r"merges.txt: a link that leads out of the directory, to .*outside.txt"):
        load_tokenizer(preset)

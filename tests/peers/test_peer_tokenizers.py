"""The tokenizers that we save, as Transformers' AutoTokenizer and KerasHub load them."""

import random
from pathlib import Path

import pytest

from refmodels import T5Backbone, T5Seq2SeqLM
from refmodels.task import Task
from refmodels.tokenizer_files import load_tokenizer, save_hugging_face

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
SHIPPED = ["t5_tiny_numbers", "opt_tiny_stdlib", "bloom_tiny_stdlib"]
TEXTS = [
    "Hello world, don't 12345\n\n ok (a|b)",
    "The quick brown fox.",
    " leading and trailing ",
    "def f(x):\n    return [y**2 for y in x]  # ok\n",
    "héllo 漢字 🙂 naïve\u00a0x",
    "one  two   three\t\tfour",
    "I'll we've can't 3.14 1,000",
    "",
    " ",
]
SPECIAL = ["a </s> b", "<pad>x", "x<unk> y", "<s>start"]


def random_texts(count):
    generator = random.Random(0)
    alphabet = "abcdefghij ABC 0123 .,!?'\n\t()[]{}|-_é漢🙂"
    return ["".join(generator.choices(alphabet, k=generator.randrange(1, 40))) for _ in range(count)]


def source(name):
    if name in SHIPPED:
        return Task.from_preset(name).tokenizer
    family, _, options = name.partition("+")
    extra = {"extra_ids": 100} if options == "extra_ids" else {}
    prefix = {"add_prefix_space": True} if options == "add_prefix_space" else {}
    return load_tokenizer(DATA / family, family, **({"extra_ids": 0} if family == "t5" else {}) | extra | prefix)


NAMES = [*SHIPPED, "t5", "t5+extra_ids", "opt", "opt+add_prefix_space", "bloom"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request, transformers, tmp_path_factory):
    """Our tokenizer and the one that AutoTokenizer makes of what we saved."""
    ours, place = source(request.param), tmp_path_factory.mktemp("tokenizer")
    save_hugging_face(ours, place)
    (place / "config.json").write_text(f'{{"model_type": "{ours.family}"}}')
    return ours, transformers.AutoTokenizer.from_pretrained(place)


def test_the_same_ids(pair):
    ours, theirs = pair
    for text in [*TEXTS, *random_texts(300)]:
        if not splits_alike(ours, text):
            continue
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text), text


def splits_alike(ours, text):
    """Where spec/files.md says that Transformers' classes go their own way."""
    if ours.family == "t5":  # its T5 splits at white space of every kind first, whatever the sentencepiece model does with it
        return ours.vocabulary_size() > 100 or not set(text) & set("\n\t\u00a0")
    if ours.add_prefix_space:
        return text[:1] == " " or not text[:1].isspace()
    return True


def test_the_same_special_tokens(pair):
    ours, theirs = pair
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.end_token_id, ours.pad_token_id)
    if ours.family != "t5":
        assert theirs.bos_token_id == ours.start_token_id
        for text in SPECIAL[: 1 if ours.add_prefix_space else None]:
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text), text
    elif ours.extra_ids:
        for text in ("a <extra_id_0> b", "<extra_id_99><extra_id_5>", "x<extra_id_1>y"):
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text), text


def test_what_stands_around_a_text(pair):
    """As the published tokenizers: OPT </s> in front, T5 </s> behind, BLOOM nothing."""
    ours, theirs = pair
    text = "one two"
    wanted = {"t5": [*ours(text), ours.end_token_id], "opt": [ours.start_token_id, *ours(text)], "bloom": ours(text)}
    assert theirs(text)["input_ids"] == wanted[ours.family]


def test_the_same_text(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = [i for i in ours(text) if i != ours.token_to_id("<unk>")]  # its text is each side's own
        assert theirs.decode(ids, clean_up_tokenization_spaces=False).strip() == ours.detokenize(ids).strip()


@pytest.mark.parametrize("name", SHIPPED)
def test_keras_hub_loads_ours(keras_hub, tmp_path, name):
    """T5 has the same ids everywhere. KerasHub splits the texts of the others by other rules; words without signs agree."""
    task = Task.from_preset(name)
    task.save_to_preset(tmp_path)
    kind = getattr(keras_hub.models, type(task.tokenizer).__name__)
    theirs = kind.from_preset(str(tmp_path))
    for text in ["spell: 4207", "return self", " value", "one two three"]:
        found = theirs(text)
        assert [int(i) for i in found] == task.tokenizer(text), text
    assert theirs.vocabulary_size() == task.tokenizer.vocabulary_size()


@pytest.mark.parametrize("extra_ids", [0, 100])
def test_keras_hub_loads_a_t5_with_extra_ids(keras_hub, tmp_path, extra_ids):
    ours = load_tokenizer(DATA / "t5", "t5", extra_ids=extra_ids)
    sizes = {"vocabulary_size": 800, "num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4}
    T5Seq2SeqLM(T5Backbone(**sizes, seed=0), tokenizer=ours).save_to_preset(tmp_path)
    theirs = keras_hub.models.T5Tokenizer.from_preset(str(tmp_path))
    for text in TEXTS[:6]:
        assert [int(i) for i in theirs(text)] == ours(text), text


@pytest.mark.parametrize("name", ["opt_tiny_stdlib", "bloom_tiny_stdlib"])
def test_keras_hub_makes_a_task_of_ours(keras_hub, tmp_path, name):
    """Greedy, from token ids: as we generate."""
    import numpy as np

    task = Task.from_preset(name)
    task.save_to_preset(tmp_path)
    peer = keras_hub.models.CausalLM.from_preset(str(tmp_path), dtype="float32")
    peer.compile(sampler="greedy")
    ids = np.zeros((1, 24), int)
    prompt = [task.tokenizer.start_token_id, *task.tokenizer("def main(")]
    ids[0, : len(prompt)] = prompt
    inputs = {"token_ids": ids, "padding_mask": np.arange(24)[None] < len(prompt)}
    peer.preprocessor = None
    found = peer.generate(inputs, stop_token_ids=None)["token_ids"]
    wanted = task.generate(inputs, stop_token_ids=None, max_length=24)["token_ids"]
    assert np.array(found).tolist() == wanted.tolist()

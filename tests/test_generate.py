"""Generation: limits, stop tokens, sampling, beams, streaming, batches, and clear errors."""

import itertools

import numpy as np
import pytest
from ahead import FourAhead

from refmodels import BloomBackbone, BloomCausalLM, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM, use
from refmodels.causal_lm import CausalLM
from refmodels.generate import Sampling, beam_search
from refmodels.seq_2_seq_lm import Seq2SeqLM
from refmodels.task import Task

SIZES = {"vocabulary_size": 23, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 20, "seed": 3}
PROMPTS = [[5, 9, 2, 14, 7], [11], [3, 3, 8]]
SETTINGS = [
    {},
    {"temperature": 1.7, "seed": 5},
    {"top_k": 4, "seed": 1},
    {"top_p": 0.6, "temperature": 2.0, "seed": 2},
    {"sampler": "random", "seed": [4, 5, 6]},
    {"num_beams": 3},
    {"min_p": 0.2, "temperature": 1.5, "seed": 3},
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "no_repeat_ngram_size": 3, "temperature": 1.5, "seed": 4},
    {"no_repeat_ngram_size": 2, "num_beams": 3, "repetition_penalty": 1.2},
    {"sampler": "contrastive", "top_k": 3, "no_repeat_ngram_size": 2},
    # Rows that differ in everything; None is what the setting is when it is not given.
    {
        "temperature": [None, 0.7, 3.0],
        "top_k": [None, 3, None],
        "top_p": [None, None, 0.9],
        "min_p": [None, 0.1, 0.01],
        "repetition_penalty": [1.5, None, 1.2],
        "no_repeat_ngram_size": [0, 2, None],
        "seed": [1, 2, 3],
    },
    {"sampler": ["beam", "contrastive", "top_p"], "num_beams": [2, None, None], "top_p": [None, None, 0.8], "seed": 7},
]


def of_row(settings, i):
    """The settings of one row."""
    return {name: value[i] if isinstance(value, list) else value for name, value in settings.items()}


def task_of(family):
    if family == "t5":
        return T5Seq2SeqLM(T5Backbone(**SIZES))
    return OPTCausalLM(OPTBackbone(**SIZES)) if family == "opt" else BloomCausalLM(BloomBackbone(**SIZES))


def inputs_of(family, prompts=PROMPTS):
    width = max(map(len, prompts))
    mask = np.array([[i < len(prompt) for i in range(width)] for prompt in prompts])
    ids = np.array([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    prefix = "encoder_" if family == "t5" else ""
    return {f"{prefix}token_ids": ids, f"{prefix}padding_mask": mask}


def tokens(output):
    """The rows of real tokens."""
    prefix = "decoder_" if "decoder_token_ids" in output else ""
    ids, mask = output[f"{prefix}token_ids"], output[f"{prefix}padding_mask"]
    return [row[real == 1].tolist() for row, real in zip(ids, mask, strict=True)]


families = pytest.mark.parametrize("family", ["t5", "opt", "bloom"])


@families
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("declines", [(), (2,)])
def test_tokens_that_are_chosen_ahead_are_the_same_tokens(family, settings, declines):
    task, accelerator = task_of(family), FourAhead(declines=declines)
    for limit in ({"max_new_tokens": 11}, {"max_length": 9}):  # the second leaves each row another number
        asked = {"stop_token_ids": [1], **limit, **settings}
        wanted = tokens(task.generate(inputs_of(family), **asked))
        with use(accelerator):
            assert tokens(task.generate(inputs_of(family), **asked)) == wanted
    chosen = [row for row in Sampling.of(settings, len(PROMPTS)) if row.kind not in ("beam", "contrastive")]
    free = chosen and not any(row.repetition_penalty or row.no_repeat_ngram_size for row in chosen)
    assert bool(accelerator.asked) == bool(free)
    assert set(accelerator.asked) <= {2, 3, 4}


@families
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(family, settings):
    task = task_of(family)
    together = tokens(task.generate(inputs_of(family), stop_token_ids=[1], max_new_tokens=9, **settings))
    for i, prompt in enumerate(PROMPTS):
        own = of_row(settings, i)
        alone = tokens(task.generate(inputs_of(family, [prompt]), stop_token_ids=[1], max_new_tokens=9, **own))
        assert alone == [together[i]]


@families
def test_greedy_takes_the_highest_score_of_the_whole_sequence_every_time(family):
    task = task_of(family)
    backbone = task.backbone
    (row,) = tokens(task.generate(inputs_of(family, PROMPTS[:1]), stop_token_ids=None, max_new_tokens=8))
    first = 1 if family == "t5" else len(PROMPTS[0])
    for end in range(first, len(row)):
        if family == "t5":
            outputs = backbone(inputs_of(family, PROMPTS[:1]) | {"decoder_token_ids": [row[:end]]})
            hidden = outputs["decoder_sequence_output"] * backbone.hidden_dim**-0.5
        else:
            hidden = backbone({"token_ids": [row[:end]]})
        assert backbone.token_embedding(hidden, reverse=True)[0, -1].argmax() == row[end]


@families
def test_limits(family):
    task = task_of(family)
    length = [1, 1, 1] if family == "t5" else [len(prompt) for prompt in PROMPTS]
    by_new = tokens(task.generate(inputs_of(family), stop_token_ids=None, max_new_tokens=4))
    assert [len(row) for row in by_new] == [n + 4 for n in length]
    by_total = tokens(task.generate(inputs_of(family), max_length=7, stop_token_ids=None))
    assert [len(row) for row in by_total] == [7, 7, 7]
    both = task.generate(inputs_of(family), max_length=6, max_new_tokens=4, stop_token_ids=None)
    assert [len(row) for row in tokens(both)] == [min(6, n + 4) for n in length]
    new = task.generate(inputs_of(family), max_new_tokens=4, stop_token_ids=None, strip_prompt=True)
    assert tokens(new) == [row[n:] for row, n in zip(by_new, length, strict=True)]


@families
def test_a_stop_token_ends_its_row_alone(family):
    task = task_of(family)
    free = tokens(task.generate(inputs_of(family), stop_token_ids=None, max_new_tokens=12, strip_prompt=True))
    stop = free[0][3]
    ended = tokens(task.generate(inputs_of(family), stop_token_ids=[stop], max_new_tokens=12, strip_prompt=True))
    for row, whole in zip(ended, free, strict=True):
        assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(ended[0]) < 12


@families
def test_a_stop_token_in_the_prompt_does_not_stop(family):
    if family == "t5":
        return
    task = task_of(family)
    output = task.generate(inputs_of(family, [[5, 9]]), stop_token_ids=[5], max_new_tokens=3)
    assert len(tokens(output)[0]) > 2


@families
def test_the_best_of_all_sequences_is_found_by_wide_beams(family):
    """With as many beams as prefixes a beam search is exhaustive: it must find the sequence that enumeration finds."""
    small = {**SIZES, "vocabulary_size": 5, "seed": 8}
    task = {
        "t5": lambda: T5Seq2SeqLM(T5Backbone(**small)),
        "opt": lambda: OPTCausalLM(OPTBackbone(**small)),
        "bloom": lambda: BloomCausalLM(BloomBackbone(**small)),
    }[family]()
    inputs = inputs_of(family, [[3, 2]])
    start = [0] if family == "t5" else [3, 2]

    def score(sequence):
        total = 0.0
        for end in range(3):
            ids = [start + list(sequence[:end])]
            if family == "t5":
                hidden = task.backbone(inputs | {"decoder_token_ids": ids})["decoder_sequence_output"] * 12**-0.5
            else:
                hidden = task.backbone({"token_ids": ids})
            logits = task.backbone.token_embedding(hidden, reverse=True)[0, -1].astype(float)
            total += logits[sequence[end]] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        return total

    best = max(itertools.product(range(5), repeat=3), key=score)
    for penalty in (0.0, 1.0):
        found = task.generate(
            inputs, stop_token_ids=None, max_new_tokens=3, num_beams=25, length_penalty=penalty, strip_prompt=True
        )
        assert tokens(found) == [list(best)]


class Scripted:
    """A decoder whose scores are a function of the tokens so far: to check the search itself."""

    def __init__(self, table):
        self.table, self.rows = table, []

    def running(self):
        import contextlib

        return contextlib.nullcontext()

    def on_device(self, array):
        return array

    on_host = on_device

    def _logits(self, cache):
        return np.array([self.table[tuple(row[row >= 0].tolist())] for row in cache["tokens"]])

    def prefill(self, ids, mask, lengths, cache):
        cache["tokens"][:, : ids.shape[1]] = ids
        return self._logits(cache)

    def decode_step(self, ids, mask, positions, cache):
        cache["tokens"][np.arange(len(ids)), positions] = ids[:, 0]
        return self._logits(cache)


def test_beams_set_finished_hypotheses_aside_and_weigh_their_length():
    """Token 0 stops. Stopping at once has probability 0.4; the best longer text 0.36 in all, better per token."""
    p = {(9,): [0.4, 0.6, 1e-9], (9, 1): [0.6, 0.3, 0.1], (9, 1, 1): [0.5, 0.4, 0.1], (9, 1, 2): [0.5, 0.4, 0.1]}
    p[(9, 2)] = p[(9, 2, 1)] = p[(9, 2, 2)] = [0.5, 0.4, 0.1]
    table = {key: np.log(value) for key, value in p.items()}

    def best(penalty):
        cache = {"tokens": np.full((1, 8), -1)}
        sampling = Sampling(num_beams=2, length_penalty=penalty)
        return beam_search(Scripted(table), cache, [9], 3, frozenset([0]), sampling)[0].tokens

    assert best(0.0) == [0]  # log 0.4 > log 0.36
    assert best(1.0) == [1, 0]  # log 0.36 / 2 > log 0.4


def test_seeds():
    task, inputs = task_of("opt"), inputs_of("opt", [[5], [5]])

    def draw(seed):
        return tokens(task.generate(inputs, max_new_tokens=12, stop_token_ids=None, sampler="random", seed=seed))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(7)[0] == draw(7)[1]  # the same prompt and the same seed
    assert draw([7, 8])[0] != draw([7, 8])[1]
    assert draw(None) != draw(None)
    with pytest.raises(ValueError, match="seed has 3 entries, wanted one value or 2"):
        draw([1, 2, 3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "nucleus"}, "sampler must be one of greedy, random, top_k, top_p, beam, contrastive, got 'nucleus'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 1.5}, r"top_p must be in \[0, 1\]"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"sampler": "greedy", "temperature": 2.0}, "sampler 'greedy' takes no temperature"),
        ({"sampler": "random", "num_beams": 3}, "sampler 'random' takes no num_beams"),
        ({"length_penalty": float("nan"), "num_beams": 2}, "length_penalty must be a number between"),
        ({"seed": -1}, "seed must be None, an integer from 0 on, or one for each row, got -1"),
        ({"seed": 1.5}, "seed must be None"),
        ({"num_beams": 2, "top_p": 0.5}, "sampler 'beam' takes no top_p"),
        ({"sampler": "greedy", "top_k": 3}, "sampler 'greedy' takes no top_k"),
        ({"sampler": "contrastive", "min_p": 0.5}, "sampler 'contrastive' takes no min_p"),
        ({"top_k": 3, "penalty_alpha": 0.5, "sampler": "top_k"}, "sampler 'top_k' takes no penalty_alpha"),
        ({"length_penalty": 0.5}, "sampler 'greedy' takes no length_penalty"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"penalty_alpha": 1.5}, r"penalty_alpha must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number between 0.001 and 1000"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0"),
        ({"top_p": [0.1, 2.0, 0.1]}, r"top_p must be in \[0, 1\], got 2.0"),
        ({"top_k": [3, 3]}, "top_k has 2 entries, wanted one value or 3, one for each row"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1"),
        ({"num_return_sequences": 2}, "num_return_sequences 2 needs draws or beams: 'greedy' has one answer"),
        ({"num_return_sequences": 2, "penalty_alpha": 0.5}, "num_return_sequences 2 needs draws or beams: 'contrastive'"),
        ({"num_return_sequences": 4, "num_beams": 3}, "num_return_sequences 4 is more than num_beams 3"),
        ({"stop": ""}, "stop must be a string that is not empty"),
        ({"stop": ["a", 3]}, "stop must be a string that is not empty"),
        ({"stop": 5}, "stop must be a string that is not empty, or several of them, got 5"),
        ({"stop": "a"}, "stop needs a tokenizer"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_length": 3}, "the prompt has 5 tokens, more than max_length 3"),
        ({"max_length": 5000}, "max_length 5000 is more than the model's max_sequence_length 2048"),
        ({"stop_token_ids": [23]}, r"stop_token_ids\[0, 0\] is 23, wanted 0 to 22"),
        ({"stop_token_ids": "never"}, "stop_token_ids must be 'auto', None or token ids"),
        ({"stop_token_ids": "auto"}, "needs a tokenizer"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        task_of("opt").generate(inputs_of("opt"), **{"stop_token_ids": None, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
        ({"top_p": "0.5"}, "top_p must be a number, got '0.5'"),
        ({"top_k": 2.5}, "top_k must be an integer, got 2.5"),
        ({"max_length": "5"}, "max_length must be an integer, got '5'"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be an integer, got 1.5"),
        ({"num_beams": True}, "num_beams must be an integer, got True"),
        ({"beams": 3}, "generate has no argument 'beams'; settings of the sampler are: sampler, temperature, top_k"),
        ({"repetition_penalty": "much"}, "repetition_penalty must be a number, got 'much'"),
        ({"constraint": [1, 2]}, "constraint must be callable"),
    ],
    ids=str,
)
def test_settings_of_the_wrong_kind(settings, message):
    with pytest.raises(TypeError, match=message):
        task_of("opt").generate(inputs_of("opt"), stop_token_ids=None, **settings)


def test_bad_inputs():
    task = task_of("opt")
    with pytest.raises(ValueError, match=r"token_ids must have shape \(batch, length\), got rows of different lengths"):
        task.backbone({"token_ids": [[1, 2], [3]]})
    with pytest.raises(ValueError, match=r"padding_mask must have shape \(2, 2\).*different lengths"):
        task.backbone({"token_ids": [[1, 2], [3, 4]], "padding_mask": [[1, 1], [1]]})
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        task.generate("hello", stop_token_ids=None)
    with pytest.raises(TypeError, match="must be a string"):
        task.generate([], stop_token_ids=None)
    with pytest.raises(ValueError, match="padding_mask row 0 has no real token"):
        task.generate({"token_ids": [[1, 2]], "padding_mask": [[0, 0]]}, stop_token_ids=None)
    with pytest.raises(ValueError, match=r"token_ids\[0, 1\] is 23, wanted 0 to 22"):
        task.generate({"token_ids": [[1, 23]]}, stop_token_ids=None)
    with pytest.raises(TypeError, match="OPTCausalLM takes OPTBackbone, got BloomBackbone"):
        OPTCausalLM(BloomBackbone(**SIZES))
    with pytest.raises(TypeError, match="CausalLM is a base class"):
        CausalLM(task.backbone)
    with pytest.raises(TypeError, match="must be a string"):
        task.generate(None, stop_token_ids=None)
    with pytest.raises(TypeError, match="prompt must be a string, got list"):
        task.stream(["a"], stop_token_ids=None)
    with pytest.raises(ValueError, match="there is nothing to go on from"):
        task.generate({"token_ids": np.zeros((0, 3), int)}, stop_token_ids=None)
    with pytest.warns(UserWarning, match="ignores input 'paddding_mask'"):
        task.generate({"token_ids": [[1, 2]], "paddding_mask": [[1, 0]]}, stop_token_ids=None)
    two = {**inputs_of("t5", [[3], [4]]), "decoder_token_ids": [[0, 1]]}
    with pytest.raises(ValueError, match="different batch sizes: encoder_token_ids"):
        task_of("t5").generate(two, stop_token_ids=None, max_new_tokens=1)


def test_a_temperature_near_zero_is_greedy():
    task, inputs = task_of("bloom"), inputs_of("bloom")
    greedy = tokens(task.generate(inputs, stop_token_ids=None, max_new_tokens=5))
    for temperature in (1e-30, 1e-300):
        assert tokens(task.generate(inputs, stop_token_ids=None, max_new_tokens=5, temperature=temperature, seed=1)) == greedy


@pytest.fixture(scope="module")
def numbers():
    return T5Seq2SeqLM.from_preset("t5_tiny_numbers")


@pytest.mark.parametrize("settings", [{}, {"temperature": 3.0, "seed": 1}, {"top_k": 3, "seed": 2}], ids=str)
def test_the_stream_is_the_generated_text(numbers, settings):
    pieces = list(numbers.stream("spell: 4207", max_new_tokens=12, **settings))
    assert "".join(pieces) == numbers.generate("spell: 4207", max_new_tokens=12, **settings)
    assert len(pieces) > 3


def test_the_stream_comes_piece_by_piece(numbers):
    steps = numbers.stream("spell: 4207")
    assert next(steps) == "four"
    assert next(steps) == " thousand"
    assert list(numbers.stream("spell: 1", num_beams=2)) == ["one"]


def test_the_stream_says_what_it_read_and_wrote(numbers):
    stream = numbers.stream("spell: 7")
    assert stream.prompt_text == ""
    assert stream.tokens == []
    assert stream.prompt_ids == [*numbers.tokenizer("spell: 7"), 1]
    "".join(stream)
    assert stream.tokens == [*numbers.tokenizer("seven"), 1]


def test_text_in_text_out(numbers):
    assert numbers.generate(["roman: 1994", "digits: ninety-nine"]) == ["MCMXCIV", "99"]
    assert numbers.generate("roman: 1994", num_beams=4) == "MCMXCIV"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"])
def test_every_policy_spells(dtype):
    model = T5Seq2SeqLM.from_preset("t5_tiny_numbers", dtype=dtype)
    assert model.generate(["spell: 4207", "roman: 1994"]) == ["four thousand two hundred seven", "MCMXCIV"]


@pytest.mark.parametrize("base", [Task, Seq2SeqLM])
def test_the_class_comes_from_the_preset(base):
    assert type(base.from_preset("t5_tiny_numbers")) is T5Seq2SeqLM
    with pytest.raises(ValueError, match="T5"):
        CausalLM.from_preset("t5_tiny_numbers")


def test_a_language_model_continues_its_prompt():
    model = OPTCausalLM.from_preset("opt_tiny_stdlib")
    text = model.generate("import os\n", max_new_tokens=20)
    assert text.startswith("import os\n")
    assert len(text) > len("import os\n")
    assert model.generate("import os\n", max_new_tokens=20, strip_prompt=True) == text.removeprefix("import os\n")
    assert "".join(model.stream("import os\n", max_new_tokens=20)) == text.removeprefix("import os\n")

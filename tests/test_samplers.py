"""Samplers as KerasHub has them, what Transformers does to scores, stop strings, constraints, and several answers."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import test_beams
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_generate import PROMPTS, families, inputs_of, task_of, tokens

import refmodels
from refmodels import OPTCausalLM, T5Seq2SeqLM, samplers
from refmodels.generate import Sampling, StopText, derived_seed
from refmodels.numerics import UNIT_ROUNDOFF
from refmodels.samplers import BeamSampler, ContrastiveSampler, GreedySampler, RandomSampler, TopKSampler, TopPSampler
from refmodels.task import Task

GOLDENS = Path(__file__).parent / "data" / "goldens"
TRANSFORMERS = json.loads((GOLDENS / "transformers_generation.json").read_text())["generate"]
KERAS_HUB = json.loads((GOLDENS / "keras_hub_samplers.json").read_text())["samplers"]
HERE = sorted(name for name in TRANSFORMERS if (GOLDENS / "hf" / name).exists())
WITH_PROMPTS = sorted(f"{path.parts[-3]}/{path.parts[-2]}" for path in GOLDENS.glob("keras_hub_*/*/generate.json"))


def new_tokens(task, inputs, **settings):
    """The new tokens of every row."""
    return tokens(task.generate(inputs, strip_prompt=True, **settings))


# -- the peers --------------------------------------------------------------------------------------------------------


@functools.cache
def golden_task(name):
    return Task.from_preset(GOLDENS / name, dtype="float64" if name.startswith("hf") else "float32")


def keras_hub_prompt(name):
    golden = json.loads((GOLDENS / name / "generate.json").read_text())
    return golden, {"token_ids": golden["prompt"], "padding_mask": golden["prompt_mask"]}


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_contrastive_search_is_keras_hubs(name):
    golden, inputs = keras_hub_prompt(name)
    for settings in ({"sampler": "contrastive"}, {"penalty_alpha": 0.6, "top_k": 5}, {"sampler": ContrastiveSampler()}):
        output = golden_task(name).generate(inputs, stop_token_ids=None, **settings)
        assert output["token_ids"].tolist() == golden["contrastive"]


@pytest.mark.parametrize("name", sorted(KERAS_HUB))
def test_sampler_objects_do_what_keras_hubs_do(name):
    _, inputs = keras_hub_prompt(name)
    for golden in KERAS_HUB[name]:
        output = golden_task(name).generate(inputs, stop_token_ids=None, sampler=golden["sampler"])
        assert output["token_ids"].tolist() == list(np.concatenate(golden["tokens"], 0).reshape(-1, 20).tolist())
        if "log_probs" in golden:
            exact = Task.from_preset(GOLDENS / name, dtype="float64").generate(
                inputs, stop_token_ids=None, sampler=golden["sampler"]
            )
            assert exact["token_ids"].tolist() == output["token_ids"].tolist()
            # Each logarithm is off by what a float32 run is, as in calibrated(4); KerasHub adds 14 of one sign in float32.
            truth, peer = exact["log_probs"], np.ravel(golden["log_probs"])
            bound = 4 * np.abs(output["log_probs"] - truth).max() + 14 * UNIT_ROUNDOFF["float32"] * np.abs(truth)
            assert (np.abs(peer - truth) <= bound).all()


def transformers_inputs(name):
    arrays = load_file(GOLDENS / "hf" / name / "golden.safetensors")
    if name.startswith("t5"):
        return {key.removeprefix("in."): value[:2] for key, value in arrays.items() if key.startswith("in.encoder")}
    return {"token_ids": arrays["in.token_ids"][:1, :6]}


def odd_or_even(row, token_ids):
    return [token for token in range(97) if token % 2 == (len(token_ids) + row) % 2]


@pytest.mark.parametrize("case", range(11))
@pytest.mark.parametrize("name", HERE)
def test_penalties_n_grams_constraints_and_several_beams_are_transformers(name, case):
    golden = TRANSFORMERS[name][case]
    settings, eos = {key: value for key, value in golden["settings"].items() if key != "eos"}, golden["eos"]
    if "constraint" in settings:
        assert golden_task(f"hf/{name}").backbone.vocabulary_size == 97
        settings["constraint"] = odd_or_even
    wanted, start = golden["tokens"], 1 if name.startswith("t5") else 6
    if eos is not None:  # behind the end token stands padding
        wanted = [row[: start + row[start:].index(eos) + 1] if eos in row[start:] else row for row in wanted]
    stop = None if eos is None else [eos]
    output = golden_task(f"hf/{name}").generate(transformers_inputs(name), stop_token_ids=stop, max_new_tokens=12, **settings)
    assert tokens(output) == wanted


@pytest.mark.parametrize(
    ("key", "settings"),
    [("greedy_repetition_penalty_1.3", {"repetition_penalty": 1.3}), ("greedy_no_repeat_ngram_2", {"no_repeat_ngram_size": 2})],
)
@pytest.mark.parametrize("name", [name for name in HERE if not name.startswith("t5")])
def test_greedy_search_with_changed_scores_is_transformers(name, key, settings):
    """These were made with a least number of new tokens: the end token was excluded."""
    golden = json.loads((GOLDENS / "hf" / name / "golden.json").read_text())["generate"][key]
    end = json.loads((GOLDENS / "hf" / name / "config.json").read_text())["eos_token_id"]
    task = golden_task(f"hf/{name}")
    others = np.arange(task.backbone.vocabulary_size) != end
    arguments = {"max_length": 18, "stop_token_ids": None, "constraint": lambda *_: others}
    assert tokens(task.generate(transformers_inputs(name), **arguments, **settings)) == [golden]


# -- contrastive search against one on whole sequences ----------------------------------------------------------------


def hidden_states(family, seed, sequence):
    """Of every token of a prompt and what follows it, as lists."""
    backbone = test_beams.task_of(family, seed).backbone
    if family == "t5":
        outputs = backbone({"encoder_token_ids": [test_beams.PROMPT], "decoder_token_ids": [sequence]})
        return outputs["decoder_sequence_output"][0].tolist()
    return backbone({"token_ids": [sequence]})[0].tolist()


def cosine(x, y):
    return math.fsum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


@pytest.mark.parametrize(
    ("k", "alpha", "temperature"), [(1, 0.6, 1.0), (3, 0.6, 2.0), (5, 0.9, 1.0), (11, 1.0, 1.0), (2, 0.0, 1.0)]
)
@test_beams.families
def test_contrastive_search_is_its_description(family, k, alpha, temperature):
    for seed in test_beams.SEEDS[family]:
        start, found = [0] if family == "t5" else list(test_beams.PROMPT), []
        for _ in range(6):
            scores = test_beams.log_probabilities(family, seed, tuple(found))
            shares = [math.exp(score / temperature) for score in scores]
            earlier = hidden_states(family, seed, start + found)

            def worth(token, *, shares=shares, earlier=earlier, found=found, start=start, seed=seed):
                hidden = hidden_states(family, seed, [*start, *found, token])[-1]
                return (1 - alpha) * shares[token] / sum(shares) - alpha * max(cosine(hidden, other) for other in earlier)

            candidates = sorted(range(len(scores)), key=lambda token, scores=scores: -scores[token])[:k]
            found = [*found, max(candidates, key=worth)]
        settings = {"sampler": ContrastiveSampler(k, alpha, temperature=temperature), "max_new_tokens": 6}
        assert test_beams.generated(family, seed, stop_token_ids=None, **settings) == [found]
        (ended,) = test_beams.generated(family, seed, stop_token_ids=[found[2]], **settings)
        assert ended == found[: found.index(found[2]) + 1]


# -- sampler objects --------------------------------------------------------------------------------------------------

OBJECTS = [
    (GreedySampler(), "greedy", {}),
    (RandomSampler(seed=3), "random", {"seed": 3}),
    (TopKSampler(), "top_k", {"k": 5, "seed": None}),
    (TopKSampler(7, 3), "top_k", {"k": 7, "seed": 3}),
    (TopPSampler(), "top_p", {"p": 0.1, "k": None, "seed": None}),
    (TopPSampler(0.5, 20, 1), "top_p", {"p": 0.5, "k": 20, "seed": 1}),
    (BeamSampler(), "beam", {"num_beams": 5, "return_all_beams": False}),
    (ContrastiveSampler(), "contrastive", {"k": 5, "alpha": 0.6}),
    (ContrastiveSampler(3, 0.2, temperature=2.0), "contrastive", {"k": 3, "alpha": 0.2, "temperature": 2.0}),
]


@pytest.mark.parametrize(("sampler", "name", "config"), OBJECTS, ids=lambda value: str(value)[:40])
def test_samplers_have_keras_hubs_arguments(sampler, name, config):
    assert sampler.get_config() == {"temperature": 1.0, **config}
    assert type(samplers.get(name)) is type(sampler)
    assert samplers.get(type(sampler)) == type(sampler)()
    assert samplers.get(sampler) is sampler
    written = samplers.serialize(sampler)
    assert written["registered_name"] == f"keras_hub>{type(sampler).__name__}"
    assert samplers.get(json.loads(json.dumps(written))) == sampler
    for class_name in (name, type(sampler).__name__, f"keras_hub>{type(sampler).__name__}"):
        assert samplers.get({"class_name": class_name, "config": config}) == sampler
    assert Sampling.of({k: v for k, v in sampler.settings().items() if k != "return_all_beams"}, 1)[0].kind == name


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("Greedy", "sampler must be one of greedy, random, top_k, top_p, beam, contrastive or a Sampler, got 'Greedy'"),
        (3, "sampler must be one of"),
        ({"class_name": "SpeculativeSampler", "config": {}}, "sampler class_name must be one of greedy"),
        ({"class_name": "TopKSampler", "config": 3}, "its config a dictionary"),
        ({"config": {}}, "sampler class_name must be one of"),
        ({"class_name": "TopKSampler", "config": {"kk": 3}}, "sampler TopKSampler: got an unexpected keyword argument 'kk'"),
        ({"class_name": "TopKSampler", "config": {"k": 0}}, "top_k must be at least 1, got 0"),
    ],
    ids=str,
)
def test_what_is_no_sampler_is_refused(identifier, message):
    with pytest.raises(ValueError, match=message):
        samplers.get(identifier)
    with pytest.raises(ValueError, match="sampler"):
        task_of("opt").generate(inputs_of("opt"), stop_token_ids=None, sampler="Greedy")
    with pytest.raises(TypeError, match="Sampler is a base class"):
        samplers.Sampler()


def test_samplers_are_there_without_being_imported():
    assert refmodels.samplers is samplers


def test_compile_says_which_sampler_generate_uses():
    task, inputs = task_of("opt"), inputs_of("opt")
    common = {"stop_token_ids": None, "max_new_tokens": 10}
    greedy = new_tokens(task, inputs, **common)
    task.compile(sampler=TopKSampler(3, seed=5))
    drawn = new_tokens(task, inputs, **common)
    assert drawn != greedy
    assert drawn == new_tokens(task_of("opt"), inputs, top_k=3, seed=5, **common)
    # Settings that choose no sampler go on top of the compiled one, those that do replace it.
    assert new_tokens(task, inputs, seed=6, **common) == new_tokens(task_of("opt"), inputs, top_k=3, seed=6, **common)
    penalised = new_tokens(task, inputs, repetition_penalty=1.5, **common)
    assert penalised == new_tokens(task_of("opt"), inputs, top_k=3, seed=5, repetition_penalty=1.5, **common)
    assert new_tokens(task, inputs, sampler="greedy", **common) == greedy
    assert new_tokens(task, inputs, num_beams=3, **common) == new_tokens(task_of("opt"), inputs, num_beams=3, **common)
    task.compile(sampler="greedy")
    assert new_tokens(task, inputs, **common) == greedy
    task.compile()
    assert task.sampler == TopKSampler()
    task.compile("adam", loss="auto", sampler={"class_name": "BeamSampler", "config": {"num_beams": 2}})
    assert new_tokens(task, inputs, **common) == new_tokens(task_of("opt"), inputs, num_beams=2, **common)


def test_one_given_temperature_asks_for_draws():
    task, inputs = task_of("opt"), inputs_of("opt")
    common = {"stop_token_ids": None, "max_new_tokens": 10, "seed": 2}
    drawn = new_tokens(task, inputs, temperature=1.0, **common)
    assert drawn == new_tokens(task, inputs, sampler="random", **common) != new_tokens(task, inputs, **common)


@families
def test_a_beam_search_takes_a_temperature(family):
    task, inputs = task_of(family), inputs_of(family)
    common = {"stop_token_ids": None, "max_new_tokens": 8, "num_beams": 3}
    assert new_tokens(task, inputs, temperature=1.0, **common) == new_tokens(task, inputs, **common)
    cold = new_tokens(task, inputs, temperature=1e-30, **common)
    assert cold == new_tokens(task, inputs, stop_token_ids=None, max_new_tokens=8)  # every beam but the greedy one is hopeless


# -- several answers --------------------------------------------------------------------------------------------------


@families
def test_each_of_several_draws_is_that_of_its_derived_seed(family):
    task, inputs = task_of(family), inputs_of(family)
    common = {"stop_token_ids": [1], "max_new_tokens": 8, "temperature": 3.0}
    seeds = [4, 5, 4]
    several = new_tokens(task, inputs, num_return_sequences=3, seed=seeds, **common)
    assert len(several) == 9
    for i, prompt in enumerate(PROMPTS):
        for n in range(3):
            alone = new_tokens(task, inputs_of(family, [prompt]), seed=derived_seed(seeds[i], n), **common)
            assert alone == [several[3 * i + n]]
        assert len({tuple(row) for row in several[3 * i : 3 * i + 3]}) > 1
    fresh = new_tokens(task, inputs, num_return_sequences=3, **common)
    assert fresh != new_tokens(task, inputs, num_return_sequences=3, **common)


def test_derived_seeds_differ():
    assert derived_seed(7, 0) == 7
    found = [derived_seed(seed, n) for seed in (0, 1, 2, 2**63, 2**200) for n in range(5)]
    assert len(set(found)) == 25
    assert derived_seed(3, 2) == derived_seed(3, 2)


@test_beams.families
def test_all_beams_are_the_best_first(family):
    """As many beams as there are sequences: all are found, in the order of their log probabilities."""
    scores = functools.partial(test_beams.log_probabilities, family, 0)
    pairs = [(a, b, scores(())[a] + scores((a,))[b]) for a in range(11) for b in range(11)]
    pairs.sort(key=lambda pair: -pair[2])
    task, prefix = test_beams.task_of(family, 0), "encoder_" if family == "t5" else ""
    inputs = {f"{prefix}token_ids": [test_beams.PROMPT]}
    common = {"stop_token_ids": None, "max_new_tokens": 2, "strip_prompt": True}
    output = task.generate(inputs, sampler=BeamSampler(121, return_all_beams=True), **common)
    assert tokens(output) == [[a, b] for a, b, _ in pairs]
    np.testing.assert_allclose(output["log_probs"], [score for *_, score in pairs], rtol=1e-12)
    best = task.generate(inputs, num_beams=121, num_return_sequences=5, **common)
    assert tokens(best) == [[a, b] for a, b, _ in pairs[:5]]
    assert "log_probs" not in best
    with pytest.raises(ValueError, match="leave num_return_sequences out"):
        task.generate(inputs, sampler=BeamSampler(2, True), num_return_sequences=2, **common)
    with pytest.raises(ValueError, match="the beam search found 11 of 12 sequences"):
        task.generate(inputs, num_beams=12, num_return_sequences=12, **{**common, "max_new_tokens": 1})


@pytest.fixture(scope="module")
def stdlib():
    return OPTCausalLM.from_preset("opt_tiny_stdlib")


@pytest.fixture(scope="module")
def numbers():
    return T5Seq2SeqLM.from_preset("t5_tiny_numbers")


def test_several_texts(stdlib, numbers):
    settings = {"max_new_tokens": 6, "temperature": 1.5, "seed": 1}
    one = stdlib.generate("def ", num_return_sequences=2, **settings)
    assert len(one) == 2
    assert one[0] == stdlib.generate("def ", **settings)
    assert all(isinstance(text, str) and text.startswith("def ") for text in one)
    both = stdlib.generate(["def ", "import"], num_return_sequences=2, **settings)
    assert both[0] == one
    assert [len(texts) for texts in both] == [2, 2]
    assert stdlib.generate(["def "], num_return_sequences=1, **settings) == one[:1]
    beams = numbers.generate(["roman: 4", "roman: 9"], num_beams=3, num_return_sequences=3)
    assert [texts[0] for texts in beams] == ["IV", "IX"]
    assert [len(set(texts)) for texts in beams] == [3, 3]
    assert numbers.generate("roman: 4", sampler=BeamSampler(3, return_all_beams=True)) == beams[0]
    stream = numbers.stream("roman: 4", num_beams=3, num_return_sequences=3)
    assert [text for text, _ in stream.answers()] == beams[0]
    assert [numbers.tokenizer.detokenize(ids) for _, ids in stream.answers()] == beams[0]
    with pytest.raises(ValueError, match="a stream has the pieces of one answer"):
        next(stream)


# -- stop strings -----------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer's incremental decoder whose tokens are pieces of text."""

    def __init__(self, pieces, rest=""):
        self.pieces, self.rest = pieces, rest

    def push(self, token):
        return self.pieces[token]

    def finish(self):
        return self.rest


def cut(text, stops):
    """What stands before the stop string that is complete first; None if there is none."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return None


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    rest=st.text("ab", max_size=2),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
@example(pieces=["aba"], rest="", stops=["aba", "b"])
def test_text_is_cut_at_the_first_stop_string_however_it_falls_into_pieces(pieces, rest, stops):
    text, shown, ended = StopText(Letters(pieces, rest), stops), [], False
    for token in range(len(pieces)):
        ended = text.push(token)
        assert ended == text.found == any(stop in "".join(pieces[: token + 1]) for stop in stops)
        shown.append(text.take())
        if ended:
            break
    shown.append(text.finish())
    whole = "".join(pieces) + rest
    wanted = cut(whole, stops)
    assert "".join(shown) == (whole if wanted is None else wanted)
    assert text.found == (wanted is not None)


def test_only_what_may_become_a_stop_string_is_held_back():
    text = StopText(Letters(["ab", "c", "a", "bd", "e"]), ["abd"])
    shown = []
    for token in range(4):
        text.push(token)
        shown.append(text.take())
    assert shown == ["", "abc", "", ""]
    assert text.found


STOPS = ["\n", "self", "e", "):", ["\n\n", "if"], "zzz", "f."]


@pytest.mark.parametrize("stop", STOPS, ids=repr)
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 2}, {"penalty_alpha": 0.4}, {"num_beams": 2}], ids=str)
def test_a_stop_string_cuts_the_text(stdlib, stop, settings):
    prompt = "def main(self"
    stops = [stop] if isinstance(stop, str) else stop
    free = stdlib.generate(prompt, strip_prompt=True, max_new_tokens=14, **settings)
    got = stdlib.generate(prompt, strip_prompt=True, max_new_tokens=14, stop=stop, **settings)
    if "num_beams" not in settings:  # beams that end make room for others
        wanted = cut(free, stops)
        assert got == (free if wanted is None else wanted)
    assert not any(text in got for text in stops)
    assert stdlib.generate(prompt, max_new_tokens=14, stop=stop, **settings) == prompt + got
    assert "".join(stdlib.stream(prompt, max_new_tokens=14, stop=stop, **settings)) == got


def test_a_stop_string_ends_its_row_alone(stdlib):
    prompts = ["import os\n", "def main(", "class Stack:"]
    together = stdlib.generate(prompts, stop=["\n", "):"], max_new_tokens=16)
    assert together == [stdlib.generate(prompt, stop=["\n", "):"], max_new_tokens=16) for prompt in prompts]
    stop = stdlib.generate(prompts[1], max_new_tokens=32, strip_prompt=True)[20:29]
    stream = stdlib.stream(prompts[1], stop=stop, max_new_tokens=32)
    text = "".join(stream)
    assert len(stream.tokens) < 32
    assert stdlib.tokenizer.detokenize(stream.tokens).startswith(text + stop)
    ids = {"token_ids": stdlib.preprocessor.prompts(prompts[1:2])}
    assert new_tokens(stdlib, ids, stop=stop, max_new_tokens=32) == [stream.tokens]


def test_stop_strings_of_an_encoder_decoder(numbers):
    assert numbers.generate(["spell: 4207", "spell: 85"], stop=" two") == ["four thousand", "eighty-five"]
    assert numbers.generate("spell: 4207", stop=[" two", "sand"]) == "four thou"
    assert numbers.generate("spell: 4207", stop="d t", num_beams=3) == "four thousan"
    assert list(numbers.stream("spell: 85", stop="y-f")) == ["eight", "", "", ""]


# -- constraints ------------------------------------------------------------------------------------------------------

FORMS = {
    "ids": lambda allowed: sorted(allowed),
    "set": lambda allowed: set(allowed),
    "array": lambda allowed: np.array(sorted(allowed)),
    "range": lambda allowed: range(min(allowed), max(allowed) + 1),
    "mask": lambda allowed: np.isin(np.arange(23), list(allowed)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [{}, {"seed": 1, "top_k": 30}, {"num_beams": 3}, {"penalty_alpha": 0.9}], ids=str)
@families
def test_a_constraint_is_kept(family, settings, form):
    """Row i may say i + 3 to i + 6, and what it likes as its third new token."""
    task, seen = task_of(family), set()
    starts = [[0]] * 3 if family == "t5" else PROMPTS

    def constraint(row, token_ids):
        assert token_ids[: len(starts[row])] == starts[row]
        seen.add((row, len(token_ids) - len(starts[row])))
        return None if len(token_ids) == len(starts[row]) + 2 else FORMS[form](set(range(row + 3, row + 7)))

    found = new_tokens(task, inputs_of(family), stop_token_ids=None, max_new_tokens=5, constraint=constraint, **settings)
    assert seen == {(row, length) for row in range(3) for length in range(5)}
    for row, new in enumerate(found):
        assert len(new) == 5
        assert all(row + 3 <= token < row + 7 for place, token in enumerate(new) if place != 2)
    free = new_tokens(task, inputs_of(family), stop_token_ids=None, max_new_tokens=5, **settings)
    none = new_tokens(task, inputs_of(family), stop_token_ids=None, max_new_tokens=5, constraint=lambda *_: None, **settings)
    assert free == none != found


def test_rows_that_are_done_are_not_asked():
    asked = []

    def constraint(row, token_ids):
        asked.append((row, len(token_ids)))
        return [4] if row == 0 else [5]

    found = new_tokens(task_of("opt"), inputs_of("opt"), stop_token_ids=[4], max_new_tokens=3, constraint=constraint)
    assert found == [[4], [5, 5, 5], [5, 5, 5]]
    assert [length for row, length in asked if row == 0] == [len(PROMPTS[0])]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ([], ValueError, "constraint allows no token for row 0 after 5 tokens"),
        (np.zeros(23, bool), ValueError, "constraint allows no token for row 0 after 5 tokens"),
        (np.ones(22, bool), ValueError, r"the mask of row 0 has shape \(22,\), wanted \(23,\)"),
        ([23], ValueError, "constraint allows token 23 for row 0, wanted 0 to 22"),
        ([-1], ValueError, "constraint allows token -1 for row 0"),
        ([1.5], TypeError, "constraint must give token ids, a mask of booleans or None, got"),
        ("all", TypeError, "constraint must give token ids"),
        ([[1], [2]], TypeError, "constraint must give token ids"),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"penalty_alpha": 0.5}], ids=str)
def test_what_a_constraint_may_not_say(answer, error, message, settings):
    with pytest.raises(error, match=message):
        task_of("opt").generate(
            inputs_of("opt"), stop_token_ids=None, max_new_tokens=2, constraint=lambda *_: answer, **settings
        )


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"num_beams": 2}, {"penalty_alpha": 0.5}], ids=str)
def test_nothing_left_to_say_is_an_error(settings):
    """One token is allowed, and it may not come twice."""
    arguments = {"stop_token_ids": None, "constraint": lambda *_: [21], "no_repeat_ngram_size": 1, **settings}
    task, inputs = task_of("opt"), inputs_of("opt", [[5, 9]])
    assert new_tokens(task, inputs, max_new_tokens=1, **arguments) == [[21]]
    with pytest.raises(ValueError, match="after 3 tokens every token is excluded"):
        task.generate(inputs, max_new_tokens=2, **arguments)


@families
def test_no_run_of_tokens_comes_twice(family):
    task = task_of(family)
    for size in (1, 2, 3):
        for settings in ({}, {"temperature": 0.5, "seed": 1}, {"num_beams": 3}, {"penalty_alpha": 0.5}):
            arguments = {"stop_token_ids": None, "max_new_tokens": 15, "no_repeat_ngram_size": size, **settings}
            for row in tokens(task.generate(inputs_of(family, [[5, 9, 2], [11]]), **arguments)):
                runs = [tuple(row[i : i + size]) for i in range(len(row) - size + 1)]
                assert len(set(runs)) == len(runs)


def test_a_prompt_of_vectors_has_no_tokens_to_repeat():
    """Its placeholders are not looked at: as Transformers with inputs_embeds, only new tokens are penalised."""
    task = task_of("opt")
    vectors = task.embed(inputs_of("opt", [[5, 9, 2]]))
    common = {"stop_token_ids": None, "max_new_tokens": 8, "strip_prompt": True}
    for settings in ({}, {"penalty_alpha": 0.5}, {"num_beams": 2}, {"top_k": 4, "seed": 1, "num_return_sequences": 2}):
        plain = tokens(task.generate(inputs_of("opt", [[5, 9, 2]]), **common, **settings))
        assert tokens(task.generate(vectors, **common, **settings)) == plain
        seen = []
        task.generate(vectors, constraint=lambda row, ids, seen=seen: seen.append(ids), **common, **settings)
        assert min(map(len, seen)) == 0
        assert max(map(len, seen)) == 7


@families
def test_no_room_for_new_tokens_gives_none(family):
    start = {"decoder_token_ids": [[0, 3]]} if family == "t5" else {}
    inputs = inputs_of(family, [[5, 9]]) | start
    for settings in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}, {"penalty_alpha": 0.5}):
        output = task_of(family).generate(inputs, max_length=2, stop_token_ids=None, strip_prompt=True, **settings)
        assert tokens(output) == [[]] * settings.get("num_return_sequences", 1)


def test_settings_for_each_row_may_be_an_array():
    rows = Sampling.of({"temperature": np.array([1.0, 2.0]), "top_k": np.array([3, 4]), "seed": 5}, 2)
    assert rows == [Sampling(temperature=1.0, top_k=3, seed=5), Sampling(temperature=2.0, top_k=4, seed=5)]

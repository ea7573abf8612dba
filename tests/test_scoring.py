"""`task.score`: against the logits of the whole sequence, against decoding step by step, and by laws."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from refmodels import BloomBackbone, BloomCausalLM, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM, scoring
from refmodels.numerics import calibrated, compare
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import build_tree
from refmodels.presets import data_directory
from refmodels.task import Task

SIZES = {"vocabulary_size": 23, "num_layers": 2, "num_heads": 3, "hidden_dim": 12, "intermediate_dim": 20, "seed": 3}
GOLDENS = Path(__file__).parent / "data" / "goldens" / "hf"
ROWS = [[5, 9, 2, 14, 7], [11, 4], [3, 3, 8]]
SOURCES = [[4, 1], [9, 9, 9, 1], [1]]
TASKS = {"t5": (T5Seq2SeqLM, T5Backbone), "opt": (OPTCausalLM, OPTBackbone), "bloom": (BloomCausalLM, BloomBackbone)}

families = pytest.mark.parametrize("family", TASKS)


def task_of(family, dtype="float32", **arguments):
    """A random model with the same weights in every type, large enough to matter."""
    task, backbone = TASKS[family]
    model, rng = backbone(**SIZES, dtype=dtype, **arguments), np.random.default_rng(5)
    kind = numpy_dtype(model.variable_dtype)
    single = lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32).astype(kind)  # noqa: E731
    model.params = build_tree(model.parameters(), single)
    return task(model)


def arrays(rows, width=None, left=False):
    """Ids and mask of rows, padded with a token that means something else."""
    width = width or max(map(len, rows))
    fill = [[6] * (width - len(row)) for row in rows]
    gaps = [[0] * (width - len(row)) for row in rows]
    ids = [gap + row if left else row + gap for row, gap in zip(rows, fill, strict=True)]
    mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for row, gap in zip(rows, gaps, strict=True)]
    return np.array(ids), np.array(mask)


def inputs_of(family, rows=ROWS, sources=SOURCES, **padding):
    """What `score` takes: for T5 the rows are the decoder's."""
    if family != "t5":
        return dict(zip(("token_ids", "padding_mask"), arrays(rows, **padding), strict=True))
    encoder = dict(zip(("encoder_token_ids", "encoder_padding_mask"), arrays(sources), strict=True))
    return encoder | dict(zip(("decoder_token_ids", "decoder_padding_mask"), arrays(rows, **padding), strict=True))


def logits(task, family, row, source):
    """Scores after each token of one row, all at once."""
    if family != "t5":
        return task.backbone.token_embedding(task.backbone({"token_ids": [row]}), reverse=True)[0]
    hidden = task.backbone({"encoder_token_ids": [source], "decoder_token_ids": [row]})["decoder_sequence_output"]
    return task.backbone.token_embedding(hidden * 12**-0.5, reverse=True)[0]


def log_probability(scores, token):
    """log softmax(scores)[token], in float64 with Python's own sum."""
    scores = [float(score) for score in scores]
    return scores[token] - max(scores) - np.log(sum(np.exp(score - max(scores)) for score in scores))


def agree(found, truth, rough):
    """Our float32 log-probabilities are as near to the truth as another way to them in float32 is."""
    single, other = np.asarray(found, np.float32), np.asarray(rough, np.float32)
    verdict = compare(single, np.asarray(truth), calibrated(4), wanted=other)
    assert verdict, verdict


@families
def test_scores_are_those_of_the_whole_sequence(family):
    single, double = task_of(family), task_of(family, "float64")
    score = single.score(inputs_of(family))
    assert (score.token_ids.dtype, score.mask.dtype, score.log_probs.dtype) == (np.int64, bool, np.float64)
    assert score.counts.tolist() == [len(row) - 1 for row in ROWS]
    for i, (row, source) in enumerate(zip(ROWS, SOURCES, strict=True)):
        assert score.token_ids[i, : len(row) - 1].tolist() == row[1:]
        assert not score.token_ids[i, len(row) - 1 :].any()
        assert not score.log_probs[i, len(row) - 1 :].any()
        rough, truth = (
            [log_probability(scores, token) for scores, token in zip(logits(task, family, row, source), row[1:], strict=False)]
            for task in (single, double)
        )
        agree(score.log_probs[i, : len(row) - 1], truth, rough)
        assert score.total[i] == pytest.approx(sum(score.log_probs[i]), abs=0, rel=1e-15)
        assert score.perplexity[i] == np.exp(-score.total[i] / (len(row) - 1))


@families
def test_scores_are_those_that_decoding_sees(family):
    task, rows = task_of(family, "float64"), [row[:2] for row in ROWS]
    seen = []
    for i, row in enumerate(rows):
        batch = task._batch_of_ids(inputs_of(family, [row], SOURCES[i : i + 1]), None, 1)
        cache, decoder = task.new_cache(batch), task.backbone
        first = decoder.prefill(np.array([row[:1]]), np.ones((1, 1), bool), np.array([1]), cache)
        seen.append([log_probability(first[0], row[1])])
    assert np.allclose(task.score(inputs_of(family, rows)).log_probs, seen, rtol=0, atol=1e-12)


@families
def test_padding_and_the_batch_change_nothing(family):
    task, double = task_of(family), task_of(family, "float64")
    whole, truth = task.score(inputs_of(family)), double.score(inputs_of(family))
    for padding in ({"width": 9}, {"width": 9, "left": True}):
        again = task.score(inputs_of(family, **padding))
        assert np.array_equal(again.token_ids, whole.token_ids)
        agree(again.log_probs, truth.log_probs, whole.log_probs)
    for i in range(len(ROWS)):
        alone = task.score(inputs_of(family, ROWS[i : i + 1], SOURCES[i : i + 1]))
        count = int(whole.counts[i])
        assert alone.log_probs.shape == (1, count)
        agree(alone.log_probs[0], truth.log_probs[i, :count], whole.log_probs[i, :count])


@families
@pytest.mark.parametrize("chunk", [1, 23, 50, 10**9])
def test_chunks_change_nothing(family, chunk, monkeypatch):
    task, inputs = task_of(family), inputs_of(family)
    whole, truth = task.score(inputs), task_of(family, "float64").score(inputs)
    sizes = []
    logits = type(task.backbone).logits
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    monkeypatch.setattr(type(task.backbone), "logits", lambda self, x: sizes.append(len(x)) or logits(self, x))
    again = task.score(inputs)
    assert sum(sizes) == 7
    assert max(sizes) <= max(1, chunk // 23)
    agree(again.log_probs, truth.log_probs, whole.log_probs)


@families
def test_targets_go_on_from_the_inputs(family):
    task = task_of(family, "float64")
    ids, mask = arrays([row[1:] for row in ROWS])
    targets = {"token_ids": ids, "padding_mask": mask}
    if family == "t5":
        inputs = {name: value for name, value in inputs_of(family).items() if name.startswith("encoder")}
        whole = task.score(inputs_of(family, [[0, *row[1:]] for row in ROWS]))
    else:
        inputs = inputs_of(family, [row[:1] for row in ROWS])
        whole = task.score(inputs_of(family))
    score = task.score(inputs, targets)
    assert np.array_equal(score.token_ids, whole.token_ids)
    assert np.array_equal(score.log_probs, whole.log_probs)


def test_targets_go_on_from_longer_inputs():
    task, targets = task_of("bloom", "float64"), {"token_ids": [[7, 1], [2, 9]], "padding_mask": [[1, 1], [0, 1]]}
    score = task.score({"token_ids": [[4, 5, 6], [6, 5, 4]]}, targets)
    assert score.counts.tolist() == [2, 1]
    assert score.token_ids.tolist() == [[7, 1], [9, 0]]
    whole = task.score({"token_ids": [[4, 5, 6, 7, 1], [6, 5, 4, 9, 0]], "padding_mask": [[1] * 5, [1, 1, 1, 1, 0]]})
    assert np.allclose(score.log_probs, [whole.log_probs[0, 2:], [whole.log_probs[1, 2], 0]], rtol=0, atol=1e-13)


@families
def test_generated_tokens_are_scored(family):
    task = task_of(family)
    inputs = inputs_of(family, [row[:2] for row in ROWS])
    new = task.generate(inputs, stop_token_ids=None, max_new_tokens=4)
    score = task.score(inputs | new)
    greedy = score.log_probs[:, 1:]  # each is the most likely of 23 tokens
    assert (greedy >= np.log(1 / 23)).all()


@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_a_row_with_nothing_to_score(family):
    score = task_of(family).score({"token_ids": [[5], [6]]})
    assert score.log_probs.shape == (2, 0)
    assert score.total.tolist() == [0, 0]
    assert np.isnan(score.perplexity).all()
    score = task_of(family).score({"token_ids": [[5, 6], [6, 6]], "padding_mask": [[1, 1], [0, 1]]})
    assert score.counts.tolist() == [1, 0]
    assert np.isnan(score.perplexity).tolist() == [False, True]


def test_every_position_of_the_table_can_be_used():
    task = task_of("opt", max_sequence_length=4)
    assert task.score({"token_ids": [[1, 2, 3, 4, 5]]}).counts == [4]
    with pytest.raises(ValueError, match="sequence length 5 is more than max_sequence_length 4"):
        task.score({"token_ids": [[1, 2, 3, 4, 5, 6]]})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@families
def test_half_precision_scores_what_generate_sees(family, dtype):
    task = task_of(family, dtype)
    score = task.score(inputs_of(family))
    row, source = ROWS[0], SOURCES[0]
    backbone = task.backbone
    if family == "t5":
        outputs = backbone({"encoder_token_ids": [source], "decoder_token_ids": [row[:-1]]})
        hidden = outputs["decoder_sequence_output"]
    else:
        hidden = backbone({"token_ids": [row[:-1]]})
    seen = backbone.logits(hidden)[0]
    assert seen.dtype == dtype
    wanted = [log_probability(scores, token) for scores, token in zip(seen, row[1:], strict=True)]
    alone = task.score(inputs_of(family, [row], [source]))
    assert np.allclose(alone.log_probs[0], wanted, rtol=2**-20, atol=0)
    assert np.isfinite(score.log_probs).all()


# -- the checkpoints of Transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(folder.name for folder in GOLDENS.iterdir()))
def test_transformers_loss(name):
    """The scores follow from the logits that Transformers gave."""
    golden = load_file(GOLDENS / name / "golden.safetensors")
    inputs = {key.removeprefix("in."): value for key, value in golden.items() if key.startswith("in.")}
    inputs.pop("left_padding_mask", None)
    side = "decoder_" if name.startswith("t5") else ""
    ids, peer = inputs[f"{side}token_ids"], golden["out.logits"].astype(float)
    mask = inputs[f"{side}padding_mask"] == 1 if f"{side}padding_mask" in inputs else np.ones(ids.shape, bool)
    single, double = (Task.from_preset(GOLDENS / name, dtype=dtype).score(inputs) for dtype in ("float32", "float64"))
    for i in range(len(ids)):
        real = np.flatnonzero(mask[i])
        assert np.array_equal(real, np.arange(len(real))), "padded on the right"
        wanted = [log_probability(peer[i, j], ids[i, j + 1]) for j in range(len(real) - 1)]
        found, truth = (score.log_probs[i, : len(real) - 1] for score in (single, double))
        agree(np.array(wanted), truth, found)
        assert -np.mean(wanted) == pytest.approx(-single.total[i] / (len(real) - 1), rel=1e-4)


# -- text ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers():
    return T5Seq2SeqLM.from_preset("t5_tiny_numbers")


def test_text_of_t5(numbers):
    score = numbers.score("spell: 7", "seven")
    assert score.token_ids.tolist() == [[*numbers.tokenizer("seven"), 1]]
    assert np.exp(score.total[0]) > 0.9
    assert np.exp(numbers.score("spell: 7", "eight").total[0]) < 0.01
    same = numbers.score({"encoder_text": "spell: 7", "decoder_text": "seven"})
    assert np.array_equal(same.log_probs, score.log_probs)
    several = numbers.score(["spell: 7", "spell: 42"], ["seven", "forty-two"])
    assert several.counts.tolist() == [len(numbers.tokenizer(text)) + 1 for text in ("seven", "forty-two")]
    ids = numbers.score("spell: 7", {"token_ids": [[*numbers.tokenizer("seven"), 1]]})
    assert np.array_equal(ids.log_probs, score.log_probs)


@pytest.mark.parametrize("name", ["opt_tiny_stdlib", "bloom_tiny_stdlib"])
def test_text_to_continue(name):
    task = Task.from_preset(name)
    tokens = task.tokenizer("import os\n")
    score = task.score("import os\n")
    assert score.token_ids.tolist() == [tokens]  # behind the start token every token has a score
    ids = task.score({"token_ids": [[task.tokenizer.start_token_id, *tokens]]})
    assert np.array_equal(ids.log_probs, score.log_probs)
    assert task.score("import os\n").total > task.score("import sdi\n").total
    assert task.score("def main(self):", "\n").token_ids.tolist() == [task.tokenizer("\n")]
    task.preprocessor.add_start_token = False
    assert task.score("import os\n").token_ids.tolist() == [tokens[1:]]


@pytest.mark.parametrize("name", ["opt_tiny_stdlib", "bloom_tiny_stdlib"])
def test_held_out_text(name):
    """The presets were shipped with the loss that another library measured on text that they were not trained on."""
    record = json.loads((data_directory() / name / "held_out.json").read_text())
    assert record  # test_shipped.py holds the loss itself
    task = Task.from_preset(name)
    assert 1 < task.score("def close(self):\n        self.file.close()\n").perplexity[0] < 100


def test_bad_arguments(numbers):
    task, inputs = task_of("opt"), inputs_of("opt")
    with pytest.raises(ValueError, match="text needs a tokenizer"):
        task.score("hello")
    with pytest.raises(ValueError, match="there are 1 targets, wanted one for each of 3 inputs"):
        task.score(inputs, {"token_ids": [[1]]})
    with pytest.raises(TypeError, match="inputs must be a string, a list of strings or a dictionary of token ids, got 7"):
        task.score(7)
    with pytest.raises(ValueError, match=r"embeddings go into generate alone: pass text or token_ids"):
        task.score(inputs | {"embeddings": np.zeros((3, 5, 12), np.float32)})
    with pytest.raises(ValueError, match="missing input 'token_ids'"):
        task.score({"padding_mask": [[1]]})
    with pytest.raises(ValueError, match="padding_mask row 1 has no real token"):
        task.score({"token_ids": [[1], [2]], "padding_mask": [[1], [0]]})
    with pytest.raises(ValueError, match=r"score needs targets, .* there are none of these"):
        numbers.score("spell: 7")
    with pytest.raises(ValueError, match=r"score needs targets, .* there are both"):
        numbers.score({"encoder_text": "spell: 7", "decoder_text": "seven"}, "seven")
    with pytest.raises(ValueError, match="different batch sizes"):
        task_of("t5").score({**inputs_of("t5"), "decoder_token_ids": [[0, 1]], "decoder_padding_mask": None})

"""The peers' own outputs: Transformers and KerasHub 0.17 and 0.32 on the tiny checkpoints in `tests/data/goldens`.

Our float64 run is the truth and the peer is judged as a candidate. How far it may be off follows from its own precision:

- KerasHub ran wholly in the checkpoint's type: `calibrated(4)`, with our own run in that type as the measure.
- Transformers ran in float64, but its BLOOM and T5 take the softmax in float32, and its T5 norms form the mean square in
  float32: it errs, but no more than a run wholly in float32 does. The largest error of such a run depends on the order in which
  its sums are formed, which NumPy leaves to the CPU's BLAS: by up to a half between two of them here. So `calibrated(2)`. Its
  OPT stays in float64 throughout.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from refmodels import Backbone, watching
from refmodels.bloom import bloom_logits
from refmodels.numerics import calibrated, compare
from refmodels.opt import opt_logits
from refmodels.t5 import t5_logits
from refmodels.task import Task

GOLDENS = Path(__file__).parent / "data" / "goldens"
HUGGING_FACE = sorted(path.name for path in (GOLDENS / "hf").iterdir())
ELSEWHERE = ("_lora", "_int8", "_int4")  # test_lora.py, test_quantize.py
KERAS_HUB = sorted(
    f"{path.parent.name}/{path.name}" for path in GOLDENS.glob("keras_hub_*/*") if not path.name.endswith(ELSEWHERE)
)
FIRST_IN_LAYER = {"opt_decoder_layer", "bloom_decoder_layer", "t5_self_attention"}
LAST_IN_LAYER = {"opt_decoder_layer", "bloom_decoder_layer", "t5_feedforward"}
FLOAT64_THROUGHOUT = {"opt"}


def load(name, dtype):
    return Backbone.from_preset(GOLDENS / name, dtype=dtype)


def arrays(name, prefix):
    tensors = load_file(GOLDENS / name / "golden.safetensors")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def run(model, inputs):
    """Every output that a golden may hold, by its name there."""
    into, out_of = [], []  # the residual stream before and after each layer

    def record(op, args, kwargs, proceed):
        result = proceed()
        if op.name in FIRST_IN_LAYER:
            into.append(args[0])
        if op.name in LAST_IN_LAYER:
            out_of.append(result)
        return result

    with watching(record):
        outputs = model(inputs)
    if model.family != "t5":
        logits = (opt_logits if model.family == "opt" else bloom_logits)(outputs, model.params)
        found = {"sequence_output": outputs, "last_hidden_state": outputs, "logits": logits}
        return found | hidden_states("hidden", into[0], out_of, outputs)
    n, encoder, decoder = model.num_layers, outputs["encoder_sequence_output"], outputs["decoder_sequence_output"]
    found = outputs | {"logits": t5_logits(decoder, model.params, model.config)}
    found |= hidden_states("encoder_hidden", into[0], out_of[:n], encoder)
    return found | hidden_states("decoder_hidden", into[n], out_of[n:], decoder)


def hidden_states(name, first, layers, last):
    """Transformers' numbering: 0 goes into the first layer, i comes out of layer i, the last has been through the norm."""
    return {f"{name}.{i}": state for i, state in enumerate([first, *layers[:-1], last])}


def judge_transformers(folder, inputs, wanted):
    """Judge every array of `wanted`, at the real positions of inputs that have one mask; gives the number judged."""
    exact, single = load(folder, "float64"), load(folder, "float32")
    truth, rough = run(exact, inputs), run(single, inputs)
    real = inputs["padding_mask"] == 1 if "padding_mask" in inputs else slice(None)
    for key, peer in wanted.items():
        error = rough[key] - truth[key]
        # In float64 throughout: float32's rounding errors times 2**-29, on either side of the comparison.
        own = truth[key] + (2 * 2.0**-29 * error if exact.family in FLOAT64_THROUGHOUT else error)
        verdict = compare(peer[real], truth[key][real], calibrated(2), wanted=own[real], name=key)
        assert verdict, verdict
    return len(wanted)


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers(name):
    inputs, wanted = arrays(f"hf/{name}", "in."), arrays(f"hf/{name}", "out.")
    inputs.pop("left_padding_mask", None)
    wanted.pop("left.last_hidden_state", None)
    assert judge_transformers(f"hf/{name}", inputs, wanted) >= 6


@pytest.mark.parametrize("name", ["bloom", "bloom_6_heads"])
def test_transformers_left_padded(name):
    """Transformers gives NaN for every row that has padding on the left; ours are finite, and equal the unpadded prompt's."""
    inputs, peer = arrays(f"hf/{name}", "in."), arrays(f"hf/{name}", "out.")["left.last_hidden_state"]
    ids, mask = inputs["token_ids"], inputs["left_padding_mask"]
    whole = mask.all(-1)
    assert np.array_equal(np.isfinite(peer).all((1, 2)), whole)
    assert whole.any()
    assert not whole.all()
    rows = {"token_ids": ids[whole], "padding_mask": mask[whole]}
    judge_transformers(f"hf/{name}", rows, {"last_hidden_state": peer[whole]})
    exact = load(f"hf/{name}", "float64")
    padded = exact({"token_ids": ids, "padding_mask": mask})
    assert np.isfinite(padded).all()
    for row in range(len(ids)):
        real = mask[row] == 1
        alone = exact({"token_ids": ids[row : row + 1, real]})
        assert compare(padded[row : row + 1, real], alone, calibrated(), name=f"row {row}")


def policy_of(name):
    """The type that a golden was made in; Transformers' float64 is judged by float32."""
    return {"opt_bf16": "bfloat16", "bloom_f16": "float16"}.get(Path(name).name, "float32")


def judge_accelerator(name, accelerator):
    """On a peer's checkpoint an accelerator is no further from the truth than the reference is, by its own error model."""
    policy, given = policy_of(name), arrays(name, "in.")
    given.pop("left_padding_mask", None)
    truth, own = (run(load(name, dtype), given) for dtype in ("float64", policy))
    found = Backbone.from_preset(GOLDENS / name, dtype=policy, accelerator=accelerator)(given)
    for key, got in found.items() if isinstance(found, dict) else [("sequence_output", found)]:
        verdict = compare(got, truth[key], calibrated(4), wanted=own[key], name=key)
        assert verdict, verdict


@pytest.mark.parametrize("name", KERAS_HUB)
def test_keras_hub(name):
    policy = policy_of(name)
    inputs, wanted = arrays(name, "in."), arrays(name, "out.")
    truth, own = run(load(name, "float64"), inputs), run(load(name, policy), inputs)
    for key, peer in wanted.items():
        # OPT: KerasHub's own versions differ from each other in rows whose keys are all padding.
        real = inputs["padding_mask"] == 1 if "padding_mask" in inputs else slice(None)
        candidate = peer.astype(own[key].dtype)
        assert np.array_equal(candidate.astype(peer.dtype), peer), "the golden holds more precision than its policy has"
        verdict = compare(candidate[real], truth[key][real], calibrated(4), wanted=own[key][real], name=key)
        assert verdict, verdict


@pytest.mark.parametrize("name", KERAS_HUB)
def test_counts(name):
    golden = json.loads((GOLDENS / name / "golden.json").read_text())
    model = Backbone.from_preset(GOLDENS / name, load_weights=False)
    assert model.count_params() == golden.get("count_params", model.count_params())
    assert "count_params" in golden or name.endswith("t5_zero_masks")


def generated(name, inputs, **settings):
    """The ids that we generate from a token dictionary; without stop tokens, as the goldens were."""
    output = Task.from_preset(GOLDENS / name).generate(inputs, stop_token_ids=None, **settings)
    return next(value for key, value in output.items() if key.endswith("token_ids")).tolist()


@pytest.mark.parametrize("name", HUGGING_FACE)
@pytest.mark.parametrize(("kind", "settings"), [("greedy", {}), ("beam4", {"num_beams": 4})])
def test_transformers_generation(name, kind, settings):
    golden = json.loads((GOLDENS / "hf" / name / "golden.json").read_text())["generate"][kind]
    inputs = arrays(f"hf/{name}", "in.")
    if name.startswith("t5"):
        prompt = {key: value[:1] for key, value in inputs.items() if key.startswith("encoder")}
    else:
        prompt = {"token_ids": inputs["token_ids"][:1, :6]}
    assert generated(f"hf/{name}", prompt, max_length=len(golden), **settings) == [golden]


@pytest.mark.parametrize("name", [name for name in HUGGING_FACE if not name.startswith("t5")])
def test_a_ragged_batch_gives_what_transformers_gives_for_each_prompt_alone(name):
    golden = json.loads((GOLDENS / "hf" / name / "golden.json").read_text())["generate"]["ragged_singles"]
    lengths = np.array([[3], [6], [11]])
    row = arrays(f"hf/{name}", "in.")["token_ids"][1, : lengths.max()]
    mask = np.arange(lengths.max()) < lengths
    inputs = {"token_ids": np.tile(row, (3, 1)) * mask, "padding_mask": mask}
    together = generated(f"hf/{name}", inputs, max_new_tokens=8)
    assert [ids[: len(alone)] for ids, alone in zip(together, golden, strict=True)] == golden


@pytest.mark.parametrize("name", [name for name in KERAS_HUB if (GOLDENS / name / "generate.json").exists()])
@pytest.mark.parametrize(("kind", "settings"), [("greedy", {}), ("beam", {"sampler": "beam"})])
def test_keras_hub_generation(name, kind, settings):
    golden = json.loads((GOLDENS / name / "generate.json").read_text())
    inputs = {"token_ids": golden["prompt"], "padding_mask": golden["prompt_mask"]}
    assert generated(name, inputs, **settings) == golden[kind]

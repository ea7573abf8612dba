"""Faults by name: each is planted in a run of our own model, by other code than its edit, and must be named."""

import copy
import math
import os
import re

import numpy as np
import pytest

from refmodels.bloom import BloomBackbone
from refmodels.op import OPS, watching
from refmodels.opt import OPTBackbone
from refmodels.t5 import T5Backbone
from refmodels.trace import trace
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.replay import replay
from refmodels.verification.signatures import FAULTS, diagnose
from refmodels.verification.signatures.diagnosis import NEGLIGIBLE

# -- models whose every number matters --------------------------------------------------------------------------------------


def strong(model, seed=3):
    """Weights and biases of deviation 0.4, gains around 1, embeddings small enough for a norm's epsilon to matter."""
    generator = np.random.default_rng(seed)

    def draw(tree, path=""):
        for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if isinstance(child, dict | list):
                draw(child, f"{path}{key}.")
                continue
            drawn = generator.standard_normal(child.shape) * (0.1 if "token_embedding" in path or "position" in path else 0.4)
            tree[key] = (1 + drawn if key in ("gamma", "weight") else drawn).astype(child.dtype)

    params = copy.deepcopy(model.params)
    draw(params)
    model.params = params
    return model


T5 = {"vocabulary_size": 40, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
BUILDERS = {
    "t5": lambda **k: T5Backbone(**{**T5, "activation": "gelu_approximate", **k}),
    "opt": lambda **k: OPTBackbone(**{**T5, "max_sequence_length": 40, **k}),
    "bloom": lambda **k: BloomBackbone(**{**T5, **k}),
}
MADE = {}


def model_of(family, **config):
    key = (family, *sorted(config.items()))
    if key not in MADE:
        MADE[key] = strong(BUILDERS[family](**config))
    return MADE[key]


def inputs_of(family, side="right", length=12, rows=3):
    generator = np.random.default_rng(5)
    lengths = [length, 5, 2][:rows]
    places = np.arange(length) if side == "right" else np.arange(length)[::-1]
    ids, mask = generator.integers(3, 40, (rows, length)), np.stack([places < count for count in lengths])
    if family != "t5":
        return {"token_ids": ids, "padding_mask": mask}
    target = generator.integers(3, 40, (rows, length - 1))
    return {
        "encoder_token_ids": ids,
        "encoder_padding_mask": mask,
        "decoder_token_ids": target,
        "decoder_padding_mask": np.ones(target.shape, bool),
    }


# -- how a fault is planted -------------------------------------------------------------------------------------------------


def run(model, inputs, observer=None):
    """Every step of a run."""
    with trace(model) as steps, watching(observer or (lambda op, args, kwargs, proceed: proceed())):
        hidden = model(inputs)
        model.logits(hidden["decoder_sequence_output"] if isinstance(hidden, dict) else hidden)
    return dict(steps)


def calls(ops, make, number=None, inside=""):
    """Theirs makes the results of these ops by `make(arguments)`.

    `number`: of one call of each alone, counted from 1; `inside`: within the composite whose name begins so alone."""

    def plant(model, inputs):
        count, around = {}, []

        def observer(op, args, kwargs, proceed):
            if op.composite:
                around.append(op.name)
            try:
                return changed(op, args, kwargs, proceed)
            finally:
                if op.composite:
                    around.pop()

        def changed(op, args, kwargs, proceed):
            if op.name not in ops.split() or not any(name.startswith(inside) for name in ("", *around) if name or not inside):
                return proceed()
            count[op.name] = count.get(op.name, 0) + 1
            if number not in (None, count[op.name]):
                return proceed()
            bound = op.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return make(bound.arguments)

        return run(model, inputs, observer)

    return plant


def weights(change):
    """Theirs has other weights: `change` is given the tree of parameters to write to."""

    def plant(model, inputs):
        other = type(model).from_config(model.get_config())
        params = copy.deepcopy(model.params)
        change(params, model.config)
        other.params = params
        return run(other, inputs)

    return plant


def config(**changes):
    """Theirs has another config."""

    def plant(model, inputs):
        other = type(model).from_config({**model.get_config(), **changes})
        other.params = {**model.params}
        return run(other, inputs)

    return plant


def given(change):
    """Theirs is given other inputs."""
    return lambda model, inputs: run(model, change(inputs))


def arrays(pattern, change):
    """Theirs is ours but for the first step whose name fits, as it is given to us."""

    def plant(model, inputs):
        steps = run(model, inputs)
        name = next(name for name in steps if re.search(pattern, name))
        return {**steps, name: change(steps[name])}

    return plant


# -- what is planted --------------------------------------------------------------------------------------------------------


def scores(scale=None, biased=lambda bias, d: bias):
    def make(a):
        d = a["query"].shape[-1]
        found = np.einsum("bthd,bshd->bhts", a["query"], a["key"]) * np.float32(a["scale"] if scale is None else scale(a))
        bias = biased(a["bias"], d)
        return found if bias is None else found + bias.astype(np.float32)

    return calls("attention_scores", make)


def bucket(relative, bidirectional, buckets=32, largest=128):
    """As the original forms it, with logarithms."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset, relative = (relative > 0) * buckets, -np.abs(relative)
    distance = np.maximum(-relative, 0)
    exact = buckets // 2
    far = exact + np.log(np.maximum(distance, 1) / exact + 1e-9) / math.log(largest / exact) * (buckets - exact)
    return offset + np.where(distance < exact, distance, np.minimum(far.astype(int), buckets - 1))


def buckets(inside, bidirectional=None, change=lambda relative: relative, largest=128):
    def make(a):
        relative = np.arange(a["keys"])[None, None] - a["positions"][:, :, None]
        return bucket(change(relative), a["bidirectional"] if bidirectional is None else bidirectional, 32, largest)

    return calls("relative_position_buckets", make, inside=inside)


def cross_bias(model, inputs):
    table = model.params["decoder"]["layers"][0]["self_attention"]["relative_attention_bias"]["embeddings"]

    def make(a):
        found = np.einsum("bthd,bshd->bhts", a["query"], a["key"])
        if a["bias"] is not None:
            return found + a["bias"]
        relative = np.arange(found.shape[3])[None] - np.arange(found.shape[2])[:, None]
        return found + table[bucket(relative, False)].transpose(2, 0, 1)

    return calls("attention_scores", make)(model, inputs)


def swapped(*pairs, place="attention"):
    def change(params, config):
        for layer in layers(params):
            for name, part in [("", layer), *layer.items()]:
                if name.endswith(place) and set(dict(pairs)) <= set(part):
                    part.update({mine: part[other] for mine, other in pairs} | {})

    return weights(change)


def layers(params):
    stacks = [params["encoder"], params["decoder"]] if "encoder" in params else [params]
    return [layer for stack in stacks for layer in stack["layers"]]


def fused(read_as_blocks):
    def change(params, config):
        h = config.num_heads
        for layer in layers(params):
            parts = [layer["self_attention"][name] for name in ("query", "key", "value")]
            for leaf in parts[0]:
                d = parts[0][leaf].shape[-1] // h
                if read_as_blocks:  # columns written head by head: head, part, number
                    columns = np.concatenate([p[leaf][..., i * d : (i + 1) * d] for i in range(h) for p in parts], -1)
                    read = np.split(columns, 3, -1)
                else:
                    columns = np.concatenate([p[leaf] for p in parts], -1)
                    pieces = np.split(columns, 3 * h, -1)
                    read = [np.concatenate(pieces[i::3], -1) for i in range(3)]
                for name, array in zip(("query", "key", "value"), read, strict=True):
                    layer["self_attention"][name] = {**layer["self_attention"][name], leaf: array}

    return weights(change)


def norms(make, number=None):
    return calls(
        "layer_norm rms_norm", lambda a: make(a, a.get("gamma", a.get("weight")), a.get("beta", np.float32(0))), number
    )


def plain_norm(x, gain, shift, epsilon, mean, count=0, outside=False):
    x = x.astype(np.float64)
    middle = x.mean(-1, keepdims=True) if mean else 0.0
    variance = ((x - middle) ** 2).sum(-1, keepdims=True) / (x.shape[-1] - count)
    root = variance**0.5 + epsilon if outside else (variance + epsilon) ** 0.5
    return ((x - middle) / root * gain + shift).astype(np.float32)


def every_norm(change=lambda gain, shift: (gain, shift), mean=None, **how):
    def make(a, gain, shift):
        new_gain, new_shift = change(gain, shift)
        takes_mean = "gamma" in a if mean is None else mean
        return plain_norm(a["x"], new_gain, new_shift, **{"epsilon": a["epsilon"], "mean": takes_mean, **how})

    return norms(make)


def softmax(scores, axis=-1):
    weights = np.exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def soft(make):
    return calls("masked_softmax", lambda a: make(a["scores"], a["mask"]).astype(np.float32))


def rounded(array, dtype):
    import ml_dtypes

    return array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(array.dtype)


def activation(of):
    """The activation of the feed-forward layer, by whatever name."""
    make = {
        "erf": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / 2**0.5)),
        "tanh": lambda x: x / 2 * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": lambda x: np.where(x > 0, x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "logistic": lambda x: x / (1 + np.exp(-1.702 * x)),
        "none": lambda x: x,
    }[of]
    return calls("relu gelu gelu_approximate silu", lambda a: make(a["x"].astype(np.float64)).astype(np.float32))


def linears(make, name=""):
    return calls("linear", lambda a: make(a["x"], a["kernel"], a["bias"]).astype(np.float32))


def affine(x, kernel, bias):
    return x @ kernel + (0 if bias is None else bias)


def tables(change):
    def write(params, config):
        tree = params["token_embedding"]
        tree.update(change(tree))

    return weights(write)


def positions(change):
    def make(a):
        ids = change(a["ids"]) if len(a["embeddings"]) == 40 and a["ids"].shape[0] == 1 else a["ids"]
        return a["embeddings"][ids]

    return calls("embedding", make, number=2)  # OPT's second is that of the positions


def own_first_rows(a):
    """Two rows that our table has not, then ours."""
    return np.concatenate([a["embeddings"][:2] * 3, a["embeddings"]])[a["ids"]]


def post_norm(model, inputs):
    """x + f(norm(x)) becomes norm(x + f(x)): in BLOOM and T5 written out as their steps."""
    held = []

    def observer(op, args, kwargs, proceed):
        if op.name in ("layer_norm", "rms_norm") and inside:
            held.append((op, {**kwargs}, args))
            return op.signature.bind(*args, **kwargs).arguments["x"].copy()
        if op.name == "add" and inside:
            norm, norm_kwargs, norm_args = held.pop()
            found = norm.signature.bind(*norm_args, **norm_kwargs)
            found.arguments["x"] = proceed()
            return norm.reference(*found.args, **found.kwargs)
        if re.fullmatch(r"(opt|bloom)_decoder_layer|t5_(self_attention|cross_attention|feedforward)", op.name):
            inside.append(op)
            try:
                return proceed()
            finally:
                inside.pop()
        return proceed()

    inside = []
    return run(model, inputs, observer)


def residual_of_norm(model, inputs):
    last = []

    def observer(op, args, kwargs, proceed):
        result = proceed()
        if op.name in ("layer_norm", "rms_norm"):
            last[:] = [result]
        if op.name == "add" and last:
            return last[0] + op.signature.bind(*args, **kwargs).arguments["y"]
        return result

    return run(model, inputs, observer)


def naive_slopes(count):
    return np.array([2 ** (-8 * (i + 1) / count) for i in range(count)])


def alibi(dtype, origin):
    def make(a):
        place = np.arange(a["keys"]) - (a["keys"] - 1 if origin == "last" else 0)
        product = rounded(rounded(a["slopes"].astype(np.float32), dtype)[:, None] * place.astype(np.float32), dtype)
        return np.broadcast_to(product[None, :, None], (1, len(product), a["positions"].shape[1], a["keys"])).copy()

    return calls("alibi_bias", make)


def logits(make):
    return calls("logits_from_embeddings", lambda a: make(a["x"], a["embeddings"], a["scale"]))


def causal(offset):
    def make(a):
        t, s = a["positions"].shape[1], a["key_mask"].shape[1]
        return (np.tril(np.ones((t, s), bool), offset)[None] & a["key_mask"][:, None])[:, None]

    return calls("causal_mask", make)


def transposed(params, config):
    for layer in layers(params):
        for attention in [part for name, part in layer.items() if name.endswith("attention")]:
            for kernel in attention.values():
                if "kernel" in kernel:
                    kernel["kernel"] = np.ascontiguousarray(kernel["kernel"].T)


def one_transposed(params, config):
    for layer in layers(params):
        for attention in [part for name, part in layer.items() if name.endswith("attention")]:
            attention["output"]["kernel"] = np.ascontiguousarray(attention["output"]["kernel"].T)


def without_bias(params, config):
    for layer in layers(params):
        for _name, part in [*layer.items(), *layer["self_attention"].items()]:
            if isinstance(part, dict) and "kernel" in part and "bias" in part:
                part["bias"] = np.zeros_like(part["bias"])


def twice_the_bias(params, config):
    for layer in layers(params):
        for _name, part in [*layer.items(), *layer["self_attention"].items()]:
            if isinstance(part, dict) and "kernel" in part and "bias" in part:
                part["bias"] = part["bias"] * 2


def first_layer_everywhere(params, config):
    for stack in [params["encoder"], params["decoder"]] if "encoder" in params else [params]:
        first = copy.deepcopy(stack["layers"][0])
        for i in range(1, config.num_layers):
            stack["layers"][i] = {key: copy.deepcopy(first[key]) for key in stack["layers"][i]}
            for part in stack["layers"][i].values():
                if isinstance(part, dict) and "relative_attention_bias" in part:
                    del part["relative_attention_bias"]


def summed_one_by_one(dtype):
    def make(a):
        x, kernel = a["x"], a["kernel"]
        total = np.zeros((*x.shape[:-1], kernel.shape[1]), np.float32)
        for k in range(len(kernel)):
            total = rounded(total + rounded(x[..., k : k + 1] * kernel[k], dtype), dtype)
        return total if a["bias"] is None else rounded(total + a["bias"], dtype)

    return calls("linear", make)


def exchanged_tables(params, config):
    mine, other = (params[stack]["layers"][0]["self_attention"] for stack in ("encoder", "decoder"))
    mine["relative_attention_bias"], other["relative_attention_bias"] = (
        other["relative_attention_bias"],
        mine["relative_attention_bias"],
    )


THOROUGH = bool(os.environ.get("REFMODELS_THOROUGH"))  # every family at every level, beside every other fault
ALL = ("t5", "opt", "bloom")
LEVELS = ("inner", "layer", "output")
PLANTS = []


def plants(name, families, plant, *, levels=LEVELS, inputs=None, **config):
    """What is planted under the name that it must be given; at those levels where it can be seen."""
    for family in families.split():
        given_inputs = {"t5": {}, "opt": {}, "bloom": {}}[family] | (inputs or {})
        label = f"{name}-{family}-{len(PLANTS)}"
        PLANTS.append(pytest.param(name, family, plant, levels, given_inputs, config, id=label))


plants("scores-not-scaled", "opt bloom", scores(lambda a: 1.0))
plants("scores-scaled", "t5", scores(lambda a: a["query"].shape[-1] ** -0.5))
plants("scale-applied-twice", "opt bloom", scores(lambda a: 1 / a["query"].shape[-1]))
plants("scale-of-hidden-size", "t5 opt bloom", scores(lambda a: 0.25))
plants("bias-scaled-too", "t5 bloom", scores(lambda a: 8**-0.5, lambda bias, d: bias if bias is None else bias / d**0.5))
plants("bias-missing", "t5 bloom", scores(None, lambda bias, d: None))
plants("bias-in-cross-attention", "t5", cross_bias)
plants("bias-of-other-stack", "t5", weights(exchanged_tables))
plants("causal-buckets-in-encoder", "t5", buckets("t5_encoder", False))
plants("bidirectional-buckets-in-decoder", "t5", buckets("t5_decoder", True))
plants("bucket-off-by-one", "t5", buckets("t5_", None, lambda relative: relative + 1))
plants("bucket-off-by-one", "t5", buckets("t5_", None, lambda relative: relative - 1))
plants("relative-position-sign", "t5", buckets("t5_", None, lambda relative: -relative))
plants("bucket-distance-wrong", "t5", buckets("t5_", largest=32), inputs={"length": 24})
plants("slopes-reversed", "bloom", calls("alibi_slopes", lambda a: naive_slopes(a["num_heads"])[::-1].copy()))
plants("slopes-for-power-of-two-only", "bloom", calls("alibi_slopes", lambda a: naive_slopes(3)), num_heads=3, hidden_dim=24)
plants(
    "slopes-for-power-of-two-only", "bloom", calls("alibi_slopes", lambda a: naive_slopes(4)[:3]), num_heads=3, hidden_dim=24
)
plants("slopes-off-by-one", "bloom", calls("alibi_slopes", lambda a: naive_slopes(a["num_heads"]) * 2 ** (8 / a["num_heads"])))
plants(
    "alibi-sign",
    "bloom",
    calls(
        "alibi_bias",
        lambda a: (a["slopes"][:, None, None] * (a["positions"][:, :, None] - np.arange(a["keys"]))[:, None]).astype(
            np.float32
        ),
    ),
)
for half in ("bfloat16", "float16"):
    for end in ("first", "last"):
        plants("alibi-in-half-precision", "bloom", alibi(half, end), num_heads=16, inputs={"length": 40, "rows": 1})
plants("causal-mask-missing", "t5 opt bloom", causal(100))
plants("causal-mask-off-by-one", "t5 opt bloom", causal(1))
plants("causal-mask-off-by-one", "t5 opt bloom", causal(-1))
plants(
    "padding-leaks",
    "opt bloom",
    given(lambda inputs: {**inputs, "padding_mask": np.ones_like(inputs["padding_mask"])}),
    inputs={"side": "left"},
)
plants("padding-leaks", "t5", calls("key_mask", lambda a: np.ones_like(a["padding_mask"])[:, None, None], inside="t5_encoder"))
plants(
    "encoder-mask-ignored-in-cross-attention",
    "t5",
    calls("key_mask", lambda a: np.ones_like(a["padding_mask"])[:, None, None], inside="t5_decoder"),
)
plants("mask-inverted", "t5", given(lambda inputs: {**inputs, "encoder_padding_mask": ~inputs["encoder_padding_mask"]}))
plants(
    "mask-inverted", "opt bloom", calls("causal_mask", lambda a: OPS["causal_mask"].reference(a["positions"], ~a["key_mask"]))
)
plants("mask-additive-weak", "t5 opt bloom", soft(lambda scores, mask: softmax(scores + np.where(mask, 0, np.float32(-10)))))
plants("mask-additive-weak", "opt bloom", soft(lambda scores, mask: softmax(np.where(mask, scores, np.float32(0)))))
plants("mask-after-softmax", "t5 opt bloom", soft(lambda scores, mask: softmax(scores) * mask))
plants("softmax-wrong-axis", "t5 opt bloom", soft(lambda scores, mask: softmax(np.where(mask, scores, -1e30), -2)))
plants("softmax-wrong-axis", "t5 opt bloom", soft(lambda scores, mask: softmax(np.where(mask, scores, -1e30), 1)))
for half in ("bfloat16", "float16"):
    plants(
        "softmax-in-half-precision",
        "t5 opt bloom",
        soft(lambda scores, mask, half=half: rounded(softmax(np.where(mask, rounded(scores, half), -1e30)), half)),
    )
plants(
    "head-order",
    "t5 opt bloom",
    calls("split_heads", lambda a: np.stack(np.split(a["x"], a["x"].shape[-1] // a["num_heads"], -1), -1)),
)
plants("head-order", "t5 opt bloom", calls("merge_heads", lambda a: np.concatenate(list(np.moveaxis(a["x"], 3, 0)), -1)))
plants(
    "heads-not-transposed",
    "t5 opt bloom",
    calls("merge_heads", lambda a: np.reshape(np.ascontiguousarray(np.swapaxes(a["x"], 1, 2)), (*a["x"].shape[:2], -1))),
)
plants(
    "heads-not-transposed",
    "t5 opt bloom",
    calls("split_heads", lambda a: np.swapaxes(a["x"].reshape(len(a["x"]), a["num_heads"], a["x"].shape[1], -1), 1, 2)),
)
plants("head-count-wrong", "opt bloom", config(num_heads=4))
plants("head-count-wrong", "opt bloom", config(num_heads=1))
plants("query-key-swapped", "t5 opt bloom", swapped(("query", "key"), ("key", "query")))
plants(
    "query-key-swapped",
    "opt bloom",
    calls(
        "attention_scores",
        lambda a: (
            np.einsum("bthd,bshd->bhst", a["query"], a["key"]) * np.float32(a["scale"])
            + (0 if a["bias"] is None else a["bias"].astype(np.float32))
        ),
    ),
)
plants("key-value-swapped", "t5 opt bloom", swapped(("value", "key"), ("key", "value")))
plants("qkv-order", "t5 opt bloom", swapped(("query", "value"), ("value", "query")))
plants("qkv-order", "opt bloom", swapped(("query", "value"), ("key", "query"), ("value", "key")))
plants("qkv-interleaved", "opt bloom", fused(True))
plants("qkv-interleaved", "t5 opt bloom", fused(False))
plants("kernel-transposed", "t5 opt bloom", weights(transposed))
plants("kernel-transposed", "t5 opt bloom", weights(one_transposed))
plants("dense-bias-missing", "opt bloom", weights(without_bias))
plants("dense-bias-twice", "opt bloom", weights(twice_the_bias))
plants("weights-of-another-layer", "t5 opt bloom", weights(first_layer_everywhere), num_layers=2)
plants("bias-in-first-layer-only", "t5", lambda model, inputs: only_first_biased(model, inputs), num_layers=2)
plants(
    "half-precision-products",
    "t5 opt bloom",
    linears(lambda x, kernel, bias: affine(rounded(x, "bfloat16"), rounded(kernel, "bfloat16"), bias)),
)
plants(
    "half-precision-products",
    "opt",
    linears(lambda x, kernel, bias: affine(rounded(x, "float16"), rounded(kernel, "float16"), bias)),
)
plants("half-precision-accumulation", "t5 opt bloom", summed_one_by_one("float16"))
plants("epsilon-wrong", "t5 opt bloom", every_norm(epsilon=1e-3))
plants("epsilon-wrong", "t5", every_norm(epsilon=1e-5))
plants("epsilon-wrong", "opt bloom", every_norm(epsilon=1e-12))
plants("epsilon-outside-root", "opt bloom", every_norm(outside=True))
plants("norm-with-mean", "t5", every_norm(mean=True))
plants("norm-without-mean", "opt bloom", every_norm(mean=False))
plants("variance-unbiased", "t5 opt bloom", every_norm(count=1))
plants("norm-gain-plus-one", "t5 opt bloom", every_norm(lambda gain, shift: (gain + 1, shift)))
plants("norm-gain-missing", "t5 opt bloom", every_norm(lambda gain, shift: (1.0, shift)))
plants("norm-shift-missing", "opt bloom", every_norm(lambda gain, shift: (gain, 0.0)))
plants("final-norm-missing", "opt", norms(lambda a, gain, shift: a["x"].copy(), number=3))
plants("final-norm-missing", "bloom", norms(lambda a, gain, shift: a["x"].copy(), number=4))
plants("embedding-norm-missing", "bloom", norms(lambda a, gain, shift: a["x"].copy(), number=1))
plants(
    "norm-missing",
    "opt",
    norms(lambda a, gain, shift: a["x"].copy() if gain.std() and len(gain) == 16 else None),
    levels=("inner",),
)
plants("residual-missing", "t5 bloom", calls("add", lambda a: a["y"].copy()))
plants("residual-missing", "bloom", calls("add", lambda a: a["y"].copy(), number=2))
plants("residual-after-norm", "t5 bloom opt", post_norm, levels=("layer", "output"))
plants("residual-after-norm", "t5 bloom opt", residual_of_norm)
plants(
    "norm-before-residual",
    "opt",
    config(do_layer_norm_before=True, remove_final_layer_norm=True),
    levels=("layer", "output"),
    do_layer_norm_before=False,
)
plants("gelu-erf-for-tanh", "t5 bloom", activation("erf"))
plants("gelu-tanh-for-erf", "t5", activation("tanh"), activation="gelu")
plants("gelu-logistic", "t5 bloom", activation("logistic"))
plants("relu-for-gelu", "t5 bloom", activation("relu"))
plants("silu-for-gelu", "t5 bloom", activation("silu"))
plants("gelu-for-relu", "opt", activation("tanh"))
plants("gelu-for-relu", "t5", activation("erf"), activation="relu")
plants("silu-for-relu", "opt", activation("silu"))
plants("gelu-for-silu", "t5", activation("tanh"), activation="silu")
plants("activation-missing", "t5 opt bloom", activation("none"))
plants(
    "gate-swapped",
    "t5",
    swapped(("input_projector", "gate_projector"), ("gate_projector", "input_projector"), place=""),
    levels=("layer", "output"),
)
plants(
    "gate-activated", "t5", calls("multiply", lambda a: (a["x"] * OPS["gelu_approximate"].reference(a["y"])).astype(np.float32))
)
plants("gate-missing", "t5", calls("multiply", lambda a: a["x"].copy()))
plants("embeddings-scaled", "t5", calls("embedding", lambda a: a["embeddings"][a["ids"]] * np.float32(4)))
plants("embeddings-scaled", "opt bloom", calls("embedding", lambda a: a["embeddings"][a["ids"]] * np.float32(4), number=1))
plants("token-ids-shifted", "opt bloom", calls("embedding", lambda a: a["embeddings"][np.minimum(a["ids"] + 1, 39)], number=1))
plants(
    "decoder-inputs-shifted",
    "t5",
    given(lambda inputs: {**inputs, "decoder_token_ids": np.pad(inputs["decoder_token_ids"], ((0, 0), (1, 0)))[:, :-1]}),
)
plants(
    "embeddings-from-head-table",
    "t5 opt bloom",
    tables(lambda p: {"embeddings": p["reverse_embeddings"].T.copy()}),
    tie_embedding_weights=False,
)
plants(
    "positions-missing",
    "opt",
    weights(
        lambda params, config: params["position_embedding"].update(embeddings=params["position_embedding"]["embeddings"] * 0)
    ),
)
plants("position-offset-missing", "opt", positions(lambda ids: np.maximum(ids - 2, 0)))
plants(
    "position-offset-missing",
    "opt",
    arrays("position_embedding:", lambda rows: np.concatenate([rows[:, :2] * 3, rows[:, :-2]], 1)),
    levels=("inner",),
)
plants(
    "position-offset-missing",
    "opt",
    lambda model, inputs: {
        name: array
        for name, array in calls("embedding", own_first_rows, number=2)(model, inputs).items()
        if name != "position_embedding:embedding"
    },
    levels=("inner",),
)
plants("position-offset-twice", "opt", positions(lambda ids: ids + 2))
plants("position-off-by-one", "opt", positions(lambda ids: ids + 1))
plants(
    "positions-skip-padding",
    "opt",
    given(lambda inputs: {**inputs, "position_ids": np.maximum(inputs["padding_mask"].cumsum(1) - 1, 0)}),
    inputs={"side": "left"},
)
plants("logits-not-scaled", "t5", logits(lambda x, table, scale: x @ table.T))
plants("logits-scaled-twice", "t5", logits(lambda x, table, scale: x @ table.T / np.float32(16)))
plants("logits-scaled", "opt bloom", logits(lambda x, table, scale: x @ table.T / np.float32(4)))
plants(
    "head-from-other-table",
    "t5 opt bloom",
    tables(lambda p: {"reverse_embeddings": p["embeddings"].T.copy()}),
    tie_embedding_weights=False,
)


def only_first_biased(model, inputs):
    seen = []

    def make(a):
        if a["bias"] is not None:
            seen.append(1)
        found = np.einsum("bthd,bshd->bhts", a["query"], a["key"])
        first = len(seen) % model.config.num_layers == 1
        return found + a["bias"] if a["bias"] is not None and first else found

    return calls("attention_scores", make)(model, inputs)


# -- tests ------------------------------------------------------------------------------------------------------------------

KEPT = {
    "inner": lambda name: True,
    "layer": lambda name: bool(
        re.search(
            r"layers\.\d+:(opt_decoder_layer|bloom_decoder_layer|t5_\w+)$|^token_embedding:token_vectors|_backbone$", name
        )
        or re.search(r"^(opt_backbone:add|embedding_layernorm:layer_norm|t5_encoder|t5_decoder|\w+_logits)$", name)
    ),
    "output": lambda name: name.endswith("_logits"),
}


def differs(other, array):
    """By more than another order of summation makes."""
    if other.shape != array.shape or array.dtype.kind in "iub":
        return not np.array_equal(other, array)
    return not np.abs(other - array).max() <= 3e-6 * np.abs(array).max()


def first_difference(ours, theirs):
    for name, array in ours.items():
        other = theirs.get(name)
        if other is not None and differs(other, array):
            return name
    raise AssertionError("the plant changes nothing")


OURS = {}


def known(family, plant, level, given_inputs, config):
    model, inputs = model_of(family, **config), inputs_of(family, **given_inputs)
    key = (family, str(config), str(given_inputs))
    if key not in OURS:
        OURS[key] = run(model, inputs)
    ours = OURS[key]
    theirs = {name: array for name, array in plant(model, inputs).items() if KEPT[level](name)}
    return model, inputs, {name: array for name, array in ours.items() if KEPT[level](name)}, theirs


def best(findings):
    """The names that stand first: those that leave no more than the first does, as far as that is told apart."""
    if not findings:
        return []
    least = max(findings[0].left, NEGLIGIBLE)
    return [finding.name for finding in findings if finding.left <= least]


def rivals(name, number):
    """Some of the faults, this one among them."""
    return [fault for i, fault in enumerate(FAULTS) if fault.name == name or fault.rule or i % 24 == number % 24]


@pytest.mark.parametrize(("name", "family", "plant", "levels", "given_inputs", "config"), PLANTS)
def test_planted_fault_is_named(name, family, plant, levels, given_inputs, config):
    """Beside every other fault where each step is known; where only layers or the logits are, beside some of them."""
    twins = [i for i, plants in enumerate(PLANTS) if plants.values[2] is plant]
    number = next(i for i in twins if PLANTS[i].values[1] == family)
    for level in levels if number == twins[twins[0] % len(twins)] or THOROUGH else levels[:1]:
        model, inputs, ours, theirs = known(family, plant, level, given_inputs, config)
        step = first_difference(ours, theirs)
        faults = None if level == "inner" or THOROUGH else rivals(name, number)
        findings = diagnose(model, inputs, theirs, step, faults=faults)
        assert name in best(findings), f"{level}: {step}: {[(f.name, f.left, f.ratio) for f in findings]}"
        assert all(finding.step == step and finding.ratio <= 1 for finding in findings)


def test_every_fault_is_planted():
    planted = {plants.values[0] for plants in PLANTS}
    seen = set(SEEN)
    assert {fault.name for fault in FAULTS} == planted | seen


@pytest.mark.parametrize("family", ALL)
def test_a_right_run_has_no_fault(family):
    model, inputs = model_of(family), inputs_of(family)
    steps = run(model, inputs)
    for level in LEVELS:
        theirs = {name: array for name, array in steps.items() if KEPT[level](name)}
        assert replay(model, inputs, theirs).ok
        for name in list(theirs)[-1:] if level != "inner" else list(theirs)[:: len(theirs) // 5]:
            assert diagnose(model, inputs, theirs, name) == []
    assert diagnose(model, inputs, steps, "no:step") == []


def noisy(array):
    return array + (np.random.default_rng(2).standard_normal(array.shape) * 0.01 * np.abs(array).max()).astype(array.dtype)


UNKNOWN = {
    "tanh": calls("relu gelu_approximate", lambda a: np.tanh(a["x"])),
    "noise": calls("attention_scores", lambda a: noisy(OPS["attention_scores"].reference(**a))),
    "one head of none": calls(
        "merge_heads", lambda a: OPS["merge_heads"].reference(a["x"] * np.array([1, 0], np.float32)[:, None])
    ),
    "a column": calls(
        "linear", lambda a: OPS["linear"].reference(**a) * np.arange(1, a["kernel"].shape[1] + 1, dtype=np.float32)
    ),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize("family", ["opt", "bloom"])
def test_what_no_fault_explains_has_no_name(family, what, level):
    model, inputs, ours, theirs = known(family, UNKNOWN[what], level, {}, {})
    faults = None if level == "inner" or THOROUGH else rivals("", len(what))
    assert diagnose(model, inputs, theirs, first_difference(ours, theirs), faults=faults) == []


# -- what is seen in the arrays ---------------------------------------------------------------------------------------------

SEEN = {}


def seen(name, family, pattern, change, step=None, inputs=None, **config):
    SEEN.setdefault(name, []).append(
        pytest.param(name, family, pattern, change, inputs or {}, config, id=f"{name}-{family}-{pattern}")
    )


def cut_off(array):
    return np.clip(array, -64504, 64504)


def infinite(array):
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def half_of_them(array):
    kept = np.random.default_rng(1).random(array.shape) < 0.9
    return (np.where(kept, array / np.float32(0.9), 0)).astype(np.float32)


seen("rows-permuted", "opt", "layers.0:opt_decoder_layer", lambda a: a[[2, 0, 1]], inputs={"rows": 3, "side": "full"})
seen("rows-permuted", "bloom", r"attention_context$", lambda a: a[:, :, ::-1].copy())
seen("rows-permuted", "t5", r"masked_softmax$", lambda a: a[:, ::-1].copy())
seen("layout", "bloom", r"attention_scores$", lambda a: a.transpose(0, 2, 1, 3).copy())
seen("layout", "opt", r"query:linear$", lambda a: a.reshape(-1, a.shape[-1]))
seen("layout", "t5", r"token_vectors$", lambda a: a.transpose(1, 0, 2).copy())
for half in ("bfloat16", "float16"):
    seen("kept-in-half-precision", "opt", r"query:linear$", lambda a, half=half: rounded(a, half))
    seen("kept-in-half-precision", "bloom", r"layers.0:bloom_decoder_layer$", lambda a, half=half: rounded(a, half))
seen("constant-factor", "opt", r"key:linear$", lambda a: a * np.float32(8**-0.5))
seen("constant-factor", "t5", r"t5_feedforward$", lambda a: -a)
seen("constant-offset", "bloom", r"mlp_output_dense:linear$", lambda a: a + 1)
seen("dropout-active", "t5", r"token_vectors$", half_of_them)
seen("dropout-active", "opt", r"layer_norm:layer_norm$", half_of_them)
seen("overflow", "t5", r"encoder.layers.0.output_projector:linear$", infinite, loud=True)
seen("overflow", "t5", r"encoder.layers.0.output_projector:linear$", cut_off, loud=True)
seen("overflow", "t5", r"encoder.layers.0:t5_feedforward$", lambda a: a * np.nan, loud=True)
seen("nan-in-rows-without-keys", "opt", r"layers.0:opt_decoder_layer$", lambda a: a * np.nan, inputs={"side": "left"})
seen("nan-in-rows-without-keys", "bloom", r"attention_context$", lambda a: a * np.nan, inputs={"side": "left"})
seen("positions-from-left", "opt", None, None)
seen("norm-in-half-precision", "t5", None, None)


@pytest.mark.parametrize(
    ("name", "family", "pattern", "change", "given_inputs", "config"), [p for ps in SEEN.values() for p in ps if p.values[2]]
)
def test_fault_is_seen_in_the_arrays(name, family, pattern, change, given_inputs, config):
    inputs = inputs_of(family, **{**given_inputs, "side": "right"} if given_inputs.get("side") == "full" else given_inputs)
    if given_inputs.get("side") == "full":
        inputs["padding_mask"][:] = True
    model = model_of(family)
    if config.get("loud"):
        model = strong(BUILDERS[family]())
        for layer in layers(model.params):
            layer["output_projector"]["kernel"] *= np.float32(1e5)
    steps = run(model, inputs)
    step = next(name for name in steps if re.search(pattern, name))
    given_steps = {name: array for name, array in steps.items() if KEPT["layer"](step) <= KEPT["layer"](name)}
    faults = rivals(name, len(pattern)) if KEPT["layer"](step) and not THOROUGH else None
    findings = diagnose(model, inputs, {**given_steps, step: change(steps[step])}, step, faults=faults)
    assert name in best(findings), [(f.name, f.left, f.ratio) for f in findings]
    if name == "overflow":
        assert "65504" in findings[0].says
    if pattern == "key:linear$":
        assert "1/sqrt(head_dim)" in findings[0].says


def test_positions_from_left_where_others_are_given():
    model, inputs = model_of("opt"), inputs_of("opt", side="left")
    inputs["position_ids"] = np.maximum(inputs["padding_mask"].cumsum(1) - 1, 0)
    theirs = run(model, {name: array for name, array in inputs.items() if name != "position_ids"})
    for level in LEVELS:
        kept = {name: array for name, array in theirs.items() if KEPT[level](name) and name != "position_embedding:embedding"}
        step = first_difference(run(model, inputs), kept)
        assert best(diagnose(model, inputs, kept, step, faults=rivals("positions-from-left", 0))) == ["positions-from-left"]


def test_norm_in_half_precision():
    def norm(a, gain, shift):
        half = lambda array: rounded(array, "bfloat16")  # noqa: E731
        x = half(a["x"])
        root = half(np.sqrt(half(half(half(x * x).sum(-1, keepdims=True) / np.float32(16)) + np.float32(a["epsilon"]))))
        return half(half(x / root) * gain).astype(np.float32)

    model, inputs = model_of("t5"), inputs_of("t5")
    theirs = norms(norm)(model, inputs)
    findings = diagnose(model, inputs, theirs, "encoder.layers.0.self_attention_layer_norm:rms_norm")
    assert "norm-in-half-precision" in best(findings), findings


# -- ranking, types, cost ---------------------------------------------------------------------------------------------------


def test_equals_are_both_said():
    """An epsilon of 1e-12 or 1e-8 or none is the same beside these values."""
    model, inputs = model_of("opt"), inputs_of("opt")
    theirs = every_norm(epsilon=1e-12)(model, inputs)
    (finding,) = diagnose(model, inputs, theirs, "layers.0.self_attention_layer_norm:layer_norm")
    assert "1e-12" in finding.says
    assert "or 0" in finding.says


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_faults_are_named_in_other_types(dtype):
    pytest.importorskip("ml_dtypes")
    model = strong(BUILDERS["bloom"](dtype=dtype))
    inputs = inputs_of("bloom")
    theirs = calls("layer_norm", lambda a: OPS["layer_norm"].reference(**{**a, "gamma": (a["gamma"] + 1).astype(dtype)}))(
        model, inputs
    )
    for level in LEVELS:
        kept = {name: array for name, array in theirs.items() if KEPT[level](name)}
        first = replay(model, inputs, kept, arithmetic=Arithmetic(dtype)).first
        faults = rivals("norm-gain-plus-one", 0)
        findings = diagnose(model, inputs, kept, first.name, arithmetic=Arithmetic(dtype), faults=faults)
        assert best(findings) == ["norm-gain-plus-one"], level


def test_only_what_the_step_depends_on_is_tried(monkeypatch):
    from refmodels.verification.signatures import diagnosis

    tried = []
    fit = diagnosis._Case.fit
    monkeypatch.setattr(
        diagnosis._Case, "fit", lambda self, variant, before: (tried.append(variant), fit(self, variant, before))[1]
    )
    model, inputs = model_of("bloom"), inputs_of("bloom")
    theirs = activation("relu")(model, inputs)
    assert best(diagnose(model, inputs, theirs, "layers.0:gelu_approximate")) == ["relu-for-gelu"]
    assert len(tried) <= 6
    theirs = soft(lambda scores, mask: softmax(scores) * mask)(model, inputs)
    tried.clear()
    assert best(diagnose(model, inputs, theirs, "layers.0.self_attention:masked_softmax")) == ["mask-after-softmax"]
    assert len(tried) <= 24


# -- the documents ----------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_in_kebab_case():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 80
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    for fault in FAULTS:
        assert fault.says.endswith("."), fault.name
        assert set(fault.families) <= set(ALL), fault.name
        assert fault.ops <= OPS.keys(), fault.name
        assert fault.ops or fault.rule, fault.name


def test_the_table_of_names_is_that_of_the_code():
    from pathlib import Path

    from refmodels.verification.signatures import table

    path = Path(__file__).parents[1] / "spec" / "verification-signatures.md"
    assert path.read_text(encoding="utf-8").endswith(table())

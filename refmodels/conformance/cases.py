"""Examples of an op, drawn from its annotations and its entry in the table of domains.

`cases(op, dtype)` is the Hypothesis strategy; `draw_case(op, draw)` is what it does with the integers that it draws.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from refmodels.accelerator import Accelerator
from refmodels.conformance import domains, models
from refmodels.conformance.case import Case, Environment, Inputs, Script
from refmodels.conformance.domains import DOMAINS, LATER, LETTERS, NAMED, NEVER_EMPTY, NEVER_LONG, OMITTED, THEN
from refmodels.conformance.drawing import (
    EMPTY,
    LONG,
    SEED_CHOICE,
    USUAL,
    Draw,
    Source,
    Unsuitable,
    encoded,
    of_kind,
    random_source,
    replayed,
)
from refmodels.op import Array, Op, Shape
from refmodels.ops.cache import cache_allocate, cache_append, cache_select, key_value_cache
from refmodels.ops.precision import numpy_dtype

LEAVES = frozenset(
    ("kernel", "bias", "gamma", "beta", "weight", "embeddings", "embeddings_scale", "embeddings_zero", "kernel_scale", "g_idx",
     "kernel_zero", "kernel_weight_only_scale", "lora_kernel_a", "lora_kernel_b", "lora_scale")
)  # fmt: skip
"""Arguments that a model takes out of its tree of parameters."""


def letters_of(op: Op[..., Any], kind: str) -> tuple[str, ...]:
    """The letters of the op's arrays that may be 0, or thousands."""
    if op.name in models.BUILDERS:
        return models.letters_of(op, kind)
    if op.name in CACHES:
        return ("b", "p") if kind == EMPTY else ("p",)
    own = LETTERS.get(op.name)
    found = (
        list(own)
        if own
        else list(dict.fromkeys(dim for shape in op.shapes.values() for dim in shape.dims if not dim.isdecimal()))
    )
    plain = [dim.lstrip("#") if dim != "*#b" else "*b" for dim in found]
    kept = [dim for dim in dict.fromkeys(plain) if dim not in NEVER_LONG] if kind == LONG else list(dict.fromkeys(plain))
    if kind == EMPTY:
        never = NEVER_EMPTY.get(op.name, "")
        kept = [dim for dim in kept if dim not in never]
    if kind == LONG and len(kept) > 1:
        kept = [dim for dim in kept if dim not in ("b", "*b")]
    return tuple(kept)


def draw_case(op: Op[..., Any], source: Source, dtype: str, tiles: tuple[int, ...] = ()) -> Case:
    """One example of the op from these choices. `Unsuitable` if they do not lead to one."""
    draw = Draw(source, dtype, tiles, lambda kind: letters_of(op, kind))
    if op.name in models.BUILDERS:
        case = models.model_case(op, draw)
    elif op.name in CACHES:
        case = CACHES[op.name](op, draw)
    else:
        case = _plain_case(op, draw)
    finish(case, draw)
    return case


def finish(case: Case, draw: Draw) -> None:
    """Choose how the example is examined, and note what it shows."""
    case.seed, case.thorough, case.threaded = draw.below(2**16), draw.chance(3), draw.chance(10)
    case.features, case.code = draw.features, draw.code


# -- ops that take arrays -----------------------------------------------------------------------------------------------------


def _plain_case(op: Op[..., Any], draw: Draw) -> Case:
    arguments = _arguments(op, draw)
    loaded, by_name = draw.below(2) == 1, draw.chance(3)
    script = _call_script(op, loaded, by_name)
    if loaded and (LEAVES & arguments.keys() or "p" in arguments):
        draw.features.add("loaded")
    return Case(op, {name: value for name, value in arguments.items() if value is not OMITTED}, script, draw.dtype)


def _arguments(op: Op[..., Any], draw: Draw) -> Inputs:
    arguments: Inputs = {}
    names = sorted(op.signature.parameters, key=lambda name: name != "g_idx")  # whose groups other shapes depend on
    for name in names:
        parameter = op.signature.parameters[name]
        shape, optional = parameter.annotation, parameter.default is not inspect.Parameter.empty
        rule = DOMAINS.get(op.name, {}).get(name, NAMED.get(name))
        if rule is LATER:
            continue
        if isinstance(shape, Shape):
            if optional and name != "uniform" and draw.below(3) == 1:
                arguments[name] = draw.pick(OMITTED, None)
                continue
            arguments[name] = (rule or DEFAULTS[shape.kind])(draw, draw.shape(shape.dims))
        elif rule is not None:
            arguments[name] = rule(draw, ())
        elif not optional:
            raise TypeError(f"{op.name}: {name} is {parameter.annotation}; say in DOMAINS how it is drawn")
    for then in THEN.get(op.name, ()):
        then(draw, arguments)
    _alias(op, draw, arguments)
    return {name: arguments[name] for name in op.signature.parameters if name in arguments}


DEFAULTS = {
    "float": domains.floats(),
    "int": domains.ints(0, 9),
    "bool": lambda draw, shape: draw.bools(*shape),
    "array": domains.floats(),
}


UNLIKE = frozenset(("weights", "scale", "kernel_scale", "embeddings_scale", "penalty", "uniform", "probabilities"))
"""Arguments of a domain of their own: no other array can stand for them."""


def _alias(op: Op[..., Any], draw: Draw, arguments: Inputs) -> None:
    """Sometimes one array is given twice."""
    if op.name in THEN or not draw.chance(6):
        return
    known: dict[Any, Array] = {}
    for name, shape in op.shapes.items():
        value = arguments.get(name)
        if isinstance(value, np.ndarray) and shape.kind == "float" and name not in UNLIKE:
            first = known.setdefault((value.shape, value.dtype), value)
            if first is not value:
                draw.features.add("aliased")
                arguments[name] = first


def _call_script(op: Op[..., Any], loaded: bool, by_name: bool) -> Script:
    def script(inputs: Inputs, env: Environment) -> Any:
        values = {name: env.array(copy.deepcopy(value) if isinstance(value, np.random.Generator) else value)
                  for name, value in inputs.items()}  # fmt: skip
        values |= _loaded(op, inputs, env, loaded)
        return _call(op, values, by_name, env)

    return script


def _loaded(op: Op[..., Any], inputs: Inputs, env: Environment, loaded: bool) -> Inputs:
    """The arguments that are parameters, as `load` gives them: a tree always goes through it, single leaves by choice."""
    if "p" in inputs:
        return {"p": env.load({"token_embedding": inputs["p"]})["token_embedding"]}
    leaves = {name: inputs[name] for name in op.signature.parameters if name in LEAVES and inputs.get(name) is not None}
    if not loaded or not leaves or op.name in ("attention_scores", "attention", "lora_merged"):
        return {}
    layer = "token_embedding" if "embeddings" in leaves and "buckets" not in inputs else "layer"
    return dict(env.load({layer: leaves})[layer])


def _call(op: Op[..., Any], values: Inputs, by_name: bool, env: Environment) -> Any:
    """By place as far as may be, or by name."""
    args: list[Any] = []
    rest = dict(values)
    for name, parameter in op.signature.parameters.items():
        if by_name or name not in rest or parameter.kind is parameter.KEYWORD_ONLY:
            break
        args.append(rest.pop(name))
    return env.call(op, *args, **rest)


def single_row(case: Case, result: Any) -> tuple[Case, tuple[int, ...]] | None:
    """The call with one row of the batch alone, and the place of that row in the result; None for an op without such a law."""
    op, shapes = case.op, case.op.shapes
    batched = {name for name, shape in shapes.items() if shape.dims[:1] in (("*b",), ("*#b",), ("b",), ("#b",))}
    if (
        not {"rowwise", "elementwise"} & set(op.laws)
        or not isinstance(result, np.ndarray)
        or case.inputs.get("rng") is not None
    ):
        return None
    lead: tuple[int, ...] = ()
    for name in batched:
        value = case.inputs.get(name)
        if isinstance(value, np.ndarray):
            own = value.shape[: value.ndim - len(shapes[name].dims) + 1] if shapes[name].dims[0][0] == "*" else value.shape[:1]
            lead = own if len(own) > len(lead) or not lead else lead
    if not lead or 0 in lead or result.shape[: len(lead)] != lead:
        return None
    place = np.unravel_index(case.seed % int(np.prod(lead)), lead)
    inputs = dict(case.inputs)
    for name in batched:
        value = inputs.get(name)
        if isinstance(value, np.ndarray):
            own_place = tuple(0 if size == 1 else i for i, size in zip(place, value.shape, strict=False))
            inputs[name] = value[own_place][None]
    row = Case(op, inputs, case.script, case.dtype, features=case.features, code=case.code)
    return row, tuple(int(i) for i in place)


# -- caches -------------------------------------------------------------------------------------------------------------------


def _allocate_case(op: Op[..., Any], draw: Draw) -> Case:
    shape = (draw.size("b", high=9), draw.size("p", high=70), *draw.pick((2, 3), (), (1,), (4, 1)))
    dtype = draw.pick(draw.dtype, "bool")
    return Case(
        op, {"shape": shape, "type": dtype}, lambda inputs, env: env.call(op, inputs["shape"], inputs["type"]), draw.dtype
    )


def _key_value_case(op: Op[..., Any], draw: Draw) -> Case:
    inputs: Inputs = {"batch": draw.size("b", high=9), "capacity": draw.size("p", high=70)}
    inputs |= {"layers": draw.pick(1, 2, 3), "heads": draw.pick(1, 2, 3), "head_dim": draw.pick(1, 2, 5), "dtype": draw.dtype}

    def script(inputs: Inputs, env: Environment) -> Any:
        given = dict(inputs)
        cache = env.call(op, given.pop("batch"), given.pop("capacity"), **given)
        if not isinstance(cache, dict):
            return []
        empty = env.host(cache)
        shape = (inputs["batch"], inputs["capacity"], inputs["heads"], inputs["head_dim"])
        leaves = [layer[name] for layer in cache["layers"] for name in ("key", "value")]
        for i, leaf in enumerate(leaves):  # each has memory of its own
            cache_append(leaf, env.array(np.full(shape, i + 1.0, numpy_dtype(inputs["dtype"]))))
        return [empty, env.host(cache)]

    return Case(op, inputs, script, draw.dtype)


def _append_case(op: Op[..., Any], draw: Draw) -> Case:
    """A cache of the accelerator's own, filled by some calls; each is judged, and so is the whole cache at the end."""
    b, rest = draw.size("b", high=9), draw.pick((2, 3), (), (1,), (1, 5))
    first = draw.size("p", high=40)
    lengths = np.full(b, first) if draw.below(2) else draw.rng.integers(0, first + 1, b)
    blocks: list[Inputs] = [{"new": draw.floats(b, first, *rest, spikes=domains.ANYTHING), "start": None}]
    for _ in range(draw.below(4)):
        count = draw.pick(1, 2, 3, 0)
        start = draw.laid_out(lengths.astype(draw.pick(np.int64, np.int32)))
        blocks.append({"new": draw.floats(b, count, *rest, spikes=domains.ANYTHING), "start": start})
        lengths = lengths + count
    if len(set(lengths.tolist())) > 1:
        draw.features.add("ragged")
    ends = [first, *(int(block["start"].max(initial=0)) + block["new"].shape[1] for block in blocks[1:])]
    inputs = {"shape": (b, max(ends) + draw.pick(0, 1, 5), *rest), "blocks": blocks, "type": draw.dtype}

    def script(inputs: Inputs, env: Environment) -> Any:
        cache = cache_allocate(inputs["shape"], inputs["type"])
        results = []
        for block in inputs["blocks"]:
            start = () if block["start"] is None else (env.array(block["start"]),)
            results.append(env.host(env.call(op, cache, env.array(block["new"]), *start)))
        nothing = np.zeros((b, 0, *rest), inputs["blocks"][0]["new"].dtype)
        whole = env.call(op, cache, env.array(nothing), env.array(np.full(b, inputs["shape"][1])))
        return [*results, env.host(whole)]

    return Case(op, inputs, script, draw.dtype)


def _select_case(op: Op[..., Any], draw: Draw) -> Case:
    """Rows of a cache of the accelerator's own; the old cache is written to afterwards, which the new one must not show."""
    old = draw.floats(
        draw.size("beams", high=9), draw.size("p", high=40), *draw.pick((2, 3), (), (1,)), spikes=domains.ANYTHING
    )
    rows = draw.ints(draw.size("b", high=9), high=len(old))

    def script(inputs: Inputs, env: Environment) -> Any:
        cache = cache_allocate(inputs["old"].shape, inputs["type"])
        if inputs["old"].shape[1]:
            cache_append(cache, env.array(inputs["old"]))
        selected = env.call(op, cache, env.array(inputs["rows"]))
        if inputs["old"].shape[1]:
            cache_append(cache, env.array(np.ones_like(inputs["old"])))
        return selected

    return Case(op, {"old": old, "rows": rows, "type": draw.dtype}, script, draw.dtype)


CACHES = {
    cache_allocate.name: _allocate_case,
    key_value_cache.name: _key_value_case,
    cache_append.name: _append_case,
    cache_select.name: _select_case,
}
"""Ops on caches, which are made by the accelerator's own kernels."""


def with_other_values(case: Case, make: Callable[[Source], Case]) -> Case | None:
    """The same sizes, layouts and kinds of values, with other numbers."""
    choices = [int(part) for part in case.code.split(".")]
    choices += [0] * (SEED_CHOICE + 1 - len(choices))
    choices[SEED_CHOICE] = (choices[SEED_CHOICE] + 1 + case.seed) % 2**16
    try:
        return make(replayed(encoded(choices)))
    except Unsuitable:
        return None


def neighbour(case: Case, tiles: tuple[int, ...] = ()) -> Case | None:
    """Another example of the same op and type, of other sizes: what is called in between, or at the same time."""
    for attempt in range(4):
        try:
            return draw_case(case.op, of_kind(USUAL, random_source(case.seed + attempt)), case.dtype, tiles)
        except Unsuitable:
            continue
    return None


def is_known(op: Op[..., Any], accelerator: Accelerator | None = None) -> bool:
    """Whether examples of this op can be drawn: all of refmodels' own, and others whose arguments have annotations."""
    if op.name in models.BUILDERS or op.name in CACHES or op.name in DOMAINS:
        return True
    return all(
        isinstance(p.annotation, Shape) or p.default is not inspect.Parameter.empty or name in NAMED
        for name, p in op.signature.parameters.items()
    )

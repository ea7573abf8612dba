"""Golden vectors: for every op, and for a small model of each family, inputs with what comes out (`spec/vectors/README.md`).

    write_vectors(Path("spec/vectors"))     every file anew
    read_vectors(path)                      the cases of one op
    check_vectors(Path("spec/vectors"))     what no longer agrees with the reference

They are for those who do not run Python: a file can be read with a JSON parser alone. The inputs of an op come from the
conformance suite's drawing, plain ones first and then such as show something, and from `EDGES`. The file of a model is a trace.
"""

import copy
import json
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.conformance.case import same_bits
from refmodels.conformance.cases import draw_case
from refmodels.conformance.drawing import EMPTY, USUAL, Unsuitable, of_kind
from refmodels.conformance.models import BACKBONES, BUILDERS
from refmodels.files import CheckpointError, replacing
from refmodels.numerics import Verdict, judge_run, widened
from refmodels.op import OPS, Array, Op, executing, watching
from refmodels.opdoc import table
from refmodels.parameters import build_tree, flatten
from refmodels.trace import Trace, open_trace, traced
from refmodels.verification.lanes import Arithmetic
from refmodels.verification.replay import replay
from refmodels.weights.safetensors import open_tensors, read_metadata, write_file
from refmodels.weights.tensor import Tensor

FORMAT = "refmodels.vectors"
VERSION = 1
MADE_BY = "refmodels vectors: the NumPy reference in float32, and once more in float64 on the same inputs"
DRAWS, CASES, MOST_BYTES, MOST_BYTES_OF_MODELS = 32, 4, 5_000, 19_000
"""Examples that are looked at for each op, drawn cases that are kept of them at most, and how large their arguments may be."""

PLAINER = frozenset({"strided", "reversed", "read-only", "F", "C", "loaded", "aliased", "tile"})
"""What an example shows that leaves no mark in a file."""

UNWANTED = frozenset({"int8", "weight_int8", "int4", "adapter"})
"""Of the examples of layers and models: the ops that these are about have files of their own."""


@dataclass
class Vector:
    """One case of an op: its arguments, what it returns, the same in float64 (`truth`), and arguments that it wrote to
    (`after`). `truth` and `after` are None where there is nothing to say."""

    name: str
    arguments: dict[str, Any]
    result: Any
    truth: Any = None
    after: dict[str, Any] | None = field(default=None)


# -- cases --------------------------------------------------------------------------------------------------------------------


def _ramp(*shape: int, low: float = -3.0, high: float = 3.0) -> Array:
    """Evenly spaced numbers, in another order than that of memory."""
    values = np.linspace(low, high, int(np.prod(shape)))
    return values[np.arange(values.size) * 7 % values.size].reshape(shape).astype(np.float32)


def _edges() -> dict[str, dict[str, dict[str, Any]]]:
    scores = _ramp(2, 1, 2, 5)
    left_padded = np.array([[False, False, True, True, True], [True, True, True, True, False]])
    distances = np.arange(301)[None]
    far = np.float32(1e4) + _ramp(2, 5)
    return {
        "masked_softmax": {
            "left and right padding": {"scores": scores, "mask": left_padded[:, None, None]},
            "a row that permits no key": {"scores": scores, "mask": np.array([[[[True] * 5, [False] * 5]]])},
            "scores of 1000": {"scores": scores * np.float32(333), "mask": np.ones((1, 1, 1, 5), bool)},
        },
        "causal_mask": {"left and right padding": {"positions": np.arange(5)[None], "key_mask": left_padded}},
        "key_mask": {"left and right padding": {"padding_mask": left_padded}},
        "token_positions": {"from 0, however padded": {"ids": np.ones((2, 5), np.int64)}},
        "relative_position_buckets": {
            "encoder, distances to 300": {"positions": np.array([[0, 300]]), "keys": 301, "bidirectional": True},
            "decoder, distances to 300": {"positions": distances, "keys": 1, "bidirectional": False},
        },
        "alibi_slopes": {f"{count} heads": {"num_heads": count} for count in (1, 2, 3, 6, 8, 12, 14, 16, 112)},
        "alibi_bias": {
            "6 heads, 1000 keys back": {
                "slopes": OPS["alibi_slopes"].reference(6), "positions": np.array([[1000]]), "keys": 9,
            },
        },
        "layer_norm": {
            "a mean of 10000": {"x": far, "gamma": _ramp(5), "beta": _ramp(5, high=1.0)},
            "equal numbers": {"x": np.full((1, 5), 3.0, np.float32), "gamma": _ramp(5), "beta": _ramp(5)},
        },
        "rms_norm": {
            "a mean of 10000": {"x": far, "weight": _ramp(5)},
            "zeros": {"x": np.zeros((1, 5), np.float32), "weight": _ramp(5)},
        },
        **{name: {"from -8 to 8": {"x": np.linspace(-8, 8, 65, dtype=np.float32)[None]}}
           for name in ("gelu", "gelu_approximate", "silu", "relu")},
        "row_scale": {"a row of zeros": {"x": np.array([[0.0, 0.0], [1.0, -2.0]], np.float32)}},
        "last_rows": {"rows of other lengths": {"x": _ramp(3, 4, 2), "lengths": np.array([4, 1, 2])}},
        "greedy_token": {"a tie: the first": {"logits": np.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]], np.float32)}},
    }  # fmt: skip


def vectors_of(op: Op[..., Any]) -> Iterator[Vector]:
    """The cases of an op, the plain ones first; the same whenever it is asked."""
    for name, arguments in _edges().get(op.name, {}).items():
        yield _computed(op, name, arguments)
    taken: set[str] = set()
    known: list[dict[str, Any]] = []
    for features, arguments in _drawn(op):
        if len(known) >= CASES or (known and not features - taken) or any(same_bits(arguments, other) for other in known):
            continue
        vector = _computed(op, f"{len(known) + 1}: {', '.join(sorted(features)) or 'plain'}", arguments)
        if _bytes([vector.result, vector.after]) > 2 * MOST_BYTES:
            continue
        taken |= features
        known.append(arguments)
        yield vector


def _drawn(op: Op[..., Any]) -> Iterator[tuple[set[str], dict[str, Any]]]:
    """(what it shows, arguments of the call) of examples of the op, those that show less first."""
    found = []
    for seed in range(DRAWS):
        kind = EMPTY if seed % 8 == 7 and op.name not in BUILDERS else USUAL
        try:
            case = draw_case(op, of_kind(kind, random.Random(f"{op.name} {seed}").randrange), "float32")
        except Unsuitable:
            continue
        if op.name not in BUILDERS or not case.features & UNWANTED:
            found.append(case)
    for case in sorted(found, key=lambda case: (len(case.features - PLAINER), "empty" in case.features)):
        for number, arguments in enumerate(_calls(op, case.run)[:2]):
            if _fits(op, arguments):
                yield case.features - PLAINER | ({"a later call"} if number else set()), arguments


def _calls(op: Op[..., Any], run: Callable[[None], Any]) -> list[dict[str, Any]]:
    """The arguments of each outermost call of the op in a run, as they were before it."""
    found: list[dict[str, Any]] = []
    inside = False

    def observer(called: Op[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], proceed: Callable[[], Any]) -> Any:
        nonlocal inside
        if called is not op or inside:
            return proceed()
        found.append(copy.deepcopy(dict(op.signature.bind(*args, **kwargs).arguments)))
        inside = True
        try:
            return proceed()
        finally:
            inside = False

    with watching(observer), _quiet():
        run(None)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Infinities, NaN and empty axes are part of some examples."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _fits(op: Op[..., Any], arguments: Mapping[str, Any]) -> bool:
    """Small enough for its op, and nothing in it but what a file can hold."""
    if any(isinstance(leaf, np.random.Generator) for leaf in _leaves(arguments)):
        return False
    return _bytes(arguments) <= (MOST_BYTES_OF_MODELS if op.name in BUILDERS else MOST_BYTES)


def _bytes(value: Any) -> int:
    return sum(leaf.nbytes for leaf in _leaves(value) if isinstance(leaf, np.ndarray))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _leaves(child)
    else:
        yield value


def _computed(op: Op[..., Any], name: str, arguments: Mapping[str, Any]) -> Vector:
    result, after = _run(op)(dict(arguments))
    truth = _run(op)(widened(dict(arguments)))
    return Vector(name, dict(arguments), result, list(truth) if _is_rounded(op, result) else None, after or None)


def _is_rounded(op: Op[..., Any], result: Any) -> bool:
    """Whether float64 has more to say."""
    floats = [leaf for leaf in _leaves(result) if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f"]
    return op.error.kind != "exact" and bool(floats)


def _run(op: Op[..., Any]) -> Callable[[dict[str, Any]], tuple[Any, dict[str, Any]]]:
    """The op on copies of its arguments: what it returns, and the arguments that it writes to as they are then."""

    def run(arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        own = copy.deepcopy(arguments)
        with executing(None), _quiet():
            result = copy.deepcopy(op.reference(**own))
        return result, {name: own[name] for name in op.mutates if own.get(name) is not None}

    return run


# -- files of ops -------------------------------------------------------------------------------------------------------------


class _Pool:
    """Tensors by name; one that is there already, bit for bit, is not stored again."""

    def __init__(self) -> None:
        self.tensors: dict[str, Array] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def described(self, value: Any, name: str) -> Any:
        """`value` as JSON: an array is `{"tensor": name}`."""
        if isinstance(value, np.ndarray | np.generic):
            array = np.ascontiguousarray(value).reshape(np.shape(value))
            key = (array.dtype.name, array.shape, array.tobytes())
            if key not in self._known:
                self._known[key] = name
                self.tensors[name] = array
            return {"tensor": self._known[key]}
        if isinstance(value, dict):
            return {str(key): self.described(child, f"{name}.{key}") for key, child in value.items()}
        if isinstance(value, list | tuple):
            return [self.described(child, f"{name}.{i}") for i, child in enumerate(value)]
        if is_dataclass(value) and not isinstance(value, type):
            return {"config": _family(value), **asdict(value)}
        return value


def _family(config: Any) -> str:
    return next(name for name, kind in BACKBONES.items() if kind.config_class is type(config))


def save_vectors(path: Path, op: Op[..., Any]) -> None:
    """Write the file of one op."""
    pool, described = _Pool(), []
    for number, vector in enumerate(vectors_of(op), 1):
        entry = {
            "name": vector.name,
            "arguments": pool.described(vector.arguments, f"{number}.in"),
            "result": pool.described(vector.result, f"{number}.out"),
        }
        if vector.after is not None:
            entry["after"] = pool.described(vector.after, f"{number}.after")
        if vector.truth is not None:
            entry["truth"] = pool.described(vector.truth[0], f"{number}.truth")
            if vector.after is not None:
                entry["truth_after"] = pool.described(vector.truth[1], f"{number}.truth_after")
        described.append(entry)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "op": op.name,
        "module": op.__module__,
        "signature": str(op.signature).replace("numpy.ndarray[typing.Any, typing.Any]", "array"),
        "error_model": str(op.error),
        "source": op.source,
        "says": " ".join((op.__doc__ or "").split()),
        "cases": json.dumps(described, separators=(",", ":"), allow_nan=False),
        "made_by": MADE_BY,
    }
    with replacing(path) as beside:
        write_file(beside, [_stored(path, name, array) for name, array in pool.tensors.items()], metadata=metadata)


def _stored(path: Path, name: str, array: Array) -> Tensor:
    return Tensor(path, name, array.shape, array.dtype, lambda: array)


def read_vectors(path: Path) -> tuple[Op[..., Any], list[Vector]]:
    """The op whose cases the file holds, and the cases. ValueError for a file that is none of ours."""
    metadata = read_metadata(path.parent, path.name)
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise CheckpointError(f"{path}: wanted golden vectors of version {VERSION}, found {metadata.get('format', 'none')!r}")
    op = OPS.get(metadata.get("op", ""))
    if op is None:
        raise CheckpointError(f"{path}: no op is called {metadata.get('op', '')[:100]!r}")
    with open_tensors(path.parent, path.name) as tensors:
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
    found = []
    try:
        for entry in json.loads(metadata["cases"]):
            truth = [_built(entry["truth"], arrays), _built(entry.get("truth_after"), arrays)] if "truth" in entry else None
            arguments = {name: _built(value, arrays) for name, value in entry["arguments"].items()}
            after = _built(entry.get("after"), arrays)
            found.append(Vector(entry["name"], arguments, _built(entry["result"], arrays), truth, after))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its cases are not as spec/vectors/README.md says: {error!r}") from None
    return op, found


def _built(value: Any, arrays: Mapping[str, Array]) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor"}:
        return arrays[value["tensor"]]
    if isinstance(value, dict) and "config" in value:
        kind = BACKBONES[value["config"]].config_class
        return kind(**{name: child for name, child in value.items() if name not in ("config", "_")})
    if isinstance(value, dict):
        return {key: _built(child, arrays) for key, child in value.items()}
    if isinstance(value, list):
        return [_built(child, arrays) for child in value]
    return value


# -- files of models ----------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {"activation": "gelu_approximate", "tie_embedding_weights": False, "key_value_dim": 3}),
    "t5_relu_tied": ("t5", {"use_gated_activation": False}),
    "opt": ("opt", {"max_sequence_length": 16}),
    "opt_350m_style": ("opt", {"max_sequence_length": 16, "word_embed_proj_dim": 4, "do_layer_norm_before": False}),
    "bloom": ("bloom", {}),
}
"""File -> (family, arguments beside the sizes). Three heads everywhere: no power of two, for ALiBi."""


def small_model(name: str, dtype: str = "float32") -> Backbone:
    """The model of this file, with parameters that all matter: no bias is 0, no norm 1."""
    family, extra = MODELS[name]
    sizes: dict[str, Any] = {"vocabulary_size": 31, "num_layers": 2, "num_heads": 3, "hidden_dim": 6, "intermediate_dim": 8}
    model = BACKBONES[family](**sizes, **extra, dtype=dtype)
    generator = np.random.default_rng(20)

    def leaf(parameter: Any) -> Array:
        values = generator.integers(-1000, 1001, parameter.shape) / 1000  # numbers that any language forms alike
        return np.asarray(values + (parameter.path.endswith(("gamma", "weight"))), np.float32)

    model.params = build_tree(model.plain_parameters(), lambda parameter: leaf(parameter).astype(dtype))
    return model


def small_inputs(model: Backbone) -> dict[str, Array]:
    """A row without padding, one padded on the left, one on the right."""
    generator = np.random.default_rng(21)
    real = np.array([[True] * 6, [False] * 2 + [True] * 4, [True] * 3 + [False] * 3])
    ids = generator.integers(3, 31, (3, 6))
    if model.family != "t5":
        return {"token_ids": ids, "padding_mask": real}
    target = np.array([[True] * 5, [True] * 5, [True] * 2 + [False] * 3])
    return {
        "encoder_token_ids": ids,
        "encoder_padding_mask": real,
        "decoder_token_ids": generator.integers(3, 31, (3, 5)),
        "decoder_padding_mask": target,
    }


def save_model(directory: Path, name: str) -> None:
    """Write two traces: NAME.safetensors in float32 with inputs and parameters, NAME.float64.safetensors in float64."""
    model = small_model(name)
    inputs = small_inputs(model)
    config = {key: value for key, value in model.get_config().items() if key not in ("name", "trainable", "dtype")}
    facts = {"model": name, "family": model.family, "config": json.dumps(config), "made_by": MADE_BY}
    parameters = {f"params.{path}": array for path, array in flatten(model.params)}
    steps = traced(model, inputs)
    Trace(steps, {**inputs, **parameters}, facts | {"dtype": "float32"}).save(directory / f"{name}.safetensors")
    truth = traced(small_model(name, "float64"), inputs)
    Trace(truth, {}, facts | {"dtype": "float64"}).save(directory / f"{name}.float64.safetensors")


# -- all of them --------------------------------------------------------------------------------------------------------------


def write_vectors(directory: Path, progress: Callable[[str], None] = lambda name: None) -> list[Path]:
    """Write every file into `directory`: ops/NAME.safetensors and models/NAME.safetensors. Gives their paths."""
    for part in ("ops", "models"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    written = []
    for op in table():
        progress(op.name)
        written.append(directory / "ops" / f"{op.name}.safetensors")
        save_vectors(written[-1], op)
    for name in MODELS:
        progress(name)
        save_model(directory / "models", name)
        written += [directory / "models" / f"{name}{kind}.safetensors" for kind in ("", ".float64")]
    return written


def check_vectors(directory: Path) -> list[str]:
    """What in these files does not agree with the reference, a line each: exact results bit for bit, others by the op's error
    model, as a sum may be formed in another order on another machine."""
    problems: list[str] = []
    for op in table():
        path = directory / "ops" / f"{op.name}.safetensors"
        problems += _wrong_vectors(path) if path.is_file() else [f"{path}: there is no such file"]
    for name in MODELS:
        problems += _wrong_model(directory / "models", name)
    return problems


def _wrong_vectors(path: Path) -> Iterator[str]:
    op, vectors = read_vectors(path)
    if not vectors:
        yield f"{path}: no case"
    for vector in vectors:
        stored = {"": (vector.arguments, [vector.result, vector.after])}
        if vector.truth is not None:
            stored[", in float64"] = (widened(vector.arguments), vector.truth)
        if (vector.truth is None) is _is_rounded(op, _run(op)(vector.arguments)[0]):
            yield f"{path}: {vector.name}: the float64 result is {'missing' if vector.truth is None else 'not wanted'}"
        for kind, (arguments, (result, after)) in stored.items():
            verdict = _verdict(op, arguments, result, after)
            if not verdict:
                yield f"{path}: {vector.name}{kind}: {verdict.reason}"


def _verdict(op: Op[..., Any], arguments: dict[str, Any], result: Any, after: Any) -> Verdict:
    run = _run(op)
    with _quiet():
        if after is None:  # an error model may want the array alone
            return judge_run(op, lambda inputs: run(inputs)[0], arguments, _like(result, run(arguments)[0]))
        return judge_run(op, run, arguments, _like((result, after), run(arguments)))


def _like(value: Any, pattern: Any) -> Any:
    """A tree from a file with tuples, and numbers in place of arrays, where the pattern has them."""
    if isinstance(value, list | tuple) and isinstance(pattern, list | tuple):
        return type(pattern)(_like(child, other) for child, other in zip(value, pattern, strict=True))
    if isinstance(value, dict) and isinstance(pattern, dict):
        return {key: _like(child, pattern.get(key)) for key, child in value.items()}
    return value


def _wrong_model(directory: Path, name: str) -> Iterator[str]:
    for dtype, kind in (("float32", ""), ("float64", ".float64")):
        path = directory / f"{name}{kind}.safetensors"
        if not path.is_file():
            yield f"{path}: there is no such file"
            continue
        model = small_model(name, dtype)
        inputs = small_inputs(model)
        with open_trace(path) as steps:
            report = replay(model, inputs, steps, arithmetic=Arithmetic(dtype))
            yield from (f"{path}: {step.local.reason}" for step in report.wrong)
            yield from (f"{path}: no step {step}" for step in report.absent)
            yield from (f"{path}: {step} is no step of ours" for step in report.unknown)
            if kind:
                continue
            known = {**inputs, **{f"params.{path}": array for path, array in flatten(model.params)}}
            if not same_bits(steps.inputs, {key: np.asarray(value) for key, value in known.items()}):
                yield f"{path}: its inputs or parameters are not those that are made now"

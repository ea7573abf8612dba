"""The forms in which an implementation can be handed over: a Python function or object, a process, arrays made elsewhere.

What each has to do is in `spec/verification.md`, the files that a process reads and writes in `spec/traces.md`.
"""

import difflib
import importlib
import inspect
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.backbone import Backbone, embeddings_name
from refmodels.files import CheckpointError, read_json
from refmodels.op import Array
from refmodels.ops.precision import numpy_dtype
from refmodels.trace import StoredTrace, Trace, open_trace
from refmodels.verification.candidate import Candidate, CandidateError
from refmodels.verification.mapping import MappingError, NameMap, Renamed, output_step
from refmodels.verification.replay import Report, step_names

TIMEOUT = 600.0
"""Seconds that a process has for one run."""

SHOWN = 4000
"""Characters of a process's last words that are shown."""

INPUT_NAMES = {
    "input_ids": ("encoder_token_ids", "token_ids"),
    "attention_mask": ("encoder_padding_mask", "padding_mask"),
    "decoder_input_ids": ("decoder_token_ids",),
    "decoder_attention_mask": ("decoder_padding_mask",),
}
"""What others call the inputs -> what they are here."""


class ProcessError(CandidateError):
    """A process that failed; `said` are its last words, of which the message has the last line."""

    def __init__(self, problem: str, said: str) -> None:
        self.said = "".join(c if c.isprintable() or c == "\n" else "?" for c in said.expandtabs())
        last = self.said.rpartition("\n")[2][-300:]
        super().__init__(f"{problem}; it said: {last or 'nothing'}")


class Form(Candidate):
    """A candidate that gives arrays by any names; a `NameMap` makes our steps of them.

    takes_checkpoint   it has the weights from the directory that was written for it, so that it can be built for others
    spec               `mypkg.model:build`, which a script can call with `checkpoint=` or nothing; None if it cannot
    """

    takes_checkpoint = False
    spec: str | None = None

    def __init__(self, name: str, model: Backbone, *, products: str = "", names: NameMap | None = None) -> None:
        self.name, self.dtype, self.products = name, model.compute_dtype, products
        self.names = names or NameMap()
        self._model = model
        self._labels: dict[str, str] = {}

    @abstractmethod
    def raw(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        """Run it; what it gives, by its own names."""

    def run(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Renamed:
        raw = self.raw(inputs, inject)
        shapes = cache(lambda: step_names(self._model, inputs))
        found = self.names.applied(raw, self._model.family, lambda step: shapes().get(step))
        self._labels |= {step: label for step in found if (label := found.label(step)) is not None}
        return found

    def check_names(self, report: Report) -> None:
        """MappingError if the mapping file says of something that it is a step which the model has not."""
        for step in report.unknown:
            if step in self._labels:
                near = difflib.get_close_matches(step, [*report.absent, *(found.name for found in report.steps)], 3, 0.0)
                raise MappingError(f"{self._labels[step]}: the model has no step {step!r}; near are {', '.join(near)}")


# -- Python -----------------------------------------------------------------------------------------------------------------


class FunctionForm(Form):
    """A function `f(inputs)` that gives an array, or a dictionary of arrays by names of outputs or steps."""

    def __init__(self, function: Callable[..., Any], name: str, model: Backbone, **options: Any) -> None:
        super().__init__(name, model, **options)
        self._function = function

    def raw(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        result = _called(self.name, self._function, inputs, {name: array.copy() for name, array in inputs.items()})
        if isinstance(result, Mapping):
            return {_text(self.name, key): as_array(self.name, str(key), value) for key, value in result.items()}
        array = as_array(self.name, "its result", result)
        return {sole_output(self.name, array, inputs, self._model): array}


class ObjectForm(Form):
    """An object with a method `run(inputs, inject=None)`, and whatever else a `Candidate` has: all of it is optional."""

    def __init__(self, held: Any, name: str, model: Backbone, **options: Any) -> None:
        super().__init__(name, model, **options)
        self._held = held
        self.name = str(getattr(held, "name", name))
        self.products = self.products or str(getattr(held, "products", ""))
        self.injects = frozenset(getattr(held, "injects", ()))
        dtype = getattr(held, "dtype", self.dtype)
        if dtype != self.dtype:
            raise CandidateError(
                f"{name} says that it computes in {dtype}, and the reference is in {self.dtype}: --dtype {dtype}"
            )

    def raw(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        copies = {name: array.copy() for name, array in inputs.items()}
        result = _called(self.name, self._held.run, inputs, copies, *(() if inject is None else (inject,)))
        if not isinstance(result, Mapping):
            raise CandidateError(f"{self.name}: run() gives {type(result).__name__}, wanted a dictionary of arrays by name")
        if isinstance(result, Trace | StoredTrace | Renamed):  # these are read one at a time
            return result
        return {_text(self.name, key): as_array(self.name, str(key), value) for key, value in result.items()}

    def chunked(self, inputs: Mapping[str, Array], sizes: Sequence[int]) -> Array | None:
        return self._optional("chunked", inputs, inputs, sizes)

    def generate(self, inputs: Mapping[str, Array], count: int) -> Array | None:
        return self._optional("generate", inputs, inputs, count)

    def facts(self) -> dict[str, str]:
        found: Mapping[Any, Any] = getattr(self._held, "facts", dict)()
        return {str(key): str(value) for key, value in found.items()}

    def close(self) -> None:
        getattr(self._held, "close", lambda: None)()

    def _optional(self, method: str, inputs: Mapping[str, Array], *arguments: Any) -> Array | None:
        function = getattr(self._held, method, None)
        result = None if function is None else _called(f"{self.name}.{method}", function, inputs, *arguments)
        return None if result is None else as_array(self.name, method, result)


PACKAGES = ("keras_hub", "transformers")
"""Packages whose own models are verified by their bare names."""


def load_object(spec: str) -> Any:
    """What `mypkg.model:build` names, or a package by its bare name. The current directory is looked in first. CandidateError
    says what is not there."""
    if spec in PACKAGES:
        spec = f"refmodels.verification.adaptors.{spec}:build"
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        known = ", ".join(PACKAGES)
        raise CandidateError(f"{spec!r} is no Python object: wanted MODULE:NAME, such as mypkg.model:build, or {known}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise CandidateError(f"{spec}: no module {error.name!r}, neither in {here} nor on sys.path") from None
        raise CandidateError(f"{spec}: importing {module_name} fails: {_reason(error)}") from error
    except (Exception, SystemExit) as error:
        raise CandidateError(f"{spec}: importing {module_name} fails: {_reason(error)}") from error
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = difflib.get_close_matches(name, dir(found), 3, 0.6)
            raise CandidateError(f"{spec}: {module_name} has no {attribute!r}{f'; near are {near}' if near else ''}")
        found = getattr(found, name)
    return found


def python_form(spec: str, model: Backbone, checkpoint: Callable[[], Path], **options: Any) -> Form:
    """What `mypkg.model:build` makes. It is called with `checkpoint=`, a directory with our weights as Hugging Face's files,
    and `model=`, our backbone, if it takes those; it may give a function, a `Candidate` or another object with `run`."""
    build = load_object(spec)
    if not callable(build):
        return _python_form(spec, build, model, options)
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if set(needed) - {"checkpoint", "model"}:
        raise CandidateError(
            f"{spec} takes {', '.join(needed)}: wanted a function that gives the model, of nothing but checkpoint and model"
        )
    taken = {parameter.name for parameter in parameters}
    arguments: dict[str, Any] = {"checkpoint": checkpoint()} if "checkpoint" in taken else {}
    if "model" in taken:
        arguments["model"] = model
    try:
        built = build(**arguments)
    except CandidateError:
        raise
    except (Exception, SystemExit) as error:
        raise CandidateError(f"{spec} fails: {_reason(error)}") from error
    form = _python_form(spec, built, model, options)
    form.takes_checkpoint = bool(arguments)
    form.spec = None if "model" in arguments else spec
    return form


def _python_form(spec: str, built: Any, model: Backbone, options: dict[str, Any]) -> Form:
    if callable(getattr(built, "run", None)):
        return ObjectForm(built, spec, model, **options)
    if callable(built):
        return FunctionForm(built, spec, model, **options)
    raise CandidateError(f"{spec} gives {type(built).__name__}, wanted a function or an object with run(inputs, inject=None)")


def as_array(owner: str, name: str, value: Any) -> Array:
    """A NumPy array of anything that is an array, such as a framework's tensor on any device; CandidateError if it is none."""
    if hasattr(value, "detach"):  # PyTorch's: NumPy takes them neither from a GPU nor in bfloat16
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            return np.asarray(value.float()).astype(numpy_dtype("bfloat16"))
    try:
        array = np.asarray(value)
    except (Exception, SystemExit) as error:
        raise CandidateError(f"{owner}: {name} is {type(value).__name__}, wanted an array: {_reason(error)}") from None
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise CandidateError(f"{owner}: {name} is {type(value).__name__} of dtype {array.dtype}, wanted an array of numbers")
    return array


def sole_output(owner: str, array: Array, inputs: Mapping[str, Array], model: Backbone) -> str:
    """Which output an array without a name is, by its shape. CandidateError if that does not tell."""
    rows = inputs["decoder_token_ids" if model.family == "t5" else "token_ids"].shape
    shapes = {"logits": (*rows, model.config.vocabulary_size), "hidden": (*rows, model.embedding_dim)}
    fitting = [name for name, shape in shapes.items() if shape == array.shape]
    if len(fitting) != 1:
        known = " or ".join(f"{shape} ({name})" for name, shape in shapes.items())
        words = f"has shape {array.shape}, wanted {known}" if not fitting else f"of shape {array.shape} may be either"
        raise CandidateError(f"{owner}: its result {words}: give a dictionary, such as {{'logits': ...}}")
    return str(output_step(fitting[0], model.family))


def _text(owner: str, key: Any) -> str:
    if not isinstance(key, str):
        raise CandidateError(f"{owner}: gives something under {key!r}, wanted names of outputs or steps")
    return key


def _called(owner: str, function: Callable[..., Any], inputs: Mapping[str, Array], *arguments: Any) -> Any:
    """What it gives; CandidateError if it fails, or if it would end Python, as a script may: that is no exit status of ours."""
    try:
        return function(*arguments)
    except CandidateError:
        raise
    except (Exception, SystemExit) as error:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
        raise CandidateError(f"{owner} fails on {shapes}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """An error of theirs in one line: what, and in which line of which file."""
    text = " ".join(str(error).split())[:500]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"


# -- a process --------------------------------------------------------------------------------------------------------------


class ProcessForm(Form):
    """A command that is run with the paths of two safetensors files: its input, and its output, which it writes.

    `{checkpoint}` in the command becomes a directory with our weights as Hugging Face's files. What it wrote stays on the disk
    until `close`.
    """

    def __init__(
        self,
        command: str,
        model: Backbone,
        checkpoint: Callable[[], Path],
        *,
        injects: frozenset[str] = frozenset(),
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> None:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise CandidateError(f"the command {command!r} cannot be split into words: {error}") from None
        if not words:
            raise CandidateError("the command is empty")
        super().__init__(words[0], model, **options)
        used = any("{checkpoint}" in word for word in words)
        self.takes_checkpoint = used
        place = str(checkpoint()) if used else ""
        self._command = [word.replace("{checkpoint}", place) for word in words]
        self._timeout, self.injects = timeout, injects
        self._facts: dict[str, str] = {}
        self._stack = ExitStack()

    def raw(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> StoredTrace:
        place = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="refmodels-")))
        given, output = place / "input.safetensors", place / "output.safetensors"
        facts = {"family": self._model.family, "dtype": self.dtype}
        Trace({f"inject.{name}": array for name, array in (inject or {}).items()}, inputs, facts).save(given)
        status, said = self._ran([*self._command, str(given), str(output)], place)
        given.unlink()
        if status != 0:
            how = f"was ended by signal {-status}" if status < 0 else f"gives exit status {status}"
            raise ProcessError(f"{self.name} {how}", said)
        if not output.is_file() or output.is_symlink():
            raise ProcessError(f"{self.name} gives exit status 0 and writes no file {output.name}", said)
        try:
            found = self._stack.enter_context(open_trace(output))
        except CheckpointError as error:
            raise CandidateError(f"{self.name} writes no sound output: {error}") from None
        self._facts |= found.facts
        return found

    def facts(self) -> dict[str, str]:
        return dict(self._facts)

    def close(self) -> None:
        self._stack.close()

    def _ran(self, command: Sequence[str], place: Path) -> tuple[int, str]:
        """The exit status and the last words of a run; nothing of it is left when it ends or is ended."""
        with (place / "said").open("w+b") as said:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise CandidateError(f"{command[0]} cannot be run: {error.strerror or error}") from None
            try:
                status = process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                problem = f"{self.name} has not ended after {self._timeout:g} seconds"
                raise ProcessError(problem, _last_words(said)) from None
            finally:
                with suppress(ProcessLookupError, PermissionError):  # itself and what it started
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return status, _last_words(said)


def _last_words(said: Any) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - SHOWN))
    return str(said.read(SHOWN).decode(errors="replace")).strip()


# -- arrays made elsewhere --------------------------------------------------------------------------------------------------


class DumpsForm(Form):
    """Arrays of one run that was made elsewhere: a directory of safetensors, npy and npz files, or one such file."""

    def __init__(self, path: str | Path, model: Backbone, inputs: Mapping[str, Array] | None = None, **options: Any) -> None:
        super().__init__(str(path), model, **options)
        self._stack = ExitStack()
        self._trace = self._stack.enter_context(open_trace(Path(path).resolve()))
        stored = self._trace.inputs
        if inputs is None and not stored:
            self.close()
            raise CandidateError(f"{path}: has no inputs (in.token_ids ...), and there is no --inputs FILE")
        self.inputs = model_inputs(inputs or stored, model, str(path))

    def raw(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> StoredTrace:
        for name, array in self.inputs.items():
            if not np.array_equal(array, inputs.get(name, ())):
                raise CandidateError(f"{self.name}: arrays of one run, and not of one with other {name}")
        return self._trace

    def facts(self) -> dict[str, str]:
        return dict(self._trace.facts)

    def close(self) -> None:
        self._stack.close()


def read_inputs(path: str | Path, model: Backbone) -> dict[str, Array]:
    """The inputs in a safetensors, npz or JSON file (`{"token_ids": [[2, 5, 7]]}`), checked. ValueError says what is wrong."""
    path = Path(path).resolve()
    if path.suffix == ".json":
        try:
            found = {name: np.asarray(value) for name, value in read_json(path.parent, path.name).items()}
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
    else:
        with open_trace(path) as stored:
            found = {**{name: stored[name] for name in stored}, **stored.inputs}
    return model_inputs(found, model, str(path))


def model_inputs(found: Mapping[str, Array], model: Backbone, source: str) -> dict[str, Array]:
    """The inputs of the model among these, by its names or by others' (`INPUT_NAMES`); a mask that is missing is all true."""
    accepted = [name for token, others in model.inputs.items() for name in (token, *others, embeddings_name(token))]
    inputs: dict[str, Array] = {}
    for name, array in found.items():
        ours = next((ours for ours in (name, *INPUT_NAMES.get(name, ())) if ours in accepted), None)
        if ours is None or ours in inputs:
            raise CheckpointError(f"{source}: input {name[:300]!r} is none of {', '.join(accepted)}, or is there twice")
        inputs[ours] = array
    try:
        return {name: np.asarray(array) for name, array in model.checked(inputs).items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from None

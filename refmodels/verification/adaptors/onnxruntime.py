"""ONNX Runtime: an exported OPT, BLOOM or T5, its logits and what its graph says of the way there.

    torch.onnx.export(model, (), "model.onnx", kwargs=..., input_names=[...], output_names=["logits"], dynamic_shapes=...)
    candidate = OnnxRuntimeCandidate("model.onnx", model)

Inner tensors are made outputs of the graph. Either exporter of PyTorch leaves the path of the module in it that a node comes
from, in the names of tensors or in metadata; modules are known by what Transformers calls their parameters. Other tensors, and
graphs of other makers, are named by `names`.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refmodels.backbone import Backbone
from refmodels.op import Array
from refmodels.verification.candidate import Candidate, CandidateError

INPUTS = {
    "input_ids": ("token_ids", "encoder_token_ids"),
    "attention_mask": ("padding_mask", "encoder_padding_mask"),
    "decoder_input_ids": ("decoder_token_ids",),
    "decoder_attention_mask": ("decoder_padding_mask",),
    "position_ids": ("position_ids",),
}
"""Names of a graph's inputs, as Transformers' -> ours."""

KINDS = {"kernel": "linear", "embeddings": "embedding", "gamma": "layer_norm", "weight": "rms_norm"}
"""The leaf of a module that we know it by -> the op that the module is."""

SCOPES = "pkg.torch.onnx.name_scopes"


class OnnxRuntimeCandidate(Candidate):
    """The graph in an ONNX file under test; `model` is what it is held to.

    `names` says which tensor of the graph is which step of ours, beside or in place of what is found; with `inner=False`
    nothing is looked for but the outputs. `optimize=False` runs the graph as it was exported.
    """

    def __init__(
        self,
        path: str | Path,
        model: Backbone,
        *,
        names: Mapping[str, str] | None = None,
        inner: bool = True,
        optimize: bool = True,
        name: str = "",
        products: str = "",
    ) -> None:
        import onnx
        import onnxruntime

        self.family, self.products = model.family, products
        self.name = name or f"{Path(path).name} in ONNX Runtime"
        options = onnxruntime.SessionOptions()
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(Path(path).parent))
        try:
            graph = onnx.load(str(path), load_external_data=False)
            outputs = [output.name for output in graph.graph.output]
            self.names = {"logits": f"{model.family}_logits"} if "logits" in outputs else {}
            self.names |= dict(modules(graph.graph, model)) if inner else {}
            self.names |= names or {}
            known = {tensor for node in graph.graph.node for tensor in node.output}
            for tensor in self.names:
                if tensor not in known:
                    raise CandidateError(f"{path}: its graph has no tensor {tensor!r}")
                if tensor not in outputs:
                    graph.graph.output.append(onnx.ValueInfoProto(name=tensor))
            self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except CandidateError:
            raise
        except Exception as error:  # protobuf's and ONNX Runtime's have no common base
            raise CandidateError(f"{path}: ONNX Runtime cannot load it: {error}") from error
        if not self.names:
            raise CandidateError(f"{path}: no tensor has a known name; its outputs are {', '.join(outputs)}")
        kinds = [output.type for output in self._session.get_outputs() if output.name in self.names]
        self.dtype = {"tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}.get(kinds[0], "float32")

    def run(self, inputs: Mapping[str, Array], inject: Mapping[str, Array] | None = None) -> Mapping[str, Array]:
        given = {wanted.name: self._input(wanted, inputs) for wanted in self._session.get_inputs()}
        if self.family == "opt" and "position_ids" not in given:
            self._check_positions(inputs)
        try:
            found = self._session.run(list(self.names), given)
        except Exception as error:
            raise CandidateError(f"{self.name} failed: {error}") from error
        rows = {np.shape(array) for name, array in inputs.items() if name.endswith("token_ids")}
        return {step: _in_rows(array, rows) for step, array in zip(self.names.values(), found, strict=True)}

    def facts(self) -> dict[str, str]:
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__, "providers": ", ".join(self._session.get_providers())}

    def _input(self, wanted: Any, inputs: Mapping[str, Array]) -> Array:
        ours = next((name for name in INPUTS.get(wanted.name, ()) if name in inputs), None)
        dtype = {"tensor(int32)": np.int32, "tensor(bool)": np.bool_}.get(wanted.type, np.int64)
        if ours is not None:
            return np.asarray(inputs[ours]).astype(dtype)
        if wanted.name == "position_ids":
            ids = inputs["token_ids"]
            return np.broadcast_to(np.arange(np.shape(ids)[1]), np.shape(ids)).astype(dtype)
        raise CandidateError(f"{self.name} wants an input {wanted.name!r}; known are {', '.join(INPUTS)}")

    def _check_positions(self, inputs: Mapping[str, Array]) -> None:
        """Its graph counts OPT's positions by the mask, as Transformers does; ours counts padding too (OPT-C1)."""
        ids = np.asarray(inputs["token_ids"])
        mask = np.asarray(inputs.get("padding_mask", np.ones(ids.shape))).astype(np.int64)
        wanted = np.broadcast_to(inputs.get("position_ids", np.arange(ids.shape[1])), ids.shape)
        if (((mask.cumsum(1) - 1) != wanted) & (mask > 0)).any():
            raise CandidateError(f"{self.name} counts positions by the mask: give it position_ids, or no padding on the left")


def modules(graph: Any, model: Backbone) -> Iterator[tuple[str, str]]:
    """(tensor of the graph, our step) for every module of Transformers' that is one op of ours: the last that it makes."""
    last: dict[str, str] = {}
    for node in graph.node:
        last[_scope(node)] = node.output[0]
    taken = set()
    for parameter in model.plain_parameters():
        place, _, leaf = parameter.path.rpartition(".")
        if leaf not in KINDS or parameter.layout not in ("same", "transposed"):
            continue
        if leaf == "embeddings" and model.family == "t5":  # looked up by either stack; and its biases
            continue
        for name in parameter.huggingface:
            wanted = name.removesuffix(".weight")
            scope = next((scope for scope in last if scope == wanted or scope.endswith(f".{wanted}")), None)
            if scope is not None and scope not in taken and last[scope] != "logits":
                taken.add(scope)
                op = KINDS[leaf]
                yield last[scope], op if place == op else f"{place}:{op}"
                break


def _scope(node: Any) -> str:
    """The path of the module that a node comes from: `model.decoder.layers.0.fc1`; empty if it is not known."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            try:
                return str(ast.literal_eval(entry.value)[-2])
            except (ValueError, SyntaxError, IndexError, TypeError):
                return ""
    return ".".join(node.output[0].strip("/").split("/")[:-1]) if node.output else ""


def _in_rows(array: Array, shapes: set[tuple[int, ...]]) -> Array:
    """A table of all tokens (b * t, n) as (b, t, n), where that is one of the shapes of the tokens."""
    found = [shape for shape in shapes if array.ndim == 2 and len(shape) == 2 and shape[0] * shape[1] == array.shape[0]]
    return array.reshape(*found[0], -1) if len(found) == 1 else array

"""The table of arrows: who may import whom, and that models are made of ops and of nothing else.

Every rule is a function from source to its violations, and is shown to fail on a bad snippet.
"""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from refmodels.cli.parser import command_line
from refmodels.op import OPS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "refmodels"
MODELS = ("t5", "opt", "bloom")
EVERYTHING = None

# Unit (a module, or a folder with all its modules) -> units of refmodels that it may import.
ARROWS = {
    "numerics": set(),
    "files": set(),
    "op": {"numerics"},
    "ops": {"ops", "op", "numerics"},
    "accelerator": {"numerics", "op"},
    "parameters": {"op", "ops"},
    "arguments": {"ops"},
    "quantization": {"arguments", "op", "ops", "parameters"},
    "generate": {"arguments", "op", "ops"},
    "samplers": {"files", "generate"},
    "placement": {"accelerator", "op", "parameters"},
    "backbone": {"accelerator", "arguments", "op", "ops", "parameters", "placement", "printing", "quantization"},
    "task": {"arguments", "backbone", "files", "generate", "op", "preprocessors", "samplers", "scoring", "tokenizers"},
    "causal_lm": {"generate", "op", "scoring", "task"},
    "seq_2_seq_lm": {"backbone", "generate", "op", "scoring", "task"},
    **{
        model: {"ops", "op", "arguments", "parameters", "backbone", "preprocessors", task}
        for model, task in (("t5", "seq_2_seq_lm"), ("opt", "causal_lm"), ("bloom", "causal_lm"))
    },
    "weights": {"weights", "files", "op", "ops", "parameters"},
    "tokenizers": {"arguments", "files"},
    "tokenizer_files": {"files", "tokenizers"},
    "preprocessors": {"arguments", "files", "op", "tokenizers"},
    "preprocessor_files": {"files", "preprocessors"},
    "scoring": {"backbone", "op", "ops"},
    "lora": {"arguments", "backbone", "op", "ops", "parameters"},
    "lora_files": {"backbone", "files", "lora", "op", "parameters", "staging", "weights"},
    "presets": {"backbone", "files", "hub", "task", "weights", *MODELS},
    "hub": {"files", "weights"},
    "staging": {"files"},
    "saving": {
        "backbone", "files", "lora", "op", "ops", "parameters", "placement", "staging", "task", "tokenizer_files", "weights",
    },
    "convert": {"backbone", "loading", "ops", "presets", "saving", "staging", "task"},
    "loading": {
        "arguments", "backbone", "files", "op", "ops", "parameters", "preprocessor_files", "preprocessors", "presets",
        "quantization", "task", "tokenizer_files", "tokenizers", "weights",
    },
    "trace": {"op", "files", "weights"},
    "verification": {
        "accelerator", "backbone", "conformance", "files", "generate", "junit", "loading", "numerics", "op",
        "opdoc", "ops", "parameters", "printing", "trace", "verification", "weights",
    },
    # It draws small models of all families, with quantised weights and adapters.
    "conformance": {
        "accelerator", "backbone", "conformance", "coverage", "numerics", "op", "opdoc", "ops", "parameters", "quantization",
        *MODELS,
    },
    "opdoc": {"op", "ops"},
    "printing": set(),
    "coverage": {"accelerator", "op", "opdoc"},
    "machine": set(),
    "bench": {"accelerator", "backbone", "generate", "machine", "parameters"},
    "bench_peers": {"backbone", "bench", "bench_worker"},
    "bench_worker": {"accelerator", "backbone", "bench", "op", "ops", "parameters", "weights"},
    "cli": EVERYTHING,
    "junit": {"files"},
    "__main__": {"cli"},
    "__init__": {
        "accelerator", "backbone", "causal_lm", "files", "op", "preprocessors", "samplers", "seq_2_seq_lm", "task",
        "tokenizers", *MODELS,
    },
}  # fmt: skip
LATE = {
    "backbone": {"loading", "lora", "lora_files", "presets", "saving"},
    "bench": {"loading"},
    "bench_worker": {"t5"},
    "task": {"loading", "saving"},
    "verification": {"opdoc"},
    "preprocessors": {"loading"},
    "tokenizers": {"loading"},
}  # inside functions

# Package of others -> the modules that may import it, inside functions only. Any other package may be imported by none.
OTHERS = {
    "h5py": {"weights.keras_h5"},
    "safetensors": {"weights.safetensors"},
    "sentencepiece": {"tokenizers"},
    "tokenizers": {"tokenizers"},
    "ml_dtypes": {"ops.precision"},
    "huggingface_hub": {"hub"},
    "kagglehub": {"hub"},
    "hypothesis": {"conformance.check"},
    "torch": {"bench_worker", "verification.adaptors.transformers"},
    "transformers": {"bench_worker", "verification.adaptors.transformers"},
    "keras": {"verification.adaptors.keras_hub"},
    "keras_hub": {"verification.adaptors.keras_hub"},
    "ctranslate2": {"verification.adaptors.ctranslate2"},
    "onnx": {"verification.adaptors.onnxruntime"},
    "onnxruntime": {"verification.adaptors.onnxruntime"},
}


def modules():
    """(name, source) of every module of the package; `ops.linear` for refmodels/ops/linear.py."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts), path.read_text()


def imports(name, source):
    """(absolute name, names taken from it, whether inside a function) of every import in a module of refmodels."""
    tree = ast.parse(source)
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    package = ["refmodels", *name.split(".")][: -1 if name not in ("conformance", "ops", "weights") else None]
    for node in ast.walk(tree):
        inside = id(node) in late
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, set(), inside
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])]), {a.name for a in node.names}, inside
        elif isinstance(node, ast.Call) and isinstance(node.args[0] if node.args else None, ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value), set(), inside


def units_of(target, names):
    """The units of refmodels that an import of `names` from `target` reaches."""
    _, *rest = target.split(".")
    return {rest[0]} if rest else {n for n in names if n in ARROWS} or {"__init__"}


def import_violations(name, source):
    unit = name.split(".")[0]
    if unit not in ARROWS:
        return [f"{name} is not in the table of arrows: say what it may import"]
    found = []
    for target, names, late in imports(name, source):
        top, *_ = target.split(".")
        if top == "refmodels":
            allowed = ARROWS[unit] if not late or ARROWS[unit] is EVERYTHING else ARROWS[unit] | LATE.get(unit, set())
            units = units_of(target, names)
            found += [f"{name} imports refmodels.{u}" for u in units if allowed is not EVERYTHING and u not in allowed]
        elif top == "numpy":
            found += [f"{name} imports numpy"] if unit in MODELS else []
        elif top in OTHERS:
            found += [f"{name} imports {top}"] if name not in OTHERS[top] else []
            found += [f"{name} imports {top} outside a function"] if not late and top != "hypothesis" else []
        elif top not in sys.stdlib_module_names:
            found.append(f"{name} imports {target}")
        if unit in MODELS and names & {"np", "numpy"}:
            found.append(f"{name} takes numpy from {target}")
    return found


@pytest.mark.parametrize(("name", "source"), list(modules()), ids=[name for name, _ in modules()])
def test_every_import_is_an_arrow_of_the_table(name, source):
    assert import_violations(name, source) == []


def unused_arrows(sources):
    """The entries of both tables that no module needs: they would let in what nobody meant to allow."""
    used = {False: {}, True: {}}
    for name, source in sources:
        for target, names, late in imports(name, source):
            if target.split(".")[0] == "refmodels":
                used[late].setdefault(name.split(".")[0], set()).update(units_of(target, names))
    there = {name.split(".")[0] for name, _ in sources}
    return [
        f"{unit} -> {allowed}"
        for late, table in ((False, ARROWS), (True, LATE))
        for unit in sorted(there & table.keys())
        for allowed in sorted((table[unit] or set()) - used[late].get(unit, set()))
    ]


def test_every_arrow_of_the_table_is_used():
    assert unused_arrows(list(modules())) == []


def test_an_unused_arrow_is_found():
    assert unused_arrows([("samplers", "import math")]) == ["samplers -> files", "samplers -> generate"]
    assert unused_arrows([("hub", "import refmodels.files\ndef f():\n    import refmodels.weights")]) == ["hub -> weights"]


BAD_IMPORTS = [
    ("t5", "import numpy as np"),
    ("opt", "from numpy import exp"),
    ("bloom", "if TYPE_CHECKING:\n    import numpy.typing"),
    ("t5", "def f():\n    import numpy"),
    ("t5", "from refmodels.op import np"),
    ("t5", "from refmodels.opt import OPTConfig"),
    ("opt", "from refmodels import bloom"),
    ("opt", "from .bloom import bloom_attention"),
    ("bloom", "import refmodels.t5"),
    ("bloom", "from refmodels import T5Backbone"),
    ("opt", "from refmodels.weights import keras_h5"),
    ("opt", "def f():\n    from refmodels.presets import load"),
    ("t5", "from refmodels.tokenizers import Tokenizer"),
    ("t5", "from refmodels.causal_lm import CausalLM"),
    ("ops.linear", "from refmodels.t5 import T5Config"),
    ("ops.linear", "from ..opt import OPTConfig"),
    ("ops.linear", "from refmodels.backbone import Backbone"),
    ("ops.linear", "from refmodels.accelerator import use"),
    ("op", "from refmodels.accelerator import use"),
    ("op", "from refmodels.ops.linear import linear"),
    ("numerics", "from refmodels.op import OPS"),
    ("numerics", "def f():\n    from refmodels.op import OPS"),
    ("accelerator", "import numba"),
    ("accelerator", "def f():\n    import cupy"),
    ("accelerator", "def f():\n    importlib.import_module('refmodels_numba')"),
    ("accelerator", "def f():\n    __import__('torch')"),
    ("cli", "def f():\n    import torch"),
    ("cli", "import refmodels_cupy"),
    ("weights.keras_h5", "import h5py"),
    ("weights.huggingface", "def f():\n    import h5py"),
    ("presets", "def f():\n    import h5py"),
    ("presets", "def f():\n    from safetensors import safe_open"),
    ("weights.safetensors", "from safetensors import safe_open"),
    ("tokenizers", "import tokenizers"),
    ("tokenizers", "from sentencepiece import SentencePieceProcessor"),
    ("task", "def f():\n    import tokenizers"),
    ("presets", "def f():\n    import sentencepiece"),
    ("ops.precision", "import ml_dtypes"),
    ("ops.linear", "def f():\n    import ml_dtypes"),
    ("presets", "from refmodels.conformance import check_op"),
    ("__init__", "from refmodels import conformance"),
    ("op", "def f():\n    from . import conformance"),
    ("trace", "from refmodels.t5 import T5Backbone"),
    ("compare", "from refmodels.backbone import Backbone"),
    ("generate", "from refmodels.task import Task"),
    ("generate", "from refmodels.backbone import Backbone"),
    ("backbone", "from refmodels.presets import load_backbone"),
    ("weights.tensor", "from refmodels.t5 import t5_parameters"),
    ("something_new", "import math"),
]


@pytest.mark.parametrize(("name", "source"), BAD_IMPORTS)
def test_a_bad_import_is_found(name, source):
    assert len(import_violations(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("t5", "from refmodels.ops.linear import linear"),
        ("tokenizers", "def f():\n    import tokenizers"),
        ("backbone", "def f():\n    from refmodels.presets import load_backbone"),
        ("cli", "import refmodels\nfrom refmodels.conformance import check_op"),
        ("ops.linear", "import math\nfrom .precision import wide"),
    ],
)
def test_a_good_import_is_none(name, source):
    assert import_violations(name, source) == []


# -- the command line -------------------------------------------------------------------------------------------------

SHARED = {"errors", "parser", "selection", "streams"}
"""Modules of the command line that are for several commands; the others are a command each."""


def command_violations(name, source):
    """What a module of the command line imports of it, other than what is for several commands."""
    allowed = {f"refmodels.cli.{module}" for module in SHARED | ({"bench_peers"} if name == "cli.bench" else set())}
    found = {target for target, _, _ in imports(name, source) if re.match(r"refmodels\.cli\b", target)}
    return [f"{name} imports {target}" for target in sorted(found - allowed)]


@pytest.mark.parametrize(("name", "source"), [(name, source) for name, source in modules() if name.startswith("cli.")])
def test_no_command_imports_another(name, source):
    assert command_violations(name, source) == []


@pytest.mark.parametrize(
    "source", ["from refmodels.cli.verify import run", "from refmodels.cli import verify", "import refmodels.cli"]
)
def test_an_import_of_another_command_is_found(source):
    assert len(command_violations("cli.trace", source)) == 1


def test_every_command_is_the_module_of_its_name():
    (commands,) = command_line()._subparsers._group_actions
    stems = {name.removeprefix("cli.") for name, _ in modules() if name.startswith("cli.")}
    assert {name.replace("-", "_") for name in commands.choices} == stems - SHARED - {"bench_peers"}


# -- composites -------------------------------------------------------------------------------------------------------

BUILTINS = {"enumerate", "range", "zip"}
NO_OP = {"compute_dtype", "wide_dtype"}  # of a config, not of an array


def is_composite(function):
    return any(
        isinstance(d, ast.Call)
        and isinstance(d.func, ast.Name)
        and d.func.id == "op"
        and any(k.arg == "composite" and isinstance(k.value, ast.Constant) and k.value.value is True for k in d.keywords)
        for d in function.decorator_list
    )


def is_array(annotation):
    """Float[...], Int[...], Bool[...], or one of them `| None`."""
    if isinstance(annotation, ast.BinOp):
        annotation = annotation.left
    name = annotation.value if isinstance(annotation, ast.Subscript) else annotation
    return isinstance(name, ast.Name) and name.id in ("Float", "Int", "Bool", "Array")


def gives_array(call, composites):
    if not isinstance(call, ast.Call):
        return False
    if isinstance(call.func, ast.Subscript):  # ACTIVATIONS[...](...)
        return True
    name = getattr(call.func, "id", "")
    if name in composites:
        return is_array(composites[name].returns)
    return name in OPS


def array_names(function, composites):
    """The names that hold an array somewhere in this function."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {a.arg for a in arguments if a.annotation is not None and is_array(a.annotation)}
    assigned = [n for n in ast.walk(function) if isinstance(n, ast.Assign | ast.AnnAssign | ast.NamedExpr)]
    for _ in range(3):  # an alias of an alias
        for node in assigned:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple):
                    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value] * len(target.elts)
                    pairs = list(zip(target.elts, values, strict=True))
                for left, value in pairs:
                    known = isinstance(value, ast.Name) and value.id in names
                    if isinstance(left, ast.Name) and (known or gives_array(value, composites)):
                        names.add(left.id)
    return names


def is_config_arithmetic(node):
    """An expression of numbers and attributes of `config` alone."""
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "config"
    if isinstance(node, ast.BinOp):
        return is_config_arithmetic(node.left) and is_config_arithmetic(node.right)
    if isinstance(node, ast.UnaryOp):
        return is_config_arithmetic(node.operand)
    return isinstance(node, ast.Constant)


def composite_violations(source):
    """What the composites of a model file do beside calling ops."""
    tree = ast.parse(textwrap.dedent(source))
    composites = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and is_composite(n)}
    found = []
    for name, function in composites.items():
        arrays = array_names(function, composites)
        for statement in function.body:
            for node in ast.walk(statement):
                problem = problem_of(node, arrays, composites)
                if problem:
                    found.append(f"{name}: {problem}: {ast.unparse(node)}")
    return found


def problem_of(node, arrays, composites):
    def is_array_name(n):
        return isinstance(n, ast.Name) and n.id in arrays

    if isinstance(node, ast.BinOp | ast.AugAssign) and not (isinstance(node, ast.BinOp) and is_config_arithmetic(node)):
        return "arithmetic"
    if isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not) and not is_config_arithmetic(node):
        return "arithmetic"
    if isinstance(node, ast.Compare) and not all(isinstance(o, ast.Is | ast.IsNot) for o in node.ops):
        return "" if all(map(is_config_arithmetic, [node.left, *node.comparators])) else "comparison"
    tested = {
        ast.BoolOp: lambda: node.values, ast.If: lambda: [node.test], ast.IfExp: lambda: [node.test],
        ast.While: lambda: [node.test], ast.UnaryOp: lambda: [node.operand], ast.Assert: lambda: [node.test],
    }.get(type(node), list)()  # fmt: skip
    if any(map(is_array_name, tested)):
        return "truth of an array"
    if isinstance(node, ast.For | ast.comprehension) and is_array_name(node.iter):
        return "loop over an array"
    if isinstance(node, ast.Starred) and is_array_name(node.value):
        return "loop over an array"
    if isinstance(node, ast.Subscript):
        of_shape = isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
        if not of_shape and (is_array_name(node.value) or isinstance(node.slice, ast.Slice | ast.Tuple | ast.UnaryOp)):
            return "subscript of an array"
    if isinstance(node, ast.Attribute):
        if is_array_name(node.value):
            return "" if node.attr in ("shape", "dtype") else "attribute of an array"
        if isinstance(node.value, ast.Name) and (node.value.id == "config" or node.attr in ("items", "keys", "values")):
            return ""
        return "attribute of something else"
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name):
            return "" if function.id in {*composites, *OPS, *BUILTINS, *NO_OP} else "call of no op"
        if isinstance(function, ast.Subscript):
            known = isinstance(function.value, ast.Name) and function.value.id == "ACTIVATIONS"
        else:
            known = isinstance(function, ast.Attribute) and function.attr in ("items", "keys", "values")
        return "" if known else "call of no op"
    if isinstance(node, ast.Lambda | ast.FunctionDef | ast.Import | ast.ImportFrom | ast.Global | ast.With):
        return "something else than calls"
    return ""


@pytest.mark.parametrize("model", MODELS)
def test_composites_are_calls_to_ops(model):
    source = (PACKAGE / f"{model}.py").read_text()
    assert composite_violations(source) == []
    checked = [name for name, op in OPS.items() if op.composite and op.reference.__module__ == f"refmodels.{model}"]
    assert source.count("@op(composite=True") == len(checked) > 5


SNIPPET = '''
@op(composite=True)
def bad(x: Float[Array, "b n"], p: Params, config: Config, *, y: Float[Array, "b n"] | None = None) -> Float[Array, "b n"]:
    """Does what it must not."""
    h = add(x, x)
    a, b = relu(x), p["kernel"]
    alias = h
    {}
    return h
'''


@pytest.mark.parametrize(
    "line",
    [
        "h = h + x",
        "h = 2 * add(x, x)",
        "h += 1",
        "h = x @ b",
        "h = add(x, x) / config.head_dim**0.5",
        "h = x * config.head_dim",
        "h = -h",
        "h = ~x",
        "h = x > 0",
        "h = p['kernel'] * 2",
        "h = x[0]",
        "h = x[:, None]",
        "h = x[-1]",
        "h = a[0]",
        "h = alias[0]",
        "h = p['kernel'][0, 1]",
        "h = p['kernel'][:2]",
        "h = p['kernel'][-1]",
        "h = x.T",
        "h = x.reshape(-1)",
        "h = x.astype('float32')",
        "h = p['kernel'].T",
        "h = add(x, x).T",
        "h = np.exp(x)",
        "h = exp(x)",
        "h = len(x)",
        "h = sum(x)",
        "h = [row for row in x]",
        "h = [*x]",
        "h = add(*x)",
        "h = relu(x) if x else h",
        "h = x and h",
        "h = not x",
        "h = not y",
        "h = (lambda z: z)(x)",
        "h = p['f'](x)",
        "import numpy",
    ],
)
def test_a_bad_line_in_a_composite_is_found(line):
    assert composite_violations(SNIPPET.format(line))


@pytest.mark.parametrize(
    "line",
    [
        "h = linear(x, **p['query'], dtype=compute_dtype(config.dtype))",
        "h = add(x, p['layers'][0]['kernel'])",
        "h = attention(x, x, x, scale=config.head_dim**-0.5)",
        "h = split_heads(x, config.num_heads)",
        "h = cache_allocate((x.shape[0], x.shape[-1], config.head_dim), 'bool')",
        "h = ACTIVATIONS[config.activation](x)",
        "h = {name: relu(value) for name, value in p.items()}",
        "h = [relu(layer['kernel']) for i, layer in enumerate(p['layers'])]",
        "h = relu(x) if y is None else add(x, y)",
        "h = relu(x) if config.use_gated_activation else h",
        "h = bad(x, p and p['layers'], config, y=None)",
    ],
)
def test_a_good_line_in_a_composite_is_none(line):
    assert composite_violations(SNIPPET.format(line)) == []


def test_composites_hold_no_numpy():
    """By their globals as well: no name in a model module is numpy or comes from it."""
    for model in MODELS:
        module = sys.modules[f"refmodels.{model}"]
        for name, value in vars(module).items():
            origin = getattr(value, "__name__" if type(value) is type(sys) else "__module__", None) or ""
            is_type_alias = name in ("Generator", "Array")
            assert is_type_alias or not origin.startswith("numpy"), f"refmodels.{model}.{name} is NumPy's"


# -- files ------------------------------------------------------------------------------------------------------------


NAME_CUPY = ("device", "installation")
"""The modules of the CuPy accelerator that import CuPy; the others run on whatever device they are given."""


def layout_violations(root):
    found = [str(path) for folder in ("presets", "spec") for path in (root / folder).rglob("__init__.py")]
    sources = [*(root / "refmodels").rglob("*.py"), *(root / "accel").rglob("*.py")]
    empty_names = ("utils", "util", "common", "helpers", "helper", "misc")
    found += [f"{path.name}: a name that says nothing" for path in sources if path.stem in empty_names]
    for model in MODELS:
        path = root / "refmodels" / f"{model}.py"
        if path.exists() and path.read_text().count("\n") >= 1000:
            found.append(f"{path.name} has 1000 lines or more")
    numba, cupy = (list((root / "accel" / f"refmodels_{name}").rglob("*.py")) for name in ("numba", "cupy"))
    for paths, other in ((numba, "refmodels_cupy"), (cupy, "refmodels_numba")):
        found += [f"{path.name} knows {other}" for path in paths if other in path.read_text()]
    asks = re.compile(r"^\s*(import|from) (cupy|cupy_backends|cuda)\b", re.MULTILINE)
    found += [f"{path.name} imports CuPy" for path in cupy if path.stem not in NAME_CUPY and asks.search(path.read_text())]
    return found


def test_the_layout():
    assert layout_violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("presets/__init__.py", ""),
        ("spec/deeper/__init__.py", ""),
        ("refmodels/utils.py", ""),
        ("refmodels/ops/helpers.py", ""),
        ("refmodels/t5.py", "\n" * 1000),
        ("accel/refmodels_numba/norm.py", "import refmodels_cupy"),
        ("accel/refmodels_cupy/common.py", ""),
        ("accel/refmodels_cupy/norm.py", "def f():\n    import cupy"),
    ],
)
def test_a_bad_layout_is_found(tmp_path, path, text):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert len(layout_violations(tmp_path)) == 1


# -- importing with NumPy alone ---------------------------------------------------------------------------------------

BLOCKED = [*OTHERS, "numba", "cupy", "torch"]

ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
{body}
"""

FORWARD = """
import numpy as np
import refmodels
for dtype in ("float32", "float16"):
    inputs = {"token_ids": [[1, 2, 3], [4, 5, 0]], "padding_mask": [[1, 1, 1], [1, 1, 0]]}
    output = refmodels.OPTBackbone(9, 2, 2, 8, 8, dtype=dtype, seed=1)(inputs)
    assert output.shape == (2, 3, 8) and output.dtype == dtype, (output.shape, output.dtype)
    assert np.isfinite(output).all() and output.any()
try:
    refmodels.OPTBackbone(9, 2, 2, 8, 8, dtype="bfloat16", seed=1)(inputs)
except ImportError as error:
    assert "ml_dtypes" in str(error)
else:
    raise AssertionError("bfloat16 without ml_dtypes")
loaded = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in loaded if not name.startswith("_") and name not in ("numpy", "refmodels", "cython_runtime")))
"""


def run_alone(body, cwd=ROOT):
    source = ALONE.format(blocked=set(BLOCKED), body=body)
    return subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(cwd), *site_packages()]!r}\n{source}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def site_packages():
    return [path for path in sys.path if path.endswith("site-packages")]


def test_the_package_needs_numpy_alone():
    done = run_alone(FORWARD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"  # nothing else was loaded, blocked or not


@pytest.mark.parametrize("name", BLOCKED)
def test_the_block_blocks(name):
    done = run_alone(f"import {name}")
    assert done.returncode == 1
    assert f"ImportError: {name} is blocked" in done.stderr

"""The documents in spec/ against the code: examples, the generated page, constraints, names of ops, tables of parameters."""

import ast
import dataclasses
import doctest
import inspect
import math
import re
import textwrap
from pathlib import Path

import pytest

import refmodels
from refmodels import bloom, generate, numerics, opdoc, opt, t5
from refmodels.op import OPS
from refmodels.ops import precision

ROOT = Path(__file__).parent.parent
SPEC = ROOT / "spec"
CODE = ROOT / "refmodels"
MODELS = ("t5", "opt", "bloom")
CITATION = re.compile(r"\b(?:T5|OPT|BLOOM)-C\d+\b")
DOCUMENTS = sorted(SPEC.glob("*.md"))

# 23, 101, ...: sizes that no other letter has, so that a shape can only be written one way.
SIZES = {"v": 101, "e": 29, "m": 37, "h": 5, "d": 7, "P": 53, "r": 32}
CONFIGS = {
    "t5": t5.T5Config(101, 23, 37, 2, 5, key_value_dim=7, tie_embedding_weights=False),
    "opt": opt.OPTConfig(101, 2, 5, 35, 37, max_sequence_length=53, word_embed_proj_dim=29, tie_embedding_weights=False),
    "bloom": bloom.BloomConfig(101, 2, 5, 35, 37, tie_embedding_weights=False),
}
PARAMETERS = {"t5": t5.t5_parameters, "opt": opt.opt_parameters, "bloom": bloom.bloom_parameters}


def text(name):
    return (SPEC / f"{name}.md").read_text()


def section(document, heading):
    """The text between a heading and the next one of its depth or higher."""
    depth = heading.index(" ")
    match = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{depth}}} |\Z)", document, re.M | re.S)
    assert match, f"no section {heading!r}"
    return match.group(1)


def spans(document):
    """Every `code span` outside of fenced blocks that is a plain lower-case name."""
    return set(re.findall(r"`([a-z][a-z0-9_]*)`", re.sub(r"^```.*?^```", "", document, flags=re.M | re.S)))


# -- examples --------------------------------------------------------------------------------------------------------------


def run_examples(document, name):
    """Failures and number of the examples in the fenced blocks of a document; they share one set of names."""
    blocks = "".join(re.findall(r"^```python\n(>>>.*?)^```", document, re.M | re.S))
    test = doctest.DocTestParser().get_doctest(blocks, {}, name, name, 0)
    out = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=out.append)
    return result.failed, len(test.examples), "".join(out)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_examples_give_what_they_show(path):
    document = path.read_text()
    failed, count, report = run_examples(document, path.name)
    assert not failed, report
    assert count == len(re.findall(r"^>>> ", document, re.M)), "an example stands outside of a python block"


def test_a_wrong_example_is_found():
    assert run_examples("```python\n>>> 1 + 1\n3\n\n```\n", "planted")[0] == 1
    assert run_examples(text("t5").replace("[0.8485, 1.1314]", "[0.8485, 1.1315]"), "planted")[0] == 1


# -- the generated page ------------------------------------------------------------------------------------------------------


def test_ops_page_is_what_the_op_table_gives():
    assert text("ops") == opdoc.render(), "run: python -m refmodels.opdoc > spec/ops.md"


def test_ops_page_has_every_op():
    page = opdoc.render()
    for op in OPS.values():
        if op.__module__ in opdoc.modules():
            entry = section(page, f"### {op.name}")
            assert str(op.error) in entry
            assert all(str(shape) in entry for shape in op.shapes.values())
            assert all(name in entry for name in (*op.mutates, *op.laws))


# -- constraints -------------------------------------------------------------------------------------------------------------


def defined(document):
    return re.findall(r"^\*\*((?:T5|OPT|BLOOM)-C\d+)\.", document, re.M)


def cited(*paths):
    return {citation for path in paths for citation in CITATION.findall(path.read_text())}


def missing_citations(documents):
    """(constraints that no code cites, citations that no document defines) for {model: document}."""
    ops = sorted((CODE / "ops").glob("*.py"))
    unused = [
        name
        for model, document in documents.items()
        for name in defined(document)
        if name not in cited(CODE / f"{model}.py", *ops)
    ]
    known = {name for document in documents.values() for name in defined(document)}
    texts = [path.read_text() for path in (*CODE.rglob("*.py"), *DOCUMENTS)]
    return unused, sorted({citation for each in texts for citation in CITATION.findall(each)} - known)


def test_every_constraint_is_cited_and_every_citation_defined():
    assert missing_citations({model: text(model) for model in MODELS}) == ([], [])


def test_a_constraint_without_citation_and_a_citation_without_constraint_are_found():
    documents = {model: text(model) for model in MODELS}
    documents["t5"] = documents["t5"].replace("**T5-C4.", "**T5-C99.")
    assert missing_citations(documents) == (["T5-C99"], ["T5-C4"])


@pytest.mark.parametrize("model", MODELS)
def test_constraints_are_numbered_from_one_without_gaps(model):
    names = defined(section(text(model), "## Constraints"))
    assert names == [f"{model.upper()}-C{i + 1}" for i in range(len(names))]
    assert names == defined(text(model))


# -- names of ops ------------------------------------------------------------------------------------------------------------


def calls(op):
    """Names of the ops that the body of a composite calls."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(op.reference)))
    names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return names & OPS.keys()


def known_names():
    """What a document may write as code: ops, their arguments, configs, parts of parameter paths, types, functions."""
    names = set(OPS) | set(precision.POLICIES)
    for op in OPS.values():
        names |= set(op.signature.parameters)
    for model, config in CONFIGS.items():
        names |= {field.name for field in dataclasses.fields(config)} | {"head_dim", "residual_dtype"}
        for parameter in PARAMETERS[model](config):
            names |= set(parameter.path.split(".")) | set(parameter.huggingface[0].split("."))
    for module in (refmodels, numerics, generate, precision):
        names |= set(vars(module))
    return names | {"i"}


def unknown_names(document):
    return sorted(spans(document) - known_names())


@pytest.mark.parametrize("name", [*MODELS, "numerics", "README"])
def test_names_in_code_spans_exist(name):
    assert unknown_names(text(name)) == []


def test_a_name_that_does_not_exist_is_found():
    assert unknown_names("by `rms_norm` and `rms_normalise`") == ["rms_normalise"]


def op_gaps(model, document):
    """{composite: ops of its body that its section lacks}, and what the tables of its section have too much."""
    gaps = {}
    for op in OPS.values():
        if op.composite and op.name.startswith(f"{model}_") and op.__module__ == f"refmodels.{model}":
            part = section(document, f"### `{op.name}`")
            column = {name for row in re.findall(r"^\|[^|]*\|([^|]*)\|", part, re.M) for name in spans(row)}
            gaps[op.name] = (calls(op) - spans(part)) | ((column & OPS.keys()) - calls(op))
    return {name: ops for name, ops in gaps.items() if ops}


@pytest.mark.parametrize("model", MODELS)
def test_each_section_names_the_ops_of_its_composite(model):
    assert op_gaps(model, text(model)) == {}


def test_an_op_that_a_section_lacks_or_has_too_much_is_found():
    bad = text("opt").replace("| `dense`, `relu` |", "| `dense`, `gelu` |")
    assert op_gaps("opt", bad) == {"opt_decoder_layer": {"relu", "gelu"}}


def test_t5_names_every_activation():
    assert {op.name for op in t5.ACTIVATIONS.values()} <= spans(section(text("t5"), "### `t5_feedforward`"))


# -- tables of parameters ------------------------------------------------------------------------------------------------------


def shown_parameters(document, sizes):
    """{path: (shape, name in Hugging Face's files, layout there)} as the document's table has it."""
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]+) \| `([\w.]+)` \| (\w+) \|$", section(document, "## Parameters"), re.M)
    return {
        path: (tuple(math.prod(sizes[letter] for letter in axis.split("*")) for axis in shape.split()), name, layout)
        for path, shape, name, layout in rows
    }


def real_parameters(model):
    """The same from the code: layer 1 stands for every layer, layer 0 for what it alone has."""
    table = {p.path: (p.shape, p.huggingface[0], p.layout) for p in PARAMETERS[model](CONFIGS[model])}
    later = {path.replace("layers.1.", "layers.0.") for path in table if "layers.1." in path}
    return {
        path.replace("layers.1.", "layers.i."): (shape, re.sub(r"\b(layers|block|h)\.1\.", r"\1.i.", name), layout)
        for path, (shape, name, layout) in table.items()
        if path not in later
    }


@pytest.mark.parametrize("model", MODELS)
def test_table_of_parameters(model):
    sizes = SIZES | {"n": CONFIGS[model].hidden_dim}
    assert shown_parameters(text(model), sizes) == real_parameters(model)


def test_a_wrong_row_of_parameters_is_found():
    bad = text("opt").replace("feedforward_output_dense.kernel` | m n", "feedforward_output_dense.kernel` | n m")
    assert shown_parameters(bad, SIZES | {"n": 35}) != real_parameters("opt")


# -- numerics ------------------------------------------------------------------------------------------------------------------


def test_tables_of_numerics():
    document = text("numerics")
    policies = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \|$", section(document, "## 1. Policies"), re.M)
    assert {name: (storage, compute) for name, storage, compute in policies} == precision.POLICIES
    types = re.findall(r"^\| (\w+) \| 2\^(-\d+) \| 2\^(-\d+) \|$", section(document, "## 3. Unit roundoff"), re.M)
    assert {name: 2.0 ** int(u) for name, u, _ in types} == numerics.UNIT_ROUNDOFF
    assert {name: 2.0 ** int(smallest) for name, _, smallest in types} == numerics._SMALLEST
    assert all(f"| `{kind}`" in document for kind in {op.error.kind for op in OPS.values()})


def test_every_document_is_listed():
    listed = set(re.findall(r"\]\(([\w.-]+\.md)\)", text("README")))
    assert listed == {path.name for path in DOCUMENTS} - {"README.md"}

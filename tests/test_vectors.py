"""The golden vectors in spec/vectors: made again, held to the reference, read without Python."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from refmodels.cli import main
from refmodels.files import CheckpointError
from refmodels.opdoc import table
from refmodels.verification import vectors
from refmodels.verification.vectors import check_vectors, read_vectors, write_vectors
from refmodels.weights.safetensors import open_tensors, read_metadata, write_file
from refmodels.weights.tensor import Tensor

STORED = Path(__file__).parent.parent / "spec" / "vectors"


def contents(path):
    with open_tensors(path.parent, path.name) as tensors:
        return {name: tensor.read() for name, tensor in tensors.items()}, read_metadata(path.parent, path.name)


def test_they_agree_with_the_reference():
    assert check_vectors(STORED) == []


def test_they_are_what_is_made_now(tmp_path):
    """Inputs, and what is said of them, to the bit; results are judged above, as BLAS differs between machines."""
    written = {str(path.relative_to(tmp_path)) for path in write_vectors(tmp_path)}
    assert written == {str(path.relative_to(STORED)) for path in STORED.rglob("*.safetensors")}
    for name in sorted(written):
        (ours, metadata), (stored, stored_metadata) = contents(tmp_path / name), contents(STORED / name)
        if "cases" in metadata:  # equal values share a tensor: which are equal may differ by a rounding
            cases, stored_cases = json.loads(metadata.pop("cases")), json.loads(stored_metadata.pop("cases"))
            assert [case["name"] for case in cases] == [case["name"] for case in stored_cases], name
            assert [case["arguments"] for case in cases] == [case["arguments"] for case in stored_cases], name
        assert metadata == stored_metadata, name
        for tensor in ours:
            if tensor.startswith("in.") or ".in." in tensor:
                np.testing.assert_array_equal(ours[tensor], stored[tensor], err_msg=f"{name} {tensor}", strict=True)


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in STORED.rglob("*") if path.is_file()) < 3_000_000


def test_every_op_has_plain_and_edge_cases():
    for op in table():
        named, cases = read_vectors(STORED / "ops" / f"{op.name}.safetensors")
        assert named is op
        assert cases
    names = {case.name for case in read_vectors(STORED / "ops" / "masked_softmax.safetensors")[1]}
    assert {"left and right padding", "a row that permits no key"} <= names


def altered(path, change):
    """Rewrite a file with `change(tensors, metadata)` done to it."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    write_file(path, [Tensor(path, n, a.shape, a.dtype, lambda a=a: a) for n, a in tensors.items()], metadata=metadata)


def damaged(tensors, suffix):
    name = next(name for name, array in tensors.items() if name.endswith(suffix) and array.size)
    values = tensors[name].reshape(-1)
    values[0] = values[0] + values.dtype.type(1) if values.dtype.kind in "iu" else np.nextafter(values[0] * 1.001, np.inf)


@pytest.mark.parametrize(
    ("file", "suffix", "wrong"),
    [
        ("ops/linear", "1.out", "linear: error"),
        ("ops/linear", "1.truth", "in float64"),
        ("ops/relative_position_buckets", "1.out", "values differ"),
        ("ops/opt_decoder_layer", "after.cache.key", "cache"),
        ("models/opt", "layers.0.self_attention.query:linear", "layers.0.self_attention.query:linear: error"),
        ("models/t5.float64", "t5_logits", "t5_logits: error"),
        ("models/bloom", "in.params.layers.1.self_attention.key.kernel", "inputs or parameters"),
    ],
)
def test_a_wrong_number_is_found(tmp_path, monkeypatch, file, suffix, wrong):
    for name in (file.split(".")[0], f"{file.split('.')[0]}.float64"):
        source = STORED / f"{name}.safetensors"
        if source.is_file():
            (tmp_path / source.parent.name).mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / source.parent.name)
    kind, name = file.split("/")
    altered(tmp_path / f"{file}.safetensors", lambda tensors, metadata: damaged(tensors, suffix))
    monkeypatch.setattr(vectors, "table", lambda: [op for op in table() if kind == "ops" and op.name == name])
    monkeypatch.setattr(
        vectors, "MODELS", {k: v for k, v in vectors.MODELS.items() if kind == "models" and k == name.split(".")[0]}
    )
    problems = check_vectors(tmp_path)
    assert problems
    assert wrong in problems[0]


def test_a_file_that_is_not_there_is_found(tmp_path):
    assert len(check_vectors(tmp_path)) == len(table()) + 2 * len(vectors.MODELS)


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("version", "9", "version 1"),
        ("op", "no_such", "no op is called 'no_such'"),
        ("cases", "[", "not as spec/vectors"),
        ("cases", '[{"name": "x", "arguments": {"x": {"tensor": "none"}}, "result": null}]', "not as spec/vectors"),
        (
            "cases",
            '[{"name": "x", "arguments": {"config": {"config": "t5", "wrong": 1}}, "result": null}]',
            "not as spec/vectors",
        ),
    ],
)
def test_a_file_of_somebody_else_is_refused(tmp_path, key, value, wrong):
    path = Path(shutil.copy(STORED / "ops" / "relu.safetensors", tmp_path))
    altered(path, lambda tensors, metadata: metadata.update({key: value}))
    with pytest.raises(CheckpointError, match=wrong):
        read_vectors(path)


def test_the_command_says_what_does_not_agree(capsys, tmp_path):
    assert main(["vectors", "--check", str(tmp_path / "none")]) == 2
    assert main(["vectors", "--check", str(tmp_path)]) == 1
    assert "do not agree" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_reader_of_the_page_reads_them(tmp_path):
    (source,) = re.findall(r"```javascript\n(.*?)```", (STORED / "README.md").read_text(), re.DOTALL)
    (tmp_path / "read.js").write_text(source)
    run = subprocess.run(
        ["node", tmp_path / "read.js", STORED / "ops" / "alibi_slopes.safetensors"], capture_output=True, text=True, check=True
    )
    assert '6 heads {"num_heads":6} [ 0.25, 0.0625, 0.015625 ]' in run.stdout

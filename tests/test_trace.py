"""Traces: names of steps, files that come back as they were, and files of strangers."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
from replayed import FAMILIES, inputs_of, run_of, small

from refmodels import trace as module
from refmodels.files import CheckpointError
from refmodels.trace import Trace, open_trace, trace
from refmodels.verification.replay import step_names

pytest.importorskip("safetensors")


# -- recording ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_has_the_steps_that_a_replay_knows(family):
    model, inputs = small(family), inputs_of(family)
    steps = run_of(model, inputs)
    assert {name: array.shape for name, array in steps.items()} == step_names(model, inputs)
    assert list(steps) == list(step_names(model, inputs))


def test_steps_are_named_by_their_parameters():
    steps = run_of(small("opt"), inputs_of("opt"))
    names = list(steps)
    assert names[:4] == [
        "token_embedding:embedding", "token_embedding:token_vectors", "position_embedding:embedding", "opt_backbone:add",
    ]  # fmt: skip
    assert {"layers.1.self_attention.query:linear", "layers.0:add", "layers.0:add.2", "opt_logits"} <= set(names)
    assert names.index("layers.0:opt_decoder_layer") < names.index("layers.1.self_attention_layer_norm:layer_norm")


def test_only_some_steps():
    model = small("bloom")
    with trace(model, only=lambda name: name.endswith(":linear")) as steps:
        model(inputs_of("bloom"))
    assert len(steps) == 2 * 6
    with pytest.raises(KeyError, match=r"no step 'layers.7:add'"):
        steps["layers.7:add"]


def test_a_trace_keeps_what_an_op_gave_whatever_becomes_of_it():
    model, inputs = small("opt"), inputs_of("opt")
    with trace(model) as steps:
        hidden = model(inputs)
    before = steps["opt_backbone"].copy()
    model.params["layer_norm"]["gamma"][...] = 0
    with trace(model) as again:
        model(inputs)
    assert np.array_equal(steps["opt_backbone"], before)
    assert not np.array_equal(again["opt_backbone"], before)
    assert np.array_equal(hidden, before)


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_file_gives_back_what_was_saved(tmp_path, dtype):
    model, inputs = small("t5", dtype), inputs_of("t5")
    steps = run_of(model, inputs)
    steps.inputs, steps.facts = inputs, {"source": "a test", "dtype": dtype}
    steps.save(tmp_path / "run.safetensors")
    with open_trace(tmp_path / "run.safetensors") as stored:
        assert list(stored) == list(steps)
        assert stored.facts == steps.facts
        assert stored.inputs.keys() == inputs.keys()
        for name, array in {**steps, **{f"in.{name}": array for name, array in inputs.items()}}.items():
            got = stored.inputs[name[3:]] if name.startswith("in.") else stored[name]
            assert (got.dtype, got.shape) == (array.dtype, array.shape)
            assert got.tobytes() == array.tobytes()
        assert stored.shape("t5_logits") == steps["t5_logits"].shape
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.safetensors"
    Trace({"a": np.ones(2)}).save(path)
    with pytest.raises(KeyError):
        Trace({"a": np.ones(2, np.complex64)}).save(path)
    with open_trace(path) as stored:
        assert stored["a"].tolist() == [1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_files_of_one_directory_are_one_trace(tmp_path):
    Trace({"z": np.ones(2), "a": np.zeros(1)}, {"token_ids": np.array([[1, 2]])}).save(tmp_path / "1.safetensors")
    np.save(tmp_path / "layers.0:add.npy", np.asfortranarray(np.arange(6.0).reshape(2, 3)))
    np.savez_compressed(tmp_path / "more.npz", **{"b": np.ones(3, ">f4"), "in.padding_mask": np.array([[True, False]])})
    (tmp_path / "notes.txt").write_text("ignored")
    with open_trace(tmp_path) as stored:
        assert list(stored) == ["z", "a", "layers.0:add", "b"]
        assert stored["layers.0:add"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert (stored["b"].dtype, stored["b"].tolist()) == (np.dtype(np.float32), [1, 1, 1])
        assert {name: array.tolist() for name, array in stored.inputs.items()} == {
            "token_ids": [[1, 2]], "padding_mask": [[True, False]],
        }  # fmt: skip
        assert "in.token_ids" not in stored
        with pytest.raises(KeyError, match=r"no step 'in.token_ids'"):
            stored["in.token_ids"]


def test_without_an_order_it_is_that_of_the_names(tmp_path):
    plain(tmp_path / "x.safetensors", {"b": np.ones(1), "a": np.ones(1)}, None)
    with open_trace(tmp_path / "x.safetensors") as stored:
        assert list(stored) == ["a", "b"]


# -- files of strangers ---------------------------------------------------------------------------------------------------


def plain(path, tensors, metadata):
    """A safetensors file, made as anybody could."""
    header, body = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        header[name] = {"dtype": "F64", "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def npy(header, body=b""):
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


HEADER = "{{'descr': '{}', 'fortran_order': False, 'shape': {}}}\n"


def refused(path, words):
    with pytest.raises(CheckpointError, match=words) as caught, open_trace(path) as stored:
        list(stored.items())
    assert str(path if path.is_file() else path.name) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"order": "[1"}, "not valid JSON"),
        ({"order": "[" * 100_000}, "not valid JSON"),
        ({"order": '["a"]'}, "does not name its 2 tensors"),
        ({"order": '["a", "a"]'}, "does not name its 2 tensors"),
        ({"order": '["a", "b", "c"]'}, "does not name its 2 tensors"),
        ({"order": '{"a": 1, "b": 2}'}, "does not name its 2 tensors"),
        ({"order": '["a", "b"]', "version": "2"}, "version '2', wanted 1"),
    ],
)
def test_metadata_that_is_wrong(tmp_path, metadata, words):
    plain(tmp_path / "x.safetensors", {"a": np.ones(1), "b": np.ones(2)}, metadata)
    refused(tmp_path / "x.safetensors", words)


@pytest.mark.parametrize("cut", [0, 4, 8, 20, -1])
def test_a_truncated_file(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    plain(path, {"a": np.ones(4)}, {})
    path.write_bytes(path.read_bytes()[:cut])
    refused(path, "not a sound safetensors file")


def test_a_link_out_of_the_directory(tmp_path):
    plain(tmp_path / "secret.safetensors", {"a": np.ones(1)}, {})
    inner = tmp_path / "dumps"
    inner.mkdir()
    for ending in (".safetensors", ".npy", ".npz"):
        link = inner / f"x{ending}"
        link.symlink_to(tmp_path / "secret.safetensors")
        with pytest.raises(CheckpointError, match="leads out of the directory"), open_trace(inner):
            pass
        link.unlink()


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(FileNotFoundError, match="no such file"), open_trace(tmp_path):
        pass


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file \*.safetensors, \*.npy, \*.npz"), open_trace(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), open_trace(tmp_path / "nothing.safetensors"):
        pass


def test_a_step_in_two_files(tmp_path):
    np.save(tmp_path / "a.npy", np.ones(1))
    np.savez(tmp_path / "b.npz", a=np.ones(1))
    refused(tmp_path, "'a' is in another file too")


def test_too_many_files_and_too_large_a_step(tmp_path, monkeypatch):
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.ones(100))
    monkeypatch.setattr(module, "MAX_FILES", 1)
    refused(tmp_path, "2 files, wanted at most 1")
    monkeypatch.setattr(module, "MAX_FILES", 2)
    monkeypatch.setattr(module, "MAX_STEP_BYTES", 799)
    refused(tmp_path, "'a' has 800 bytes, wanted at most 799")


def test_pickles_are_not_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.save(tmp_path / "x.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    refused(tmp_path / "x.npy", "pickled objects, which are not read")
    np.savez(tmp_path / "x.npz", x=np.array([Bomb()], dtype=object))
    refused(tmp_path / "x.npz", "pickled objects, which are not read")
    (tmp_path / "y.npz").write_bytes((tmp_path / "x.npy").read_bytes())
    refused(tmp_path / "y.npz", "not a sound npz file")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a sound npy file"),
        (b"\x93NUMPY\x03\x00" + bytes(20), "npy format 3.0"),
        (b"\x93NUMPY\x09\x00" + bytes(20), "npy"),
        (npy(HEADER.format("<f4", "(2,)"), bytes(7)), "7 bytes of values, wanted those of shape"),
        (npy(HEADER.format("<f4", "(2,)"), bytes(9)), "9 bytes of values"),
        (npy(HEADER.format("<f4", "(10**9,)")), "not a sound npy file"),
        (npy(HEADER.format("<f4", "(1000000000000, 1000000000000)")), "0 bytes of values"),
        (npy(HEADER.format("<f4", "(-1,)"), bytes(4)), "bytes of values"),
        (npy(HEADER.format("<c8", "(1,)"), bytes(8)), "dtype complex64 is not supported"),
        (npy(HEADER.format("<V2", "(2,)"), bytes(4)), "bfloat16 is written as float32"),
        (npy(HEADER.format("<U1", "(1,)"), bytes(4)), "is not supported"),
        (npy("__import__('os').mkdir('x')\n"), "not a sound npy file"),
        (npy("(" * 5000 + "\n"), "not a sound npy file"),
    ],
)
def test_npy_files_that_are_wrong(tmp_path, content, words):
    (tmp_path / "x.npy").write_bytes(content)
    refused(tmp_path / "x.npy", words)
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(CheckpointError, match=words), open_trace(tmp_path / "y.npz") as stored:
        list(stored.items())


def test_an_archive_that_says_less_than_it_holds(tmp_path, monkeypatch):
    """A member that unpacks to gigabytes is held against the size that the archive states, and that against the limit."""
    monkeypatch.setattr(module, "MAX_STEP_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(HEADER.format("<f8", "(1000000,)"), bytes(8 * 10**6)))
    assert (tmp_path / "x.npz").stat().st_size < 20_000
    refused(tmp_path / "x.npz", "'x' has 8000000 bytes, wanted at most 1000000")


def test_archives_that_are_wrong(tmp_path):
    path = tmp_path / "x.npz"
    body = io.BytesIO()
    np.save(body, np.ones(3))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.txt", "hello")
    refused(path, "'x.txt', which is no npy file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", body.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", body.getvalue())
    refused(path, "has 'x' twice")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", body.getvalue())
    content = bytearray(path.read_bytes())
    content[content.index(b"\x93NUMPY") + 140] ^= 1  # its checksum is then another
    path.write_bytes(content)
    refused(path, "CRC")
    path.write_bytes(content[:-40])
    refused(path, "not a sound npz file")

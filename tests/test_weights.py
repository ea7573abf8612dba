"""Weight files: what well-formed ones give, and that damaged or hostile ones are refused with an error that says
where."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from refmodels import OPTBackbone
from refmodels.files import MAX_FILE_BYTES, field, inside, read_json
from refmodels.parameters import ZEROS, Parameter
from refmodels.weights import huggingface, keras_h5, safetensors

h5py = pytest.importorskip("h5py")

GOLDENS = Path(__file__).parent / "data" / "goldens"


def write_safetensors(path, header, data=b"", length=None):
    """A file with this header (an object, or bytes) and data; `length` is what the first eight bytes claim."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + data)


def entry(dtype="F32", shape=(2, 3), begin=0, end=24):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def read_all(module, path):
    with module.open_tensors(path.parent, path.name) as tensors:
        return {name: tensor.read() for name, tensor in tensors.items()}


def refused(module, path, error=ValueError):
    """The message with which reading this file is refused; it has the file's path."""
    with pytest.raises(error) as caught:
        read_all(module, path)
    message = str(caught.value)
    assert str(path) in message
    return message


# -- safetensors -----------------------------------------------------------------------------------------------------


def test_safetensors_reads_every_dtype(tmp_path):
    generator = np.random.default_rng(0)
    dtypes = ["float64", "float32", "float16", ml_dtypes.bfloat16, "int64", "int32", "int16", "int8", "uint8", "bool"]
    written = {f"tensor.{np.dtype(dtype).name}": generator.normal(size=(i, 3)).astype(dtype) for i, dtype in enumerate(dtypes)}
    written["scalar"] = np.array(2.5, np.float32)
    save_file(written, tmp_path / "model.safetensors", metadata={"format": "np"})
    with safetensors.open_tensors(tmp_path, "model.safetensors") as tensors:
        assert tensors.keys() == written.keys()
        for name, values in written.items():
            assert (tensors[name].shape, tensors[name].dtype) == (values.shape, values.dtype)
            found = tensors[name].read()
            assert found.dtype == values.dtype
            np.testing.assert_array_equal(found, values)


def test_safetensors_shards_are_one_mapping():
    directory = GOLDENS / "hf" / "bloom_sharded"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    with safetensors.open_tensors(directory, "model.safetensors.index.json") as tensors:
        assert tensors.keys() == index["weight_map"].keys()
        sizes = [tensor.read().nbytes for tensor in tensors.values()]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert len({tensor.file for tensor in tensors.values()}) == 10


@pytest.mark.parametrize(
    ("header", "data_size"),
    [
        ({"w": entry()}, 23),
        ({"w": entry()}, 25),
        ({"w": entry(end=20)}, 20),
        ({"w": entry(begin=4, end=28)}, 28),
        ({"v": entry(), "w": entry(begin=12, end=36)}, 36),
        ({"w": entry(shape=(2**40, 2**40))}, 24),
        ({"w": entry(shape=(-2, -3))}, 24),
        ({"w": entry(shape=(2.0, 3))}, 24),
        ({"w": entry(shape=(10**4000,) * 2)}, 24),
        ({"w": entry(begin=24, end=0)}, 24),
        ({"w": entry(dtype="F5")}, 24),
        ({"w": entry(dtype=["F32"])}, 24),
        ({"w": {"dtype": "F32", "shape": [2, 3]}}, 24),
        ({"w": {**entry(), "data_offsets": [0, 1, 2]}}, 24),
        ({"w": {**entry(), "shape": 6}}, 24),
        ({"w": 3}, 24),
        (b"[1, 2]", 0),
        (b'{"w": ', 0),
        (b"[" * 200_000, 0),
        (b"\xff\xfe{}", 0),
    ],
    ids=lambda value: str(value)[:60],
)
def test_safetensors_refuses_a_header_that_lies(tmp_path, header, data_size):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, header, bytes(data_size))
    assert "not a sound safetensors file" in refused(safetensors, path)


def test_safetensors_refuses_a_type_that_numpy_lacks(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": entry(dtype="F8_E5M2", end=6)}, bytes(6))
    message = refused(safetensors, path)
    assert "tensor 'w': dtype 'F8_E5M2' is not supported, wanted one of F64, F32" in message


@pytest.mark.parametrize("length", [1000, 2**27, 2**63, 2**64 - 1])
def test_safetensors_refuses_a_header_length_that_lies(tmp_path, length):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": entry()}, bytes(24), length=length)
    assert "not a sound safetensors file" in refused(safetensors, path)


@pytest.mark.parametrize("size", [0, 7, 8, 100, 20_000])
def test_safetensors_refuses_a_truncated_file(tmp_path, size):
    path = tmp_path / "model.safetensors"
    path.write_bytes((GOLDENS / "hf" / "opt" / "model.safetensors").read_bytes()[:size])
    assert "truncated" in refused(safetensors, path)


def test_safetensors_refuses_an_index_that_lies(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    shard = tmp_path / "shard.safetensors"
    write_safetensors(shard, {"w": entry(), "v": entry(begin=24, end=48)}, bytes(48))

    def message(weight_map, error=ValueError, path=index):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error) as caught, safetensors.open_tensors(tmp_path, index.name):
            pass
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "tensor 'u'" in message(dict.fromkeys("uvw", shard.name))
    assert "tensor 'w'" in message({"v": shard.name})
    assert "'weight_map'" in message(["v"])
    assert "'weight_map'" in message({"v": 3})
    assert "'../shard.safetensors'" in message({"v": "../shard.safetensors"}, path=tmp_path)
    assert "'/etc/passwd'" in message({"v": "/etc/passwd"}, path=tmp_path)
    assert "no such file" in message({"v": "other.safetensors"}, FileNotFoundError, tmp_path / "other.safetensors")


# -- KerasHub HDF5 ---------------------------------------------------------------------------------------------------


def test_h5_lists_datasets_by_path_and_ignores_empty_groups():
    directory = GOLDENS / "keras_hub_0.17" / "opt"
    with h5py.File(directory / "model.weights.h5") as file:
        assert "layers/input_layer/vars" in file  # an empty group: there is something to ignore
        wanted = {}
        file.visititems(lambda name, item: wanted.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    with keras_h5.open_tensors(directory, "model.weights.h5") as tensors:
        assert tensors.keys() == wanted.keys()
        for name, values in wanted.items():
            assert (tensors[name].shape, tensors[name].dtype) == (values.shape, values.dtype)
            np.testing.assert_array_equal(tensors[name].read(), values)


def test_h5_bfloat16_is_the_upper_half_of_float32():
    with keras_h5.open_tensors(GOLDENS / "keras_hub_0.17" / "opt_bf16", "model.weights.h5") as tensors:
        tensor = tensors["layers/token_and_position_embedding/token_embedding/vars/0"]
        assert tensor.dtype == ml_dtypes.bfloat16
        values = tensor.read()
    with h5py.File(tensor.file) as file:
        raw = np.frombuffer(file[tensor.name][()].tobytes(), "<u2")
    np.testing.assert_array_equal(values.ravel().astype(np.float32), (raw.astype(np.uint32) << 16).view(np.float32))
    assert np.abs(values.astype(np.float32)).max() > 0


def test_h5_refuses_what_is_no_hdf5_or_truncated(tmp_path):
    path = tmp_path / "model.weights.h5"
    content = (GOLDENS / "keras_hub_0.17" / "bloom" / "model.weights.h5").read_bytes()
    for damaged in (b"", b"not HDF5 at all" * 100, content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        assert "HDF5" in refused(keras_h5, path)


def keras_shapes(content, path):
    path.write_bytes(content)
    return {name: values.shape for name, values in read_all(keras_h5, path).items()}


def test_h5_refuses_overwritten_structures_or_reads_them_whole(tmp_path):
    """Bytes of the file replaced by 0xff, block by block: a clear error or values of the declared shape, nothing
    else."""
    path = tmp_path / "model.weights.h5"
    content = (GOLDENS / "keras_hub_0.17" / "bloom" / "model.weights.h5").read_bytes()
    whole, messages = keras_shapes(content, path), []
    for start in range(0, len(content), 9000):
        try:
            assert keras_shapes(content[:start] + b"\xff" * 64 + content[start + 64 :], path) == whole
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 5
    assert all(str(path) in message for message in messages)


def test_h5_refuses_links_and_outside_storage(tmp_path):
    path = tmp_path / "model.weights.h5"
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["w"] = np.ones(3)

    def message(build):
        with h5py.File(path, "w") as file:
            build(file)
        return refused(keras_h5, path)

    def external_link(file):
        file["layers/vars/0"] = h5py.ExternalLink(str(secret), "w")

    def soft_link(file):
        file["w"] = np.ones(3)
        file["layers/vars/0"] = h5py.SoftLink("/w")

    def external_storage(file):
        (tmp_path / "raw").write_bytes(bytes(12))
        file.create_dataset("layers/vars/0", (3,), "f4", external=[(str(tmp_path / "raw"), 0, 12)])

    def virtual_storage(file):
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(str(secret), "w", (3,))
        file.create_virtual_dataset("layers/vars/0", layout)

    def circle(file):
        file["layers/vars/0"] = np.ones(3)
        file["layers/vars/again"] = file["layers"]

    assert "'layers/vars/0' is a ExternalLink" in message(external_link)
    assert "'layers/vars/0' is a SoftLink" in message(soft_link)
    assert "'layers/vars/0' keeps its values in other files" in message(external_storage)
    assert "'layers/vars/0' keeps its values in other files" in message(virtual_storage)
    assert "'layers/vars/again'" in message(circle)


def test_h5_refuses_chunks(tmp_path):
    """Keras writes none: without them no filter of the C library is ever run."""
    path = tmp_path / "model.weights.h5"
    for options in (
        {"chunks": (1000,)},
        {"chunks": (1000,), "fletcher32": True},
        {"compression": "gzip"},
        {"maxshape": (None,)},
    ):
        with h5py.File(path, "w") as file:
            file.create_dataset("layers/vars/0", data=np.ones(10**5, "f4"), **options)
        assert "'layers/vars/0' is stored in chunks, wanted in one piece" in refused(keras_h5, path)


def test_h5_refuses_types_that_are_no_numbers(tmp_path):
    path = tmp_path / "model.weights.h5"
    for values in (np.array(["a", "b"], object), np.array([b"ab"]), np.ones(2, "c16"), np.zeros(2, [("a", "f4"), ("b", "i2")])):
        with h5py.File(path, "w") as file:
            kind = h5py.string_dtype() if values.dtype == object else values.dtype
            file.create_dataset("layers/vars/0", data=values, dtype=kind)
        assert "'layers/vars/0' has dtype" in refused(keras_h5, path)


def test_h5_refuses_lists_without_an_end(tmp_path):
    """The C library follows each of these for ever, or until the memory is full."""
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        for name in ("layers/a/vars/0", "layers/b/vars/0"):
            file[name] = np.ones(3)
    content = path.read_bytes()
    heap, node, leaf = (content.index(signature) for signature in (b"HEAP", b"TREE", b"SNOD"))
    (free,) = struct.unpack_from("<Q", content, heap + 16)
    (names,) = struct.unpack_from("<Q", content, heap + 24)

    def message(place, value):
        path.write_bytes(content[:place] + struct.pack("<Q", value) + content[place + 8 :])
        return refused(keras_h5, path)

    assert f"the free list of the heap at {heap} has no end" in message(names + free, free)
    assert f"the free list of the heap at {heap} has no end" in message(heap + 16, 2**63)
    assert f"the block at {node} is there twice" in message(node + 32, node)
    assert "no b'SNOD" in message(node + 32, names)
    assert "are not in the" in message(heap + 24, len(content))
    assert "of a heap of" in message(leaf + 8, 2**40)
    path.write_bytes(content[:node] + content[node : node + 5] + b"\x03" + content[node + 6 :])
    assert "perhaps truncated" in refused(keras_h5, path)


def test_h5_refuses_other_generations_of_the_format(tmp_path):
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["layers/vars/0"] = np.ones(3)
    assert "superblock of version 0" in refused(keras_h5, path)


def test_h5_refuses_a_name_that_is_no_text(tmp_path):
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        file["layers/some_name/vars/0"] = np.ones(3)
    path.write_bytes(path.read_bytes().replace(b"some_name", b"some\xffname"))
    assert "damaged HDF5 file" in refused(keras_h5, path)


def test_h5_refuses_a_shape_larger_than_its_storage(tmp_path):
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/vars/0", (10**6, 10**6), "f4")  # declared, never written: no storage
    assert "'layers/vars/0' declares float32 (1000000, 1000000), 4000000000000 bytes, stores 0" in refused(keras_h5, path)
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/vars/0", data=h5py.Empty("f4"))
    assert "'layers/vars/0' has no shape" in refused(keras_h5, path)


def test_h5_refuses_datasets_that_share_their_storage(tmp_path):
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        first = file.create_dataset("layers/a/vars/0", data=np.ones(50_000, "f4"))
        offset = first.id.get_offset()
        file.create_dataset("layers/b/vars/0", (50_000,), "f4")  # never written: its address is still all ones
    content = path.read_bytes()
    unwritten = b"\xff" * 8 + (200_000).to_bytes(8, "little")
    assert content.count(unwritten) == 1
    path.write_bytes(content.replace(unwritten, offset.to_bytes(8, "little") + (200_000).to_bytes(8, "little")))
    assert f"declare more bytes than the {len(content)} of the file" in refused(keras_h5, path)


@pytest.mark.parametrize("name", ["opt_sharded", "t5_sharded"])
def test_h5_shards_are_one_mapping(name):
    directory = GOLDENS / "keras_hub_0.32" / name
    index = json.loads((directory / "model.weights.json").read_text())
    with keras_h5.open_tensors(directory, "model.weights.json") as tensors:
        assert {f"/{dataset.rpartition('/')[0]}" for dataset in tensors} == index["weight_map"].keys()
        assert sum(tensor.read().nbytes for tensor in tensors.values()) == index["metadata"]["total_size"]
        assert {tensor.file.name for tensor in tensors.values()} == {path.name for path in directory.glob("*.h5")}


@pytest.fixture
def shards(tmp_path):
    """Two shards between which one group is split; gives what writes the index."""
    for number, names in enumerate((("layers/a/vars/0", "layers/b/vars/0"), ("layers/b/vars/1",))):
        with h5py.File(tmp_path / f"model_0000{number}.weights.h5", "w") as file:
            file.create_group("layers/empty/vars")
            for name in names:
                file[name] = np.full(3, number, "f4")

    def write(a, b, **metadata):
        weight_map = {"/layers/a/vars": a, "/layers/b/vars": b}
        (tmp_path / "model.weights.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
        return tmp_path / "model.weights.json"

    return write


def test_h5_group_in_two_shards(shards):
    first, second = "model_00000.weights.h5", "model_00001.weights.h5"
    index = shards(first, [first, second], total_size=36.0)
    wanted = {"layers/a/vars/0": 0, "layers/b/vars/0": 0, "layers/b/vars/1": 1}
    assert {name: values[0] for name, values in read_all(keras_h5, index).items()} == wanted
    shards(second, [first, second])
    assert f"group '/layers/a/vars' has no dataset in shard {second}" in refused(keras_h5, index)
    shards(first, [first, second], total_size=37)
    assert "'total_size' is 37, the datasets have 36 bytes" in refused(keras_h5, index)
    shards(first, [first, second], total_size="36")
    assert "'total_size' is 36, the datasets" in refused(keras_h5, index)
    for wrong in ([], 3, [3], None, {"file": first}):
        shards(first, wrong)
        assert "'weight_map' must map names to names of files" in refused(keras_h5, index)
    for outside in ("../model_00000.weights.h5", "/etc/passwd", ""):
        with pytest.raises(ValueError, match="is not a plain file name"):
            read_all(keras_h5, shards(first, [first, outside]))
    with pytest.raises(FileNotFoundError, match=r"model_00002\.weights\.h5: no such file"):
        read_all(keras_h5, shards(first, [first, "model_00002.weights.h5"]))


def test_h5_dataset_in_two_shards(shards, tmp_path):
    first, second = "model_00000.weights.h5", "model_00001.weights.h5"
    with h5py.File(tmp_path / second, "a") as file:
        file["layers/a/vars/0"] = np.ones(3, "f4")
    message = refused(keras_h5, shards(first, [first, second]))
    assert f"dataset 'layers/a/vars/0' is in two shards, {first} and {second}" in message


def test_h5_missing_file_names_the_file(tmp_path):
    assert "no such file" in refused(keras_h5, tmp_path / "model.weights.h5", FileNotFoundError)


def test_spellings_of_old_files():
    assert keras_h5.spellings("layers/a/_self_attention_layer/query_dense/vars/0") == (
        "layers/a/_self_attention_layer/query_dense/vars/0",
        "layers/a/_self_attention_layer/_query_dense/vars/0",
        "_layer_checkpoint_dependencies/a/_self_attention_layer/query_dense/vars/0",
        "_layer_checkpoint_dependencies/a/_self_attention_layer/_query_dense/vars/0",
    )
    assert keras_h5.spellings("layers/b/vars/0") == ("layers/b/vars/0", "_layer_checkpoint_dependencies/b/vars/0")


# -- files -----------------------------------------------------------------------------------------------------------


def test_links_may_stay_inside_but_not_lead_out(tmp_path):
    outside = tmp_path / "secret.json"
    outside.write_text('{"secret": 1}')
    directory = tmp_path / "preset"
    directory.mkdir()
    (directory / "real.json").write_text('{"a": 1}')
    (directory / "config.json").symlink_to("real.json")
    assert read_json(directory, "config.json") == {"a": 1}
    (directory / "out.json").symlink_to(outside)
    with pytest.raises(ValueError, match=r"out\.json: a link that leads out of the directory, to .*secret\.json"):
        read_json(directory, "out.json")
    (directory / "circle.json").symlink_to("circle.json")
    with pytest.raises(ValueError, match=r"circle\.json"):
        read_json(directory, "circle.json")
    for name in ("../secret.json", str(outside), "..", "", "a\0b", "a\\b", "a" * 300):
        with pytest.raises(ValueError, match="not a plain file name"):
            inside(directory, name)


def test_links_of_the_hugging_face_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (blobs / "feed").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/feed")
    assert read_json(snapshot, "config.json") == {"a": 1}
    (tmp_path / "elsewhere").write_text("{}")
    (snapshot / "out.json").symlink_to("../../../elsewhere")
    with pytest.raises(ValueError, match="leads out"):
        read_json(snapshot, "out.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_json(tmp_path, "config.json")


def test_json_of_absurd_size_is_refused_unread(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match=rf"config\.json: {MAX_FILE_BYTES + 1} bytes, wanted at most"):
        read_json(tmp_path, path.name)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("size", [1, 10_000_000], [0, -1, 10_000_001, 2.0, "3", True, [4]]),
        ("layers", [1, 10_000], [10_001, 0, False]),
        ("fraction", [0, 0.5, 1e-6], [1, -0.1, float("nan"), float("inf"), "0.1", True]),
        ("flag", [True, False], [0, 1, "true"]),
        ("text", ["", "a"], [3, "a" * 1001, ["a"]]),
    ],
)
def test_field_of_each_kind(kind, good, bad):
    for value in good:
        assert field({"x": value}, "config.json", "x", kind) == value
    for value in bad:
        with pytest.raises(ValueError, match=r"^config\.json: field 'x' is .*, wanted"):
            field({"x": value}, "config.json", "x", kind)
    for values in ({}, {"x": None}):
        assert field(values, "config.json", "x", kind, "default") == "default"
        with pytest.raises(ValueError, match=r"^config\.json: field 'x' is missing or null, wanted"):
            field(values, "config.json", "x", kind)


# -- Hugging Face ----------------------------------------------------------------------------------------------------


def parameter(layout, shape, keras_shape, *names):
    return Parameter("x", shape, "layers/x/vars/0", keras_shape, names or ("x",), layout, ZEROS)


def test_layouts_by_index():
    """Every element of every layout, against the definition written out as loops."""
    heads, size, hidden = 3, 2, 5
    fused = np.arange(heads * 3 * size * hidden, dtype=np.float32).reshape(heads * 3 * size, hidden)
    for part, layout in enumerate(("query", "key", "value")):
        kernel = parameter(layout, (hidden, heads * size), (hidden, heads, size))
        assert huggingface.stored_shape(kernel) == fused.shape
        found = huggingface.convert(fused, kernel)
        assert found.shape == kernel.shape
        bias = parameter(layout, (heads * size,), (heads, size))
        assert huggingface.stored_shape(bias) == (fused.shape[0],)
        found_bias = huggingface.convert(fused[:, 0], bias)
        for h in range(heads):
            for d in range(size):
                row = (h * 3 + part) * size + d
                np.testing.assert_array_equal(found[:, h * size + d], fused[row])
                assert found_bias[h * size + d] == fused[row, 0]

    same = parameter("same", (4, 5), (4, 5))
    assert huggingface.stored_shape(same) == (4, 5)
    np.testing.assert_array_equal(huggingface.convert(fused[:4], same), fused[:4])
    turned = parameter("transposed", (5, 4), (5, 4))
    assert huggingface.stored_shape(turned) == (4, 5)
    assert huggingface.convert(fused[:4], turned)[3, 2] == fused[2, 3]
    offset = parameter("offset_rows", (2, 5), (2, 5))
    assert huggingface.stored_shape(offset) == (4, 5)
    np.testing.assert_array_equal(huggingface.convert(fused[:4], offset), fused[2:4])


def test_prefixes_and_names():
    assert huggingface.prefix(["model.decoder.final_layer_norm.bias", "lm_head.weight"], "opt") == "model.decoder."
    assert huggingface.prefix(["decoder.final_layer_norm.bias"], "opt") == "decoder."
    assert huggingface.prefix(["final_layer_norm.bias"], "opt") == ""
    assert huggingface.prefix(["transformer.ln_f.bias"], "bloom") == "transformer."
    assert huggingface.prefix(["ln_f.bias"], "bloom") == ""
    assert huggingface.prefix(["decoder.final_layer_norm.weight"], "t5") == ""
    given = parameter("same", (1,), (1,), "embed_tokens.weight", "lm_head.weight")
    assert huggingface.names(given, "decoder.")[0] == "decoder.embed_tokens.weight"
    assert "lm_head.weight" in huggingface.names(given, "decoder.")


@pytest.mark.parametrize(
    ("family", "start", "name", "wanted"),
    [
        ("t5", "", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", True),
        ("t5", "", "decoder.block.1.layer.1.EncDecAttention.relative_attention_bias.weight", False),
        ("t5", "", "encoder.embed_tokens.weight", True),
        ("t5", "", "decoder.embed_tokens.weight", True),
        ("t5", "", "encoder.block.0.layer.0.SelfAttention.q.weight", False),
        ("opt", "model.decoder.", "lm_head.weight", True),
        ("opt", "model.decoder.", "model.decoder.project_in.weight", False),
        ("bloom", "transformer.", "transformer.h.12.self_attention.masked_bias", True),
        ("bloom", "", "h.0.self_attention.bias", True),
        ("bloom", "", "h.0.self_attention.dense.bias", False),
    ],
)
def test_ignorable_names(family, start, name, wanted):
    assert huggingface.ignorable(name, family, start) is wanted


T5 = {"model_type": "t5", "vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
OPT = {
    "model_type": "opt",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 160,
}
BLOOM = {"model_type": "bloom", "vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}


@pytest.mark.parametrize(
    ("proj", "activation", "gated"),
    [
        (None, "relu", False),
        ("relu", "relu", False),
        ("gelu", "gelu", False),
        ("gated-gelu", "gelu_approximate", True),
        ("gated-silu", "silu", True),
        ("gated-relu", "relu", True),
        ("gelu_new", "gelu_approximate", False),
    ],
)
def test_t5_feed_forward(proj, activation, gated):
    found = huggingface.arguments({**T5, "feed_forward_proj": proj}, "config.json")
    assert (found["activation"], found["use_gated_activation"]) == (activation, gated)


def test_mt5_is_gated_unless_it_says_otherwise():
    found = huggingface.arguments({**T5, "model_type": "mt5"}, "config.json")
    assert (found["activation"], found["use_gated_activation"]) == ("gelu_approximate", True)


def test_t5_fields_by_transformers_common_names():
    other = {"d_model": "hidden_size", "d_kv": "head_dim", "num_layers": "num_hidden_layers"}
    other |= {"num_heads": "num_attention_heads"}
    common = {other.get(name, name): value for name, value in T5.items()}
    assert huggingface.arguments(common, "config.json") == huggingface.arguments(T5, "config.json")


def test_older_bloom_fields():
    old = {"model_type": "bloom", "vocab_size": 97, "n_embed": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    assert huggingface.arguments(old, "config.json") == huggingface.arguments(BLOOM, "config.json")
    assert huggingface.arguments(BLOOM, "config.json")["intermediate_dim"] == 128


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (T5, {"num_decoder_layers": 2}, ["'num_decoder_layers' is 2", "it is 3"]),
        (T5, {"relative_attention_num_buckets": 64}, ["'relative_attention_num_buckets' is 64", "it is 32"]),
        (T5, {"relative_attention_max_distance": 20}, ["'relative_attention_max_distance' is 20", "it is 128"]),
        (T5, {"feed_forward_proj": "gated-mish"}, ["'feed_forward_proj' is 'gated-mish'", "relu"]),
        (T5, {"feed_forward_proj": "open-relu"}, ["'feed_forward_proj' is 'open-relu'"]),
        (T5, {"feed_forward_proj": "gated-gelu", "dense_act_fn": "relu"}, ["'dense_act_fn' is 'relu'", "'gelu_new'"]),
        (T5, {"feed_forward_proj": "relu", "is_gated_act": True}, ["'is_gated_act' is True", "it is False"]),
        (T5, {"d_model": None}, ["'d_model' is missing"]),
        (T5, {"num_layers": 10**9}, ["'num_layers' is '1000000000'", "10 thousand"]),
        (T5, {"model_type": "umt5"}, ["'model_type' is 'umt5'", "mt5"]),
        (OPT, {"word_embed_proj_dim": 0}, ["'word_embed_proj_dim' is '0'", "10 million"]),
        (OPT, {"do_layer_norm_before": "no"}, ["'do_layer_norm_before' is 'no'", "true or false"]),
        (OPT, {"_remove_final_layer_norm": 1}, ["'_remove_final_layer_norm' is '1'", "true or false"]),
        (OPT, {"tie_word_embeddings": "yes"}, ["'tie_word_embeddings' is 'yes'", "true or false"]),
        (BLOOM, {"tie_word_embeddings": 0}, ["'tie_word_embeddings' is '0'", "true or false"]),
        (T5, {"scale_decoder_outputs": 1}, ["'scale_decoder_outputs' is '1'", "true or false"]),
        (OPT, {"activation_function": "gelu"}, ["'activation_function' is 'gelu'", "'relu'"]),
        (OPT, {"enable_bias": False}, ["'enable_bias' is False"]),
        (OPT, {"layer_norm_elementwise_affine": False}, ["'layer_norm_elementwise_affine' is False"]),
        (OPT, {"ffn_dim": -4}, ["'ffn_dim' is '-4'", "10 million"]),
        (OPT, {"quantization_config": {"bits": 8}}, ["'quantization_config'", "not supported"]),
        (
            BLOOM,
            {"apply_residual_connection_post_layernorm": True},
            ["'apply_residual_connection_post_layernorm' is True"],
        ),
        (BLOOM, {"hidden_size": "32"}, ["'hidden_size' is '32'", "whole number"]),
        (BLOOM, {"num_attention_heads": 2}, ["'n_head' is 4", "'num_attention_heads' is '2'", "one value for both"]),
        (BLOOM, {"n_embed": 64}, ["'hidden_size' is 32", "'n_embed' is '64'"]),
        (T5, {"num_attention_heads": 2}, ["'num_heads' is 4", "'num_attention_heads' is '2'"]),
    ],
)
def test_a_configuration_that_the_class_cannot_be_is_refused(config, changes, words):
    huggingface.arguments(config, "dir/config.json")  # without the change it is fine
    with pytest.raises(ValueError, match=r"^dir/config\.json: field ") as caught:
        huggingface.arguments({**config, **changes}, "dir/config.json")
    for word in words:
        assert word in str(caught.value)


# -- memory ----------------------------------------------------------------------------------------------------------

MEASURED = """
import re, sys
from pathlib import Path
import h5py, safetensors
from refmodels import OPTBackbone
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
model = OPTBackbone.from_preset(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of another system")
@pytest.mark.parametrize("form", ["keras", "hf"])
def test_loading_needs_the_weights_and_the_largest_tensor(tmp_path, form):
    """Pages of a mapped file count: a second model in memory is one even where the system could take it back."""
    model = OPTBackbone(vocabulary_size=20_000, num_layers=6, num_heads=8, hidden_dim=512, intermediate_dim=2048, seed=0)
    (model.save_to_preset if form == "keras" else model.save_to_hf)(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True)
    weights, largest = 4 * model.count_params(), 4 * 20_000 * 512
    assert 0.5 * weights < int(done.stdout) < weights + largest


# -- packages --------------------------------------------------------------------------------------------------------


def test_without_h5py_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with (
        pytest.raises(ImportError, match=r"model\.weights\.h5 needs h5py: pip install h5py"),
        keras_h5.open_tensors(GOLDENS / "keras_hub_0.17" / "opt", "model.weights.h5"),
    ):
        pass

"""torch checkpoints: archives and pickles written byte by byte, sound ones and hostile ones.

What is hostile is refused with a ValueError that names the file, at once, and without any effect.
"""

import io
import json
import os
import pickle
import shutil
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from refmodels.weights import torch_bin, torch_legacy, torch_pickle

NAME = "pytorch_model.bin"
DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "goldens" / "hf" / "opt_bin" / NAME
OLD_GOLDEN = DATA / "torch_legacy" / NAME  # torch 2.13, _use_new_zipfile_serialization=False: some tensors of the other
ODICT = b"ccollections\nOrderedDict\n)R"
START, STOP = b"\x80\x02", b"."


# -- writing ---------------------------------------------------------------------------------------------------------


def text(value):
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value):
    if isinstance(value, bytes):  # an opcode in place of the number
        return value
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def row(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(numel, kind="FloatStorage", key="0", location="cpu", tag="storage", part=b""):
    return b"(" + text(tag) + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text(location) + number(numel) + part + b"tQ"


def tensor(shape=(2, 3), strides=(3, 1), offset=0, numel=6, stored=None, requires=b"\x89", hooks=ODICT, more=b"", **of_storage):
    """The opcodes of one tensor."""
    arguments = (storage(numel, **of_storage) if stored is None else stored) + number(offset) + row(shape) + row(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + requires + hooks + more + b"tR"


def state(**tensors):
    """The pickle of a state dict, from the opcodes of its tensors."""
    return START + b"}(" + b"".join(text(name) + content for name, content in tensors.items()) + b"u" + STOP


def archive(entries, *, prefix="archive/", **lies):
    """A zip file with these entries: content, or a dict of content and what its header is to say instead of the truth.

    The layout is torch's: stored, each entry on a boundary of 64 bytes.
    """
    file, directory = bytearray(), bytearray()
    for name, entry in entries.items():
        entry = entry if isinstance(entry, dict) else {"content": entry}
        content, full = entry["content"], (prefix + name).encode()
        size, method, flags = entry.get("size", len(content)), entry.get("method", 0), entry.get("flags", 0x800)
        sizes = struct.pack("<III", entry.get("crc", zlib.crc32(content)), entry.get("packed", size), size)
        offset = entry.get("offset", len(file))
        padding = -(len(file) + 30 + len(full)) % 64
        local = entry.get("local_name", full)
        file += b"PK\3\4" + struct.pack("<HHHHH", 0, flags, method, 0, 0) + sizes + struct.pack("<HH", len(local), padding)
        file += local + bytes(padding) + content
        directory += b"PK\1\2" + struct.pack("<HHHHHH", 0, 0, flags, method, 0, 0) + sizes
        directory += struct.pack("<HHHHHII", len(full), 0, 0, 0, 0, 0, offset) + full
    count, size = lies.get("count", len(entries)), lies.get("directory_size", len(directory))
    start = lies.get("directory_start", len(file))
    return bytes(file + directory + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, count, count, size, start, 0))


VALUES = np.arange(6, dtype="<f4")
MAGIC, VERSION = number(torch_legacy.MAGIC), number(torch_legacy.VERSION)
SIZES = b"".join(text(name) + number(size) for name, size in {"short": 2, "int": 4, "long": 8}.items())
SYSTEM = (
    b"}(" + text("protocol_version") + VERSION + text("little_endian") + b"\x88" + text("type_sizes") + b"}(" + SIZES + b"uu"
)


def listed(keys):
    return b"](" + b"".join(map(text, keys)) + b"e"


def legacy(pickled=None, storages=None, *, magic=MAGIC, version=VERSION, system=SYSTEM, keys=None):
    """A file of torch before 1.6: pickles from these opcodes, then `storages`, which are values or bytes by their keys."""
    storages = {"0": VALUES} if storages is None else storages
    file = b"".join(START + opcodes + STOP for opcodes in (magic, version, system))
    file += (state(w=tensor(part=b"N")) if pickled is None else pickled) + START + (keys or listed(storages)) + STOP
    for values in storages.values():
        file += values if isinstance(values, bytes) else struct.pack("<Q", values.size) + values.tobytes()
    return file


def checkpoint(pickled=None, values=VALUES, **more):
    entries = {"data.pkl": state(w=tensor()) if pickled is None else pickled, "byteorder": b"little"}
    return archive(entries | {"data/0": values.tobytes()} | more | {"version": b"3\n"})


def read(path):
    with torch_bin.open_tensors(path.parent, path.name) as tensors:
        return {name: tensor.read() for name, tensor in tensors.items()}


@pytest.fixture
def given(tmp_path):
    """`given(content)` gives what is read from a file with this content."""

    def load(content):
        (tmp_path / NAME).write_bytes(content)
        return read(tmp_path / NAME)

    return load


@pytest.fixture
def refused(tmp_path, given, monkeypatch):
    """`refused(content, *words)`: quickly, without much memory, without any effect."""
    canary = tmp_path / "CANARY"
    monkeypatch.chdir(tmp_path)  # where the hostile pickles would leave it

    def check(content, *words):
        before = sorted(tmp_path.iterdir())
        tracemalloc.start()
        began = time.process_time()
        try:
            with pytest.raises(ValueError, match=NAME) as caught:
                given(content)
            seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert seconds < 10  # of this process alone, traced; it takes 1 without
        assert peak < 20 * 2**20
        assert set(tmp_path.iterdir()) - set(before) <= {tmp_path / NAME}
        assert not canary.exists()
        message = str(caught.value)
        assert len(message) < 2000
        for word in words:
            assert word in message, message
        return message

    return check


def refused_pickle(refused, pickled, *words):
    return refused(checkpoint(pickled), "not a pickle of tensors", *words)


# -- what is sound ---------------------------------------------------------------------------------------------------


def test_the_golden_file_holds_what_its_records_hold():
    tensors = read(GOLDEN)
    own = {name: values for name, values in tensors.items() if name != "lm_head.weight"}  # tied: the first record's
    with zipfile.ZipFile(GOLDEN) as file:
        for number_, (name, values) in enumerate(own.items()):
            stored = np.frombuffer(file.read(f"pytorch_model/data/{number_}"), "<f4")
            np.testing.assert_array_equal(values.ravel(), stored, name)
    np.testing.assert_array_equal(tensors["lm_head.weight"], tensors["model.decoder.embed_tokens.weight"])
    assert tensors["model.decoder.embed_positions.weight"].shape == (162, 32)
    assert len(tensors) == 53


@pytest.mark.parametrize(("kind", "name"), torch_pickle.STORAGES.items())
def test_every_type(given, kind, name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    values = np.arange(6).astype(dtype)
    found = given(checkpoint(state(w=tensor(kind=kind)), values))["w"]
    assert (found.dtype, found.shape) == (dtype, (2, 3))
    np.testing.assert_array_equal(found.ravel(), values)


def test_views_of_a_storage(given):
    base = np.arange(60, dtype="<f4").reshape(3, 4, 5)
    views = {
        "whole": base,
        "turned": base.transpose(2, 0, 1),
        "columns": base[:, 1:3],
        "steps": base[::2, :, ::2],
        "row": base[1],
        "one": base[2, 3, 4, ...],
        "narrow": base[:, 2:3, :],
        "none": base[:0],
    }
    opcodes = {}
    for name, view in views.items():
        start = (view.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // 4
        strides = [stride // 4 for stride in view.strides]
        opcodes[name] = tensor(shape=view.shape, strides=strides, offset=0 if name == "none" else start, numel=60)
    found = given(checkpoint(state(**opcodes), base))
    assert found.keys() == views.keys()
    for name, view in views.items():
        assert found[name].shape == view.shape
        np.testing.assert_array_equal(found[name], view)


def test_an_axis_of_length_one_may_have_any_stride(given):
    assert given(checkpoint(state(w=tensor(shape=(1, 6), strides=(2**62, 1)))))["w"].shape == (1, 6)


def test_tied_tensors_share_a_storage(given):
    found = given(checkpoint(state(v=tensor(), w=tensor())))
    np.testing.assert_array_equal(found["v"], found["w"])


def test_what_a_module_saves(given):
    """An OrderedDict with attributes; a parameter; memo opcodes; protocol 4."""
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor() + b"\x88" + ODICT + b"tR"
    versions = b"}" + text("_metadata") + ODICT + text("") + b"}" + text("version") + number(1) + b"sss"
    pickled = START + ODICT + b"q\x00(" + text("w") + parameter + b"r\x00\x01\x00\x00u" + versions + b"b" + STOP
    np.testing.assert_array_equal(given(checkpoint(pickled))["w"].ravel(), VALUES)

    def short(value):
        return b"\x8c" + bytes([len(value)]) + value + b"\x94"

    identity = b"(" + short(b"storage") + short(b"torch") + short(b"FloatStorage") + b"\x93" + short(b"0") + short(b"cpu")
    arguments = (
        b"(" + identity + b"K\x06tQK\0K\2K\3\x86K\3K\1\x86\x89" + short(b"collections") + short(b"OrderedDict") + b"\x93)RtR"
    )
    body = b"}" + short(b"w") + short(b"torch._utils") + short(b"_rebuild_tensor_v2") + b"\x93" + arguments + b"s."
    framed = b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body
    np.testing.assert_array_equal(given(checkpoint(framed))["w"].ravel(), VALUES)
    too_long = b"\x80\x04\x95" + struct.pack("<Q", len(body) + 1) + body
    with pytest.raises(ValueError, match="a frame of"):
        given(checkpoint(too_long))


def test_an_archive_that_zipfile_writes(given):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("any/data.pkl", state(w=tensor()))
        file.writestr("any/data/0", VALUES.tobytes())
    np.testing.assert_array_equal(given(buffer.getvalue())["w"].ravel(), VALUES)


def test_checksums_that_were_not_recorded(given):
    pickled, values = {"content": state(w=tensor()), "crc": 0}, {"content": VALUES.tobytes(), "crc": 0}
    np.testing.assert_array_equal(given(archive({"data.pkl": pickled, "data/0": values}))["w"].ravel(), VALUES)


@pytest.mark.parametrize("checkpoint", [checkpoint, legacy])
def test_shards(tmp_path, checkpoint):
    first, second = tmp_path / "pytorch_model-00001-of-00002.bin", tmp_path / "pytorch_model-00002-of-00002.bin"
    part = {"part": b"N"} if checkpoint is legacy else {}
    first.write_bytes(checkpoint(state(v=tensor(**part))))
    second.write_bytes(checkpoint(state(w=tensor(**part))))
    index = tmp_path / f"{NAME}.index.json"

    def load(weight_map):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return read(index)

    assert load({"v": first.name, "w": second.name}).keys() == {"v", "w"}
    for weight_map, word in (
        ({"v": first.name}, None),
        ({"v": first.name, "w": first.name}, "tensor 'w' of shard"),
        ({"v": second.name, "w": first.name}, "tensor 'v' of shard"),
        ({"v": [first.name, second.name]}, "several files for tensor 'v'"),
        ({"v": []}, "'weight_map'"),
        ({"v": "../x.bin"}, "'../x.bin' is not a plain file name"),
    ):
        if word is None:
            assert load(weight_map).keys() == {"v"}
            continue
        with pytest.raises(ValueError, match=word.replace("(", r"\(")):
            load(weight_map)


@pytest.mark.parametrize("old", [False, True])
def test_reading_keeps_one_tensor_at_a_time(tmp_path, old):
    values = np.zeros(2**18, "<f4")
    names = [f"w{n}" for n in range(8)]
    pickled = state(**{n: tensor((2**18,), (1,), numel=2**18, key=str(i)) for i, n in enumerate(names)})
    zipped = archive({"data.pkl": pickled} | {f"data/{n}": values.tobytes() for n in range(8)})
    (tmp_path / NAME).write_bytes(legacy(pickled, {str(n): values for n in range(8)}) if old else zipped)
    with torch_bin.open_tensors(tmp_path, NAME) as tensors:
        tracemalloc.start()
        for item in tensors.values():
            item.read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1.1 * values.nbytes


# -- hostile pickles -------------------------------------------------------------------------------------------------

SHELL = text("touch CANARY") + b"\x85R"
CALLS = {
    "os.system": b"cos\nsystem\n" + SHELL,
    "posix.system": b"cposix\nsystem\n" + SHELL,
    "os.system ": text("os") + text("system") + b"\x93" + SHELL,
    "builtins.eval": b"cbuiltins\neval\n" + text("open('CANARY', 'w')") + b"\x85R",
    "builtins.getattr": b"cbuiltins\ngetattr\n" + ODICT + text("__class__") + b"\x86R",
    "subprocess.Popen": b"csubprocess\nPopen\n" + SHELL,
    "torch.load": b"ctorch\nload\n" + SHELL,
    "torch._utils._rebuild_tensor_v2.__globals__": text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93",
    "collections.OrderedDict.fromkeys": text("collections") + text("OrderedDict.fromkeys") + b"\x93",
    "refmodels.cli.main": b"crefmodels.cli\nmain\n)R",
}


@pytest.mark.parametrize(("name", "opcodes"), CALLS.items())
def test_globals_outside_the_list(refused, name, opcodes):
    words = [f"global {name.strip()!r} is not allowed"]
    refused_pickle(refused, START + opcodes + STOP, *words)
    refused_pickle(refused, state(w=opcodes), *words)
    refused_pickle(refused, state(w=tensor(stored=opcodes)), *words)
    refused_pickle(refused, state(w=tensor(hooks=opcodes)), *words)
    refused_pickle(refused, state(w=tensor(stored=b"(" + text("storage") + opcodes + b"tQ")), *words)
    refused_pickle(refused, START + ODICT + opcodes + b"b" + STOP, *words)


def test_a_pickle_that_would_run(refused, tmp_path):
    """The same bytes do run in Python's own unpickler: the test is not blunt."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "CANARY",)

    for protocol in range(2, 6):
        pickled = pickle.dumps({"w": Bomb()}, protocol)
        refused_pickle(refused, pickled, "is not allowed")
    pickle.loads(pickled)
    assert (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    ("opcodes", "word"),
    [
        (b"(ios\nsystem\n", "INST"),
        (b"(cos\nsystem\n" + text("touch CANARY") + b"o", "os.system"),
        (b"(o", "OBJ"),
        (ODICT + b")\x81", "NEWOBJ"),
        (ODICT + b")}\x92", "NEWOBJ_EX"),
        (b"\x82\x01", "EXT1"),
        (b"\x83\x01\x00", "EXT2"),
        (b"\x84\x01\x00\x00\x00", "EXT4"),
        (b"Pstorage\n", "PERSID"),
        (b"\x96" + struct.pack("<Q", 3) + b"abc", "BYTEARRAY8"),
        (b"\x97", "NEXT_BUFFER"),
        (b"\x98", "READONLY_BUFFER"),
        (b"\x8f", "EMPTY_SET"),
        (b"]", "entry 'w' is list"),
        (b"l", "LIST"),
        (b"I12\n", "INT"),
        (b"I" + b"9" * 100_000 + b"\n", ""),
        (b"L" + b"9" * 100_000 + b"L\n", ""),
        (b"F1.0\n", "FLOAT"),
        (b"G" + struct.pack(">d", 1.5), "BINFLOAT"),
        (b"C\x01a", "SHORT_BINBYTES"),
        (b"S'a'\n", "STRING"),
        (b"S" + b"x" * 200_000 + b"\n", ""),
        (b"0", "POP"),
        (b"N2", "DUP"),
        (b"\x80\x06", "protocol 6"),
        (b"\x8b" + struct.pack("<i", -1), ""),
        (b"\x8b" + struct.pack("<i", 2**31 - 1), ""),
        (b"\xff", ""),
    ],
    ids=repr,
)
def test_opcodes_outside_the_list(refused, opcodes, word):
    refused_pickle(refused, state(w=opcodes[:500_000]), word)


@pytest.mark.parametrize(
    "opcodes",
    [
        b"ccollections\nOrderedDict\n(((K\1K\2tttR",  # OrderedDict with items
        b"ccollections\nOrderedDict\n}R",
        b"ccollections\nOrderedDict\nR",
        b"ctorch\nFloatStorage\n)R",
        b"ctorch\nFloatStorage\n" + number(2**40) + b"\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ctorch._utils\n_rebuild_tensor_v2\n" + ODICT + b"R",
        b"ctorch._utils\n_rebuild_parameter\n" + tensor() + b"\x85R",
        b"ctorch._utils\n_rebuild_parameter\n(" + text("w") + b"\x88" + ODICT + b"tR",
        tensor(more=b"}" + text("conj") + b"\x88s"),
        tensor(more=b"NN"),
        tensor(hooks=b"N"),
        tensor(hooks=b"}" + text("hook") + b"Ns"),
        tensor(requires=b"K\1"),
        text("collections.OrderedDict") + b")R",
        text("collections.OrderedDict") + b"Q",
        b"NQ",
        b"(" + text("storage") + b"tQ",
        tensor(tag="module"),
        tensor(stored=b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\6tQ"),
        tensor(stored=b"(" + text("storage") + b"ccollections\nOrderedDict\n" + text("0") + text("cpu") + b"K\6tQ"),
        tensor(stored=b"(" + text("storage") + b"ctorch\nFloatStorage\nK\0" + text("cpu") + b"K\6tQ"),
        tensor(part=b"K\1"),
        tensor(part=b"NN"),
        tensor(part=b"(" + text("1") + b"K\0K\6t"),
        tensor(stored=ODICT),
        tensor(shape=[b"N", b"K\3"]),
        tensor(shape=[b"\x88", b"K\3"]),
        tensor(shape=(6,)),
        tensor(shape=(-2, -3)),
        tensor(strides=(-3, 1), offset=3),
        tensor(offset=-1),
        tensor(offset=b"\x88"),
        tensor(offset=2**70),
        tensor(offset=number(0)[:0] + b"G" + struct.pack(">d", 0.0)),
        tensor(numel=-1),
        tensor(numel=b"G" + struct.pack(">d", 6.0)),
        tensor(numel=b"\x88"),
        tensor(numel=2**2000),
        tensor(shape=(1,) * 65, strides=(1,) * 65),
        ODICT + b"}b",
        ODICT + b"}" + text("__class__") + b"Nsb",
        ODICT + b"}" + text("_metadata") + b"Ns" + text("update") + b"Nsb",
        tensor() + b"}" + text("_metadata") + b"Nsb",
        b"}K\1Ns",
        b"}(" + text("a") + b"N" + text("a") + b"Nu",
        b"}(" + text("a") + b"u",
        b")" + text("a") + b"Ns",
        b"s",
        b"u",
        b"e",
        b"Na",
        b"}Na",
        b"}(Ne",
        b"](K\1",
        b"]q\x00h\x00a",
        b"]" + b"q\x00h\x00a" * 50_000,
        b"]" * 5_000 + b"a" * 4_999,
        tensor(shape=[b"]", b"K\3"]),
        tensor(hooks=b"]"),
        b"t",
        b"R",
        b"\x93",
        b"\x94" * 3 + b"R",
        b"(q\x00",
        b"h\x07",
        b"j\xff\xff\xff\xff",
        b"(((\x87",
        b")" + b"\x85" * 50_000,
        b")" + b"q\x00h\x00h\x00\x86" * 50_000,
        b"(" * 200_000,
        b"(" + b"K\1" * 200_000 + b"t",
        b"}" * 200_000,
        b"N",
        b"K\1",
        b"}",
        text("w" * 100_000) + b"\x85",
    ],
    ids=lambda opcodes: repr(opcodes[:60]),
)
def test_what_is_no_table_of_tensors(refused, opcodes):
    refused_pickle(refused, state(w=opcodes))
    refused_pickle(refused, START + opcodes + STOP) if opcodes != b"}" else None


def test_streams_that_do_not_end_as_they_should(refused):
    whole = state(w=tensor())
    for content in (b"", START, b".", b"N.", whole[:-1], whole + b".", whole + whole, whole[:-1] + b"N.", b"\x80\x02" + whole):
        refused_pickle(refused, content)
    for end in range(len(whole) - 1):
        refused_pickle(refused, whole[:end])


def test_the_memo_takes_no_memory(refused):
    """Python's own unpickler allocates as many entries as the greatest index says."""
    big = b"r" + struct.pack("<I", 2**32 - 1)
    refused_pickle(refused, START + b"N" + big + STOP, "wanted a dict")
    refused_pickle(refused, START + b"N" + b"".join(b"r" + struct.pack("<I", n << 16) for n in range(1, 2000)) + STOP)


@pytest.mark.parametrize(
    "length", [b"X\xff\xff\xff\xff", b"\x8a\xff", b"\x8d" + b"\xff" * 7 + b"\x7f", b"\x8c\xff", b"B\xff\xff\xff\x7f"]
)
def test_lengths_that_lie(refused, length):
    refused_pickle(refused, START + length + b"a" + STOP)


def test_the_largest_pickle_takes_little_time_and_memory(refused):
    size = torch_pickle.MAX_BYTES - 3
    refused_pickle(refused, START + b"}" * size + STOP, "over 10000 values on the stack")
    refused_pickle(refused, START + b"Nq\x00" + b"h\x00q\x00\x85q\x00" * (size // 8))
    refused_pickle(
        refused, START + b"}q\x00" + b"".join(text(f"{n:04x}") + b"Ns" for n in range(40_000)) + STOP, "'0000' is NoneType"
    )
    refused_pickle(refused, START + b"N" + b"q\x00" * (size // 2 - 1) + STOP, "it holds NoneType")
    refused_pickle(refused, START + b"(" + b"N" * (size - 2) + b"t" + STOP)
    refused(checkpoint(START + b"}" * (size + 1) + STOP), "data.pkl has", "wanted at most")


@pytest.mark.parametrize(
    ("opcodes", "kind"),
    [
        (b"ctorch._utils\n_rebuild_qtensor\n", "quantised tensors are not supported"),
        (b"ctorch._utils\n_rebuild_sparse_tensor\n", "sparse tensors are not supported"),
        (b"ctorch\nComplexFloatStorage\n", "complex tensors are not supported"),
        (b"ctorch._utils\n_rebuild_tensor_v3\n", "8-bit floats, are not supported (torch._utils._rebuild_tensor_v3)"),
        (b"ctorch\nQInt8Storage\n", "global 'torch.QInt8Storage' is not allowed"),
    ],
)
def test_types_that_are_not_supported(refused, opcodes, kind):
    refused_pickle(refused, state(w=opcodes), kind)


# -- tensors that do not fit their storage ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"shape": (2, 4), "strides": (4, 1)}, "8 elements from 0 on of 6"),
        ({"offset": 1}, "6 elements from 1 on of 6"),
        ({"offset": 2**62}, "of 6"),
        ({"strides": (2**62, 1)}, "of 6"),
        ({"strides": (4, 1)}, "7 elements"),
        ({"shape": (2**31, 2**31), "strides": (2**31, 1)}, "of 6"),
        ({"shape": (2**62, 2**62)}, "overlap"),
        ({"shape": (10**6, 10**6), "strides": (0, 0)}, "overlap"),
        ({"shape": (6, 6), "strides": (0, 1)}, "overlap"),
        ({"strides": (1, 1)}, "overlap"),
        ({"shape": (3, 3), "strides": (2, 1)}, "overlap"),
        ({"shape": (0,), "strides": (1,), "offset": 7}, "0 elements from 7 on"),
        ({"numel": 5, "shape": (5,), "strides": (1,)}, "5 elements of float32, its record 24 bytes"),
        ({"numel": 2**62}, "its record 24 bytes"),
        ({"kind": "DoubleStorage"}, "6 elements of float64, its record 24 bytes"),
        ({"key": "1"}, "record '1', which the file lacks"),
        ({"key": "../version"}, "record '../version', which the file lacks"),
    ],
)
def test_views_that_leave_their_storage(refused, fields, word):
    refused(checkpoint(state(w=tensor(**fields))), "tensor 'w'", word)


def test_many_names_for_one_storage(refused, given):
    values = np.zeros(2**16, "<f4")
    opcodes = tensor((2**16,), (1,), numel=2**16)
    assert len(given(checkpoint(state(**{f"w{n}": opcodes for n in range(4)}), values))) == 4
    for form in (checkpoint, lambda pickled, values: legacy(pickled, {"0": values})):
        refused(form(state(**{f"w{n}": opcodes for n in range(9)}), values), "the tensors declare", "the file has")


def test_values_that_fail_their_checksum(given, tmp_path):
    content = bytearray(checkpoint())
    content[content.index(VALUES.tobytes()) + 5] ^= 1
    (tmp_path / NAME).write_bytes(content)
    with torch_bin.open_tensors(tmp_path, NAME) as tensors, pytest.raises(ValueError, match=r"tensor 'w' is damaged"):
        tensors["w"].read()


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    size = 2**18  # beyond what the reader has buffered
    opcodes = tensor((size,), (1,), numel=size)
    (tmp_path / NAME).write_bytes(checkpoint(state(w=opcodes), np.zeros(size, "<f4")))
    with torch_bin.open_tensors(tmp_path, NAME) as tensors:
        os.truncate(tmp_path / NAME, 1000)
        with pytest.raises(ValueError, match=r"tensor 'w' is damaged"):
            tensors["w"].read()


# -- archives --------------------------------------------------------------------------------------------------------


def test_archives_that_lie(refused):
    pickled, values = state(w=tensor()), VALUES.tobytes()

    def lying(**fields):
        return archive({"data.pkl": pickled, "data/0": {"content": values} | fields})

    bomb = zlib.compress(bytes(10**6))[2:-4]
    packed = {"content": bomb, "size": 10**6, "packed": len(bomb), "method": 8, "crc": zlib.crc32(bytes(10**6))}
    refused(archive({"data.pkl": packed}), "'archive/data.pkl' is compressed")
    refused(lying(method=8), "'archive/data/0' is compressed")
    refused(lying(method=99), "is compressed")
    refused(lying(size=2**30, packed=24), "is compressed")
    refused(lying(size=2**30), "'archive/data/0' reaches into the next one or out of the file")
    for flags in (0x1, 0x40, 0x2000):
        refused(lying(flags=0x800 | flags), "'archive/data/0' is encrypted")
    refused(lying(offset=0), "another name at byte 0")
    refused(lying(offset=10), "no header at byte 10")
    refused(lying(offset=2**31), "no header at byte")
    refused(lying(local_name=b"archive/data/1"), "another name")
    refused(lying(local_name=b"\xff\xfe"), "not a sound torch checkpoint")
    same = {"data.pkl": pickled, "data/0": values, "data/1": {"content": values, "local_name": b"archive/data/0"}}
    refused(archive(same), "another name")
    refused(archive({"data.pkl": pickled, "data/0": values}).replace(b"archive/data/0", b"xrchive/data/0"), "in one directory")
    twice = archive({"data.pkl": pickled, "data/0": values, "data/1": values}).replace(b"archive/data/1", b"archive/data/0")
    refused(twice, "each once")
    refused(archive({"data/0": values}), "wanted data.pkl")
    refused(archive({}), "not a sound torch checkpoint")
    refused(archive({"data.pkl": pickled}, prefix=""), "not a sound torch checkpoint")
    refused(archive({"data.pkl": {"content": pickled, "crc": 1}, "data/0": values}), "data.pkl is damaged")
    for lie in (
        {"count": 60000},
        {"directory_size": 2**31},
        {"directory_start": 2**31},
        {"directory_size": 3},
        {"directory_start": 5},
    ):
        if lie != {"count": 60000}:  # nobody reads the count
            refused(archive({"data.pkl": pickled, "data/0": values}, **lie))


def test_entries_inside_each_other(refused):
    inner = archive({"data/0": VALUES.tobytes()})
    start = inner.index(b"PK\3\4")
    outer = {"data.pkl": state(w=tensor()), "big": inner, "data/0": {"content": VALUES.tobytes()}}
    content = archive(outer)
    place = content.index(inner) + start
    outer["data/0"]["offset"] = place
    refused(archive(outer), "'archive/big' reaches into the next one")


@pytest.mark.parametrize("order", [b"big", b"", b"middle" * 1000])
def test_byte_order(refused, order):
    refused(checkpoint(byteorder=order), "byte order")


def test_a_directory_as_large_as_the_file(refused):
    """The end of the archive says that its directory begins at byte 0."""
    content = bytes(2 * torch_pickle.MAX_BYTES)
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(content), 0, 0)
    refused(b"PK\3\4" + content[4:] + end, "the directory of the archive or the pickle is larger than")


def test_files_that_are_no_archive(refused):
    for content in (
        b"",
        b"PK",
        b"PK\3\4",
        b"\x93NUMPY",
        b"PK\5\6" + bytes(18),
        bytes(100),
        b"version https://git-lfs",
    ):
        refused(content, "not a sound torch checkpoint, perhaps truncated")


def test_truncated_at_many_places(refused):
    content = GOLDEN.read_bytes()
    for end in [*range(0, 300, 13), *range(300, len(content), 4999), *range(len(content) - 60, len(content))]:
        refused(content[:end], "truncated")


# -- files of torch before 1.6 ---------------------------------------------------------------------------------------------


def test_the_golden_file_of_the_old_form():
    """A state dict with versions of modules; tied and turned tensors; four types; keys in no order of the tensors."""
    tensors, wanted = read(OLD_GOLDEN), read(GOLDEN)
    q, bias = (f"model.decoder.layers.0.self_attn.q_proj.{leaf}" for leaf in ("weight", "bias"))
    wanted |= {"tied": wanted[q], "turned": wanted[q].T, "rows": wanted[q][::3, 2:9], "count": np.int64(7)}
    wanted |= {"half": wanted[bias].astype("f2"), "bfloat16": wanted[bias].astype(ml_dtypes.bfloat16)}
    assert len(tensors) == 11
    for name, values in tensors.items():
        assert (values.dtype, values.shape) == (wanted[name].dtype, wanted[name].shape), name
        np.testing.assert_array_equal(values, wanted[name], name)


def test_the_old_form_by_hand(given):
    np.testing.assert_array_equal(given(legacy())["w"], VALUES.reshape(2, 3))
    found = given(legacy(state(v=tensor(part=b"N"), w=tensor((3, 2), (1, 3), part=b"N"))))  # one storage, two tensors
    np.testing.assert_array_equal(found["w"], found["v"].T)
    assert given(legacy(START + ODICT + STOP, {})) == {}
    empty = state(w=tensor((0, 3), (3, 1), numel=0, part=b"N"))
    assert given(legacy(empty, {"0": VALUES[:0]}))["w"].shape == (0, 3)
    assert len(given(legacy(keys=b"]" + text("0") + b"a"))) == 1  # as one item is appended


@pytest.mark.parametrize(("kind", "name"), torch_pickle.STORAGES.items())
def test_every_type_of_the_old_form(given, kind, name):
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    values = np.arange(6).astype(dtype)
    found = given(legacy(state(w=tensor(kind=kind, part=b"N")), {"0": values}))["w"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.ravel(), values)


def test_storages_follow_in_the_order_of_their_keys(tmp_path):
    (tmp_path / NAME).write_bytes(legacy(state(v=tensor(key="9"), w=tensor(key="10")), {"10": VALUES, "9": -VALUES}))
    found = read(tmp_path / NAME)
    np.testing.assert_array_equal(found["v"].ravel(), -VALUES)
    np.testing.assert_array_equal(found["w"].ravel(), VALUES)


def test_old_files_that_lie(refused):
    count, values = struct.pack("<Q", 6), VALUES.tobytes()
    for content, *words in (
        (START + b"N.", "magic number NoneType"),
        (state(w=tensor()), "magic number dict"),
        (legacy(magic=number(torch_legacy.MAGIC + 1)), "magic number"),
        (legacy(version=number(1000)), "version of the form 1000, wanted 1001"),
        (legacy(version=b"\x88"), "version of the form True"),
        (legacy(system=SYSTEM.replace(b"\x88", b"\x89")), "byte order: little_endian is False, wanted True"),
        (legacy(system=b"}"), "byte order: little_endian is NoneType"),
        (legacy(system=b"N"), "byte order"),
        (legacy(START + b"N."), "it holds NoneType, wanted a dict of tensors"),
        (legacy(START + b"NN."), "2 values on the stack"),
        (legacy(state(w=tensor(part=b"(" + text("1") + b"K\0K\6t"))), "('1', 0, 6)) is not that of a storage"),
        (legacy(storages={"0": count[:-1] + b"\1" + values}), "has 6 elements, at byte", "has 72057594037927942 elements"),
        (legacy(storages={"0": struct.pack("<Q", 5) + values[:-4]}), "the file has 5 elements"),
        (legacy(storages={"0": b"\xff" * 8 + values}), "has 6 elements"),
        (legacy(storages={"0": struct.pack(">Q", 6) + values}), "has 6 elements"),
        (legacy(storages={"0": count + values[:-1]}), "storage '0' ends at byte", "truncated"),
        (legacy(storages={"0": count[:-1]}), "the file has nothing: it is truncated"),
        (legacy() + b"\0", "the last storage ends at byte"),
        (legacy() + legacy(), "the last storage ends at byte"),
        (legacy(storages={"0": VALUES, "1": VALUES}), "storage '1' is in the list of keys, but in no tensor"),
        (legacy(storages={}), "storage '0' is in the tensors, but not in the list of keys"),
        (legacy(state(w=tensor(key="x" * 1000)), {"x" * 999: VALUES}), "storage 'xxx"),
        (legacy(keys=listed("00")), "wanted a list of the keys of storages, each once"),
        (legacy(keys=b"](" + text("0") + b"K\1e"), "wanted a list"),
        (legacy(keys=b"](]]e"), "wanted a list"),
        (legacy(keys=b"N"), "wanted a list"),
        (legacy(keys=b"}"), "wanted a list"),
        (legacy(keys=text("0")), "wanted a list"),
        (legacy(state(v=tensor(), w=tensor(kind="IntStorage"))), "'w': its storage has 6 elements of int32", "6 of float32"),
        (legacy(state(v=tensor(), w=tensor(numel=7))), "'w': its storage has 7 elements of float32, in another tensor 6"),
        (legacy(state(w=tensor(numel=2**62)), {"0": struct.pack("<Q", 2**62) + values}), "storage '0' ends at byte 184467"),
        (legacy(state(w=tensor(strides=(1, 1)))), "its elements overlap"),
        (legacy(state(w=tensor(offset=1))), "6 elements from 1 on of 6"),
    ):  # fmt: skip
        refused(content, *words)


@pytest.mark.parametrize("opcodes", CALLS.values(), ids=CALLS)
def test_none_of_the_old_pickles_runs(refused, opcodes):
    for place in ("magic", "version", "system", "keys"):
        refused(legacy(**{place: opcodes}), "is not allowed")
    refused(legacy(state(w=opcodes)), "is not allowed")


def test_old_pickles_are_bounded(refused):
    size = torch_pickle.MAX_BYTES
    for opcodes in (b"Nq\x00" + b"h\x00q\x00\x85q\x00" * (size // 8), b"]" + b"q\x00h\x00a" * (size // 5), b"c" + bytes(size)):
        for place in ("magic", "system", "keys"):
            refused(legacy(**{place: opcodes}))
    for opcodes in (b"X\xff\xff\xff\xff", b"\x95" + struct.pack("<Q", 2**40), text("x" * size)):
        refused(legacy(keys=opcodes), f"of at most {size})")


def test_an_old_file_truncated_anywhere(refused):
    content = OLD_GOLDEN.read_bytes()
    values = content.index(b"e.", content.index(b"\x80\x02]"))
    for end in [*range(0, values, 97), *range(values + 2, len(content), 499), *range(len(content) - 9, len(content))]:
        refused(content[:end], "truncated" if end > values + 1 or end < 1 else "")


def test_an_old_file_that_shrinks_while_it_is_open(tmp_path):
    size = 2**18
    opcodes = tensor((size,), (1,), numel=size, part=b"N")
    (tmp_path / NAME).write_bytes(legacy(state(w=opcodes), {"0": np.zeros(size, "<f4")}))
    with torch_bin.open_tensors(tmp_path, NAME) as tensors:
        os.truncate(tmp_path / NAME, 1000)
        with pytest.raises(ValueError, match=r"tensor 'w' is damaged"):
            tensors["w"].read()


def test_links_and_missing_files(tmp_path):
    directory = tmp_path / "preset"
    directory.mkdir()
    with pytest.raises(FileNotFoundError, match=NAME):
        read(directory / NAME)
    shutil.copy(GOLDEN, tmp_path / "outside")
    (directory / NAME).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="a link that leads out of the directory"):
        read(directory / NAME)

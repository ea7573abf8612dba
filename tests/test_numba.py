"""The Numba accelerator: everything that the conformance suite draws, the peers' goldens, and what it claims beyond the spec.

Its kernels are compiled once for all of these tests, or found on disk.
"""

import hashlib
import multiprocessing
import os
import platform
import subprocess
import sys
import threading

import numpy as np
import pytest

pytest.importorskip("numba", reason="the accelerator needs numba: pip install 'refmodels[numba]'")

import test_goldens
from llvmlite import binding as llvm
from numba import njit, types
from refmodels_numba import native, numba, packing, team
from refmodels_numba.kernels import vector
from refmodels_numba.layout import BFLOAT16, FLOAT16, FLOAT32, INT8

from refmodels import BloomBackbone, OPTBackbone, OPTCausalLM, T5Backbone, T5Seq2SeqLM, use
from refmodels.accelerator import AcceleratorError, find
from refmodels.conformance import check_accelerator
from refmodels.conformance.check import subjects
from refmodels.coverage import COMPOSITE, OWN, coverage
from refmodels.numerics import judge
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.quantize import pack_int4, quantized_groups
from refmodels.ops.sampling import beam_candidates, likeliest_tokens, sample_token
from refmodels.t5 import t5_logits

SMALL = {"vocabulary_size": 37, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "intermediate_dim": 70, "seed": 2}
MODELS = {
    "opt": (OPTBackbone, {**SMALL, "max_sequence_length": 300}),
    "bloom": (BloomBackbone, SMALL),
    "t5": (T5Backbone, {**SMALL, "key_value_dim": 20, "activation": "gelu_approximate"}),
}
FORMS = {
    "float32": ("float32", {}),
    "float16": ("float16", {}),
    "bfloat16": ("bfloat16", {}),
    "mixed_bfloat16": ("mixed_bfloat16", {}),
    "int8": ("float32", {"mode": "int8"}),
    "int8 weights": ("bfloat16", {"mode": "int8", "weight_only": True}),
    "int4": ("float32", {"mode": "int4", "block_size": 16}),
    "int4 in odd groups": ("float32", {"mode": "int4", "block_size": 5}),
}


def model(name, form="float32", accelerator=numba, **changes):
    cls, arguments = MODELS[name]
    dtype, quantization = FORMS[form]
    made = cls(**{**arguments, **changes}, dtype=dtype, accelerator=accelerator)
    if quantization:
        made.quantize(**quantization)
    return made


def inputs(name, batch=3, length=11, seed=0):
    ids = np.random.default_rng(seed).integers(0, 37, (batch, length))
    mask = np.arange(length) < np.linspace(length, length // 2, batch).astype(int)[:, None]
    if name != "t5":
        return {"token_ids": ids, "padding_mask": mask}
    keys = ("encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask")
    return dict(zip(keys, (ids, mask, ids[:, : length - 2], mask[:, : length - 2]), strict=True))


def outputs(made, given):
    """The last hidden states, and which of them are of real tokens."""
    result = made(given)
    real = given["padding_mask" if "padding_mask" in given else "decoder_padding_mask"]
    return (result["decoder_sequence_output"] if isinstance(result, dict) else result), real


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# -- to the specification -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [subject.name for subject in subjects(numba)])
def test_conformance(name):
    """A part of what `refmodels check --accelerator numba` draws."""
    (checked,) = check_accelerator(numba, ops=[name], examples=30)
    assert not checked.failures, "\n".join(map(str, checked.failures))


@pytest.mark.parametrize("name", [f"hf/{name}" for name in test_goldens.HUGGING_FACE] + test_goldens.KERAS_HUB)
def test_goldens_of_the_peers(name):
    test_goldens.judge_accelerator(name, numba)
    assert not numba.crossings


@pytest.mark.parametrize("name", test_goldens.HUGGING_FACE)
def test_generation_of_the_peers(name):
    with use(numba):
        test_goldens.test_transformers_generation(name, "greedy", {})
        test_goldens.test_transformers_generation(name, "beam4", {"num_beams": 4})


def test_nothing_with_arithmetic_is_left_to_the_reference():
    """Views, look-ups, masks, and the choice of a token: all that has no kernel and calls none."""
    left = {entry.op.name for entry in coverage(numba) if entry.runs not in (OWN, COMPOSITE)}
    assert left == {
        "cache_allocate", "cache_append", "split_heads", "merge_heads", "last_rows", "linear_activation", "dropout",
        "causal_mask", "key_mask", "token_positions", "relative_position_buckets", "relative_position_bias", "alibi_slopes",
        "alibi_bias", "pack_int4", "unpack_int4", "lora_merged", "log_softmax", "token_log_probs", "penalise_repetition",
        "forbid_ngrams", "allow_tokens", "has_choice", "greedy_token", "contrastive_choice",
    }  # fmt: skip


def test_tokens_are_chosen_as_by_sorting_the_vocabulary():
    """Ties and all, in vocabularies larger than those that the conformance suite draws."""
    rng = np.random.default_rng(0)
    for i in range(200):
        logits = (3 * rng.standard_normal((2, 2000))).astype(np.float32)
        logits = np.round(logits) if i % 2 else logits
        settings = {"top_k": rng.integers(1, 65, 2), "top_p": rng.random(2), "temperature": rng.random(2) + 0.1}
        uniform = rng.random(2)
        with use(numba):
            got = sample_token(logits, uniform, **settings), *beam_candidates(logits, uniform, 9), *likeliest_tokens(logits, 7)
        reference = sample_token.reference, beam_candidates.reference, likeliest_tokens.reference
        wanted = reference[0](logits, uniform, **settings), *reference[1](logits, uniform, 9), *reference[2](logits, 7)
        assert all(map(np.array_equal, got, wanted))


# -- to the bit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_the_same_bits_alone_padded_and_by_any_number_of_threads(name, form):
    one, two, five = (model(name, form, numba.configured(threads=n)) for n in (1, 2, 5))
    given = inputs(name, batch=7, length=19)
    wanted, real = outputs(one, given)
    for other in (two, five, one):
        assert same_bits(outputs(other, given)[0], wanted)
    for row in range(7):
        alone = {key: value[row : row + 1] for key, value in given.items()}
        if name != "t5":  # without its padding, too
            alone = {key: value[:, : real[row].sum()] for key, value in alone.items()}
        got, own = outputs(two, alone)
        assert same_bits(got[own], wanted[row : row + 1, : own.shape[1]][own])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_chunks_and_steps_with_a_cache_are_one_pass_to_the_bit(name, form):
    made = model(name, form)
    ids = np.random.default_rng(1).integers(0, 37, (2, 150))
    wanted = made({"token_ids": ids})
    with made.running():
        cache, parts, start = made.new_cache(2, 160), [], 0
        for length in (1, 70, 1, 1, 8, 69):
            mask, first = np.ones((2, length), bool), np.full(2, start)
            parts.append(made.hidden_states(ids[:, start : start + length], mask, first, cache))
            start += length
    assert start == 150
    assert same_bits(np.concatenate(parts, 1), wanted)


@pytest.mark.parametrize("form", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_kernels_are_the_bits_of_their_parts(name, form):
    """A model with adapters that change nothing runs op by op: dense layers, norms and attention, each by its own kernel."""
    fused, parts = model(name, form), model(name, form)
    parts.enable_lora(1)
    given = inputs(name)
    wanted, real = outputs(parts, given)
    got, _ = outputs(fused, given)
    if form != "float16":  # an adapter's sum is rounded once more
        assert same_bits(got[real], wanted[real])
    assert not numba.crossings


def test_calls_from_several_threads_at_once():
    made = {name: model(name) for name in MODELS}
    given = {name: inputs(name, batch=4, length=40) for name in MODELS}
    wanted = {name: outputs(made[name], given[name])[0] for name in MODELS}
    wrong, start = [], threading.Barrier(6)

    def call(name):
        start.wait()
        wrong.extend(name for _ in range(12) if not same_bits(outputs(made[name], given[name])[0], wanted[name]))

    callers = [threading.Thread(target=call, args=(name,)) for name in [*MODELS] * 2]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_threads_of_its_own():
    made = model("opt", accelerator=numba.configured(threads=2), hidden_dim=96)
    wanted = outputs(made, inputs("opt", batch=40))[0]

    def child(sender):
        sender.send(same_bits(outputs(made, inputs("opt", batch=40))[0], wanted))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    assert receiver.poll(60)
    assert receiver.recv()
    process.join()


# -- weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 16), (33, 50), (3, 4, 8), (0, 3), (8, 0)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packed_floats_come_back_bit_for_bit(dtype, shape):
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal(shape).astype(numpy_dtype(dtype))
    assert same_bits(packing.packed(leaf).unpacked(), leaf)
    if len(shape) == 2:
        for owned in (False, True):
            table = packing.packed(leaf.copy(), by_rows=True, owned=owned)
            assert same_bits(table.unpacked(), leaf)
            ids = np.arange(shape[0])[::-1]
            assert same_bits(np.ascontiguousarray(table.rows(ids)), np.ascontiguousarray(leaf[ids]))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 16), (33, 50)])
@pytest.mark.parametrize("by_rows", [False, True])
def test_packed_integers_come_back_bit_for_bit(shape, by_rows):
    leaf = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    for integer in (False, True):
        packed = packing.packed_int8(leaf, by_rows=by_rows, integer=integer)
        assert same_bits(packed.unpacked(), leaf)
        if by_rows:
            assert np.array_equal(packed.rows(np.arange(shape[0])), leaf)
    for block, axis in ((4, -1), (8, 0), (3, -1), (100, 0)):
        if by_rows and axis == 0:
            continue
        values, scale, zero = quantized_groups(np.random.default_rng(1).standard_normal(shape).astype(np.float32), block)
        g_idx = (np.arange(shape[0]) // block).astype(np.float32)
        if by_rows:
            values, scale, zero = values.T, scale.T, zero.T
        leaf = pack_int4.reference(np.ascontiguousarray(values), axis=axis)
        packed = packing.packed_int4(leaf, scale, zero, g_idx, by_rows=by_rows, axis=axis)
        assert same_bits(packed.unpacked(), leaf)
        assert packed.host is None or block == 3
        if by_rows and packed.host is None:
            assert np.array_equal(packed.rows(np.arange(shape[1])), values)


@pytest.mark.parametrize("hidden_dim", [1, 2, 5])
def test_the_untied_head_in_int4_has_two_numbers_of_a_column_in_a_byte(hidden_dim):
    """Also where there is one row of them, whose form says nothing."""
    arguments = {"num_heads": 1, "hidden_dim": hidden_dim, "tie_embedding_weights": False}
    fast, slow = (model("t5", "int4", accelerator, **arguments) for accelerator in (numba, None))
    hidden = np.ones((3, hidden_dim), np.float32)
    with use(numba):
        got = fast.logits(hidden)
    verdict = judge(t5_logits, (hidden, slow.params, slow.config), {}, got)
    assert verdict, verdict


def test_a_table_is_packed_in_its_own_memory():
    table = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)
    place = packing.address(table)
    assert packing.packed(table, by_rows=True, owned=True).address == place
    other = np.random.default_rng(0).standard_normal((64, 40)).astype(np.float32)
    assert packing.packed(other, by_rows=True).address != packing.address(other)


# -- threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"NUMBA_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1,4"}, 1),
        ({"OMP_NUM_THREADS": "many"}, None),
        ({"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}, 1),
    ],
)
def test_environment_variables_set_the_number_of_threads(monkeypatch, variables, wanted):
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    free = team.default_threads()
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert team.default_threads() == (wanted or free)


def test_threads_are_a_setting():
    assert find("numba", threads=3).threads == 3
    assert find("numba").threads == team.default_threads()
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(AcceleratorError, match="threads must be an integer from 1 on"):
            find("numba", threads=wrong)
    with pytest.raises(AcceleratorError, match="no setting 'thread'"):
        find("numba", thread=2)


def test_python_goes_on_while_a_program_runs():
    made = model("opt", num_layers=12, hidden_dim=384, intermediate_dim=1536)
    made(inputs("opt", 1, 2))
    seen, done = [], threading.Event()

    def count():
        while not done.is_set():
            seen.append(1)

    counter = threading.Thread(target=count)
    before = 0
    counter.start()
    try:
        before = len(seen)
        made(inputs("opt", batch=16, length=200))
    finally:
        done.set()
        counter.join()
    assert len(seen) > before + 1000


# -- compiled code --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The code that is loaded, in place of what a compiler would make; and a directory for it."""
    native.load(lambda line: None)
    found = native._read()
    assert found is not None
    calls = []

    def compile_now(report):
        calls.append(1)
        return found

    monkeypatch.setattr(native, "_compiled", compile_now)
    monkeypatch.setattr(native, "_execute", None)
    monkeypatch.setattr(native, "directories", lambda: [tmp_path / "first", tmp_path / "second"])
    return calls, tmp_path


def test_what_is_compiled_once_is_read_afterwards(compiled, monkeypatch):
    calls, directory = compiled
    assert "compiled in" in native.compile_ahead(lambda line: None)
    (file,) = (directory / "first").iterdir()
    assert file.name == f"{native.digest()}.o"
    assert file.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(native, "_execute", None)
    assert "loaded in" in native.compile_ahead(lambda line: None)
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "linked", "open"])
def test_a_file_that_is_not_as_it_was_written_is_not_run(compiled, monkeypatch, damage):
    calls, directory = compiled
    native.load(lambda line: None)
    (file,) = (directory / "first").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "linked":
        file.rename(directory / "elsewhere")
        file.symlink_to(directory / "elsewhere")
    elif damage == "open":
        file.chmod(0o666)
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes({"cut": content[:-9], "changed": content, "empty": b""}[damage])
    monkeypatch.setattr(native, "_execute", None)
    native.load(lambda line: None)
    assert len(calls) == 2


def test_a_directory_of_somebody_else_is_not_used(compiled):
    _, directory = compiled
    (directory / "first").mkdir()
    (directory / "first").chmod(0o777)
    native.load(lambda line: None)
    assert not list((directory / "first").iterdir())
    assert list((directory / "second").iterdir())


def test_where_nothing_can_be_written_the_code_lives_as_long_as_the_process(compiled):
    calls, directory = compiled
    for name in ("first", "second"):
        (directory / name).write_text("a file where the directory would be")
    assert "not cached" in native.compile_ahead(lambda line: None)
    assert len(calls) == 1
    assert same_bits(*[outputs(model("opt"), inputs("opt"))[0]] * 2)


def test_another_version_finds_another_file(monkeypatch):
    before = native.digest()
    native.digest.cache_clear()
    monkeypatch.setattr(native, "host", lambda: ["something else"])
    assert native.digest() != before
    native.digest.cache_clear()
    monkeypatch.undo()
    assert native.digest() == before


def test_llvm_links_what_is_not_of_the_usual_kind(compiled, monkeypatch):
    """And gives the same: a file with another kind of relocation, or of another system."""
    native.load(lambda line: None)
    wanted = outputs(model("opt"), inputs("opt"))[0]
    monkeypatch.setattr("refmodels_numba.linking.ABSOLUTE_64", 77)
    code, symbol = native._read()
    assert native.linking.linked(code, symbol, native.UNUSED) is None
    monkeypatch.setattr(native, "_execute", None)
    native.load(lambda line: None)
    assert native._engines
    assert same_bits(outputs(model("opt"), inputs("opt"))[0], wanted)


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="for Linux on x86-64")
def test_on_linux_the_code_is_linked_without_llvm():
    native.load(lambda line: None)
    code, symbol = native._read()
    assert native.linking.linked(code, symbol, native.UNUSED)
    assert native.linking.linked(code, "no such symbol", native.UNUSED) is None
    assert native.linking.linked(b"MZ" + code[2:], symbol, native.UNUSED) is None


def test_numba_is_not_imported_where_its_code_is_on_disk():
    native.load(lambda line: None)
    program = (
        "import sys; from refmodels import OPTCausalLM; "
        "text = OPTCausalLM.from_preset('opt_tiny_stdlib', accelerator='numba').generate('import', max_new_tokens=3); "
        "print('numba' in sys.modules, 'llvmlite' in sys.modules, len(text) > 6)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    linux = sys.platform == "linux" and platform.machine() == "x86_64"
    assert done.stdout.split() == ["False", str(not linux), "True"]


def test_without_numba_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("refmodels_numba.accelerator._installed", lambda package: package != "numba")
    assert numba.missing() == "numba is not installed: pip install 'refmodels[numba]'"


# -- on other CPUs --------------------------------------------------------------------------------------------------------


def intermediate(tile, arguments):
    """LLVM's text of a function that is nothing but this intrinsic."""
    names = ", ".join(f"a{i}" for i in range(arguments))
    namespace = {"tile": tile}
    exec(f"def alone({names}):\n    tile({names})", namespace)
    alone = njit((types.int64,) * arguments, error_model="numpy", _nrt=False)(namespace["alone"])
    return alone.overloads[(types.int64,) * arguments].library.get_llvm_str()


def assembly(text, triple, cpu):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    lines = [line for line in text.splitlines() if not line.startswith(("target ", "source_filename"))]
    module = llvm.parse_assembly("\n".join(lines))
    module.triple, module.data_layout = triple, str(machine.target_data)
    return machine.emit_assembly(module)


@pytest.mark.parametrize(
    ("triple", "cpu", "instruction", "register"),
    [
        ("x86_64-unknown-linux-gnu", "haswell", "vfmadd", "ymm"),
        ("x86_64-unknown-linux-gnu", "skylake-avx512", "vfmadd", "zmm"),
        ("aarch64-unknown-linux-gnu", "cortex-a76", "fmla", "v0.4s"),
    ],
)
@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16, INT8])
def test_tiles_become_vector_instructions_everywhere(kind, triple, cpu, instruction, register):
    text = assembly(intermediate(vector.make_tile(6, 1, kind), 6), triple, cpu)
    assert text.count(instruction) >= 6
    assert register in text


@pytest.mark.parametrize("kind", [FLOAT32, BFLOAT16])
def test_keys_turned_into_panels_give_the_bits_of_keys_as_they_lie(kind):
    dots, turn, tile = vector.make_dots(kind), vector.make_turning(kind), vector.make_dots_tile(3)

    @njit((types.int64,) * 7, error_model="numpy", _nrt=False)
    def both(x, keys, count, size, panel, plain, turned):
        stride = size * (4 if kind == FLOAT32 else 2)
        for q in range(3):
            dots(x + 4 * size * q, keys, stride, count, size, plain + 64 * q)
        turn(keys, stride, count, size, panel)
        tile(x, 4 * size, panel, turned, 64, size)

    draw = np.random.default_rng(0)
    for size in (1, 7, 8, 15, 16, 17, 31, 40, 64, 80, 100, 128, 131):
        for count in (1, 5, 9, 16):
            x, keys = (draw.standard_normal((rows, size), np.float32) for rows in (3, count))
            stored = keys if kind == FLOAT32 else (keys.view(np.uint32) >> 16).astype(np.uint16)
            panel, (plain, turned) = np.empty((size, 16), np.float32), np.zeros((2, 3, 16), np.float32)
            both(*map(packing.address, (x, stored)), count, size, *map(packing.address, (panel, plain, turned)))
            np.testing.assert_array_equal(plain[:, :count], turned[:, :count])
            seen = keys if kind == FLOAT32 else (keys.view(np.uint32) & 0xFFFF0000).view(np.float32)
            np.testing.assert_allclose(plain[:, :count], x @ seen.T, rtol=1e-3, atol=1e-4)


def test_float16_is_widened_by_hand_where_the_cpu_does_not(monkeypatch):
    halves = np.arange(1 << 16, dtype=np.uint16)
    wanted = halves.view(np.float16).astype(np.float32)
    for in_hardware in (False, vector.HALF_IN_HARDWARE):
        monkeypatch.setattr(vector, "HALF_IN_HARDWARE", in_hardware)
        widen = vector.make_widening(FLOAT16)
        namespace = {"widen": widen}
        exec("def alone(a, b, c):\n    widen(a, b, c)", namespace)
        out = np.empty(1 << 16, np.float32)
        njit((types.int64,) * 3, _nrt=False)(namespace["alone"])(
            packing.address(halves), packing.address(out), len(halves) // 16
        )
        np.testing.assert_array_equal(out, wanted)


# -- as it is used --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["opt_tiny_stdlib", "bloom_tiny_stdlib", "t5_tiny_numbers"])
def test_the_presets_say_what_the_reference_says(preset):
    cls = {"o": OPTCausalLM, "t": T5Seq2SeqLM}.get(preset[0])
    from refmodels import Task

    prompts = ["spell: 4207", "roman: 1994"] if preset.startswith("t5") else ["import os", "class"]
    fast, slow = (Task.from_preset(preset, accelerator=name) for name in ("numba", None))
    assert cls is None or isinstance(fast, cls)
    for settings in ({}, {"num_beams": 3}, {"top_k": 5, "seed": 3}):
        assert fast.generate(prompts, max_new_tokens=12, **settings) == slow.generate(prompts, max_new_tokens=12, **settings)


def test_weights_are_there_once(tmp_path):
    """They are packed, and saving brings back the same file."""
    made = OPTCausalLM.from_preset("opt_tiny_stdlib")
    made.save_to_preset(tmp_path / "before")
    fast = OPTCausalLM.from_preset("opt_tiny_stdlib", accelerator="numba")
    fast.generate("import", max_new_tokens=2)
    fast.save_to_preset(tmp_path / "after")
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).rglob("*.h5")}
        for name in ("before", "after")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 1

"""The CuPy accelerator's ops that use array functions, on a device whose functions are as CuPy's: `apart.py` says in what."""

import shutil

import numpy as np
import pytest
from apart import EmulatedApart, MixedError
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.device import Launch
from stand_in import NORM
from test_cupy_linear import BY_KERNELS

from refmodels import OPTCausalLM, T5Seq2SeqLM
from refmodels.conformance import check_accelerator, drawing
from refmodels.op import OPS
from refmodels.ops.attention import attention_scores
from refmodels.ops.elementwise import dropout, scaled
from refmodels.ops.precision import numpy_dtype
from refmodels.ops.sampling import allow_tokens, likeliest_tokens
from refmodels.samplers import TopPSampler

BY_KERNELS_ALONE = {*BY_KERNELS, "masked_softmax", "greedy_token", "sample_token"}
BY_ARRAY_FUNCTIONS = tuple(name for name, op in OPS.items() if not op.composite and name not in BY_KERNELS_ALONE)


@pytest.fixture
def cupy(compiled, monkeypatch):
    monkeypatch.setattr(drawing, "ROOM", 2**9)  # a thread costs a microsecond here
    monkeypatch.setattr(drawing, "TILES", (8, 16))
    cupy = Cupy(EmulatedApart(compiled, orders=(2,)))
    cupy.tiles = ()
    return cupy


@pytest.mark.parametrize("name", BY_ARRAY_FUNCTIONS)
def test_conformance(cupy, name):
    [checked] = check_accelerator(cupy, ops=[name], examples=24)
    assert [str(failure) for failure in checked.failures] == []
    assert checked.taken == checked.examples > 0
    assert not cupy.crossings


# -- planted faults: arithmetic by array functions ----------------------------------------------------------------------------


def scaled_by_numpy(xp):
    return lambda x, factor: (x * np.float32(factor)).astype(x.dtype)


def scores_by_numpy(xp):
    def scores(query, key, bias=None, *, scale=1.0):
        wide = [part.astype(np.float32) for part in (query.transpose(0, 2, 1, 3), key.transpose(0, 2, 3, 1))]
        products = wide[0] @ wide[1] * np.float32(scale)
        return products if bias is None else products + bias.astype(np.float32)

    return scores


def allowed_by_numpy(xp):
    return lambda logits, allowed: xp.where(allowed, logits, logits.dtype.type(-np.inf)).astype(np.float32)


def likeliest_by_numpy(xp):
    def likeliest(logits, count, *, temperature=1.0):
        scores = logits.astype(np.float32)
        tokens = xp.argsort(-scores, axis=-1, kind="stable")[:, :count]
        powers = xp.exp((scores - scores.max(-1, keepdims=True)) / np.float32(temperature))
        return xp.take_along_axis(powers / powers.sum(-1, keepdims=True), tokens, -1), tokens

    return likeliest


def dropout_by_numpy(xp):
    def dropped(x, rate=0.0, rng=None):
        if rng is None or rate == 0.0:
            return x[...]
        kept = xp.asarray(rng.random(x.shape, np.float32) >= rate)
        return xp.where(kept, x.astype(np.float32) / np.float32(1.0 - rate), np.float32(0)).astype(x.dtype)

    return dropped


@pytest.mark.parametrize(
    ("op", "planted", "dtype"),
    [
        (scaled, scaled_by_numpy, "float32"),
        (attention_scores, scores_by_numpy, "float32"),
        (allow_tokens, allowed_by_numpy, "bfloat16"),
        (likeliest_tokens, likeliest_by_numpy, "float32"),
        (dropout, dropout_by_numpy, "float32"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_faults(cupy, op, planted, dtype):
    del cupy._kernels[op]
    cupy.kernel(op)(planted(cupy.device.xp))
    [checked] = check_accelerator(cupy, ops=[op.name], dtypes=[dtype], examples=200, shrink=False)
    assert checked.failures, "the fault was not found"


def test_what_is_flushed_and_what_is_moved(tmp_path):
    device, bfloat16 = EmulatedApart(tmp_path), numpy_dtype("bfloat16")
    x = device.to_device(np.full(2, 1e-40, np.float32))
    for y in (x * np.float32(1), x + x, -x, x.max(), x.astype(np.float64), x > 0):
        assert not device.to_host(y).any()
    for y in (
        x.copy(),
        x[[0, 1]],
        device.xp.where(x == x, x, x),
        x.astype(bfloat16),
        x[:, None] @ device.xp.ones((1, 1), np.float32),
    ):
        assert device.to_host(y).all()
    half = x.astype(bfloat16)
    for refused in (
        lambda: device.xp.where(x == x, half, half),
        lambda: half[None, None] @ half[None, :, None],
        lambda: 2.0 * half,
    ):
        with pytest.raises(TypeError, match="of bfloat16"):
            refused()


# -- arrays of the device and of the host -------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("g++") is None, reason="the emulated device needs g++")
@pytest.mark.parametrize("sampler", ["greedy", "top_p", "beam"])
@pytest.mark.parametrize(
    ("task", "preset", "prompt"), [(OPTCausalLM, "opt_tiny_stdlib", "import"), (T5Seq2SeqLM, "t5_tiny_numbers", "spell: 42")]
)
def test_models_do_not_mix_arrays(compiled, task, preset, prompt, sampler):
    mine = Cupy(EmulatedApart(compiled, orders=(2,)))
    model, wanted = task.from_preset(preset, accelerator=mine), task.from_preset(preset)
    for each in (model, wanted):
        each.compile(sampler=TopPSampler(p=0.5, seed=1) if sampler == "top_p" else sampler)
    assert model.generate(prompt, max_new_tokens=3) == wanted.generate(prompt, max_new_tokens=3)
    assert not mine.crossings


def test_what_is_mixed_is_found(tmp_path):
    device = EmulatedApart(tmp_path)
    held, host = device.to_device(np.ones(2)), np.ones(2)
    for mixed in (
        lambda: held + host,
        lambda: host * held,
        lambda: held * np.array(2.0),
        lambda: held.__setitem__(slice(None), host),
        lambda: device.xp.where(held > 0, held, host),
        lambda: device.product(held[None], host[None]),
        lambda: device.launch(Launch("norm.cu", NORM, (1, 1, 1), (1, 1, 1), (host,))),
    ):
        with pytest.raises(MixedError):
            mixed()

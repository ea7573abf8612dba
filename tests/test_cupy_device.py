"""The GPU of the CuPy accelerator without one, on a stand-in for CuPy: arrays, products, and the end."""

import gc
import threading
import weakref
from contextlib import suppress

import numpy as np
import pytest
from refmodels_cupy.accelerator import Cupy
from refmodels_cupy.device import Gpu, Staging
from stand_in import rms_norm

from refmodels import use
from refmodels.accelerator import AcceleratorError
from refmodels.ops.elementwise import relu
from refmodels.ops.precision import numpy_dtype

# -- arrays -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 4), (Staging.LEAST,), (5, Staging.PIECE // 4 + 1)])
def test_arrays_go_and_come_back(gpu, dtype, shape):
    array = np.random.default_rng(1).integers(0, 2, shape).astype(numpy_dtype(dtype))
    wanted = np.array(array)
    held = gpu.to_device(array)
    array[...] = 1 - array  # it is the caller's again
    back = gpu.to_host(held)
    assert type(back) is np.ndarray
    assert back.dtype == wanted.dtype
    assert back.shape == shape
    assert back.tobytes() == wanted.tobytes()


def test_an_array_that_is_not_contiguous(gpu):
    array = np.arange(2 * Staging.LEAST, dtype=np.float32).reshape(2, -1)[:, ::2]
    assert (gpu.to_host(gpu.to_device(array)) == array).all()


def test_an_array_of_columns(gpu):
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    held = gpu.to_device(array)
    assert held.flags.c_contiguous
    assert (gpu.to_host(held) == array).all()


def test_uploads_from_several_threads(gpu):
    arrays = [np.full(3 * Staging.PIECE // 2, i, np.int8) for i in range(3)]
    held = [None] * 3

    def upload(i):
        held[i] = gpu.to_device(arrays[i])

    together = [threading.Thread(target=upload, args=(i,)) for i in range(3)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert [np.unique(gpu.to_host(each)).tolist() for each in held] == [[0], [1], [2]]


def test_threads_that_begin_together_have_one_stream(stand_in, gpu, monkeypatch):
    made, together, found = stand_in.module.cuda.Stream, threading.Barrier(2), []

    def slowly(**how):
        with suppress(threading.BrokenBarrierError):  # Python 3.11 lets one in at a time
            together.wait(0.2)
        return made(**how)

    monkeypatch.setattr(stand_in.module.cuda, "Stream", slowly)
    threads = [threading.Thread(target=lambda: found.append(gpu._stream)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [gpu._stream] * 2


def test_working_is_entered_once(stand_in, gpu):
    with gpu.working():
        [stream] = stand_in.streams
        for _ in range(3):
            with gpu.working():
                gpu.empty((2,), np.float32)
        assert stream.entered == 1
        assert (stand_in.device, stand_in.stream) == (1, stream)
        with Gpu(0).working():
            assert (stand_in.device, stand_in.stream) == (0, stand_in.streams[1])
            with gpu.working():
                assert (stand_in.device, stand_in.stream) == (1, stream)
            assert stand_in.device == 0
        with gpu.working():
            assert (stand_in.device, stand_in.stream) == (1, stream)
        assert stream.entered == 2
    assert (stand_in.device, stand_in.stream, stand_in.allocator) == (0, None, None)


def test_working_ends_with_an_error(stand_in, gpu):
    with pytest.raises(KeyError), gpu.working():
        raise KeyError
    assert (stand_in.device, stand_in.stream, stand_in.allocator) == (0, None, None)
    gpu.empty((2,), np.float32)


def test_memory_that_does_not_suffice(stand_in, gpu):
    stand_in.memory = 10**6
    held = [gpu.empty((10**5,), np.float32)]
    with pytest.raises(AcceleratorError) as caught:
        gpu.empty((10**6,), np.float32)
    assert str(caught.value) == (
        "NVIDIA Stand-in has 600.0 kB of 1.0 MB free, which do not suffice: Out of memory allocating 4,000,000 bytes; fewer "
        "rows at once, shorter texts and weights of fewer bytes need less"
    )
    held.append(gpu.empty((10**5,), np.float32))
    assert gpu.room() == (200_000, 1_000_000)
    held.pop()
    assert gpu.room() == (600_000, 1_000_000)


def test_memory_that_does_not_suffice_for_cuda_itself(stand_in, gpu):
    launch, a = rms_norm(gpu), gpu.to_device(np.ones((4, 4), np.float32))
    gpu.launch(launch)
    stand_in.memory = stand_in.used
    for work, said in (
        (lambda: gpu.product(a, a, out=a), "CUBLAS_STATUS_ALLOC_FAILED"),
        (lambda: gpu.captured([launch]), "cudaErrorMemoryAllocation: out of memory"),
    ):
        with pytest.raises(AcceleratorError, match=f"which do not suffice: {said}; fewer rows at once"):
            work()


def test_what_the_device_is(gpu):
    assert (gpu.name, gpu.multiprocessors) == ("NVIDIA Stand-in", 132)
    described = gpu.description()
    assert (described["memory"], described["compute capability"]) == ("1.0 GB", "9.0")
    assert described["driver"].endswith("for CUDA 12.9")
    assert (described["CUDA runtime"], described["cupy"]) == ("12.9", "14.2.0")


# -- products -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8"])
def test_products(gpu, dtype, transposed):
    if dtype == "int8" and not transposed:
        pytest.skip("weights have one output after the other")
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-9, 9, shape).astype(numpy_dtype(dtype)) for shape in ((3, 8), (12, 8) if transposed else (8, 12)))
    wide = {"float64": np.float64, "int8": np.int32}.get(dtype, np.float32)
    c = gpu.to_host(gpu.product(gpu.to_device(a), gpu.to_device(b), transposed=transposed))
    assert c.dtype == wide
    assert (c == a.astype(wide) @ (b.T if transposed else b).astype(wide)).all()


@pytest.mark.parametrize("n", [1, 6, 7])
def test_int8_weights_of_any_number_of_outputs(gpu, n):
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-127, 127, shape).astype(np.int8) for shape in ((5, 16), (n, 16)))
    c = gpu.product(gpu.to_device(a), gpu.to_device(b), transposed=True)
    assert c.flags.c_contiguous
    assert (gpu.to_host(c) == a.astype(np.int32) @ b.astype(np.int32).T).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_product_that_is_rounded_once(gpu, dtype):
    a, b = (gpu.to_device(np.ones((8, 8), numpy_dtype(dtype))) for _ in range(2))
    y = gpu.to_device(np.full((8, 8), 3, numpy_dtype(dtype)))
    assert gpu.product(a, b, out=y, add=True) is y
    assert (gpu.to_host(y) == 11).all()


def test_a_product_of_parts_and_one_of_nothing(gpu):
    a, b = gpu.to_device(np.arange(48.0).reshape(6, 8)), gpu.to_device(np.arange(40.0).reshape(5, 8))
    assert (gpu.to_host(gpu.product(a[::2, ::2], b[:, 4:].T)) == a[::2, ::2] @ b[:, 4:].T).all()
    assert (gpu.to_host(gpu.product(a[:, :0], b[:, :0], transposed=True)) == np.zeros((6, 5))).all()
    assert gpu.product(a[:0], b, transposed=True).shape == (0, 5)


def test_float32_is_rounded_if_that_was_asked_for(stand_in):
    a = np.ones((4, 4), np.float32)
    for tf32, wanted in ((False, 68), (True, 77)):
        gpu = Gpu(tf32=tf32)
        gpu.product(gpu.to_device(a), gpu.to_device(a))
        gpu.product(gpu.to_device(a.astype(np.float16)), gpu.to_device(a.astype(np.float16)))
        assert stand_in.products[-2:] == [wanted, 68]


# -- the end ------------------------------------------------------------------------------------------------------------------


def test_close(stand_in, gpu):
    play = gpu.captured([rms_norm(gpu)])
    array = gpu.to_device(np.ones(3, np.float32))
    gpu.close()
    with pytest.raises(AcceleratorError, match="closed"):
        play()
    assert gpu.to_host(array).tolist() == [1, 1, 1]  # on a new stream
    gpu.close()
    gpu.close()


def test_memory_of_a_closed_gpu_comes_back_when_its_arrays_go(stand_in, gpu):
    array, other = (gpu.empty((1000,), np.float32) for _ in range(2))
    part = array[:10]
    gpu.close()
    assert stand_in.used == 8000
    del array, other
    gpu.close()
    assert stand_in.used == 8000  # nothing was closed
    assert Gpu(0).room() == (10**9 - 4000, 10**9)
    del part
    assert Gpu(0).room() == (10**9, 10**9)


def test_close_of_what_was_never_used(stand_in):
    Gpu().close()
    assert stand_in.streams == []


def test_an_accelerator_that_is_collected_is_closed(stand_in):
    mine = Cupy(Gpu())
    play = mine.device.captured([rms_norm(mine.device)])
    stream, pool = (weakref.ref(part) for part in (mine.device._stream, mine.device._pool))
    stand_in.streams.clear()
    del mine
    gc.collect()
    with pytest.raises(AcceleratorError, match="closed"):
        play()
    del play
    gc.collect()
    assert stream() is None
    assert pool() is None


# -- an op --------------------------------------------------------------------------------------------------------------------


def test_an_op_on_the_stand_in(stand_in):
    mine = Cupy(Gpu())
    with use(mine):
        y = relu(mine.asarray(np.array([-1.0, 2.0], np.float32)))
    assert mine.asnumpy(y).shape == (2,)
    assert [launched[0] for launched in stand_in.launched] == ["_Zelementwise<float, float>"]

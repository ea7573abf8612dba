"""Where the kernels run. `Device` is what the ops ask for; `Gpu` is an NVIDIA GPU through CuPy.

The tests have another: it runs the same kernels on the CPU, and NumPy in place of CuPy. So nothing but this file and
installation.py imports CuPy, and everything else can be tested without a GPU.
"""

import os
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from refmodels.accelerator import AcceleratorError
from refmodels.op import Array
from refmodels.printing import byte_size, progress
from refmodels_cupy.compiler import function

Grid = tuple[int, int, int]

MOST_BLOCKS = 65535
"""Of a grid's second and third axis."""

WIDE_REDUCTIONS = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION of cublas_api.h, which CuPy does not name. Without it cuBLAS may round parts
of a long sum, which different blocks have made, to the type of the result before it adds them up."""

OUT_OF_MEMORY = {("OutOfMemoryError", None), ("CUDARuntimeError", 2), ("CUDADriverError", 2), ("CUBLASError", 3)}
"""CuPy's errors by their names, and their status by the headers of CUDA: of arrays, and of what CUDA keeps for itself, such as
a graph, the code of a kernel, or what cuBLAS works in."""


class Strided(NamedTuple):
    """An array among the arguments of a launch that is not contiguous: the kernel is told its strides as well."""

    array: Any


class Launch(NamedTuple):
    """One launch of a kernel: its file, its form, blocks, threads of a block, arguments, bytes of dynamic shared memory.

    Arguments are device arrays (their addresses are passed; contiguous, or `Strided`), None (a null address) and
    NumPy scalars of the parameter's type. With what the kernel declares, a block may have 99 KB of shared memory on every GPU.
    """

    file: str
    form: str
    grid: Grid
    block: Grid
    arguments: tuple[Any, ...]
    shared: int = 0


def address(array: Any) -> int:
    """Where an array begins in the memory of its device."""
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr)


class Device(Protocol):
    """A device with its own memory and one queue of work."""

    @property
    def xp(self) -> Any:
        """NumPy, or a library like it, for arrays on the device."""

    @property
    def name(self) -> str:
        """What its maker calls it."""

    @property
    def multiprocessors(self) -> int:
        """How many blocks can surely run at once."""

    def to_device(self, array: Array) -> Any:
        """A copy of a host array, contiguous whatever that is."""

    def to_host(self, array: Any) -> Array:
        """A host copy of a device array, when all work before it is done."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """An array whose values are undefined."""

    def launch(self, launch: Launch) -> None:
        """Put one launch into the queue."""

    def product(self, a: Any, b: Any, *, transposed: bool = False, out: Any = None, add: bool = False) -> Any:
        """a @ b, or a @ b.T, for matrices of one type, summed in float32 (float64 for float64) and given as that.

        Of int8 the sums are int32; then b is transposed, and the size that is summed over must be a multiple of 4.
        `out`, contiguous, takes the result, rounded to its type, that of a and b or of the sums; with `add` on top of what it
        held.
        """

    def captured(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """A function that puts all of these into the queue at once."""

    def working(self) -> AbstractContextManager[None]:
        """Inside the block, work of this thread goes to this device."""


class Gpu:
    """An NVIDIA GPU by its index, with a memory pool and a stream of its own. `tf32` rounds what float32 products multiply.

    Several may be one GPU: each has its own queue and memory, and they share the compiled kernels. Threads may share one: what
    they ask for goes into one queue, in the order in which they ask, so that another thread may use an array that one made.
    Nothing waits for the GPU but `to_host`, `close`, and large uploads for the uploads before them.
    """

    def __init__(self, index: int = 0, *, tf32: bool = False) -> None:
        self.xp: Any = Later()
        self.index = index
        self.tf32 = tf32
        self._functions: dict[tuple[str, str], Any] = {}
        self._recordings: weakref.WeakSet[Recording] = weakref.WeakSet()

    @cached_property
    def _device(self) -> Any:
        return self.xp.cuda.Device(self.index)

    @cached_property
    def _pool(self) -> Any:
        _give_back()
        return self._first("_pool", self.xp.cuda.MemoryPool())

    @cached_property
    def _stream(self) -> Any:
        with self._device:
            return self._first("_stream", self.xp.cuda.Stream(non_blocking=True))

    @cached_property
    def _staging(self) -> "Staging":
        return Staging(self.xp.cuda)

    def _first(self, name: str, made: Any) -> Any:
        """What is kept under this name: `made`, or what another thread has made meanwhile."""
        return self.__dict__.setdefault(name, made)

    @cached_property
    def name(self) -> str:
        """What the driver calls it."""
        return str(self.xp.cuda.runtime.getDeviceProperties(self.index)["name"].decode())

    @cached_property
    def multiprocessors(self) -> int:
        """How many blocks can surely run at once."""
        return int(self._device.attributes["MultiProcessorCount"])

    def description(self) -> dict[str, str]:
        """The GPU in words: its name as `device`, and whatever else decides how fast it is."""
        properties, runtime = self.xp.cuda.runtime.getDeviceProperties(self.index), self.xp.cuda.runtime
        return {
            "device": self.name,
            "memory": f"{properties['totalGlobalMem'] / 1e9:.1f} GB",
            "compute capability": f"{properties['major']}.{properties['minor']}",
            "multiprocessors": str(self.multiprocessors),
            "driver": f"{_driver(self.index)}for CUDA {_version(runtime.driverGetVersion())}",
            "CUDA runtime": _version(runtime.runtimeGetVersion()),
            "cupy": str(self.xp.__version__),
        }

    def room(self) -> tuple[int, int]:
        """Bytes of its memory that are free, the pool's among them, and all bytes."""
        _give_back()
        with self.working():
            free, total = self.xp.cuda.runtime.memGetInfo()
            return int(free + self._pool.free_bytes()), int(total)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Cheap inside another such block of the same thread. AcceleratorError when the memory does not suffice."""
        outer = getattr(_current, "gpu", None)
        if outer is self:
            yield
            return
        with self._device, self._stream, self.xp.cuda.using_allocator(self._pool.malloc):
            _current.gpu = self
            try:
                yield
            except Exception as error:
                if (type(error).__name__, getattr(error, "status", None)) in OUT_OF_MEMORY:
                    raise AcceleratorError(self._exhausted(error)) from error
                raise
            finally:
                _current.gpu = outer

    def _exhausted(self, error: Exception) -> str:
        free, total = self.room()
        return (
            f"{self.name} has {byte_size(free)} of {byte_size(total)} free, which do not suffice: {error}; fewer rows at once, "
            "shorter texts and weights of fewer bytes need less"
        )

    def close(self) -> None:
        """Give back stream, memory and recordings when the queue is empty. Arrays that are still held keep theirs, until they
        go; what is asked for afterwards gets a new stream and new memory."""
        if "_stream" not in self.__dict__:
            return
        self._stream.synchronize()
        for recording in list(self._recordings):
            recording.close()
        if "_pool" in self.__dict__:
            _closed.append((self._device, self._pool))
        for own in ("_stream", "_pool", "_staging"):
            self.__dict__.pop(own, None)
        _give_back()

    # -- arrays ---------------------------------------------------------------------------------------------------------------

    def to_device(self, array: Array) -> Any:
        with self.working():
            if not isinstance(array, np.ndarray) or array.nbytes < Staging.LEAST:
                return self.xp.asarray(array, order="C")
            held = self.xp.empty(array.shape, array.dtype)
            self._staging.upload(np.ascontiguousarray(array), held.data, self._stream)
            return held

    def to_host(self, array: Any) -> Array:
        with self.working():
            host: Array = self.xp.asnumpy(array, stream=self._stream)
        return host

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        with self.working():
            return self.xp.empty(shape, dtype)

    # -- kernels --------------------------------------------------------------------------------------------------------------

    def launch(self, launch: Launch) -> None:
        with self.working():
            self._function(launch.file, launch.form)(
                launch.grid, launch.block, tuple(map(_passed, launch.arguments)), shared_mem=launch.shared
            )

    def compile(self, forms: dict[str, list[str]], report: Callable[[str], None]) -> int:
        """Compile every form, by its file, on all cores, and say for which one it waits. Gives how many there are."""
        every = [(file, form) for file, texts in forms.items() for form in texts]
        with self.working(), ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = [pool.submit(self._make, file, form) for file, form in every]
            try:
                for i, ((file, form), one) in enumerate(zip(every, compiling, strict=True), start=1):
                    report(f"compiling {i}/{len(every)}: {file} {form}")
                    one.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after an error
        return len(every)

    def _function(self, file: str, form: str) -> Any:
        """A form of a kernel, compiled when it is first asked for."""
        key = (file, form)
        if key not in self._functions:
            if not self._functions:
                progress("making kernels ready: those not used before are compiled, and kept on disk")
            self._make(file, form)
        return self._functions[key]

    def _make(self, file: str, form: str) -> None:
        with self.working():
            self._functions[file, form] = function(self.xp, self.index, file, form)

    def captured(self, launches: Sequence[Launch]) -> "Recording":
        """Recorded on a stream of its own, so that what other threads put into the queue meanwhile is no part of it."""
        for launch in launches:  # compiled before, as nothing else may happen during a capture
            self._function(launch.file, launch.form)
        with self.working():
            stream = self.xp.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture(self.xp.cuda.runtime.streamCaptureModeRelaxed)  # other threads may allocate
                try:
                    for launch in launches:
                        self.launch(launch)
                finally:
                    graph = stream.end_capture()
            graph.upload(self._stream)
        recording = Recording(self, graph, launches)
        self._recordings.add(recording)
        return recording

    def play(self, graph: Any) -> None:
        """Put a captured graph into the queue."""
        with self.working():
            graph.launch(self._stream)

    # -- products -------------------------------------------------------------------------------------------------------------

    def product(self, a: Any, b: Any, *, transposed: bool = False, out: Any = None, add: bool = False) -> Any:
        (m, k), n = a.shape, b.shape[0 if transposed else 1]
        wide = {"float64": np.float64, "int8": np.int32}.get(a.dtype.name, np.float32)
        with self.working():
            if 0 in (m, n, k):
                c = self.xp.empty((m, n), wide) if out is None else out
                if not add:
                    c.fill(0)
                return c
            if wide is np.int32 and n % 4:  # cuBLAS multiplies int8 by rows in fours
                rows = self.xp.zeros((n + -n % 4, k), b.dtype)
                rows[:n] = b
                return self.xp.ascontiguousarray(self.product(a, rows, transposed=True)[:, :n])
            a, b = self.xp.ascontiguousarray(a), self.xp.ascontiguousarray(b)
            c = self.xp.empty((m, n), wide) if out is None else out
            one, onto = np.ones(1, wide), np.full(1, add, wide)
            cublas, codes = self.xp.cuda.cublas, self._codes
            handle = self._device.cublas_handle  # of this thread, on the stream in force
            cublas.setMathMode(handle, WIDE_REDUCTIONS)  # each time, as products of CuPy's own set it back
            # cuBLAS counts by columns: it is asked for the transposed product, b.T @ a.T.
            cublas.gemmEx(
                handle,
                cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N,
                cublas.CUBLAS_OP_N,
                *(n, m, k),
                one.ctypes.data,
                *(b.data.ptr, codes[b.dtype.name], k if transposed else n),
                *(a.data.ptr, codes[a.dtype.name], k),
                onto.ctypes.data,
                *(c.data.ptr, codes[c.dtype.name], n),
                self._arithmetic(a.dtype.name),
                cublas.CUBLAS_GEMM_DEFAULT,
            )
        return c

    def _arithmetic(self, dtype: str) -> int:
        """What cuBLAS multiplies and sums in: float32 is true float32 unless `tf32` was asked for."""
        cublas = self.xp.cuda.cublas
        chosen = {"float64": cublas.CUBLAS_COMPUTE_64F, "int8": cublas.CUBLAS_COMPUTE_32I}
        if self.tf32:
            chosen["float32"] = cublas.CUBLAS_COMPUTE_32F_FAST_TF32
        return int(chosen.get(dtype, cublas.CUBLAS_COMPUTE_32F))

    @cached_property
    def _codes(self) -> dict[str, int]:
        runtime = self.xp.cuda.runtime
        return {
            "float64": runtime.CUDA_R_64F,
            "float32": runtime.CUDA_R_32F,
            "float16": runtime.CUDA_R_16F,
            "bfloat16": runtime.CUDA_R_16BF,
            "int8": runtime.CUDA_R_8I,
            "int32": 10,  # CUDA_R_32I of CUDA's library_types.h, which CuPy does not name
        }


class Later:
    """CuPy, imported when something of it is first used: kernels are registered where there is none, too."""

    def __getattr__(self, name: str) -> Any:
        import cupy

        found = getattr(cupy, name)
        setattr(self, name, found)  # so that this is asked once for each name
        return found


class Recording:
    """A captured graph: calling it puts all its launches into the queue. It holds the arrays that they read and write."""

    def __init__(self, gpu: Gpu, graph: Any, launches: Sequence[Launch]) -> None:
        self._gpu, self._graph, self._launches = gpu, graph, launches

    def __call__(self) -> None:
        if self._graph is None:
            raise AcceleratorError("the accelerator was closed, and with it what was recorded: load the model again")
        self._gpu.play(self._graph)

    def close(self) -> None:
        """Give back the graph and the arrays."""
        self._graph, self._launches = None, ()


class Staging:
    """Two pieces of page-locked host memory, through which large arrays go to the GPU: one is filled while the other is copied.

    From pageable memory the driver copies at a fraction of the speed, and page-locking a whole array costs more than its copy.
    """

    PIECE = 16 * 2**20
    LEAST = 2**18
    """Bytes of a piece, and of the smallest array for which it pays to wait for one."""

    def __init__(self, cuda: Any) -> None:
        memory = [cuda.alloc_pinned_memory(self.PIECE) for _ in range(2)]
        self._pieces = [(int(at), np.frombuffer(at, np.uint8, self.PIECE), cuda.Event(disable_timing=True)) for at in memory]
        self._lock = threading.Lock()

    def upload(self, array: Array, place: Any, stream: Any) -> None:
        """Put copies of a contiguous array's bytes to an address on the device into the queue. The array is free on return."""
        values = array.reshape(-1).view(np.uint8)
        with self._lock:
            for start in range(0, values.size, self.PIECE):
                address, room, copied = self._pieces[0]
                self._pieces.reverse()
                part = values[start : start + self.PIECE]
                copied.synchronize()  # what the piece held before
                room[: part.size] = part
                (place + start).copy_from_host_async(address, part.size, stream)
                copied.record(stream)


_current = threading.local()
"""`gpu` is the one that this thread works on, inside `working`."""

_closed: list[tuple[Any, Any]] = []
"""Devices and pools of closed GPUs, some of whose arrays may still be held. A pool has to be there when they go: CuPy loses the
rest of every block that an array was a part of with the pool."""


def _give_back() -> None:
    """To the driver the memory of closed GPUs, as far as no array is in it."""
    for device, pool in list(_closed):
        with device:
            pool.free_all_blocks()
            if pool.total_bytes() == 0:
                with suppress(ValueError):  # another thread has seen it too
                    _closed.remove((device, pool))


def _passed(argument: Any) -> Any:
    """An argument as CuPy takes it; None is a null address."""
    return argument.array if isinstance(argument, Strided) else argument


def _version(number: int) -> str:
    """CUDA's 13010 is 13.1."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver(index: int) -> str:
    """The driver's own number and a comma, if nvidia-smi is there to ask."""
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return f"{subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()}, "
    except (OSError, subprocess.SubprocessError):
        return ""

"""Where the kernels run. `Device` is what the ops ask for; `Gpu` is an NVIDIA GPU through CuPy.

The tests have another: it runs the same kernels on the CPU, and NumPy in place of CuPy. So nothing outside this file names
CuPy, and everything else can be tested without a GPU.
"""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from refmodels.op import Array
from refmodels_cupy.source import DIRECTORY, OPTIONS

Grid = tuple[int, int, int]


class Strided(NamedTuple):
    """An array among the arguments of a launch that is not contiguous: the kernel is told its strides as well."""

    array: Any


class Launch(NamedTuple):
    """One launch of a kernel: its file, its form, blocks, threads of a block, arguments, bytes of dynamic shared memory.

    Arguments are device arrays (their addresses are passed; contiguous, or `Strided`), None (a null address) and
    NumPy scalars of the parameter's type.
    """

    file: str
    form: str
    grid: Grid
    block: Grid
    arguments: tuple[Any, ...]
    shared: int = 0


class Device(Protocol):
    """A device with its own memory and one queue of work."""

    xp: Any
    """NumPy, or a library like it, for arrays on the device."""

    name: str
    multiprocessors: int

    def description(self) -> dict[str, str]:
        """The device in words: its name as `device`, and whatever else decides how fast it is."""

    def to_device(self, array: Array) -> Any:
        """A copy of a host array."""

    def to_host(self, array: Any) -> Array:
        """A host copy of a device array, when all work before it is done."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """An array whose values are undefined."""

    def launch(self, launch: Launch) -> None:
        """Put one launch into the queue."""

    def product(self, a: Any, b: Any, *, transposed: bool = False) -> Any:
        """a @ b, or a @ b.T, for matrices of one type, summed in float32 (float64 for float64) and given as that.

        Of int8 the sums are int32; then the sizes that are summed over and of b's rows must be multiples of 4.
        """

    def captured(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """A function that puts all of these into the queue at once."""

    def working(self) -> AbstractContextManager[None]:
        """Inside the block, work of this thread goes to this device."""


class Gpu:
    """An NVIDIA GPU by its index."""

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._functions: dict[tuple[str, str], Any] = {}

    @cached_property
    def xp(self) -> Any:
        """CuPy."""
        import cupy

        return cupy

    @cached_property
    def _device(self) -> Any:
        return self.xp.cuda.Device(self.index)

    @cached_property
    def _pool(self) -> Any:
        return self.xp.cuda.MemoryPool()

    @cached_property
    def _stream(self) -> Any:
        with self._device:
            return self.xp.cuda.Stream(non_blocking=True)

    @property
    def name(self) -> str:
        """What the driver calls it."""
        return str(self.xp.cuda.runtime.getDeviceProperties(self.index)["name"].decode())

    @property
    def multiprocessors(self) -> int:
        """How many blocks can surely run at once."""
        return int(self._device.attributes["MultiProcessorCount"])

    def description(self) -> dict[str, str]:
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

    def to_device(self, array: Array) -> Any:
        with self.working():
            return self.xp.asarray(array)

    def to_host(self, array: Any) -> Array:
        with self.working():
            host: Array = self.xp.asnumpy(array, stream=self._stream)
        return host

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        with self.working():
            return self.xp.empty(shape, dtype)

    def launch(self, launch: Launch) -> None:
        function = self._function(launch.file, launch.form)
        if launch.shared > 48 * 1024:
            function.max_dynamic_shared_size_bytes = launch.shared
        arguments = tuple(_passed(argument) for argument in launch.arguments)
        with self.working():
            function(launch.grid, launch.block, arguments, shared_mem=launch.shared)

    def _function(self, file: str, form: str) -> Any:
        """A form of a kernel, compiled when it is first asked for; CuPy keeps the binary on disk."""
        key = (file, form)
        if key not in self._functions:
            with self.working():
                module = self.xp.RawModule(
                    code=(DIRECTORY / file).read_text(),
                    options=(*OPTIONS, f"-I{DIRECTORY}"),
                    name_expressions=[form],
                )
                self._functions[key] = module.get_function(form)
        return self._functions[key]

    def product(self, a: Any, b: Any, *, transposed: bool = False) -> Any:
        from cupy_backends.cuda.libs import cublas

        (m, k), n = a.shape, b.shape[0 if transposed else 1]
        wide = {"float64": np.float64, "int8": np.int32}.get(a.dtype.name, np.float32)
        with self.working():
            a, b = self.xp.ascontiguousarray(a), self.xp.ascontiguousarray(b)
            c = self.xp.empty((m, n), wide)
            if 0 in (m, n, k):
                return self.xp.zeros((m, n), wide)
            one, zero = np.ones(1, np.dtype(wide)), np.zeros(1, np.dtype(wide))
            codes = self._codes()
            computes = {np.float64: cublas.CUBLAS_COMPUTE_64F, np.int32: cublas.CUBLAS_COMPUTE_32I}
            compute = computes.get(wide, cublas.CUBLAS_COMPUTE_32F)
            # cuBLAS counts by columns: it is asked for the transposed product, b.T @ a.T.
            cublas.gemmEx(
                self._device.cublas_handle,
                cublas.CUBLAS_OP_T if transposed else cublas.CUBLAS_OP_N,
                cublas.CUBLAS_OP_N,
                *(n, m, k),
                one.ctypes.data,
                *(b.data.ptr, codes[b.dtype.name], k if transposed else n),
                *(a.data.ptr, codes[a.dtype.name], k),
                zero.ctypes.data,
                *(c.data.ptr, codes[c.dtype.name], n),
                compute,
                cublas.CUBLAS_GEMM_DEFAULT,
            )
        return c

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

    def captured(self, launches: Sequence[Launch]) -> Callable[[], None]:
        for launch in launches:  # compiled before, as nothing else may happen during a capture
            self._function(launch.file, launch.form)
        with self.working():
            self._stream.begin_capture()
            try:
                for launch in launches:
                    self.launch(launch)
            finally:
                graph = self._stream.end_capture()

        def play() -> None:
            with self._device:
                graph.launch(self._stream)

        return play

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._device, self._stream, self.xp.cuda.using_allocator(self._pool.malloc):
            yield


def _passed(argument: Any) -> Any:
    """An argument as CuPy takes it."""
    return np.uint64(0) if argument is None else argument.array if isinstance(argument, Strided) else argument


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

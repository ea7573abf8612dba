"""A device that is this CPU: the kernels of refmodels_cupy compiled by the host's C++ compiler, NumPy in place of CuPy.

The compiler puts `emulation.h` in the place of the GPU. Every launch runs the threads of a block in three orders, and the
results must be the same bits in each: a missing barrier shows in one of them.
"""

import ctypes
import hashlib
import math
import os
import subprocess
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from refmodels_cupy.accelerator import FAMILIES
from refmodels_cupy.device import MOST_BLOCKS, Strided, address
from refmodels_cupy.source import DIRECTORY, all_forms

HERE = Path(__file__).parent
ORDERS = (0, 1, 2)
MANY_THREADS = 2**16
"""A launch of more runs in one order alone: blocks are alike, and each thread costs a microsecond or so."""

VECTORS = {"matmul_few.cu": (0, 2, 5), "matvec.cu": (0, 1, 4), "attention_prefill.cu": (0, 2, 3)}
"""Arguments that a kernel reads 16 bytes at once whatever its form: no GPU does so but from a multiple of 16."""

ONE_AT_A_TIME = threading.RLock()  # the emulation's state is global

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
"""Whether this process was started with the sanitizer, which a library that is compiled for it needs."""

COMMAND = ("g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
COMMAND += ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all") if SANITIZED else ("-O1",)


class EmulationError(AssertionError):
    """A kernel that deadlocks, that leaves its arrays, or whose result depends on the order of its threads."""


class DoesNotCompile(EmulationError):  # noqa: N818 -- the verdict on a source
    """A source that the compiler refuses: of a planted fault, that nothing was shown."""


def library(file, forms, cache, *, source=None):
    """The shared library with these forms of a kernel file, or of another `source` for it; compiled unless `cache` has it."""
    wrappers = "\n".join(
        f'extern "C" __attribute__((visibility("default"))) int form_{i}(const unsigned* shape, size_t dynamic, int order, '
        f"unsigned seed, void** arguments, char* message, size_t room) "
        f"{{ return emulation::launch_kernel({form}, shape, dynamic, order, seed, arguments, message, room); }}"
        for i, form in enumerate(forms)
    )
    text = (DIRECTORY / file).read_text() if source is None else source
    warnings = ["-Werror"] if source is None else ["-Wno-unused"]  # what a fault leaves out may leave something unused
    runtime = compiled(HERE / "emulation.cpp", (HERE / "emulation.cpp").read_text(), cache, ".o", "-Werror", "-c")
    code = f'#define EMULATED\n#line 1 "{file}"\n{text}\n{wrappers}\n'
    return ctypes.CDLL(str(compiled(Path(file), code, cache, ".so", *warnings, "-shared", str(runtime))))


def compiled(name, code, cache, ending, *options):
    """The path in `cache` of what the compiler makes of this. The name says all that goes in: others may make it too."""
    headers = "".join(header.read_text() for header in [HERE / "emulation.h", *sorted(DIRECTORY.glob("*.cuh"))])
    digest = hashlib.sha256("\0".join([code, headers, *COMMAND, *options]).encode()).hexdigest()[:24]
    path = Path(cache) / f"{name.stem}-{digest}{ending}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}{ending}")
        command = [*COMMAND, f"-I{HERE}", f"-I{DIRECTORY}", "-x", "c++", "-", "-x", "none", *options, "-o", str(beside)]
        done = subprocess.run(command, input=code, capture_output=True, text=True)
        if done.returncode:
            raise DoesNotCompile(f"{name.name}: {done.stderr[-4000:]}")
        beside.rename(path)
    return path


class Emulated:
    """The device. `launches` counts what was launched, by form."""

    xp = np
    name = "emulation"
    multiprocessors = 3

    def __init__(self, cache, *, orders=ORDERS, sources=None, forms=None):
        """`sources` are other texts for kernel files, `forms` those to compile of each file: all that the accelerator has."""
        self.cache, self.orders, self.sources, self.forms = cache, orders, sources or {}, forms
        self.launches = {}
        self._functions = {}

    def to_device(self, array):
        return np.array(array, order="C")

    def to_host(self, array):
        return np.asarray(array)

    def empty(self, shape, dtype):
        """Filled with what must not be read: NaN, or a number that is out of range."""
        array = np.empty(shape, dtype)
        array.reshape(-1).view(np.uint8)[...] = 0xFF
        return array

    def launch(self, launch):
        self.launches[launch.form] = self.launches.get(launch.form, 0) + 1
        (x, *others), threads = launch.grid, math.prod(launch.block)
        # Of a grid without a block CuPy would make one with a block.
        if not (0 < x < 2**31 and all(0 < size <= MOST_BLOCKS for size in others) and 0 < threads <= 1024):
            raise EmulationError(f"{launch.form}: no GPU has a grid of {launch.grid} with blocks of {launch.block}")
        arrays = [argument for argument in launch.arguments if isinstance(argument, np.ndarray)]
        for array in arrays:
            if not array.flags.c_contiguous:
                raise EmulationError(f"{launch.form}: an array that is not contiguous: {array.shape}, strides {array.strides}")
        arrays += [argument.array for argument in launch.arguments if isinstance(argument, Strided)]
        for place in VECTORS.get(launch.file, ()):
            array = getattr(launch.arguments[place], "array", launch.arguments[place])
            if array is not None and address(array) % 16:
                raise EmulationError(f"{launch.form}: argument {place} begins at no multiple of 16 bytes")
        before = [array.copy() for array in arrays]
        first = None
        with ONE_AT_A_TIME:
            many = math.prod(launch.grid) * math.prod(launch.block) > MANY_THREADS
            for order in self.orders[-1:] if many else self.orders:
                for array, old in zip(arrays, before, strict=True):
                    if array.flags.writeable:
                        array[...] = old
                self._run(launch, order)
                after = [array.tobytes() for array in arrays]
                if first is not None and after != first:
                    raise EmulationError(
                        f"{launch.form}: the result depends on the order of the threads, or on what shared memory held before"
                    )
                first = after

    def _run(self, launch, order):
        function = self._function(launch)
        shape = (ctypes.c_uint * 6)(*launch.grid, *launch.block)
        held = [self._argument(argument) for argument in launch.arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in held))
        message = ctypes.create_string_buffer(1000)
        room = ctypes.c_size_t(len(message))
        if function(shape, ctypes.c_size_t(launch.shared), order, 7, pointers, message, room):
            raise EmulationError(f"{launch.form}: {message.value.decode()}")

    def _function(self, launch):
        """The form, out of one library with all forms of its file: together they compile faster than one after the other."""
        key = (launch.file, launch.form)
        if key not in self._functions:
            # of a source that a test plants, the one that is launched
            forms = self.forms or all_forms(FAMILIES)
            forms = [launch.form] if launch.file in self.sources else forms[launch.file]
            if launch.form not in forms:
                raise EmulationError(f"{launch.form} is in no FORMS: nothing would compile it ahead")
            loaded = library(launch.file, forms, self.cache, source=self.sources.get(launch.file))
            self._functions |= {(launch.file, form): getattr(loaded, f"form_{i}") for i, form in enumerate(forms)}
        return self._functions[key]

    @staticmethod
    def _argument(argument):
        if argument is None:
            return ctypes.c_void_p(None)
        argument = argument.array if isinstance(argument, Strided) else argument
        if isinstance(argument, np.ndarray):
            return ctypes.c_void_p(argument.ctypes.data)
        kinds = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "float32": ctypes.c_float, "uint32": ctypes.c_uint32}
        return kinds[argument.dtype.name](argument.item())

    def product(self, a, b, *, transposed=False, out=None, add=False):
        kind = {"int8": np.int32, "float64": np.float64}.get(a.dtype.name, np.float32)
        wide = np.float64 if kind is np.int32 else kind  # of NumPy's products only those of floats are fast
        assert out is None or (out.dtype in (a.dtype, kind) and out.flags.c_contiguous)
        a, b = a.astype(wide), b.astype(wide)
        sums = (a @ (b.T if transposed else b)).astype(kind)
        if out is None:
            return sums
        out[...] = sums + out.astype(kind) if add else sums
        return out

    def captured(self, launches):
        launches = list(launches)

        def play():
            for launch in launches:
                self.launch(launch)

        return play

    def working(self):
        return nullcontext()

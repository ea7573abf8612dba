"""A stand-in for CuPy with the few names that `Gpu` uses, in NumPy: whatever else is asked for raises AttributeError.

A stream is a list of work that is done when somebody waits for it, as on a GPU: who reads or overwrites too early is found out.
"""

import ctypes
import functools
import threading
import types
import weakref
from contextlib import contextmanager

import numpy as np

from refmodels.ops.precision import numpy_dtype

TYPES = {0: "float32", 1: "float64", 2: "float16", 3: "int8", 10: "int32", 14: "bfloat16"}


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, text):
        super().__init__(text)
        self.status = status


class OutOfMemoryError(MemoryError):
    pass


class NVRTCError(RuntimeError):
    pass


class Pointer:
    def __init__(self, ptr):
        self.ptr = ptr

    def __add__(self, offset):
        return Pointer(self.ptr + offset)

    def copy_from_host_async(self, mem, size, stream):
        stream.put(lambda: ctypes.memmove(self.ptr, mem, size))


class Array(np.ndarray):
    @property
    def data(self):
        return Pointer(self.ctypes.data)


class Pinned(bytearray):
    def __int__(self):
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


class StandIn:
    """`module` is the stand-in. What happens is written down: `launched`, `products`, `compiled`, `streams`."""

    def __init__(self, *, devices=2, memory=10**9, capability="90", driver=12090, runtime=12090, name=b"NVIDIA Stand-in"):
        self.devices, self.memory, self.capability = devices, memory, capability
        self.driver, self.built, self.device_name = driver, runtime, name
        self.error = None  # of asking for devices
        self.libraries = {"nvrtc", "cublas"}
        self.used, self.kept = 0, 0  # bytes that arrays were given, and that the pool has for others
        self.launched, self.products, self.compiled, self.streams = [], [], [], []
        self.math_modes = {}  # of cuBLAS, by its handle
        self.local = threading.local()
        self.module = types.SimpleNamespace(
            ndarray=Array,
            empty=self.empty,
            zeros=self.zeros,
            asarray=self.asarray,
            ascontiguousarray=lambda array: self.asarray(np.ascontiguousarray(array)),
            asnumpy=self.asnumpy,
            cuda=self.cuda(),
        )

    # -- the state of a thread ------------------------------------------------------------------------------------------------

    @property
    def device(self):
        return getattr(self.local, "device", 0)

    @property
    def stream(self):
        return getattr(self.local, "stream", None)

    @property
    def allocator(self):
        return getattr(self.local, "allocator", None)

    def own(self):
        """The stream in force, which must not be the default one: `Gpu` has its own."""
        assert self.stream is not None, "on the default stream"
        assert self.stream.device == self.device, "on a stream of another device"
        return self.stream

    # -- arrays ---------------------------------------------------------------------------------------------------------------

    def empty(self, shape, dtype):
        assert self.allocator is not None, "not from the pool"
        assert not self.own().graph, "an allocation while a graph is captured"
        array = np.full(shape, 0x7F, numpy_dtype(np.dtype(dtype).name)).view(Array)
        self.allocator(array.nbytes)
        return array

    def zeros(self, shape, dtype):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def asarray(self, array):
        if isinstance(array, Array):
            return array
        copy = self.empty(np.shape(array), np.asarray(array).dtype)
        copy[...] = array
        return copy

    def asnumpy(self, array, stream):
        stream.synchronize()
        return np.array(array)

    # -- cuda -----------------------------------------------------------------------------------------------------------------

    def cuda(self):
        outer = self

        class Device:
            attributes = {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}

            def __init__(self, index):
                self.id = index

            @property
            def compute_capability(self):
                return outer.capability

            @property
            def cublas_handle(self):
                return 1000 * (self.id + 1) + threading.get_ident() % 1000

            def __enter__(self):
                self.__dict__.setdefault("before", []).append(outer.device)
                outer.local.device = self.id

            def __exit__(self, *_):
                outer.local.device = self.before.pop()

        class Stream:
            def __init__(self, *, non_blocking):
                assert non_blocking
                self.device, self.work, self.graph, self.entered, self.before = outer.device, [], None, 0, []
                outer.streams.append(self)

            def __enter__(self):
                assert self.device == outer.device, "a stream of another device"
                self.entered += 1
                self.before.append(outer.stream)
                outer.local.stream = self

            def __exit__(self, *_):
                outer.local.stream = self.before.pop()

            def put(self, work):
                (self.work if self.graph is None else self.graph.work).append(work)

            def synchronize(self):
                assert self.graph is None, "waiting while a graph is captured"
                work, self.work = self.work, []
                for each in work:
                    each()

            def begin_capture(self, mode):
                assert mode == 2, "other threads could not allocate"
                self.graph = Graph()

            def end_capture(self):
                graph, self.graph = self.graph, None
                return graph

        class Graph:
            def __init__(self):
                self.work, self.uploaded = [], False

            def __bool__(self):
                return True

            def upload(self, stream):
                self.uploaded = True

            def launch(self, stream):
                assert outer.device == stream.device
                for each in self.work:
                    stream.put(each)

        class Event:
            def __init__(self, *, disable_timing):
                self.stream = None

            def record(self, stream):
                self.stream = stream

            def synchronize(self):
                if self.stream is not None:
                    self.stream.synchronize()

        class MemoryPool:
            device = None

            def malloc(self, size):
                if outer.used + size > outer.memory:
                    raise OutOfMemoryError(f"Out of memory allocating {size:,} bytes")
                outer.used += size
                self.device = outer.device

            def free_bytes(self):
                return outer.kept

            def free_all_blocks(self):
                assert self.device in (None, outer.device), "of another device"
                outer.used = 0

        @contextmanager
        def using_allocator(allocator):
            before, outer.local.allocator = outer.allocator, allocator
            try:
                yield
            finally:
                outer.local.allocator = before

        class Function:
            def __init__(self, symbol):
                self.symbol, self.ptr, self.most = symbol, id(self), 48 * 1024

            def __call__(self, grid, block, args, shared_mem=0):
                assert shared_mem <= self.most
                assert all(type(each) is tuple and len(each) == 3 for each in (grid, block))
                kinds = (Array, np.int32, np.int64, np.uint32, np.float32, type(None))
                assert all(isinstance(each, kinds) for each in args)
                held = [weakref.ref(each) if isinstance(each, Array) else lambda each=each: each for each in args]
                launched = (self.symbol, grid, block)
                outer.own().put(lambda: outer.launched.append((*launched, [each() for each in held], shared_mem)))

        functions = {}

        class Module:
            def load(self, binary):
                assert isinstance(binary, bytes)
                self.binary = binary

            def get_function(self, symbol):
                assert not (outer.stream and outer.stream.graph), "a module is loaded while a graph is captured"
                assert self.binary.endswith(symbol.encode())
                found = Function(symbol)
                functions[found.ptr] = found
                return found

        def set_attribute(function, attribute, value):
            assert attribute == 8
            assert value + 1024 <= 232448, "more than there is beside what the kernel declares"
            functions[function].most = value

        def device_count():
            if outer.error is not None:
                raise CUDARuntimeError(*outer.error)
            return outer.devices

        def cuda_getattr(name):
            if name == "cublas":
                if "cublas" not in outer.libraries:
                    raise ImportError('Failure finding "libcublas.so"')
                return outer.cublas()
            raise AttributeError(name)

        module = types.ModuleType("cupy.cuda")
        module.__getattr__ = cuda_getattr
        module.Device, module.Stream, module.Event, module.MemoryPool = Device, Stream, Event, MemoryPool
        module.using_allocator, module.Module, module.nvrtc = using_allocator, Module, self.nvrtc()
        module.alloc_pinned_memory = Pinned
        module.memory = types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError)
        module.driver = types.SimpleNamespace(
            CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES=1,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
            funcGetAttribute=lambda attribute, function: {1: 1024}[attribute],
            funcSetAttribute=set_attribute,
        )
        module.runtime = types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            CUDA_R_32F=0,
            CUDA_R_64F=1,
            CUDA_R_16F=2,
            CUDA_R_8I=3,
            CUDA_R_16BF=14,
            streamCaptureModeRelaxed=2,
            driverGetVersion=lambda: outer.driver,
            runtimeGetVersion=lambda: outer.built,
            getDeviceCount=device_count,
            getDeviceProperties=lambda index: {"name": outer.device_name},
            memGetInfo=lambda: (outer.memory - outer.used, outer.memory),
        )
        return module

    def nvrtc(self):
        outer = self
        programs = {}

        def program(source, name, headers, include_names):
            assert (headers, include_names) == ((), ())
            programs[len(programs) + 1] = {"source": source, "name": name}
            return len(programs)

        def compile_program(handle, options):
            programs[handle]["options"] = options
            if "nothing" in programs[handle]["form"]:
                raise NVRTCError("NVRTC_ERROR_COMPILATION (6)")
            outer.compiled.append((programs[handle]["name"], programs[handle]["form"], options))

        def version():
            if "nvrtc" not in outer.libraries:
                raise RuntimeError('Failure finding "libnvrtc.so.12"')
            return (12, 9)

        def lowered(handle, form):
            assert form == programs[handle]["form"]
            return f"_Z{form}"

        return types.SimpleNamespace(
            NVRTCError=NVRTCError,
            getVersion=version,
            getSupportedArchs=lambda: (75, 80, 90, 100),
            createProgram=program,
            addNameExpression=lambda handle, form: programs[handle].update(form=form),
            compileProgram=compile_program,
            getProgramLog=lambda handle: f"{programs[handle]['name']}(7): error: nothing",
            getCUBIN=lambda handle: b"cubin\n_Z" + programs[handle]["form"].encode(),
            getPTX=lambda handle: b"ptx\n_Z" + programs[handle]["form"].encode(),
            getLoweredName=lowered,
            destroyProgram=lambda handle: programs.pop(handle),
        )

    @functools.cache  # noqa: B019  one for each test
    def cublas(self):
        return types.SimpleNamespace(
            CUBLAS_OP_N=0,
            CUBLAS_OP_T=1,
            CUBLAS_COMPUTE_32F=68,
            CUBLAS_COMPUTE_32F_FAST_TF32=77,
            CUBLAS_COMPUTE_64F=70,
            CUBLAS_COMPUTE_32I=72,
            CUBLAS_GEMM_DEFAULT=-1,
            CUBLAS_DEFAULT_MATH=0,
            setMathMode=self.math_modes.__setitem__,
            gemmEx=self.gemm,
        )

    def gemm(self, handle, transa, transb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo):
        """alpha * op(A) @ op(B) + beta * C at once, of matrices that lie column after column at these addresses."""
        assert handle // 1000 == self.device + 1, "the handle of another device"
        assert algo == -1
        assert self.math_modes[handle] == 16, "sums in half precision"
        scale = {68: 0, 77: 0, 70: 1, 72: 10}[compute]
        assert not self.own().graph, "cuBLAS while a graph is captured"
        self.own().synchronize()  # what it reads has been put there
        if compute == 72:
            assert (a_type, c_type, transa, transb) == (3, 10, 1, 0)
            assert m % 4 == k % 4 == lda % 4 == ldb % 4 == 0

        def columns(address, kind, rows, count, leading):
            assert leading >= max(rows, 1)
            size = numpy_dtype(TYPES[kind]).itemsize
            values = np.frombuffer((ctypes.c_char * (leading * count * size)).from_address(address), numpy_dtype(TYPES[kind]))
            return values.reshape(count, leading)[:, :rows].T

        first = columns(a, a_type, *((k, m) if transa else (m, k)), lda)
        second = columns(b, b_type, *((n, k) if transb else (k, n)), ldb)
        result = columns(c, c_type, m, n, ldc)
        assert columns(alpha, scale, 1, 1, 1)[0, 0] == 1
        onto = columns(beta, scale, 1, 1, 1)[0, 0]
        assert onto in (0, 1)
        assert c_type in (a_type, scale)
        wide = "int64" if compute == 72 else "float64"
        first, second = (part.astype(wide) for part in (first, second))
        product = (first.T if transa else first) @ (second.T if transb else second)
        result[...] = product + result.astype(wide) if onto else product
        self.products.append(compute)

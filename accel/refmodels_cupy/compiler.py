"""From the source of a kernel to a function on the GPU: compiled by NVRTC when it is first asked for, and kept on disk.

CuPy's own `RawModule` is not used: it compiles with numbers below the smallest normal one flushed to zero, which the ops do not
allow, and does not see when a header has changed.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from refmodels.accelerator import CompileError
from refmodels_cupy.source import DIRECTORY, OPTIONS

_functions: dict[tuple[int, str, str], Any] = {}
"""Index of the GPU, file, form -> the function there. Two threads may both compile one: either will do."""


def function(cupy: Any, index: int, file: str, form: str) -> Any:
    """A form of a kernel on the GPU in force, whose index this is. CompileError with NVRTC's log."""
    key = (index, file, form)
    if key not in _functions:
        device = cupy.cuda.Device(index)
        binary, symbol = kept(cupy.cuda.nvrtc, file, form, int(device.compute_capability))
        module = cupy.cuda.Module()
        module.load(binary)
        found = module.get_function(symbol)
        # More than 48 KB of shared memory have to be asked for: whatever the GPU has beside what the kernel declares.
        driver = cupy.cuda.driver
        most = device.attributes["MaxSharedMemoryPerBlockOptin"]
        declared = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, found.ptr)
        driver.funcSetAttribute(found.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most - declared)
        _functions[key] = found
    return _functions[key]


def target(known: tuple[int, ...], capability: int) -> str:
    """What NVRTC is to compile for: the GPU, or the newest that it knows if that is newer still: the driver adapts that."""
    return f"sm_{capability}" if capability in known else f"compute_{max(number for number in known if number < capability)}"


def kept(nvrtc: Any, file: str, form: str, capability: int) -> tuple[bytes, str]:
    """The binary of a form and the kernel's name in it, from the disk if it is there; else it is compiled and put there."""
    architecture = target(nvrtc.getSupportedArchs(), capability)
    told = "\0".join([_sources(file), form, architecture, *OPTIONS, str(nvrtc.getVersion())])
    path = directory() / f"refmodels-{hashlib.sha256(told.encode()).hexdigest()[:32]}.bin"
    with suppress(OSError):
        symbol, _, rest = path.read_bytes().partition(b"\n")
        checksum, _, binary = rest.partition(b"\n")
        if checksum == _checksum(symbol, binary):
            return binary, symbol.decode()
    binary, name = compiled(nvrtc, file, form, architecture)
    with suppress(OSError):  # where nothing can be written it lives as long as the process
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix="refmodels-")
        with os.fdopen(handle, "wb") as new:
            new.write(b"\n".join([name.encode(), _checksum(name.encode(), binary), binary]))
        os.replace(beside, path)
    return binary, name


def compiled(nvrtc: Any, file: str, form: str, architecture: str) -> tuple[bytes, str]:
    """The binary for `sm_90`, or the intermediate code for `compute_90`, and the kernel's name in it. CompileError as above."""
    program = nvrtc.createProgram((DIRECTORY / file).read_text(), file, (), ())
    try:
        nvrtc.addNameExpression(program, form)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={architecture}", f"-I{DIRECTORY}"))
        except nvrtc.NVRTCError as error:
            raise CompileError(f"{file}, {form}, for {architecture}: {nvrtc.getProgramLog(program).strip()}") from error
        give = nvrtc.getCUBIN if architecture.startswith("sm_") else nvrtc.getPTX
        return give(program), nvrtc.getLoweredName(program, form)
    finally:
        nvrtc.destroyProgram(program)


def directory() -> Path:
    """Where CuPy keeps what it compiles."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


@cache
def _sources(file: str) -> str:
    """The text of a kernel file and of all headers, any of which it may include."""
    return "\0".join(path.read_text() for path in [DIRECTORY / file, *sorted(DIRECTORY.glob("*.cuh"))])


def _checksum(symbol: bytes, binary: bytes) -> bytes:
    return hashlib.sha256(symbol + b"\n" + binary).hexdigest().encode()

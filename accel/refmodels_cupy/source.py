"""The CUDA C++ of the kernels: which files there are, which forms of each kernel are made, and what NVRTC makes of them.

A kernel is a template over the types that it reads and writes; a form is one choice of them, written as C++ does:
`layer_norm<bf16, bf16>`. Forms are compiled when they are first launched, or all of them ahead of time, for the tests.
"""

import ctypes
import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from refmodels.accelerator import CompileError

DIRECTORY = Path(__file__).parent / "kernels"

TYPES = {"float32": "float", "float16": "f16", "bfloat16": "bf16", "int8": "int8_t", "int32": "int", "int64": "int64_t"}
"""NumPy's name of a type -> its name in the kernels."""


def all_forms(families: Iterable[str]) -> dict[str, list[str]]:
    """Every form that the modules of these names may launch, by file."""
    found: dict[str, list[str]] = {}
    for family in families:
        for file, text in getattr(importlib.import_module(f"refmodels_cupy.{family}"), "FORMS", ()):
            found.setdefault(file, []).append(text)
    return found


def form(kernel: str, *arguments: str | int | bool) -> str:
    """A form of a kernel, its types by NumPy's names: form("layer_norm", "bfloat16", "float32")."""
    return f"{kernel}<{', '.join(TYPES.get(str(a), str(a).lower()) for a in arguments)}>"


@dataclass(frozen=True)
class Compiled:
    """One form as NVRTC made it: the binary, its name in there, and what ptxas says of registers and spills."""

    form: str
    symbol: str
    registers: int
    spilled: int
    shared: int


OPTIONS = ("--std=c++17", "--device-as-default-execution-space")


def compile_ahead(library: str, file: str, forms: list[str], architecture: str) -> list[Compiled]:
    """Compile forms of one file for `sm_80` and the like with NVRTC, for which no driver need be there.

    `library` is the path of NVRTC's. CompileError for an error or a warning: the log, which names file and line.
    """
    nvrtc = ctypes.CDLL(library)
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = (DIRECTORY / file).read_bytes()
    _checked(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, file.encode(), 0, None, None))
    try:
        for text in forms:
            _checked(nvrtc, nvrtc.nvrtcAddNameExpression(program, text.encode()))
        options = (*OPTIONS, f"--gpu-architecture={architecture}", f"-I{DIRECTORY}", "--ptxas-options=-v")
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)
        _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        log = ctypes.create_string_buffer(size.value)
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
        text = log.value.decode(errors="replace")
        if status != 0 or re.search(r"\bwarning\b", text):
            raise CompileError(f"{file} for {architecture}: {text.strip()}")
        found = []
        for name in forms:
            symbol = ctypes.c_char_p()
            _checked(nvrtc, nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol)))
            found.append(_described(name, (symbol.value or b"").decode(), text))
        return found
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _described(name: str, symbol: str, log: str) -> Compiled:
    """What ptxas says between the line that names this function and the next such line."""
    _, _, rest = log.partition(f"Compiling entry function '{symbol}'")
    part = rest.partition("Compiling entry function")[0]

    def number(pattern: str) -> int:
        found = re.search(pattern, part)
        return int(found[1]) if found else 0

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Compiled(name, symbol, number(r"Used (\d+) registers"), spilled, number(r"(\d+) bytes smem"))


def _checked(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")

"""What every kernel takes of a GPU, by NVRTC alone and without a GPU: registers of a thread, spills, shared memory of a block.

    python -m refmodels_cupy.registers                                    every form for sm_80, sm_90 and sm_100
    python -m refmodels_cupy.registers attention_prefill.cu --for sm_90   those of one file for one architecture

NVRTC is that of the package nvidia-cuda-nvrtc-cu12. The status is 1 if a kernel spills, or does not compile without a warning.
"""

import argparse
import ctypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from refmodels.accelerator import CompileError
from refmodels.printing import aligned
from refmodels_cupy.accelerator import FAMILIES
from refmodels_cupy.source import DIRECTORY, OPTIONS, all_forms

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""A100, H100 and H200, B200."""

DISTRIBUTIONS = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
"""Packages that have NVRTC: for CUDA 12, and for later ones."""


@dataclass(frozen=True)
class Resources:
    """What one form takes: registers of a thread, bytes of a thread that do not fit into them or are arrays whose places are
    known at the launch alone, bytes of a block's shared memory beside that which a launch asks for."""

    form: str
    architecture: str
    registers: int
    spilled: int
    shared: int


def nvrtc() -> ctypes.CDLL | None:
    """NVRTC of an installed package, or None."""
    for distribution in DISTRIBUTIONS:
        try:
            files = metadata.files(distribution) or ()
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name.startswith("libnvrtc.so"):
                return ctypes.CDLL(str(file.locate()))
    return None


def resources(
    nvrtc: ctypes.CDLL, file: str, forms: Sequence[str], architecture: str, *, source: str | None = None
) -> list[Resources]:
    """What forms of a file take on `sm_80` and the like, or those of another `source` in its place.

    CompileError for an error or a warning: the log, which names file and line.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = (DIRECTORY / file).read_text() if source is None else source
    _checked(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), file.encode(), 0, None, None))
    try:
        for form in forms:
            _checked(nvrtc, nvrtc.nvrtcAddNameExpression(program, form.encode()))
        options = (*OPTIONS, f"--gpu-architecture={architecture}", f"-I{DIRECTORY}", "--ptxas-options=-v")
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)
        _checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, buffer))
        log = buffer.value.decode(errors="replace")
        if status != 0 or re.search(r"\bwarning\b", log):
            raise CompileError(f"{file} for {architecture}: {log.strip()}")
        found = []
        for form in forms:
            symbol = ctypes.c_char_p()
            _checked(nvrtc, nvrtc.nvrtcGetLoweredName(program, form.encode(), ctypes.byref(symbol)))
            found.append(_described(form, architecture, (symbol.value or b"").decode(), log))
        return found
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _described(form: str, architecture: str, symbol: str, log: str) -> Resources:
    """What ptxas says between the line that names this function and the next such line."""
    _, there, rest = log.partition(f"Compiling entry function '{symbol}'")
    if not there:
        raise CompileError(f"{form} for {architecture}: ptxas says nothing of {symbol}")
    part = rest.partition("Compiling entry function")[0]

    def number(pattern: str) -> int:
        found = re.search(pattern, part)
        return int(found[1]) if found else 0

    spilled = sum(number(rf"(\d+) bytes {what}") for what in ("stack frame", "spill stores", "spill loads"))
    return Resources(form, architecture, number(r"Used (\d+) registers"), spilled, number(r"(\d+) bytes smem"))


def _checked(nvrtc: ctypes.CDLL, status: int) -> None:
    if status != 0:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


def alike(forms: Sequence[str]) -> list[str]:
    """The forms without those that have float16 where another has bfloat16: the same instructions but for their type."""
    return [form for form in forms if (other := re.sub(r"\bf16\b", "bf16", form)) == form or other not in forms]


def table(found: Sequence[Resources]) -> list[str]:
    """Lines: a row for each form, and its registers in a column for each architecture. A dash is for what was not compiled."""
    architectures = [name for name in ARCHITECTURES if any(one.architecture == name for one in found)]
    by_form: dict[str, dict[str, Resources]] = {}
    for one in found:
        by_form.setdefault(one.form, {})[one.architecture] = one
    rows = [("FORM", "SHARED", *architectures)]
    for form, by_architecture in by_form.items():
        shared = str(max(one.shared for one in by_architecture.values()))
        rows.append((form, shared, *(_cell(by_architecture.get(name)) for name in architectures)))
    return aligned(rows, right=tuple(range(1, len(rows[0]))))


def _cell(one: Resources | None) -> str:
    return "-" if one is None else f"{one.registers} and {one.spilled} bytes spilled" if one.spilled else str(one.registers)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    every = all_forms(FAMILIES)
    parser = argparse.ArgumentParser(prog="python -m refmodels_cupy.registers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"one of {', '.join(every)}; without it all")
    parser.add_argument("--for", dest="architectures", action="append", metavar="ARCHITECTURE", help="such as sm_90")
    given = parser.parse_args(arguments)
    if unknown := set(given.files) - set(every):
        parser.error(f"no kernel file: {', '.join(sorted(unknown))}")
    library = nvrtc()
    if library is None:
        parser.error(f"NVRTC is not installed: pip install {DISTRIBUTIONS[0]}")
    spilled = False
    for file in given.files or every:
        try:
            found = [
                one for name in given.architectures or ARCHITECTURES for one in resources(library, file, every[file], name)
            ]
        except CompileError as error:
            print(error, file=sys.stderr)
            return 1
        print(file, *(f"  {line}" for line in table(found)), sep="\n", flush=True)
        spilled |= any(one.spilled for one in found)
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())

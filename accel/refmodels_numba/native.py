"""The machine code: compiled by Numba once for this CPU and these sources, kept on disk, and loaded without Numba.

The name of a file holds a digest of everything that its code depends on, so that another version of the project, of Numba or
another CPU finds another file. What is loaded is checked against the digest of its content.
"""

import ctypes
import functools
import hashlib
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refmodels.printing import progress
from refmodels_numba import linking
from refmodels_numba.layout import host_features

HERE = Path(__file__).parent
DIRECTORY = "REFMODELS_CACHE_DIR"
"""The variable that names another directory for compiled code."""
KEPT = 8
"""Files that stay in the directory: those of other versions and CPUs, the latest first."""

_loading = threading.Lock()
_execute: Callable[[int, int, int, int], None] | None = None
_engines: list[Any] = []


def execute(program: int, count: int, counters: int, scratch: int) -> None:
    """Run a program (`kernels/machine.py`); all four are integers, addresses but for the count."""
    entry = _execute or load(progress)
    entry(program, count, counters, scratch)


def compile_ahead(report: Callable[[str], None]) -> str:
    """Have the code on disk; says in a few words where it is and what that took."""
    start = time.perf_counter()
    cached = _find() is not None
    load(report)
    path = _find()
    where = "not cached: no directory can be written" if path is None else f"cached in {path.parent}"
    return f"ready, {'loaded' if cached else 'compiled'} in {time.perf_counter() - start:.1f} s, {where}"


def load(report: Callable[[str], None]) -> Callable[[int, int, int, int], None]:
    """The compiled entry, from disk or compiled now; `report` is given lines that say how far it is."""
    global _execute
    with _loading:
        if _execute is None:
            found = _read()
            if found is None:
                found = _compiled(report)
                _write(*found)
            _execute = _linked(*found)
    return _execute


@functools.cache
def digest() -> str:
    """Of all that the machine code depends on."""
    from importlib.metadata import version

    text = [version("numba"), version("llvmlite"), sys.platform, platform.machine(), *host()]
    sources = [HERE / "layout.py", *sorted((HERE / "kernels").glob("*.py"))]
    parts = ["\n".join(text).encode(), *(source.read_bytes() for source in sources)]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]


def host() -> list[str]:
    """This CPU and what it can do: as Linux tells, which is quick, else as LLVM does."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        first = ""
    lines = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    told = {name.strip(): value.strip() for name, value in lines.items()}
    names = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
    if "flags" in told or "Features" in told:
        return [told.get(name, "") for name in names]
    return sorted(host_features())


def directories() -> list[Path]:
    """Where compiled code may be: the user's cache, or where that cannot be written a directory of the user's own for
    temporary files."""
    if os.environ.get(DIRECTORY):
        first = Path(os.environ[DIRECTORY])
    elif sys.platform == "win32":
        first = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "refmodels"
    elif sys.platform == "darwin":
        first = Path.home() / "Library" / "Caches" / "refmodels"
    else:
        first = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refmodels"
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return [first, Path(tempfile.gettempdir()) / f"refmodels-{user}"]


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have put machine code there: it is this user's (or root's) and others may not write to it."""
    status = path.lstat()
    if path.is_symlink():
        return False
    return not hasattr(os, "getuid") or (status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022)


def _find() -> Path | None:
    """The file of this CPU and these sources, if there is one that only this user can have written."""
    for directory in directories():
        path = directory / f"{digest()}.o"
        try:
            if _is_ours(directory) and _is_ours(path):
                return path
        except OSError:
            continue
    return None


def _read() -> tuple[bytes, str] | None:
    path = _find()
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    symbol, _, rest = content.partition(b"\n")
    checksum, _, code = rest.partition(b"\n")
    return (code, symbol.decode()) if hashlib.sha256(symbol + code).hexdigest().encode() == checksum else None


def _write(code: bytes, symbol: str) -> None:
    checksum = hashlib.sha256(symbol.encode() + code).hexdigest()
    for directory in directories():
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(directory):
                continue
            handle, beside = tempfile.mkstemp(dir=directory, suffix=".new")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(f"{symbol}\n{checksum}\n".encode() + code)
                os.replace(beside, directory / f"{digest()}.o")
            except BaseException:
                Path(beside).unlink(missing_ok=True)
                raise
            files = sorted(directory.glob("*.o"), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in files[KEPT:]:
                path.unlink(missing_ok=True)
        except OSError:  # cannot be written: try the next; with none the code lives as long as the process
            continue
        return


def _compiled(report: Callable[[str], None]) -> tuple[bytes, str]:
    from refmodels_numba.kernels import machine

    return machine.compiled(report)


UNUSED = (
    "numba_do_raise", "numba_gil_ensure", "numba_gil_release", "numba_runtime_build_excinfo_struct", "numba_unpickle"
)  # fmt: skip
"""Of Numba's wrapper: called when a kernel raises, which none does."""


def _linked(code: bytes, symbol: str) -> Callable[[int, int, int, int], None]:
    address = linking.linked(code, symbol, UNUSED)
    if address is None:
        address = _linked_by_llvm(code, symbol)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)


def _linked_by_llvm(code: bytes, symbol: str) -> int:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
    for name in UNUSED:
        if llvm.address_of_symbol(name) is None:
            llvm.add_symbol(name, abort)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # it owns the code
    return int(engine.get_function_address(symbol))

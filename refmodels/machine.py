"""What this machine can do: how fast it reads memory and multiplies float32 matrices, measured; what it is, in words.

    python -m refmodels.machine 2        # with two threads: one JSON object

A process of its own, because NumPy's BLAS takes its number of threads from the environment when it is loaded.
"""

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "OMP_NUM_THREADS")
"""What NumPy's BLAS libraries take their number of threads from, the particular before the general."""

READ_BYTES = 2**30
"""Far more than any last-level cache holds."""

MATRIX = 2048
"""Rows and columns of the matrices that are multiplied."""

FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "amx_tile",
    "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
"""What decides how fast a processor multiplies, as Linux calls it."""


class Limits(NamedTuple):
    """The hardware's own limits: bytes a second that are read from memory, float32 operations a second in matrix products."""

    bytes_per_second: float
    flops_per_second: float


def read_bandwidth(threads: int, repeats: int = 3) -> float:
    """Bytes a second that so many threads read together at best: each takes the maximum of its part of a large array.

    A maximum and not a sum, because NumPy's pairwise sum is slower than the memory.
    """
    parts = np.array_split(np.ones(READ_BYTES // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, parts))  # start the threads
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds.append(time.perf_counter() - began)
    return READ_BYTES / min(seconds)


def matrix_rate(repeats: int = 3) -> float:
    """Operations a second of NumPy's product of two square float32 matrices at best, with the threads that its BLAS has."""
    a = np.random.default_rng(0).standard_normal((MATRIX, MATRIX), np.float32)
    b, product = a.copy(), np.empty_like(a)
    np.matmul(a, b, out=product)  # start the threads
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        np.matmul(a, b, out=product)
        seconds.append(time.perf_counter() - began)
    return 2 * MATRIX**3 / min(seconds)


def measured_limits(threads: int) -> Limits:
    """Both limits with this number of threads, measured in a process of its own. RuntimeError if that fails."""
    environment = child_environment() | dict.fromkeys(THREAD_VARIABLES, str(threads))
    command = [sys.executable, "-m", "refmodels.machine", str(threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the limits of this machine could not be measured: {last_line(done.stderr)}")
    return Limits(**json.loads(done.stdout))


def child_environment() -> dict[str, str]:
    """The environment for a Python process that imports what this one does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def last_line(text: str) -> str:
    """The line of a traceback that says what it was."""
    return (text.strip().splitlines() or ["it said nothing"])[-1]


def default_threads() -> int:
    """The number of threads that NumPy's BLAS takes: what the environment says, else every core this process may use."""
    for name in THREAD_VARIABLES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return cores()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def description() -> dict[str, object]:
    """The machine in words: processor, cores, features, system."""
    fields = _processor_fields()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": cores(),
        "features": [name for name in FEATURES if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor_fields() -> dict[str, str]:
    """What Linux says about the first core; nothing elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory; None where the system does not say."""
    try:  # Linux's getrusage counts what the parent had when it started this process
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, others kilobytes


if __name__ == "__main__":
    print(json.dumps(Limits(read_bandwidth(int(sys.argv[1])), matrix_rate())._asdict()))

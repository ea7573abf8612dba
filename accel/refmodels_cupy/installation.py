"""Whether CuPy can run here, and if not, what is missing and how to get it: one line."""

import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

OLDEST_RELEASE = (14, 2)
"""The CuPy that this package is written against."""

PACKAGES = ("cupy", *(f"cupy-cuda{major}x" for major in range(11, 20)))
"""`cupy` builds itself, the others come built for a CUDA."""

OLDEST_CAPABILITY = 80
"""Compute capability from which on the kernels run: bfloat16 in the tensor cores."""

INSUFFICIENT_DRIVER, NO_DEVICE = 35, 100
"""Of CUDA's driver_types.h, which CuPy does not name."""


def is_installed() -> bool:
    """Whether there is a CuPy of any kind. It is not imported."""
    return find_spec("cupy") is not None


def missing(index: int = 0) -> str | None:
    """Why the GPU of this index cannot be used, and what to do; None if it can."""
    if not is_installed():
        return "CuPy is not installed: pip install 'refmodels[cupy]' for CUDA 12, 'refmodels[cupy13]' for CUDA 13"
    packages = _packages()
    if len(packages) > 1:
        return f"several CuPy packages are installed, {' and '.join(packages)}: uninstall all of them, then install one"
    package = next(iter(packages), "cupy")
    release = packages.get(package)
    if release is not None and tuple(int(part) for part in release.split(".")[:2] if part.isdigit()) < OLDEST_RELEASE:
        wanted = ".".join(map(str, OLDEST_RELEASE))
        return f"{package} {release} is installed, wanted {wanted} or newer: pip install -U {package}"
    if np.lib.NumpyVersion(np.__version__) < "2.1.2":
        return f"NumPy {np.__version__} is installed, and CuPy has bfloat16 from 2.1.2 on: pip install -U numpy"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy
    except Exception as error:  # whatever a broken installation raises
        return f"{package} cannot be imported: {_last_line(error)}"
    return _without_driver(cupy.cuda) or _without_gpu(cupy.cuda, index) or _without_libraries(cupy.cuda, package)


def _packages() -> dict[str, str]:
    """The packages that bring a module `cupy`, and their versions."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _without_driver(cuda: Any) -> str | None:
    try:
        driver, built = cuda.runtime.driverGetVersion() // 1000, cuda.runtime.runtimeGetVersion() // 1000
    except cuda.runtime.CUDARuntimeError as error:
        return f"NVIDIA's driver does not answer: {error}"
    if driver == 0:
        return f"no NVIDIA driver is installed: an NVIDIA GPU needs one for CUDA {built} or newer"
    if built > driver:
        return (
            f"this CuPy is made for CUDA {built}, and the driver is of CUDA {driver}: install a newer driver, or pip uninstall "
            f"cupy-cuda{built}x, then pip install 'refmodels[{'cupy' if driver < 13 else f'cupy{driver}'}]'"
        )
    return None


def _without_gpu(cuda: Any, index: int) -> str | None:
    try:
        count = cuda.runtime.getDeviceCount()
        if count == 0:
            return "no NVIDIA GPU is here"
        if index >= count:
            return f"no GPU {index} is here: there {'is one, 0' if count == 1 else f'are {count}, 0 to {count - 1}'}"
        capability = int(cuda.Device(index).compute_capability)
    except cuda.runtime.CUDARuntimeError as error:
        if error.status == NO_DEVICE:
            return "no NVIDIA GPU is here, or CUDA_VISIBLE_DEVICES hides it"
        if error.status == INSUFFICIENT_DRIVER:
            return "NVIDIA's driver is too old for this CuPy: install a newer driver"
        return f"NVIDIA's driver does not answer: {error}"
    if capability < OLDEST_CAPABILITY:
        name = cuda.runtime.getDeviceProperties(index)["name"].decode()
        wanted = f"{OLDEST_CAPABILITY // 10}.{OLDEST_CAPABILITY % 10}"
        return f"{name} has compute capability {capability // 10}.{capability % 10}, wanted {wanted} or newer (Ampere)"
    return None


def _without_libraries(cuda: Any, package: str) -> str | None:
    """The compiler, the matrix products and the headers of CUDA are packages of their own."""
    from cuda.pathfinder import find_nvidia_header_directory

    lacking = []
    try:
        cuda.nvrtc.getVersion()
    except RuntimeError:
        lacking.append("NVRTC")
    try:
        cuda.cublas  # noqa: B018  it is loaded when it is asked for
    except ImportError:
        lacking.append("cuBLAS")
    if find_nvidia_header_directory("cudart") is None:
        lacking.append("CUDA's headers")
    if lacking:
        return f"{' and '.join(lacking)} cannot be found: pip install '{package}[ctk]'"
    return None


def _last_line(error: Exception) -> str:
    """CuPy frames its errors with advice; what happened stands last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" =-")]
    return lines[-1] if lines else type(error).__name__

"""The CUDA C++ of the kernels: where it is, which forms of each kernel are made, and how they are compiled.

A kernel is a template over the types that it reads and writes; a form is one choice of them, written as C++ does:
`elementwise<bf16, float>`. Forms are compiled when they are first launched, or all of them ahead of time, for the tests.
"""

import importlib
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

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


@lru_cache(maxsize=None, typed=True)  # True and 1 are two forms; a recorded step has hundreds of launches
def form(kernel: str, *arguments: str | int | bool) -> str:
    """A form of a kernel, its types by NumPy's names: form("elementwise", "bfloat16", "float32")."""
    return f"{kernel}<{', '.join(TYPES.get(str(a), str(a).lower()) for a in arguments)}>"


def kernels(text: str) -> list[str]:
    """The names of the kernels that a source defines. ValueError if one is written in another way than those here."""
    code = re.sub(r"//.*", "", text)
    bounds = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
    found = re.findall(rf"__global__\s+void\s+{bounds}(\w+)\s*\(", code)
    if len(found) != code.count("__global__"):
        raise ValueError(f"{code.count('__global__')} kernels, of which these have a name that can be read: {found}")
    return found


OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
"""For NVRTC, beside the architecture and where the headers are."""

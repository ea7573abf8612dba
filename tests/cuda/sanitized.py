"""Launches on the emulated device under AddressSanitizer and UBSan: what is read or written beside an array or shared memory.

The sanitizer must be in a process before all else, so that `run` starts one that loads launches from a file. In it each array
has a block of memory of its own, which ends where the array ends.
"""

import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from emulated import HERE, Emulated
from refmodels_cupy.device import Strided
from refmodels_cupy.source import DIRECTORY

FORMS, THREADS, BYTES = 2, 2**13, 2**17
"""Of each kernel that many forms are kept, and of each form the largest launch within these limits."""


class Block(NamedTuple):
    """An array as the bytes from its first number to its last."""

    memory: Any
    shape: tuple[int, ...]
    dtype: Any
    strides: tuple[int, ...]
    strided: bool

    @classmethod
    def of(cls, argument):
        strided = isinstance(argument, Strided)
        array = argument.array if strided else argument
        size = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) + array.itemsize
        block = cls(np.full(size if array.size else 0, 0xFF, np.uint8), array.shape, array.dtype, array.strides, strided)
        block._view()[...] = array
        return block

    def argument(self):
        array = self._replace(memory=self.memory.copy())._view()
        return Strided(array) if self.strided else array

    def _view(self):
        return np.ndarray(self.shape, self.dtype, self.memory, strides=self.strides)


class Keeping(Emulated):
    """A device that keeps some launches of every kernel, as they are before they run: form -> launch, by the kernel's name."""

    def __init__(self, cache):
        super().__init__(cache, orders=(0,))
        self.kept = {}

    def launch(self, launch):
        kept = self.kept.setdefault(launch.form.partition("<")[0], {})
        threads = math.prod(launch.grid) * math.prod(launch.block)
        if threads <= THREADS and (launch.form in kept or len(kept) < FORMS):
            written = written_down(launch)
            if BYTES >= size(written) > size(kept.get(launch.form)):
                kept[launch.form] = written
        super().launch(launch)


def written_down(launch):
    """The launch with blocks for its arrays."""
    arguments = (Block.of(one) if isinstance(one, np.ndarray | Strided) else one for one in launch.arguments)
    return launch._replace(arguments=tuple(arguments))


def size(launch):
    """Bytes of its arrays."""
    return sum(one.memory.size for one in launch.arguments if isinstance(one, Block)) if launch else -1


def run(launches, cache, directory, *, sources=None):
    """The finished process that ran these, written down, one after the other; its standard error says what was found."""
    file = Path(directory) / "launches.pickle"
    file.write_bytes(pickle.dumps((launches, sources or {})))
    # Beside the sanitizer the library whose exceptions it looks at.
    found = (subprocess.check_output(["g++", f"-print-file-name={name}"], text=True) for name in ("libasan.so", "libstdc++.so"))
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path.strip() for path in found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python leaves much to the end of its process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, DIRECTORY.parents[1], HERE.parents[1]))),
    }
    command = [sys.executable, __file__, str(file), str(cache)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def main(file, cache):
    """What the process does."""
    launches, sources = pickle.loads(Path(file).read_bytes())
    forms = {}
    for launch in launches:
        forms.setdefault(launch.file, []).append(launch.form)
    device = Emulated(cache, sources=sources, forms=forms)
    for launch in launches:
        print(launch.form, flush=True)
        device.launch(
            launch._replace(arguments=tuple(one.argument() if isinstance(one, Block) else one for one in launch.arguments))
        )


if __name__ == "__main__":
    import sanitized  # the classes in the file are those of this module's name

    sanitized.main(*sys.argv[1:])

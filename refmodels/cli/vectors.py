"""`refmodels vectors`: write the golden vectors, or hold those that are there to the reference."""

import argparse
from pathlib import Path

from refmodels.printing import byte_size, progress
from refmodels.verification.vectors import check_vectors, write_vectors

AGREE, DIFFER = 0, 1


def run(arguments: argparse.Namespace) -> int:
    """Write every file, or say what no longer agrees; the exit status."""
    directory = Path(arguments.directory)
    if arguments.check:
        if not directory.is_dir():
            raise NotADirectoryError(f"{arguments.directory}: no such directory")
        problems = check_vectors(directory)
        for problem in problems:
            print(problem)
        print(f"{arguments.directory}: {f'{len(problems)} do not agree' if problems else 'all agree'}", flush=True)
        return DIFFER if problems else AGREE
    written = write_vectors(directory, lambda name: progress(f"computing {name}"))
    size = sum(path.stat().st_size for path in written)
    print(f"{arguments.directory}: {len(written)} files, {byte_size(size)}", flush=True)
    return AGREE

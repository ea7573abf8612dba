"""`refmodels vectors`: write the golden vectors, or hold those that are there to the reference."""

from pathlib import Path

from refmodels.printing import byte_size, progress

AGREE, DIFFER = 0, 1


def vectors(directory: str, *, check: bool) -> int:
    """Write every file, or say what no longer agrees; the exit status."""
    from refmodels.verification.vectors import check_vectors, write_vectors

    if check:
        if not Path(directory).is_dir():
            raise NotADirectoryError(f"{directory}: no such directory")
        problems = check_vectors(Path(directory))
        for problem in problems:
            print(problem)
        print(f"{directory}: {f'{len(problems)} do not agree' if problems else 'all agree'}", flush=True)
        return DIFFER if problems else AGREE
    written = write_vectors(Path(directory), lambda name: progress(f"computing {name}"))
    size = sum(path.stat().st_size for path in written)
    print(f"{directory}: {len(written)} files, {byte_size(size)}", flush=True)
    return AGREE

"""Directories that appear when they are complete: all is written into a hidden one beside the place first."""

import glob
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refmodels.files import naming


@contextmanager
def staged(directory: str | Path, *, replace: bool = False, superseded: re.Pattern[str] | None = None) -> Iterator[Path]:
    """A hidden directory beside `directory`, for the files to be written into; it takes its place when the block ends well, and
    is removed when it does not. What a killed process left of its own is removed first.

    A directory with files in it keeps them, except those of the same name and those whose names are `superseded`; with
    `replace` it goes as a whole.
    """
    target = checked_target(directory)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    place = staging_parent(target) / f"{partial_prefix(target)}{os.getpid()}-{time.time_ns():x}"
    place.mkdir()
    try:
        with naming(directory), locked(place):
            yield place
            if place.parent == target:
                _merge(place, target, None if replace else superseded, keep=not replace)
            elif not target.exists() or not any(target.iterdir()):
                place.replace(target)
            elif replace:
                _replace(place, target)
            else:
                _merge(place, target, superseded)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        with suppress(OSError):  # they stay where something is in them
            for parent in new_parents:
                parent.rmdir()


def checked_target(directory: str | Path) -> Path:
    """The directory that is to be written, links followed. ValueError for an empty name, which would be the one we are in;
    FileExistsError if something is in the way."""
    if not os.fspath(directory):
        raise ValueError("the directory to write to is '', wanted a name")
    target = Path(directory).resolve()
    obstacle = next((place for place in (target, *target.parents) if place.exists()), target)
    if obstacle.exists() and not obstacle.is_dir():
        raise FileExistsError(f"{directory if obstacle == target else obstacle} is there and is no directory")
    return target


def _replace(place: Path, target: Path) -> None:
    old = place.with_name(f"{place.name}-old")
    try:
        target.replace(old)
        place.replace(target)
    finally:  # also after an interrupt
        if not target.exists():
            old.replace(target)
        shutil.rmtree(old, ignore_errors=True)


def _merge(place: Path, target: Path, superseded: re.Pattern[str] | None, *, keep: bool = True) -> None:
    """Each file appears whole, the configuration last."""
    new = sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
    for path in [path for path in target.iterdir() if path != place and Path(path.name) not in new]:
        if superseded is not None and superseded.fullmatch(path.name) and not path.is_dir():
            path.unlink()
        elif not keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in sorted(new, key=lambda name: name.name.endswith("config.json")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).replace(target / name)


def staging_parent(target: Path) -> Path:
    """Where the hidden directory goes: beside the target, or into one that cannot be replaced: a mount, the directory that we
    are in, one beside which nothing may be written."""
    fixed = target.is_dir() and (target.is_mount() or target == Path.cwd() or not os.access(target.parent, os.W_OK))
    return target if fixed else target.parent


def partial_prefix(target: Path) -> str:
    """What the names of the hidden directories for this target begin with."""
    return f".{target.name}.partial-"


def remove_abandoned(target: Path) -> None:
    """Remove what processes that were killed left beside `target`. One that still runs holds a lock on its directory."""
    for place in staging_parent(target).glob(f"{glob.escape(partial_prefix(target))}*"):
        with suppress(OSError), locked(place):
            if place.name.endswith("-old") and not target.exists():
                place.replace(target)
            else:
                shutil.rmtree(place, ignore_errors=True)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the lock of this directory; BlockingIOError if another process holds it. Where there are no such locks, OSError for
    the directory of another process."""
    try:
        import fcntl
    except ImportError:  # Windows
        if f".partial-{os.getpid()}-" not in directory.name:
            raise OSError(f"{directory}: may be in use") from None
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)

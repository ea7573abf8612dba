"""Put compiled code where it can run: a linker for the one kind of object file that Numba makes on Linux for x86-64.

llvmlite does that everywhere, but takes 50 MB of memory and a tenth of a second for it. Such a file has absolute relocations of
64 bits alone; where one has anything else, the answer is None, and llvmlite is asked.
"""

import ctypes
import mmap
import platform
import struct
import sys
from typing import Any, NamedTuple

SYMBOL_TABLE, RELOCATIONS, UNWINDING = 2, 4, 0x70000001
ALLOCATED = 2
ABSOLUTE_64 = 1
UNDEFINED, COMMON, ABSOLUTE = 0, 0xFFF2, 0xFFF1
PAGE = mmap.PAGESIZE

_regions: list[Any] = []


class Section(NamedTuple):
    """A row of an ELF file's table of sections."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry: int


class Symbol(NamedTuple):
    """A row of its table of symbols."""

    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


def linked(code: bytes, symbol: str, unused: tuple[str, ...]) -> int | None:
    """The address of `symbol`, all of the file being in memory for good; None for a file that is not of this kind.

    `unused` are names that the code has, but never calls.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64" or code[:6] != b"\x7fELF\x02\x01":
        return None
    table, count = struct.unpack_from("<Q", code, 40)[0], struct.unpack_from("<H", code, 60)[0]
    sections = [Section(*struct.unpack_from("<IIQQQQIIQQ", code, table + 64 * i)) for i in range(count)]
    (symbols_at,) = (section for section in sections if section.kind == SYMBOL_TABLE)
    symbols = [
        Symbol(*struct.unpack_from("<IBBHQQ", code, symbols_at.offset + place)) for place in range(0, symbols_at.size, 24)
    ]
    text = sections[symbols_at.link]
    strings = code[text.offset : text.offset + text.size]

    def name_of(entry: Symbol) -> str:
        return strings[entry.name : strings.index(b"\0", entry.name)].decode()

    placed, end = {}, 0
    for i, section in enumerate(sections):
        if section.flags & ALLOCATED and section.kind != UNWINDING:
            end += -end % max(section.alignment, 1)
            placed[i], end = end, end + section.size
    # Variables that are zero at first stand on pages of their own, which stay writeable.
    variables, end = {}, end + -end % PAGE
    shared = end
    for i, entry in enumerate(symbols):
        if entry.section == COMMON:
            variables[i], end = end, end + entry.size + -entry.size % 16
    region = mmap.mmap(-1, end + PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for i, place in placed.items():
        section = sections[i]
        region[place : place + section.size] = code[section.offset : section.offset + section.size]

    def address(i: int) -> int | None:
        entry = symbols[i]
        if entry.section == UNDEFINED:
            return _outside(name_of(entry), unused)
        if entry.section == COMMON:
            return start + variables[i]
        return start + placed[entry.section] + entry.value if entry.section in placed else None

    for section in sections:
        if section.kind != RELOCATIONS or section.info not in placed:
            continue
        for place in range(section.offset, section.offset + section.size, section.entry):
            offset, info, addend = struct.unpack_from("<QQq", code, place)
            target = address(info >> 32)
            if info & 0xFFFFFFFF != ABSOLUTE_64 or target is None:
                return None
            struct.pack_into("<Q", region, placed[section.info] + offset, (target + addend) % 2**64)
    found = next((address(i) for i, entry in enumerate(symbols) if name_of(entry) == symbol), None)
    if found is None or ctypes.CDLL(None).mprotect(
        ctypes.c_void_p(start), ctypes.c_size_t(shared), mmap.PROT_READ | mmap.PROT_EXEC
    ):
        return None
    _regions.append(region)
    return found


def _outside(name: str, unused: tuple[str, ...]) -> int | None:
    """Where a function of the C library or of Python is."""
    for library in (ctypes.CDLL(None), ctypes.pythonapi):
        try:
            return ctypes.cast(getattr(library, "abort" if name in unused else name), ctypes.c_void_p).value
        except AttributeError:
            continue
    return None

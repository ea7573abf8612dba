"""The structures of an HDF5 file on which the C library runs for ever if they are damaged, checked before it sees them.

Those are lists and trees that lead back into themselves: the free list in the heap of a group's names, the tree of its
entries, the blocks of an object's header. Keras writes the oldest form of all of them (superblock 0, the default of
h5py), and this follows no other. Layouts: the HDF5 File Format Specification, version 3.0, sections II.A, III.A, III.B,
III.D and IV.A.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from refmodels.files import CheckpointError

SIGNATURE = b"\x89HDF\r\n\x1a\n"

MAX_BLOCKS = 1_000_000
"""A file with more headers, nodes and heaps than this is refused."""

MAX_BYTES = 2**28
"""A file with more in them is refused; values do not count."""

_CONTINUATION, _SYMBOL_TABLE = 0x10, 0x11  # types of messages in a header
_SOFT_LINK = 2  # of an entry: it has no object
_NO_MORE = 1  # ends a free list


def check(path: Path, source: str) -> None:
    """ValueError that starts with `source` if the file is none in which every list and tree comes to an end."""
    with path.open("rb") as file:
        try:
            _Walk(file).run()
        except ValueError as error:
            raise CheckpointError(f"{source}: not a readable HDF5 file, perhaps truncated: {error}") from None


class _Walk:
    """Every block once: `seen` has the addresses of those that were there."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, 2)
        self.left = MAX_BYTES
        self.seen: set[int] = set()
        self.objects: list[int] = []
        self.headers: set[int] = set()

    def run(self) -> None:
        start = self.at(0, 96)
        if start[:8] != SIGNATURE or start[8] != 0 or start[13:15] != b"\x08\x08":
            raise ValueError("it does not begin with a superblock of version 0, as Keras writes it")
        base, _, end, _ = struct.unpack_from("<QQQQ", start, 24)
        if base or end > self.size:
            raise ValueError(f"it is to have {end} bytes from {base} on, and has {self.size}")
        self.objects.append(struct.unpack_from("<Q", start, 64)[0])
        while self.objects:
            if (address := self.objects.pop()) not in self.headers:  # an object may have two names: no harm here
                self.headers.add(address)
                self.header(address)

    def at(self, address: int, count: int) -> bytes:
        """So many bytes from there on, all of them in the file."""
        if address > self.size or count > self.size - address:
            raise ValueError(f"{count} bytes at {address} are not in the {self.size} of the file")
        self.left -= count
        if self.left < 0:
            raise ValueError(f"its headers and trees have over {MAX_BYTES} bytes")
        self.file.seek(address)
        return self.file.read(count)

    def block(self, address: int, signature: bytes, count: int) -> bytes:
        """The beginning of a block that was not there before."""
        if address in self.seen or len(self.seen) > MAX_BLOCKS:
            raise ValueError(f"the block at {address} is there twice, or there are over {MAX_BLOCKS}")
        self.seen.add(address)
        content = self.at(address, count)
        if not content.startswith(signature):
            raise ValueError(f"no {signature!r} at {address}")
        return content

    def header(self, address: int) -> None:
        """An object: the messages of its header, in one block and those that continue it."""
        count, _, size = struct.unpack_from("<HII", self.block(address, b"\x01", 16), 2)
        blocks = [(address + 16, size)]
        while blocks:
            start, size = blocks.pop()
            content, place = self.at(start, size), 0
            while place + 8 <= size and count:
                kind, length = struct.unpack_from("<HH", content, place)
                data = content[place + 8 : place + 8 + length]
                if kind in {_CONTINUATION, _SYMBOL_TABLE}:
                    if len(data) < 16:
                        raise ValueError(f"the message at {start + place} is cut off")
                    first, second = struct.unpack_from("<QQ", data)
                    if kind == _SYMBOL_TABLE:
                        self.entries(first, self.names(second))
                    else:
                        self.block(first, b"", 0)
                        blocks.append((first, second))
                place, count = place + 8 + length, count - 1

    def names(self, address: int) -> int:
        """The heap of a group's names; gives its size."""
        size, free, start = struct.unpack_from("<QQQ", self.block(address, b"HEAP\0", 32), 8)
        content, seen = self.at(start, size), set()
        while free != _NO_MORE:
            if free in seen or free + 16 > size:
                raise ValueError(f"the free list of the heap at {address} has no end")
            seen.add(free)
            (free,) = struct.unpack_from("<Q", content, free)
        return int(size)

    def entries(self, address: int, names: int, level: int | None = None) -> None:
        """The tree of a group's entries, whose levels go down to 0."""
        node = self.block(address, b"TREE\0", 24)
        if level is not None and node[5] != level:
            raise ValueError(f"the node at {address} is of level {node[5]}, wanted {level}")
        (count,) = struct.unpack_from("<H", node, 6)
        content = self.at(address + 24, 16 * count + 8)
        for index in range(count):
            (child,) = struct.unpack_from("<Q", content, 16 * index + 8)
            if node[5]:
                self.entries(child, names, node[5] - 1)
            else:
                self.leaf(child, names)

    def leaf(self, address: int, names: int) -> None:
        (count,) = struct.unpack_from("<H", self.block(address, b"SNOD\x01", 8), 6)
        content = self.at(address + 8, 40 * count)
        for name, item, kind in struct.iter_unpack("<QQI20x", content):
            if name >= names:
                raise ValueError(f"the name at {name} of a heap of {names} bytes")
            if kind != _SOFT_LINK:
                self.objects.append(item)

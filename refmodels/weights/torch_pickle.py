"""The pickles in a torch checkpoint, read without unpickling them.

A small machine of our own runs the few opcodes of which a table of tensors consists, on values that are plain data. It
imports nothing and calls nothing; whatever else a pickle can ask for is refused by name. The standard library only
splits the stream into opcodes.
"""

import io
import pickletools
from dataclasses import dataclass
from typing import Any, Final

from refmodels.files import CheckpointError

MAX_BYTES = 2**19
"""A larger pickle is refused: this holds about three thousand tensors, and the largest models have about a thousand."""

MAX_STACK = 10_000
"""The deepest stack: picklers set at most a thousand items of a dict at once."""

MAX_TUPLE = 64
"""The longest tuple: the shape of an array has no more axes."""

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
"""Class of a storage in torch -> NumPy name of the type of its elements."""

_DICT, _TENSOR, _PARAMETER = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"

_ALLOWED = {_DICT, _TENSOR, _PARAMETER, *(f"torch.{name}" for name in STORAGES)}

_KINDS = {
    "torch._utils._rebuild_qtensor": "quantised tensors",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_tensor_v3": "tensors of a type without a storage class, such as 8-bit floats,",
    "torch.ComplexFloatStorage": "complex tensors",
    "torch.ComplexDoubleStorage": "complex tensors",
}
"""Globals that a checkpoint may rightly have -> what it asks for with them, that is not supported."""

_MARK: Final = object()


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements, the record `key` of the file; `dtype` is the NumPy name of their type."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class Record:
    """Where the bytes of a storage, or of another entry of an archive, lie in the file; `crc` is 0 if torch recorded none."""

    start: int
    size: int
    crc: int = 0


@dataclass(frozen=True)
class View:
    """A tensor: the elements of `storage` from `offset` on, `strides` elements apart along each axis of `shape`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    """The name of something that an unpickler would import."""

    name: str


def read_tensors(content: bytes, source: str) -> dict[str, View]:
    """The tensors of a state dict by name; every count in them is an int from 0 to below 2**63, not checked otherwise.

    ValueError that starts with `source` for a pickle that is anything else.
    """
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{source}: the pickle has {len(content)} bytes, wanted at most {MAX_BYTES}")
    stream = io.BytesIO(content)
    tensors = tensors_of(read_pickle(stream, source), source)
    if stream.tell() != len(content):
        raise CheckpointError(f"{source}: not a pickle of tensors: it ends before the last of {len(content)} bytes")
    return tensors


def read_pickle(stream: io.BytesIO, source: str) -> Any:
    """What the pickle that begins here holds, as `_Machine` has it; the stream, of `MAX_BYTES` at most, is then behind it.

    ValueError as for `read_tensors`.
    """
    position = stream.tell()
    machine = _Machine(position, stream.getbuffer().nbytes)
    try:
        for opcode, argument, place in pickletools.genops(stream):
            position = place or 0
            machine.step(opcode.name, argument, position)
            if len(machine.stack) > MAX_STACK:
                raise ValueError(f"over {MAX_STACK} values on the stack")
        return machine.result()
    except (ValueError, IndexError, OverflowError) as error:
        where = f"at byte {position} of at most {MAX_BYTES}"
        raise CheckpointError(f"{source}: not a pickle of tensors: {str(error)[:500]} ({where})") from None


def tensors_of(value: Any, source: str) -> dict[str, View]:
    """The tensors of a state dict by name, if that is what a pickle held; ValueError as for `read_tensors`."""
    if type(value) is not dict:
        raise CheckpointError(f"{source}: not a pickle of tensors: it holds {_kind(value)}, wanted a dict of tensors")
    for name, view in value.items():
        if type(view) is not View:
            raise CheckpointError(f"{source}: not a pickle of tensors: entry {short(name)} is {_kind(view)}, wanted a tensor")
    tensors: dict[str, View] = value
    return tensors


class _Machine:
    """The stack and the memo of a pickle, which hold None, bool, int, str, and tuples, lists and dicts of these and
    of the classes above. The pickle begins at byte `start` of a stream that ends at byte `end`."""

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any, position: int) -> None:
        stack = self.stack
        match opcode:
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"the memo lacks {argument}")
                stack.append(self.memo[argument])
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(_tuple(self.pop(int(opcode[-1]))))
            case "TUPLE":
                stack.append(_tuple(self.pop_to_mark()))
            case "APPEND":
                self.append(self.pop(1))
            case "APPENDS":
                self.append(self.pop_to_mark())
            case "SETITEM":
                self.set_items(self.pop(2))
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "GLOBAL":
                stack.append(_global(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                stack.append(_global(".".join(map(str, self.pop(2)))))
            case "BINPERSID":
                stack.append(_storage(*self.pop(1)))
            case "REDUCE":
                stack.append(_reduce(*self.pop(2)))
            case "BUILD":
                self.build(*self.pop(1))
            case "FRAME":
                if argument > self.end - position - 9:
                    raise ValueError(f"a frame of {argument} bytes ends behind the pickle")
            case "PROTO":
                if position != self.start or argument > 5:
                    raise ValueError(f"protocol {argument}, wanted 2 to 5, at the beginning")
            case "STOP":
                pass
            case _:
                raise ValueError(f"opcode {opcode} is not allowed")

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) < count or any(value is _MARK for value in values):
            raise ValueError("the stack is empty")
        del self.stack[-count:]
        return values

    def pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def append(self, values: list[Any]) -> None:
        """Values for the list below them."""
        target = self.top()
        if type(target) is not list:
            raise ValueError(f"a value for the end of {_kind(target)}, wanted a list")
        target += values

    def set_items(self, items: list[Any]) -> None:
        """Keys and values by turns, for the dict below them."""
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise ValueError(f"an item of {_kind(target)}, wanted a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise ValueError(f"key {short(key)} of a dict is no string, or there twice")
            target[key] = value

    def build(self, state: Any) -> None:
        """The attributes of the OrderedDict below: of a state dict, the versions of its modules, which are not used."""
        if type(self.top()) is not dict or type(state) is not dict or state.keys() != {"_metadata"}:
            raise ValueError(f"attributes {short(state)} of {_kind(self.top())}, wanted _metadata of an OrderedDict")

    def result(self) -> Any:
        if len(self.stack) != 1:
            raise ValueError(f"it ends with {len(self.stack)} values on the stack, wanted one")
        return self.top()


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    """Never deeper than the arguments of a tensor are: shape and strides are tuples in a tuple."""
    deep = any(type(value) is tuple and any(type(inner) is tuple for inner in value) for value in values[:MAX_TUPLE])
    if deep or len(values) > MAX_TUPLE:
        raise ValueError(f"a tuple of over {MAX_TUPLE} values, or too deep")
    return tuple(values)


def _global(name: str) -> _Global:
    if name in _KINDS:
        raise ValueError(f"{_KINDS[name]} are not supported ({name})")
    if name not in _ALLOWED:
        raise ValueError(f"global {short(name)} is not allowed")
    return _Global(name)


def _storage(identity: Any) -> Storage:
    """The persistent id of a storage: ("storage", its class, name of its record, device, number of elements), and before
    torch 1.6 which part it is of another storage: None, it is a whole one."""
    match identity:
        case ("storage", _Global(name), str(key), str(), int(numel), *part) if part in ([], [None]) and _counts((numel,)):
            dtype = STORAGES.get(name.removeprefix("torch."))
            if dtype is not None:
                return Storage(dtype, key, numel)
    raise ValueError(f"persistent id {short(identity)} is not that of a storage")


def _reduce(function: Any, arguments: Any) -> Any:
    """What the function would return."""
    name = function.name if type(function) is _Global else _kind(function)
    match name, arguments:
        case (str(_), ()) if name == _DICT:
            return {}
        case (str(_), (Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), {}, *metadata)) if (
            name == _TENSOR
        ):
            flags = metadata not in ([], [None], [{}])  # they change what the values mean
            if _counts((offset, *shape, *strides)) and len(shape) == len(strides) and not arguments[5] and not flags:
                return View(storage, offset, shape, strides)
        case (str(_), (View() as view, bool(), {})) if name == _PARAMETER and not arguments[2]:
            return view
    raise ValueError(f"{name} is called with {short(arguments)}")


def _counts(values: tuple[Any, ...]) -> bool:
    return all(type(value) is int and 0 <= value < 2**63 for value in values)


def _kind(value: Any) -> str:
    return {_Global: "a global", Storage: "a storage", View: "a tensor"}.get(type(value), type(value).__name__)


def short(value: Any) -> str:
    """A value for a message, never a long one, however large it is."""
    if type(value) is tuple:
        return f"({', '.join(map(short, value[:8]))}{', ...' if len(value) > 8 else ''})"
    if type(value) in (bool, int) and abs(value) < 2**64:
        return str(value)
    return repr(value[:100]) if type(value) is str else _kind(value)

"""What the compiled kernels and the Python around them agree on: stored types, the shape of panels and tiles, instructions.

A matrix (k, n) is stored in panels of sixteen columns, [n/16, k, 16]: a vector of weights is one load, and a product with one
row reads the memory from front to back. The last panel is filled up with zeros.
"""

import functools
import struct

LANES = 16
FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, INTEGER = range(6)
"""How weights are stored; INT8 is multiplied in float32, INTEGER with int8 inputs."""
STORED = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
ROUND = {"float32": 0, "bfloat16": BFLOAT16, "float16": FLOAT16}
"""What activations are rounded to; 0 leaves float32 as it is."""
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_approximate": 3, "silu": 4}

ROW_BLOCK = 384
"""Rows of one piece of work of a product: a multiple of every tile's rows."""
QUERIES = 12
"""Queries of one piece of work of attention: a block of keys is read for all of them."""
KEYS = 64
ADD, MULTIPLY = 1, 2
"""How `elementwise` joins its two operands."""
NO_BIAS, GIVEN_BIAS, RELATIVE_BIAS, ALIBI = range(4)
REACH = 128
"""The distance from which on T5's relative bias is the same for all keys."""
TEMPORARY = 2048
"""Bytes at the front of a thread's scratch memory: the sums of one tile, and half way those of one int4 group."""

INSTRUCTIONS = {
    "linear": "rows x k n weights kind scales zeros block bias factor row_scales activation gate residual out rounding "
    "residual_rounding",
    "norm": "rows x n gamma beta epsilon out rounding",
    "quantize": "rows x k out row_scales given",
    "write": "rows t heads size x out kind batch_stride position_stride head_stride start",
    "attention": "batch t s heads size query keys values kind key_batch key_position key_head value_batch value_position "
    "value_head scale mask mask_batch mask_query causal positions positions_batch bias_kind bias bias_batch bias_head "
    "bias_query out rounding",
    "scores": "batch t s heads size query keys kind key_batch key_position key_head scale bias_kind bias bias_batch bias_head "
    "bias_query out",
    "softmax": "batch t s heads scores mask mask_batch mask_query out",
    "context": "batch t s heads size weights values kind value_batch value_position value_head out rounding",
    "elementwise": "count x other combination out activation factor rounding",
}
"""Instruction -> its operands, in the order of its kernel's parameters: addresses, sizes, and the bits of float64 numbers."""

CODES = {name: code for code, name in enumerate(INSTRUCTIONS)}
HEADER = 2
"""An instruction begins with its code and whether it waits for all before it."""
WIDTH = HEADER + max(len(operands.split()) for operands in INSTRUCTIONS.values())


def padded(keys: int) -> int:
    """Places for the scores of one query: whole vectors."""
    return (keys + LANES - 1) // LANES * LANES


def attention_scratch(keys: int, size: int) -> int:
    """Bytes that a piece of work of attention needs: where each query ends, scores, and a block of keys in panels."""
    return 8 * QUERIES + 4 * QUERIES * padded(keys) + 4 * KEYS * size


def bits(value: float) -> int:
    """The bits of a float64 as an integer."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@functools.cache
def host_features() -> frozenset[str]:
    """What this CPU can do, in LLVM's words."""
    import llvmlite.binding as llvm

    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def host_has(feature: str) -> bool:
    """Whether this CPU has this feature of LLVM's."""
    return feature in host_features()


def tile_rows() -> int:
    """Rows of the tile of a matrix product: as many as the registers hold sums for."""
    return 12 if host_has("avx512f") else 6

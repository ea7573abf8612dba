"""`refmodels info`: a preset's arguments, parameters and memory, without reading a weight."""

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import groupby

from refmodels.backbone import Backbone
from refmodels.ops.precision import numpy_dtype
from refmodels.parameters import Parameter, stored_bytes
from refmodels.presets import locate, preset_info, preset_names
from refmodels.printing import PROSE_WIDTH, byte_size, print_json, print_rows

COMPARED = ("float32", "float16", "bfloat16")
"""The types in which memory is shown."""


@dataclass(frozen=True)
class LayerRow:
    """A layer of the parameter table, or the same one in several consecutive blocks: `layers.0..11.layer_norm`."""

    name: str
    shapes: list[tuple[int, ...]]
    times: int

    @property
    def each(self) -> int:
        """Parameters in one of them."""
        return sum(map(math.prod, self.shapes))


def run(arguments: argparse.Namespace) -> None:
    """`refmodels info`."""
    located = locate(arguments.preset)
    with redirect_stdout(sys.stderr):
        backbone = Backbone.from_preset(arguments.preset, load_weights=False, dtype=arguments.dtype)
    known = preset_info(arguments.preset) if arguments.preset in preset_names() else {}
    table, count, kv = layer_rows(backbone.parameters()), backbone.count_params(), cache_values_per_token(backbone)
    stored = {name: stored_bytes(backbone.parameters(), name) for name in {*COMPARED, backbone.variable_dtype}}
    cached = {name: kv * numpy_dtype(name).itemsize for name in {*COMPARED, backbone.compute_dtype}}
    weights, cache = stored[backbone.variable_dtype], cached[backbone.compute_dtype]
    memory = {name: {"weights_bytes": stored[name], "kv_cache_bytes_per_token": cached[name]} for name in COMPARED}
    where = located.handle or ("shipped with refmodels" if known else str(located.directory))
    if arguments.json:
        print_json(
            {
                "preset": arguments.preset,
                "class": type(backbone).__name__,
                "description": known.get("description", ""),
                "where": where,
                "config": backbone.get_config(),
                "parameters": [{"name": r.name, "shapes": r.shapes, "times": r.times, "each": r.each} for r in table],
                "parameter_count": count,
                "weights_bytes": weights,
                "kv_cache_bytes_per_token": cache,
                "memory": memory,
            }
        )
        return
    print(f"{arguments.preset}: {type(backbone).__name__}, {count:,} parameters, {where}")
    if known.get("description"):
        print(textwrap.fill(known["description"], PROSE_WIDTH))
    print("\nArguments")
    config, how = backbone.get_config(), backbone.quantization
    if how is not None:  # else a policy for each layer
        config["dtype"] = f"{how.keras_mode}_from_{backbone.config.dtype}"
    print_rows([(name, "None" if value is None else str(value)) for name, value in config.items()])
    print("\nParameters")
    rows = [("LAYER", "PARAMETERS", "EACH", "SHAPES")]
    rows += [(row.name, f"{row.each * row.times:,}", f"{row.each:,}", _shapes(row.shapes)) for row in table]
    print_rows([*rows, ("total", f"{count:,}", "", "")], right=(1, 2))
    print("\nMemory")
    rows = [("DTYPE", "WEIGHTS", "KEYS AND VALUES", "")]
    rows += [(name, byte_size(stored[name]), f"{cached[name]:,} bytes a token", "") for name in COMPARED]
    policy = backbone.config.dtype
    if policy not in COMPARED:
        rows.append((policy, byte_size(weights), f"{cache:,} bytes a token", ""))
    rows = [(*row[:3], "this preset" if row[0] == policy else "") for row in rows]
    print_rows(rows, right=(1, 2))


def layer_rows(parameters: Iterable[Parameter]) -> list[LayerRow]:
    """The parameters layer by layer, in order; consecutive numbered blocks that are alike are one."""
    blocks: list[tuple[str, int, list[tuple[str, tuple[int, ...]]]]] = []  # stack, number (or -1), contents
    for (stack, number), group in groupby(parameters, key=lambda parameter: _block(parameter.path)):
        start = len(f"{stack}.{number}.") if number >= 0 else 0
        blocks.append((stack, number, [(parameter.path[start:], parameter.shape) for parameter in group]))
    rows = []
    # Blocks that are alike: the same stack, consecutive numbers, the same contents.
    alike = groupby(enumerate(blocks), key=lambda entry: (entry[1][0], entry[1][1] < 0 or entry[0] - entry[1][1], entry[1][2]))
    for (stack, *_), entries in alike:
        members = [block for _, block in entries]
        first, last = members[0][1], members[-1][1]
        numbers = str(first) if first == last else f"{first}..{last}"
        prefix = f"{stack}.{numbers}." if first >= 0 else ""
        for layer, leaves in groupby(members[0][2], key=lambda leaf: leaf[0].rpartition(".")[0]):
            rows.append(LayerRow(prefix + layer, [shape for _, shape in leaves], len(members)))
    return rows


def _block(path: str) -> tuple[str, int]:
    """The stack and the number of a parameter's block: `encoder.layers`, 3. Outside of any: "", -1."""
    match = re.match(r"(.*?)\.(\d+)\.", path)
    return ("", -1) if match is None else (match[1], int(match[2]))


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return " ".join(str(shape).replace(" ", "") for shape in shapes)


def cache_values_per_token(backbone: Backbone) -> int:
    """Numbers that a key/value cache holds for one token: a key and a value for each head of each decoder layer."""
    config = backbone.config
    return int(2 * config.num_layers * config.num_heads * config.head_dim)

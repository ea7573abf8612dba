"""`refmodels presets`: the built-in presets, as a table."""

import argparse
import textwrap
from collections.abc import Mapping
from typing import Any

from refmodels.ops.precision import numpy_dtype
from refmodels.presets import MODELS, preset_info, preset_names
from refmodels.printing import PROSE_WIDTH, aligned, byte_size, print_json


def run(arguments: argparse.Namespace) -> None:
    """`refmodels presets`."""
    infos = [preset_info(name) for name in preset_names()]
    for info in infos:
        info["parameter_count"] = info["parameter_count"] or MODELS[info["class"]](**info["config"]).count_params()
    infos.sort(key=lambda info: (info["kaggle_handle"] is not None, info["class"], info["parameter_count"]))
    if arguments.json:
        print_json([{**info, "weights_bytes": _weights_bytes(info)} for info in infos])
        return
    rows = [("NAME", "CLASS", "PARAMETERS", "WEIGHTS", "", "WHERE")]
    for info in infos:
        size, where = _weights_bytes(info), info["kaggle_handle"] or "shipped"
        dtype = info["weights_dtype"] or "-"
        count = f"{info['parameter_count']:,}"
        rows.append((info["name"], info["class"], count, "" if size is None else byte_size(size), dtype, where))
    lines = aligned(rows, right=(2, 3))
    print(lines[0])
    for line, info in zip(lines[1:], infos, strict=True):
        print(line)
        if info["description"]:
            print(textwrap.fill(info["description"], PROSE_WIDTH, initial_indent="    ", subsequent_indent="    "))


def _weights_bytes(info: Mapping[str, Any]) -> int | None:
    """Bytes of the weights in their file; None if the type there is not recorded."""
    dtype = info["weights_dtype"]
    return None if dtype is None else int(info["parameter_count"]) * numpy_dtype(dtype).itemsize

"""`refmodels bench`: the model that is asked for, and the figures as a table."""

import argparse
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from refmodels.accelerator import REFERENCE, Accelerator, find
from refmodels.backbone import Backbone
from refmodels.bench import DECODE_AFTER, Plan, measure
from refmodels.cli.bench_peers import print_peers
from refmodels.cli.selection import fastest_accelerator
from refmodels.presets import locate
from refmodels.printing import aligned, byte_size, print_json, show_status

DEFAULT_PRESET = "opt_125m_en"


def run(arguments: argparse.Namespace) -> None:
    """`refmodels bench`, of which --peers is another run altogether."""
    accelerator = fastest_accelerator() if arguments.accelerator is None else find(arguments.accelerator)
    (print_peers if arguments.peers else print_bench)(arguments, accelerator)


def print_bench(arguments: argparse.Namespace, accelerator: Accelerator | None) -> None:
    """Measure what the options say, and print it."""
    if arguments.write is not None:
        raise ValueError("--write goes with --peers")
    arguments.preset = arguments.preset or DEFAULT_PRESET
    given = {"prompt_length": arguments.prompt_length, "new_tokens": arguments.new_tokens, "batches": arguments.batch}
    plan = Plan(**{name: value for name, value in (given | {"repeats": arguments.repeats}).items() if value is not None})
    settings = {} if arguments.threads is None else {"threads": arguments.threads}
    if arguments.weight_only and arguments.quantize is None:
        raise ValueError("--weight-only goes with --quantize")
    accelerator = find(accelerator, **settings)
    try:
        with redirect_stdout(sys.stderr):  # downloads report their progress on either stream
            backbone, directory = _model(arguments, accelerator, plan)
            found = measure(backbone, plan, directory, settings, show_status)
    finally:
        show_status("")
    result = {
        "preset": arguments.preset,
        "class": type(backbone).__name__,
        "random_weights": _is_random(arguments),
        "dtype": backbone.config.dtype,
        "quantization": None if backbone.quantization is None else backbone.quantization.keras_mode,
        "weight_only": backbone.quantization is not None and backbone.quantization.weight_only,
        "accelerator": REFERENCE if accelerator is None else accelerator.name,
        **found,
    }
    if arguments.json:
        print_json(result)
    else:
        print("\n".join(_report(result)), flush=True)


def _is_random(arguments: argparse.Namespace) -> bool:
    """Whether the weights are random: when asked for, and for a built-in preset that does not ship them."""
    return arguments.random or locate(arguments.preset).info is not None


def _model(arguments: argparse.Namespace, accelerator: Accelerator | None, plan: Plan) -> tuple[Backbone, Path | None]:
    """The model, and the directory it is in as it is, if there is one."""
    random, options = _is_random(arguments), {"accelerator": accelerator, "dtype": arguments.dtype}
    plan.check(Backbone.from_preset(arguments.preset, load_weights=False, **options))  # before any weight is read
    backbone = Backbone.from_preset(arguments.preset, load_weights=not random, **options, **({"seed": 0} if random else {}))
    if arguments.quantize is not None:
        backbone.quantize(arguments.quantize, weight_only=arguments.weight_only or None)
    located = locate(arguments.preset)
    return backbone, None if random or arguments.quantize is not None else located.fetch()


def _report(result: Mapping[str, Any]) -> list[str]:
    machine = result["machine"]
    kind = result["dtype"] if result["quantization"] is None else f"{result['quantization']} from {result['dtype']}"
    kind += ", weights alone" if result["weight_only"] and result["quantization"] == "int8" else ""
    weights = "random weights" if result["random_weights"] else "its weights"
    rows = [
        ("model", f"{result['preset']}, {result['parameters']:,} parameters, {kind}, {weights}"),
        ("accelerator", str(result["accelerator"])),
        *([("device", _hardware(result["hardware"]))] if result["hardware"] else []),
        ("machine", f"{machine['processor']}, {machine['cores']} cores; NumPy {machine['numpy']}"),
        ("limits", _limits(result)),
        ("a step reads", byte_size(result["bytes_per_step"])),
        ("a prompt takes", f"{result['flops_per_prompt'] / 1e9:,.4g} GFLOP for {result['prompt_length']} tokens"),
        ("first token", f"{result['first_token_seconds']:.4f} s after a prompt of one token"),
        *_fresh_rows(result),
    ]
    table: list[tuple[str, ...]] = [("TOKENS/S", "MEDIAN", "LEAST", "MOST", "LIMIT", "REACHED")]
    for figure in result["figures"]:
        speeds = [figure[name] for name in ("tokens_per_second", "least", "most", "limit_tokens_per_second")]
        name = f"{figure['figure']}, batch {figure['batch']}"
        table.append((name, *(f"{speed:,.1f}" for speed in speeds), f"{figure['fraction_of_limit']:.0%}"))
    rounds = f"{result['repeats']} round{'s' * (result['repeats'] > 1)}"
    rounds += f"; decoding: {result['new_tokens']} tokens after {DECODE_AFTER}"
    return [*aligned(rows), "", *aligned(table, right=(1, 2, 3, 4, 5)), "", rounds]


def _hardware(hardware: Mapping[str, str]) -> str:
    """Its name, and by their names the numbers that would say nothing alone."""
    others = ", ".join(f"{name} {value}" for name, value in hardware.items() if name != "device")
    return f"{hardware['device']}; {others}" if others else hardware["device"]


def _limits(result: Mapping[str, Any]) -> str:
    reading, multiplying = f"{result['limits']['bytes_per_second'] / 1e9:,.1f} GB/s", result["limits"]["flops_per_second"] / 1e9
    if result["hardware"]:
        return f"the device reads {reading} and multiplies bfloat16 matrices at {multiplying:,.0f} GFLOP/s"
    return f"{result['threads']} threads read {reading} and multiply float32 matrices at {multiplying:.0f} GFLOP/s"


def _fresh_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    fresh = result["fresh_process"]
    if "left_out" in fresh:
        return [("load, memory", f"left out: {fresh['left_out']}")]
    rows = [
        (
            "load",
            f"{fresh['load_seconds']:.3f} s in a new process, then {fresh['first_token_seconds']:.4f} s to the first token",
        )
    ]
    if fresh["peak_memory_bytes"] is not None:
        weights, before = byte_size(result["weights_bytes"]), byte_size(fresh["memory_before_bytes"])
        rows.append(("memory", f"{byte_size(fresh['peak_memory_bytes'])} at most; weights {weights}, before loading {before}"))
    return rows

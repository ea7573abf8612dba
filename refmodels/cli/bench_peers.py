"""`refmodels bench --peers`: the run on a GPU beside other libraries, as tables on the terminal and in accel/bench/gpu.md."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from refmodels.accelerator import REFERENCE, Accelerator
from refmodels.bench_peers import AIMED, Plan, measure
from refmodels.printing import aligned, print_json, say

DOCUMENT = Path(__file__).parents[2] / "accel" / "bench" / "gpu.md"
"""Where a run of the shapes that have aims is kept, in a checkout."""

TORCH_DEVICE = "cuda"
"""The first GPU, which is also that of an accelerator without settings."""

REFUSED = ("random", "prompt_length", "new_tokens", "batch", "threads", "dtype", "quantize", "weight_only")

HEADER = """# On a GPU

refmodels and Transformers, with random weights of one shape on one GPU, by turns, in one run. This file is written by
`refmodels bench --accelerator cupy --peers`; [spec/bench.md](../../spec/bench.md) says what each figure is. Only ratios of one
run mean anything elsewhere.
"""

NO_RUN = """
**No run has been made on a GPU yet**: no machine with one has been at hand. What is here has been tried with small shapes, on a
processor in the place of the device.
"""


def print_peers(arguments: argparse.Namespace, accelerator: Accelerator | None) -> None:
    """Measure, print, and write. ValueError, before any work, for what cannot be measured so."""
    given = [name for name in REFUSED if getattr(arguments, name)]
    if given:
        raise ValueError(f"--peers has a plan of its own: leave out --{given[0].replace('_', '-')}")
    hardware = None if accelerator is None else accelerator.hardware()
    if accelerator is None or hardware is None:
        name = REFERENCE if accelerator is None else accelerator.name
        raise ValueError(
            f"--peers measures on a GPU, and {name} runs on the processor: give --accelerator cupy; "
            "accel/bench/peers.py measures on processors"
        )
    aimed = arguments.preset is None
    target = Path(arguments.write) if arguments.write is not None else DOCUMENT if aimed else None
    if target is not None and not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no directory to write {target.name} to: give --write FILE")
    plan = Plan() if arguments.repeats is None else Plan(repeats=arguments.repeats)
    with redirect_stdout(sys.stderr):
        presets = AIMED if aimed else (arguments.preset,)
        result = measure(presets, plan, accelerator.name, TORCH_DEVICE, lambda line: say(f"refmodels: {line}"))
    if target is not None:
        target.write_text(document(result), encoding="utf-8")
        say(f"refmodels: written to {target}")
    if arguments.json:
        print_json(result)
    else:
        print("\n".join(report(result)), flush=True)


# -- what is told ------------------------------------------------------------------------------------------------------------

Table = list[tuple[str, ...]]


def aims_table(result: Mapping[str, Any]) -> Table:
    """Each aim beside what was reached."""
    rows: Table = [("aim", "wanted", "reached", "")]
    for aim in result["aims"]:
        reached, met = ("", "not measured") if aim["reached"] is None else (f"{aim['reached']:.2f}", "missed")
        rows.append((aim["aim"], f"{aim['wanted']:.2f}", reached, "met" if aim["met"] else met))
    return rows


def figures_table(result: Mapping[str, Any]) -> Table:
    """Each speed, and how many times as fast refmodels in bfloat16 is."""
    rows: Table = [("shape", "system", "figure", "tokens/s", "least", "most", "refmodels beside it")]
    for figure in result["figures"]:
        speeds = ("" if figure[name] is None else f"{figure[name]:,.1f}" for name in ("tokens_per_second", "least", "most"))
        beside = figure["ours_over_this"]
        ratio = "" if beside is None or figure["system"] == "refmodels" else f"{beside:.2f}"
        rows.append((figure["preset"], figure["system"], figure["figure"], *speeds, ratio))
    return rows


def facts(result: Mapping[str, Any]) -> dict[str, str]:
    """What a reader must know to judge the tables."""
    pairs = [(pair["bytes_per_second"] / 1e9, pair["flops_per_second"] / 1e12) for pair in result["limits"]]
    limits = "not measured"
    if pairs:
        reads, multiplies = (f"{min(values):,.4g} to {max(values):,.4g}" for values in zip(*pairs, strict=True))
        limits = f"memory {reads} GB/s, products of bfloat16 matrices {multiplies} TFLOP/s"
    plan = result["plan"]
    rows, length = plan["encode"]
    return {
        **result["hardware"],
        "its limits, from round to round": limits,
        "versions": ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        "date": result["date"],
        "rounds": f"{plan['repeats']}, in {result['seconds']:.0f} s in all",
        "decode": f"{plan['more']} tokens after {plan['decode_after']} and {plan['fewer']} more",
        "prefill": f"{plan['prefill']} tokens, or as many as the model has positions for",
        "encode": f"{rows} rows of {length} tokens",
    }


def left_out(result: Mapping[str, Any]) -> list[str]:
    """What could not be measured, and why."""
    return [f"{gap['preset']}, {gap['system']}: {', '.join(gap['figures'])}: {gap['reason']}" for gap in result["left_out"]]


def report(result: Mapping[str, Any]) -> list[str]:
    """For the terminal."""
    lines = aligned(list(facts(result).items()))
    if result["aims"]:
        lines += ["", *aligned(aims_table(result), right=(1, 2))]
    lines += ["", *aligned(figures_table(result), right=(3, 4, 5, 6))]
    return lines + [f"left out: {line}" for line in left_out(result)]


def document(result: Mapping[str, Any] | None) -> str:
    """The file: a run, or that there has been none."""
    if result is None:
        return HEADER + NO_RUN
    parts = [HEADER, *(f"- {name}: {value}" for name, value in facts(result).items()), ""]
    if result["aims"]:
        parts += [*_markdown(aims_table(result), right=(1, 2)), ""]
    parts += _markdown(figures_table(result), right=(3, 4, 5, 6))
    if gaps := left_out(result):
        parts += ["", "Left out:", "", *(f"- {line}" for line in gaps)]
    return "\n".join(parts) + "\n"


def _markdown(rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> list[str]:
    head, *rest = rows
    rule = tuple("---:" if i in right else "---" for i in range(len(head)))
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rest)]

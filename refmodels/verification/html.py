"""A verification as one page of HTML that needs nothing else: no script, no file, no network. It reads well on a phone.

All text in it may come from strangers, so everything goes through `_text`; and the page forbids itself whatever it does not
need.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from refmodels.files import write_bytes
from refmodels.op import Array
from refmodels.printing import printable
from refmodels.verification.evidence import Evidence, Slice
from refmodels.verification.judgement import Step, ratio
from refmodels.verification.pictures import Bar, chart, difference_picture, error_picture, weight_picture
from refmodels.verification.report import (
    OUTCOMES,
    Layer,
    accumulated_in_words,
    by_first,
    case_title,
    counts,
    explained,
    layer_verdict,
    layers,
    not_compared,
    number,
    short_name,
    step_verdicts,
    worst_case,
)
from refmodels.verification.verify import CaseResult, Verification

MAX_NUMBERS = 4000
"""Inputs with more numbers than this are not printed on the page."""

LABELS = ("First wrong step", "Where", "Why", "That fits too")
"""Beginnings of sentences of a diagnosis that stand out."""

MAX_NAMES = 200
"""Of more names than this that were not compared the page lists so many."""


def write_html(verification: Verification, path: str | Path, *, command: str = "") -> None:
    """Write the page: complete or not there. `command` is what makes it again."""
    write_bytes(Path(path), page(verification, command=command).encode())


def page(verification: Verification, *, command: str = "") -> str:
    """The page as text."""
    outcome = OUTCOMES[verification.status]
    title = f"{verification.candidate} beside {verification.model}: {outcome}"
    sections = [
        _summary(verification, outcome),
        *(_fault(results) for results in by_first(verification)),
        _charts(verification),
        _steps(verification),
        _laws(verification),
        _not_compared(verification),
        _facts(verification),
        _reproduction(verification, command),
    ]
    return HEAD.replace("TITLE", _text(title)) + "\n".join(filter(None, sections)) + "\n</main></body></html>\n"


def _text(text: object, most: int = 300) -> str:
    """Text fit for a page: escaped, without control characters, not too long."""
    return escape(printable(str(text), most))


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def _code(text: object) -> str:
    """A name of a step, to be broken where it has joints."""
    joined = re.sub("([.:_])", r"\1<wbr>", _text(text))
    return f"<code>{joined}</code>"


def _folded(summary: str, body: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{summary}</summary>\n{body}\n</details>"


def _verdict(said: str) -> str:
    kind = {"right": "right", "unclear": "unclear"}.get(said, "wrong")
    return f'<span class="{kind}">{_text(said)}</span>'


# -- sections ---------------------------------------------------------------------------------------------------------------


def _summary(verification: Verification, outcome: str) -> str:
    kind = {"agrees": "right", "inconclusive": "unclear"}.get(outcome, "wrong")
    beside = f"beside {verification.model} in {verification.arithmetic}"
    parts = [
        f'<p class="badge {kind}">{outcome}</p>',
        f"<h1>{_text(verification.candidate, 100)} <small>{_text(beside)}</small></h1>",
        f"<p>{_text(counts(verification).capitalize())}.</p>",
        *(f"<p>{_text(line, 1000)}</p>" for line in accumulated_in_words(verification)),
    ]
    return "<header>\n" + "\n".join(parts) + "\n</header>"


def _fault(results: Sequence[CaseResult]) -> str:
    """Cases that diverge at the same step: in words and in pictures."""
    parts = []
    for line in explained(results):
        label, _, rest = line.partition(": ")
        parts.append(f"<p><b>{_text(label)}:</b> {_text(rest, 1000)}</p>" if label in LABELS else f"<p>{_text(line, 1000)}</p>")
    evidence = worst_case(results).evidence
    if evidence is not None:
        parts += _pictures(evidence)
    return _section("What is wrong", *parts)


def _pictures(evidence: Evidence) -> list[str]:
    error, parts = evidence.error, []
    largest = error.error.max(initial=0.0)
    scale = (
        f"clear: within the bound ({evidence.bound:.2g}); strongest: off by {largest:.2g}"
        if evidence.bound
        else "orange: differs"
    )
    source = error_picture(error.error, evidence.bound, error.judged)
    parts.append(f'<div class="figures">{_figure(source, error, "Error of theirs", scale, wide=True)}</div>')
    rows = [
        (str(example.index), f"{example.theirs:.6g}", f"{example.ours:.6g}", f"{abs(example.theirs - example.ours):.2g}")
        for example in evidence.worst
    ]
    parts.append(_folded("The worst values", _table(("Index", "Theirs", "Ours", "Off by"), rows)))
    if evidence.attention is not None:
        parts.append(_attention(evidence.attention))
    return parts


def _attention(weights: Slice) -> str:
    counted = [np.abs(array[weights.judged & np.isfinite(array)]).max(initial=0.0) for array in (weights.theirs, weights.ours)]
    largest = float(max(counted))
    with np.errstate(invalid="ignore"):
        difference = weights.theirs - weights.ours
    what = "Weights" if weights.step.partition(":")[2].startswith("masked_softmax") else "Scores"
    figures = [
        _figure(weight_picture(weights.theirs, weights.judged, largest), weights, "Theirs", f"strongest: {largest:.2g}"),
        _figure(weight_picture(weights.ours, weights.judged, largest), weights, "Ours", "the same scale"),
        _figure(
            difference_picture(difference, weights.judged),
            weights,
            "Theirs less ours",
            f"orange: more, blue: less; strongest: {float(weights.error.max(initial=0.0)):.2g}",
        ),
    ]
    note = f"{what} of {_code(weights.step)}, {_text(weights.at)}. Ours are as they would be without the fault."
    return f'<h3>The attention of the failing head</h3>\n<p>{note}</p>\n<div class="figures three">{"".join(figures)}</div>'


def _figure(source: str, shown: Slice, title: str, scale: str, wide: bool = False) -> str:
    """A picture with what its axes count, at a size at which cells can be seen."""
    rows, columns = shown.theirs.shape
    cell = min(28, max(1, (640 if wide else 280) // max(rows, columns)))
    spans = [
        f"{axis}s {start} to {start + size - 1} {way}"
        for axis, start, size, way in zip(shown.axes, shown.start, shown.theirs.shape, ("down", "across"), strict=True)
        if axis
    ]
    ignored = "" if shown.judged.all() else "; grey: does not count"
    words = f"{title}, {shown.at}: {', '.join(spans)}" if shown.at else f"{title}: {', '.join(spans)}"
    return (
        f"<figure><figcaption><b>{_text(title)}</b>{f', {_text(shown.at)}' if shown.at and wide else ''}</figcaption>"
        f'<img alt="{_text(words)}" src="{source}" width="{columns * cell}" height="{rows * cell}" '
        f'style="aspect-ratio: {columns} / {rows}">'
        f"<figcaption>{_text(', '.join(spans).capitalize())}. {_text((scale + ignored).capitalize())}.</figcaption></figure>"
    )


def _charts(verification: Verification) -> str:
    drawn = []
    first = verification.first
    for result in verification.cases:
        verdicts = step_verdicts(result.report)
        bars = [
            Bar(_bar_name(layer), layer.local, layer.accumulated, layer_verdict(layer, verdicts) != "WRONG")
            for layer in layers(result.report)
        ]
        label = printable(f"Error over bound of each layer in the case {result.case.name}")
        opened = result is (first[0] if first is not None else verification.cases[0])
        drawn.append(_folded(_text(case_title(result)), f'<div class="scroll">{chart(bars, label)}</div>', opened))
    note = (
        "<p>On a logarithmic scale; above the dashed line is more than is allowed. Bars: the largest error of a step given its "
        "own inputs, orange where one is wrong. Rings: what has added up since the model's inputs.</p>"
    )
    return _section("Error against bound, layer by layer", note, *drawn)


def _bar_name(layer: Layer) -> str:
    """Short enough to stand below a bar."""
    name = layer.name.replace("encoder.layers.", "enc ").replace("decoder.layers.", "dec ").replace("layers.", "layer ")
    return printable(name.partition(":")[2] or name, 18)


def _steps(verification: Verification) -> str:
    cases = []
    for result in verification.cases:
        verdicts = step_verdicts(result.report)
        lines = [_layer(layer, verdicts, result.report.first) for layer in layers(result.report)]
        wrong = len(result.report.wrong)
        said = f"{wrong} wrong" if wrong else "all right"
        cases.append(_folded(f"{_text(case_title(result))} <small>{said}</small>", "\n".join(lines)))
    return _section(
        "Steps", "<p>Beside each layer: its local error over its bound / what has added up. Above 1 is wrong.</p>", *cases
    )


def _layer(layer: Layer, verdicts: Mapping[str, str], first: Step | None) -> str:
    accumulated = "-" if layer.accumulated is None else number(layer.accumulated)
    line = f'{_code(layer.name)} <span class="numbers">{number(layer.local)} / {accumulated}</span> '
    line += _verdict(layer_verdict(layer, verdicts))
    if layer.name == layer.steps[0].name:
        return f'<p class="line">{line}</p>'
    rows = [
        (
            _code(short_name(step.name, layer.name)),
            number(step.ratio),
            "" if step.through is None else number(ratio(step.through)),
            f"{step.largest:.3g}",
            _verdict(verdicts[step.name]),
        )
        for step in layer.steps
    ]
    columns = ("Step", "Local", "Added up", "Largest", "Verdict")
    return _folded(line, _table(columns, rows, markup=True), first in layer.steps)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], markup: bool = False) -> str:
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell if markup else _text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _laws(verification: Verification) -> str:
    if not verification.laws:
        return ""
    rows = []
    for law in verification.laws:
        said = "not tried" if law.verdict is None else "kept" if law.verdict.ok else "BROKEN"
        kind = {"not tried": "unclear", "kept": "right"}.get(said, "wrong")
        reason = law.reason if law.verdict is None else law.verdict.reason
        rows.append((_text(law.name), f'<span class="{kind}">{said}</span>', _text(reason)))
    return _section("Laws that need no reference", _table(("Law", "Verdict", "Reason"), rows, markup=True))


def _not_compared(verification: Verification) -> str:
    parts = []
    for names, what in not_compared(verification):
        listed = "".join(f"<li>{_code(name)}</li>" for name in names[:MAX_NAMES])
        rest = f"<li>and {len(names) - MAX_NAMES} more</li>" if len(names) > MAX_NAMES else ""
        parts.append(_folded(f"{len(names)} {what}", f"<ul>{listed}{rest}</ul>"))
    return _section("Not compared", *parts) if parts else ""


def _facts(verification: Verification) -> str:
    facts = dict(verification.facts)
    for result in verification.cases:
        facts |= result.report.facts
    listed = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    return _section("Facts", f"<dl>{listed}</dl>") if facts else ""


def _reproduction(verification: Verification, command: str) -> str:
    parts = [f'<pre class="scroll">{_text(command, 2000)}</pre>'] if command else []
    first = verification.first
    if first is not None:
        inputs = first[0].case.inputs
        if sum(array.size for array in inputs.values()) <= MAX_NUMBERS:
            lines = ",\n".join(f"    {_text(repr(printable(name)))}: {_literal(array)}" for name, array in inputs.items())
            parts.append(f"<p>The inputs of the case {_text(first[0].case.name)}:</p>")
            parts.append(f'<pre class="scroll">inputs = {{\n{lines},\n}}</pre>')
    return _section("To see it again", *parts) if parts else ""


def _literal(array: Array) -> str:
    values = array.tolist() if array.dtype.kind in "iubf" else array.astype(np.float64).tolist()
    return f"np.array({escape(repr(values)).replace('], [', '],' + chr(10) + '        [')})"


HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>TITLE</title>
<style>
:root { --page: #ffffff; --box: #f4f5f8; --line: #d3d5dd; --text: #1b1b1f; --soft: #555761;
  --right: #17693a; --wrong: #b3240f; --unclear: #805300; --bar: #8598bd; --fault: #ea580c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131419; --box: #1e2027; --line: #3a3d49; --text: #e9e9ee; --soft: #b0b2bd;
    --right: #7fd8a2; --wrong: #ff9c8c; --unclear: #f0c263; --bar: #6f82a8; --fault: #ff8a4c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h1 small { display: block; font-size: 1rem; font-weight: normal; color: var(--soft); }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 0.25rem; }
p { margin: 0.4rem 0; }
code, pre, .numbers, td:not(:first-child) { font-variant-numeric: tabular-nums; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.875em; }
td code { font-size: 0.75rem; }
.numbers { white-space: nowrap; }
.badge { display: inline-block; margin: 0; padding: 0.1rem 0.75rem; border: 2px solid; border-radius: 1rem;
  font-weight: 600; text-transform: uppercase; letter-spacing: 0.03em; }
.right { color: var(--right); } .wrong { color: var(--wrong); font-weight: 600; } .unclear { color: var(--unclear); }
.scroll { overflow-x: auto; max-width: 100%; }
pre { background: var(--box); padding: 0.75rem; border-radius: 0.5rem; overflow-wrap: normal; }
details { margin: 0.35rem 0; }
details details, .line { margin-left: 0.75rem; }
summary { cursor: pointer; padding: 0.3rem 0; }
summary small, figcaption, .numbers { color: var(--soft); }
table { border-collapse: collapse; font-size: 0.875rem; }
th { overflow-wrap: normal; font-size: 0.75rem; color: var(--soft); }
th, td { text-align: right; padding: 0.2rem 0.4rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: break-word; }
.line { padding-left: 1.15rem; }
td:not(:first-child) { overflow-wrap: normal; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin: 0.5rem 0; }
.three { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.25rem, 1fr)); max-width: 56rem; }
.three img { width: 100%; }
figure { margin: 0; max-width: 100%; }
figcaption { font-size: 0.8125rem; max-width: 26rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0.25rem 0; image-rendering: pixelated;
  background: var(--page); border: 1px solid var(--line); }
svg.chart { display: block; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg text.strong { fill: var(--wrong); font-weight: 600; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .bound { stroke: var(--wrong); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg rect.right { fill: var(--bar); } svg rect.wrong { fill: var(--fault); }
svg .through { fill: var(--page); stroke: var(--text); stroke-width: 1.5; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; margin: 0; }
dt { color: var(--soft); max-width: 10rem; } dd { margin: 0; }
ul { margin: 0.25rem 0; padding-left: 1.25rem; }
</style>
</head>
<body><main>
"""

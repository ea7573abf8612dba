"""Pictures for a page that needs nothing else: PNG files as data URIs, and one chart in SVG.

Cells are coloured by their opacity over whatever is behind them, so that a picture suits a light page and a dark one.
"""

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from refmodels.op import Array

MORE, LESS, IGNORED = (234, 88, 12), (59, 130, 246), (128, 128, 128)
"""Orange: wrong, or more than ours; blue: weight, or less than ours; grey: does not count. Told apart without red and green."""

MAX_CELLS = (256, 512)
"""Rows and columns of a picture: of more numbers each cell shows the most extreme of a block."""


def error_picture(error: Array, bound: float, judged: Array) -> str:
    """Opaque where the error is largest, on a logarithmic scale from the bound on; clear where it is within the bound."""
    error = np.where(judged, error, 0.0)
    wrong = error > bound
    floor = max(bound, 1e-300)
    finite = error[wrong & np.isfinite(error)]
    span = math.log(max(float(finite.max(initial=0.0)) / floor, math.e))
    with np.errstate(divide="ignore"):
        depth = np.clip(np.log(np.maximum(error / floor, 1.0)) / span, 0.0, 1.0)
    return _cells(np.where(wrong, 0.25 + 0.75 * depth, 0.0), judged)


def weight_picture(weights: Array, judged: Array, largest: float) -> str:
    """Blue, opaque at `largest`; below zero, as scores may be, orange."""
    return _cells(-np.clip(np.nan_to_num(weights / (largest or 1.0)), -1.0, 1.0), judged)


def difference_picture(difference: Array, judged: Array) -> str:
    """Orange where theirs are more than ours, blue where they are less; opaque at the largest difference."""
    largest = float(np.abs(difference[judged & np.isfinite(difference)]).max(initial=0.0)) or 1.0
    return _cells(np.clip(np.nan_to_num(difference / largest, nan=1.0), -1.0, 1.0), judged)


def _cells(values: Array, judged: Array) -> str:
    """From -1, blue, over 0, clear, to 1, orange."""
    values, judged = np.where(judged, values, 0.0), judged
    values, judged = _pooled(values, _extreme), _pooled(judged, _any)
    pixels = np.zeros((*values.shape, 4), np.uint8)
    pixels[values > 0, :3], pixels[values < 0, :3], pixels[~judged, :3] = MORE, LESS, IGNORED
    pixels[..., 3] = np.where(judged, np.rint(255 * np.abs(values)), 70)
    return png(pixels)


def _any(block: Array) -> Array:
    return np.asarray(block.any(-1))


def _extreme(block: Array) -> Array:
    return np.take_along_axis(block, np.abs(block).argmax(-1)[..., None], -1)[..., 0]


def _pooled(array: Array, pool: Callable[[Array], Array]) -> Array:
    """Blocks of the array as one cell each, so that no axis has more than `MAX_CELLS`."""
    for axis, most in enumerate(MAX_CELLS):
        size = -(-array.shape[axis] // most)
        if size > 1:
            edges = np.minimum(np.arange(-(-array.shape[axis] // size) * size), array.shape[axis] - 1)
            moved = np.moveaxis(array, axis, -1)[..., edges]
            array = np.moveaxis(pool(moved.reshape(*moved.shape[:-1], -1, size)), -1, axis)
    return array


def png(pixels: Array) -> str:
    """An array (rows, columns, 4) of bytes as a data URI."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


# -- the chart --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One place on the chart: its name and the two ratios, the second of them None where it is not known."""

    name: str
    local: float
    accumulated: float | None
    ok: bool


def chart(bars: Sequence[Bar], label: str) -> str:
    """Error over bound on a logarithmic scale, with a line at 1: local as a bar, accumulated as a ring."""
    known = [value for bar in bars for value in (bar.local, bar.accumulated) if value is not None and 0 < value < math.inf]
    low = min(-2, max(-4, math.floor(math.log10(min(known, default=1.0)))))
    high = max(1, math.ceil(math.log10(max(known, default=1.0)) + 0.25))
    step = 34 if len(bars) <= 16 else 22
    left, top, plot, bottom = 46, 14, 180, 96
    width, height = left + step * len(bars) + 16, top + plot + bottom

    def y(value: float) -> float:
        power = high if value == math.inf else low if value <= 0 else math.log10(value)
        return top + plot * (high - min(max(power, low), high)) / (high - low)

    parts = [f'<svg class="chart" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">']
    parts.append(f"<title>{escape(label)}</title>")
    every = max(1, round((high - low) / 6))
    for power in range(low, high + 1):
        if power % every == 0 and power != 0:
            parts.append(
                f'<line class="grid" x1="{left}" x2="{width - 8}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}"/>'
            )
            parts.append(f'<text x="{left - 6}" y="{y(10.0**power) + 4:.1f}" text-anchor="end">{_power(power)}</text>')
    parts.append(f'<line class="bound" x1="{left}" x2="{width - 8}" y1="{y(1.0):.1f}" y2="{y(1.0):.1f}"/>')
    parts.append(f'<text class="strong" x="{left - 6}" y="{y(1.0) + 4:.1f}" text-anchor="end">bound</text>')
    for i, bar in enumerate(bars):
        middle, floor = left + step * (i + 0.5), top + plot
        said = f"{bar.name}: local {_said(bar.local)}"
        said += "" if bar.accumulated is None else f", accumulated {_said(bar.accumulated)}"
        level = min(y(bar.local), floor - 2)
        parts.append(f"<g><title>{escape(said)}</title>")
        parts.append(
            f'<rect class="{"right" if bar.ok else "wrong"}" x="{middle - step * 0.3:.1f}" y="{level:.1f}" '
            f'width="{step * 0.6:.1f}" height="{floor - level:.1f}"/>'
        )
        if bar.local == math.inf:
            parts.append(f'<text class="strong" x="{middle:.1f}" y="{top - 3}" text-anchor="middle">\u221e</text>')
        if bar.accumulated is not None:
            parts.append(f'<circle class="through" cx="{middle:.1f}" cy="{y(bar.accumulated):.1f}" r="4"/>')
        foot = floor + 12
        parts.append(
            f'<text class="{"" if bar.ok else "strong"}" x="{middle + 4:.1f}" y="{foot}" text-anchor="end" '
            f'transform="rotate(-50 {middle + 4:.1f} {foot})">{escape(bar.name)}</text></g>'
        )
    parts.append(f'<line class="axis" x1="{left}" x2="{width - 8}" y1="{top + plot}" y2="{top + plot}"/>')
    return "\n".join([*parts, "</svg>"])


def _power(power: int) -> str:
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power}"


def _said(value: float) -> str:
    return "infinite" if value == math.inf else f"{value:.2g}"

"""Small charts as inline SVG: text sizes in user units, colours from the page's CSS variables.

Every function returns markup that is safe to put into a page: labels are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26  # room for the axes' labels
COLOURS = 8  # --c0 to --c7 in the page's style


@dataclass(frozen=True)
class Point:
    """One round in a curve."""

    round: int
    value: float
    low: float
    high: float
    accepted: bool


@dataclass(frozen=True)
class Mark:
    """One sample in a strip; `group` is its row."""

    group: str
    value: float


@dataclass(frozen=True)
class _Frame:
    """Maps data to the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float
    height: float = HEIGHT

    def x(self, value: float) -> float:
        span = (self.x1 - self.x0) or 1.0
        return LEFT + (value - self.x0) / span * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        span = (self.y1 - self.y0) or 1.0
        return self.height - BOTTOM - (value - self.y0) / span * (self.height - TOP - BOTTOM)


def curve(points: Sequence[Point], *, label: str, percent: bool = False) -> Markup:
    """A metric by round with its intervals.

    The line runs through the accepted rounds; others are hollow and stand alone. The dashed line is
    the base's value.
    """
    low = min(min(p.low, p.value) for p in points)
    high = max(max(p.high, p.value) for p in points)
    ticks = nice_ticks(low, high)
    frame = _Frame(
        points[0].round - 0.3, max(points[-1].round, 1) + 0.3, min(low, ticks[0]), max(high, ticks[-1])
    )
    parts = [_y_axis(frame, ticks, percent), _rounds_axis(frame, [p.round for p in points])]
    if points[0].round == 0:
        y = frame.y(points[0].value)
        parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    kept = [p for p in points if p.accepted]
    line = " ".join(f"{frame.x(p.round):.1f},{frame.y(p.value):.1f}" for p in kept)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for p in points:
        x, kind = frame.x(p.round), "kept" if p.accepted else "dropped"
        value, low_, high_ = (figure(v, percent) for v in (p.value, p.low, p.high))
        says = f"round {p.round}: {value} [{low_}, {high_}]"
        parts.append(
            f'<g class="{kind}"><title>{escape(says)}{"" if p.accepted else ", not accepted"}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{frame.y(p.low):.1f}" y2="{frame.y(p.high):.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{frame.y(p.value):.1f}" r="3.6"/></g>'
        )
    return _svg("".join(parts), label)


def lines(series: Sequence[Sequence[tuple[float, float]]], *, label: str, names: Sequence[str]) -> Markup:
    """One line a round, one after another along the steps of the whole run."""
    values = [y for one in series for _, y in one]
    ticks = nice_ticks(min(values), max(values))
    last = max(x for one in series for x, _ in one)
    frame = _Frame(0, last, min(*values, ticks[0]), max(*values, ticks[-1]))
    parts = [_y_axis(frame, ticks, False)]
    every = -(-len(series) // 9)
    for number, (one, name) in enumerate(zip(series, names, strict=True)):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in one)
        parts.append(f'<polyline class="line thin" points="{path}"><title>{escape(name)}</title></polyline>')
        start, end = frame.x(one[0][0]), frame.x(one[-1][0])
        if number:
            parts.append(_vertical("grid", start, TOP, HEIGHT - BOTTOM))
        if number % every == 0:
            parts.append(_text((start + end) / 2, HEIGHT - 10, name, "middle"))
    return _svg("".join(parts), label)


def strip(marks: Sequence[Mark], groups: Sequence[str], *, label: str) -> Markup:
    """The values of each group as dots in a row, their mean as a bar."""
    row, left = 34, 92
    height = row * len(groups) + BOTTOM + 4
    top = max((m.value for m in marks), default=1.0)
    ticks = nice_ticks(0.0, top)

    def x(value: float) -> float:
        return left + value / max(top, ticks[-1]) * (WIDTH - left - RIGHT)

    parts = []
    for tick in ticks:
        parts.append(_vertical("grid", x(tick), 4, height - BOTTOM))
        parts.append(_text(x(tick), height - 10, figure(tick), "middle"))
    for number, group in enumerate(groups):
        middle = 4 + row * number + row / 2
        values = [m.value for m in marks if m.group == group]
        parts.append(_text(left - 8, middle + 4, f"{group} ({len(values)})", "end"))
        for n, value in enumerate(values):  # spread by the golden ratio: dense, even, repeatable
            y = middle + (n * 0.618034 % 1 - 0.5) * (row - 14)
            parts.append(f'<circle class="dot" cx="{x(value):.1f}" cy="{y:.1f}" r="2"/>')
        if values:
            parts.append(_vertical("mean", x(sum(values) / len(values)), middle - 13, middle + 13))
    return _svg("".join(parts), label, height)


def bars(rows: Sequence[tuple[str, Sequence[float]]], *, label: str) -> Markup:
    """Stacked horizontal bars; part n of each row has the page's colour n."""
    step, left, right = 18, 46, 44
    height = step * len(rows) + 6
    top = max((sum(parts) for _, parts in rows), default=1.0) or 1.0
    drawn = []
    for number, (name, parts) in enumerate(rows):
        y, x = 3 + step * number, float(left)
        drawn.append(_text(left - 6, y + 12, name, "end"))
        for n, value in enumerate(parts):
            width = value / top * (WIDTH - left - right)
            if width > 0.05:
                drawn.append(
                    f'<rect style="fill:var(--c{n % COLOURS})" x="{x:.1f}" y="{y}" width="{width:.1f}" '
                    f'height="{step - 4}"><title>{value:.1f} s</title></rect>'
                )
            x += width
        drawn.append(_text(x + 4, y + 12, f"{sum(parts):.0f} s", "start"))
    return _svg("".join(drawn), label, height)


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `wanted` of them, at least two."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def figure(value: float, percent: bool = False) -> str:
    """A number in few characters."""
    if percent:
        return f"{value * 100:.3g} %"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def _y_axis(frame: _Frame, ticks: Sequence[float], percent: bool) -> str:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 5, y + 4, figure(tick, percent), "end"))
    return "".join(parts)


def _rounds_axis(frame: _Frame, numbers: Sequence[int]) -> str:
    every = -(-len(numbers) // 12)
    return "".join(
        _text(frame.x(n), HEIGHT - 8, str(n), "middle") for i, n in enumerate(numbers) if i % every == 0
    )


def _vertical(kind: str, x: float, top: float, bottom: float) -> str:
    return f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(body: str, label: str, height: float = HEIGHT) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )

"""What each part of the page shows, from markers and rows: plain data and ready charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rsi_jobs import plan, rounds
from rsi_jobs.config import Identity, Operations, RunConfig
from rsi_jobs.marker import Markers
from rsi_jobs.report import charts
from rsi_jobs.rounds import Round

MOST_POINTS = 40  # of a round's loss curve
KINDS = ("right", "wrong", "extra", "malformed", "all")  # of a pick: the judge's word, or none


@dataclass(frozen=True)
class Curve:
    """One metric over the rounds."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Table:
    """A header and rows of cells."""

    header: list[str]
    rows: list[list[str]]


def metrics(config: RunConfig) -> list[tuple[str, str, str]]:
    """(name, title, note) of every metric that is shown, in the page's order."""
    rewards = config.identity.rewards
    return [
        (plan.GATE_SCORE, f"Held-out score ({rewards.heldout})", "the gate decides by it; base's spreads"),
        ("judge.right", "Right images", "by the exact judge, which selects nothing"),
        *[(name, f"Reward {name}", "one of those that select") for name in rewards.use],
        ("judge.extra", "Extra objects an image", "hallucinations, by the exact judge"),
        ("judge.malformed", "Malformed shapes an image", "hallucinations, by the exact judge"),
        ("distance", "Distance from the base's good images", "robust z; higher is stranger"),
        ("diversity", "Diversity", "mean cosine distance among a prompt's good images"),
    ]


def curves(config: RunConfig, known: Sequence[Round]) -> list[Curve]:
    """One chart for each metric that any round has."""
    found = []
    for name, title, note in metrics(config):
        points = [
            charts.Point(r.number, *inside, r.accepted)
            for r in known
            if (inside := rounds.interval(r.metrics, name)) is not None
        ]
        if points:
            found.append(Curve(title, note, charts.curve(points, label=title, percent=name == "judge.right")))
    return found


def test_table(config: RunConfig, markers: Markers) -> Table | None:
    """The base and the best round on the test prompts; None before they were looked at."""
    phases = {
        ref.round: rounds.numbers(marker)
        for (ref, _), marker in sorted(markers.items(), key=lambda item: item[0])
        if ref.phase == "test" and ref.stage == "select"
    }
    if 0 not in phases:
        return None
    best = max(phases)
    rows = []
    for name, title, _ in metrics(config):
        if name in phases[0]:
            gain = rounds.interval(phases[best], f"{name}.vs_base")
            compared = [_figure(phases[best], name), rounds.signed(gain) if gain else ""] if best else []
            rows.append([title, _figure(phases[0], name), *compared])
    return Table(["metric", "base", *([f"round {best}", "difference"] if best else [])], rows)


def _figure(metrics: Mapping[str, float], name: str) -> str:
    found = rounds.interval(metrics, name)
    return "" if found is None else f"{found[0]:.3f} [{found[1]:.3f}, {found[2]:.3f}]"


def dropped_table(dropped: Mapping[int, Mapping[str, int]]) -> Table:
    """Reasons by rounds, the commonest first; kept ones are under the reason ''."""
    numbers = sorted(dropped)
    totals: dict[str, int] = {}
    for counts in dropped.values():
        for reason, count in counts.items():
            totals[reason] = totals.get(reason, 0) + count
    order = sorted(totals, key=lambda reason: (reason != "", -totals[reason], reason))
    rows = [[reason or "kept", *[str(dropped[n].get(reason, 0)) for n in numbers]] for reason in order]
    return Table(["", *[f"r{n}" for n in numbers]], rows)


@dataclass(frozen=True)
class Weights:
    """The last round's weights by the judge's word, and their means in every round."""

    number: int
    svg: Markup
    means: Table


def weight_charts(picks: Mapping[int, Sequence[charts.Mark]]) -> Weights | None:
    """None when no round has picked anything."""
    if not picks:
        return None
    groups = [kind for kind in KINDS if any(m.group == kind for marks in picks.values() for m in marks)]
    rows = []
    for number in sorted(picks):
        cells = []
        for kind in groups:
            values = [m.value for m in picks[number] if m.group == kind]
            cells.append(f"{sum(values) / len(values):.2f} ({len(values)})" if values else "")
        rows.append([str(number), *cells])
    last = max(picks)
    svg = charts.strip(picks[last], groups, label=f"weights of round {last}")
    return Weights(last, svg, Table(["round", *groups], rows))


def learning_rows(markers: Markers) -> Table | None:
    """By round: what was drawn, what was picked, what the weights made of it."""
    names = {
        "judge.right": "right",
        "judge.extra": "extra",
        "judge.malformed": "malformed",
    }
    selects = {
        ref.round: rounds.numbers(marker)
        for (ref, _), marker in sorted(markers.items(), key=lambda item: item[0])
        if ref.phase == "train" and ref.stage == "select"
    }
    shown = {n: t for n, t in names.items() if any(f"{n}.candidates" in m for m in selects.values())}
    if not selects:
        return None
    header = ["round", "candidates", "picked", "effective", *shown.values()]
    rows = []
    for number, found in selects.items():
        counts = [found.get(n) for n in ("candidates", "selected", "ess")]
        cells = [str(number), *["" if n is None else f"{n:.0f}" for n in counts]]
        for name in shown:
            path = [found.get(f"{name}.{part}") for part in ("candidates", "selected", "weighted")]
            cells.append(" → ".join("–" if v is None else f"{v:.2f}" for v in path))
        rows.append(cells)
    return Table(header, rows)


def loss_chart(losses: Mapping[int, Sequence[tuple[int, float]]]) -> Markup | None:
    """All rounds' training losses one after another; None without any."""
    series, names, offset = [], [], 0
    for number in sorted(losses):
        points = thin(losses[number])
        if points:
            series.append([(offset + step, loss) for step, loss in points])
            names.append(f"r{number}")
            offset += losses[number][-1][0] + 1
    return charts.lines(series, label="training loss by step", names=names) if series else None


def quartile_table(quartiles: Mapping[int, Sequence[float]]) -> Table | None:
    """Mean squared error by quarter of the noise schedule; None where it was not recorded."""
    if not quartiles:
        return None
    rows = [
        [str(n), *["" if math.isnan(value) else f"{value:.4f}" for value in values]]
        for n, values in sorted(quartiles.items())
    ]
    return Table(["round", "q1", "q2", "q3", "q4"], rows)


def thin(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS means of neighbouring points; the losses of single steps are noise."""
    size = -(-len(points) // MOST_POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


@dataclass(frozen=True)
class Times:
    """Bars by round, the stages' names in the order of the colours, and seconds by stage."""

    svg: Markup
    stages: list[str]
    table: Table


def times(markers: Markers) -> Times:
    """Where the time went."""
    whole = rounds.stage_times(markers)
    stages = list(dict.fromkeys(name.split()[-1] for name in whole))
    numbers = sorted({ref.round for ref, _ in markers})
    rows = []
    for number in numbers:
        mine = rounds.stage_times({p: m for p, m in markers.items() if p[0].round == number})
        sums = [sum(t.seconds for n, t in mine.items() if n.split()[-1] == stage) for stage in stages]
        rows.append((f"r{number}", sums))
    cells = []
    for name, t in whole.items():
        share = f"{t.arithmetic / t.seconds:.0%}" if t.seconds else ""
        rest = sorted(((s, kind) for kind, s in t.kinds.items() if kind != rounds.ARITHMETIC), reverse=True)
        named = ", ".join(f"{kind} {s:.1f}" for s, kind in rest if s >= 0.05)
        cells.append([name, f"{t.seconds:.1f}", f"{t.arithmetic:.1f}", share, named])
    header = ["stage", "seconds", "model arithmetic", "share", "the rest, as far as timed"]
    return Times(charts.bars(rows, label="seconds by stage and round"), stages, Table(header, cells))


@dataclass(frozen=True)
class Verdict:
    """One decision of the gate with the figures it saw."""

    round: int
    verdict: str
    accepted: bool
    reason: str


def verdict_rows(known: Sequence[Round]) -> list[Verdict]:
    """Every decision, in order."""
    names = {"accept": "accepted", "half": "once more at half the step", "rollback": "rolled back"}
    rows = []
    for round_ in known:
        for decision in round_.decisions:
            name = names.get(decision.verdict, decision.verdict)
            if decision.attempt_no:
                name += " (half step)"
            elif decision.verdict == "rollback" and round_.standing == "rejected":
                name = "rejected"
            rows.append(Verdict(round_.number, name, decision.verdict == "accept", decision.reason))
    return rows


@dataclass(frozen=True)
class Setting:
    """One field; `default` is empty where the value is the default."""

    name: str
    value: str
    default: str
    what: str


def settings(config: RunConfig) -> dict[str, list[Setting]]:
    """Every field by section, those that differ from the package's defaults marked."""
    found: dict[str, list[Setting]] = {
        "run": [
            Setting("recipe", config.identity.recipe, "", "the recipe it was made from"),
            Setting("seed", str(config.identity.seed), "", "every random choice derives from it"),
            Setting("rounds", str(config.rounds), "", "the target"),
            Setting("identity", config.identity_digest(), "", "equal digests, equal results"),
        ]
    }
    untouched = Identity.model_validate({})
    defaults = {name: getattr(untouched, name) for name in Identity.model_fields}
    sections = {name: getattr(config.identity, name) for name in Identity.model_fields}
    sections["operations"], defaults["operations"] = config.operations, Operations.model_validate({})
    for name, section in sections.items():
        fields = getattr(type(section), "model_fields", None)
        if fields is None:
            continue
        found[name] = []
        for field, info in fields.items():
            value, default = getattr(section, field), getattr(defaults[name], field)
            shown = "" if value == default else _plain(default) or "empty"
            found[name].append(Setting(field, _plain(value), shown, info.description or ""))
    return found


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def made_with(markers: Markers) -> list[tuple[str, str]]:
    """Versions and hardware of all stages; several values where they differ."""
    found: dict[str, dict[str, None]] = {}
    for marker in markers.values():
        for name, value in {**marker.versions, **marker.hardware}.items():
            found.setdefault(name, {})[str(value)] = None
    return [(name, ", ".join(values)) for name, values in found.items()]

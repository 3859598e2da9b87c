"""The report of a run: one HTML file that needs nothing else.

`render` takes what the report stage gathered (`Contents`: markers, and a few rows and pictures of the
tables that the markers name) and returns the page. Images are data URIs, charts are inline SVG.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rsi_jobs import rounds
from rsi_jobs.config import RunConfig
from rsi_jobs.marker import Markers
from rsi_jobs.report import charts, sections, words

__all__ = ["Contents", "Shot", "Strip", "render"]


@dataclass(frozen=True)
class Shot:
    """One picture with what is said of it."""

    data: bytes  # as the page holds it: small enough
    kind: str  # the media type's second half: png or jpeg
    note: str  # one short line below it
    right: bool | None = None  # by the exact judge, where there is one
    prompt: str = ""

    @property
    def uri(self) -> str:
        return f"data:image/{self.kind};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True)
class Strip:
    """One prompt over the rounds: the same noise in every one."""

    prompt: str
    shots: Mapping[int, Shot]  # by round; a round without an evaluation is missing


@dataclass(frozen=True)
class Contents:
    """Everything the page shows. What a run does not have stays empty, and its part says so."""

    config: RunConfig
    markers: Markers
    final: bool = False  # the run is over: the last report
    strips: Sequence[Strip] = ()
    best: Sequence[Shot] = ()  # of the last evaluated round, by the held-out score
    worst: Sequence[Shot] = ()
    shown_round: int = 0  # the round of best and worst
    dropped: Mapping[int, Mapping[str, int]] = field(
        default_factory=dict
    )  # round -> reason (or "") -> prompts
    examples: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)  # by reason
    picks: Mapping[int, Sequence[charts.Mark]] = field(default_factory=dict)  # by round
    losses: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)  # by round
    quartiles: Mapping[int, Sequence[float]] = field(default_factory=dict)  # by round


def render(contents: Contents) -> str:
    """The page.

    Every text from outside is escaped by the template engine.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = rounds.rounds(contents.markers)
    config = contents.config
    return environment.get_template("page.html.j2").render(
        c=contents,
        config=config,
        rounds=known,
        headline=words.headline(config, contents.markers, contents.final),
        curves=sections.curves(config, known),
        test=sections.test_table(config, contents.markers),
        dropped=sections.dropped_table(contents.dropped),
        weights=sections.weight_charts(contents.picks),
        learning=sections.learning_rows(contents.markers),
        loss=sections.loss_chart(contents.losses),
        quartiles=sections.quartile_table(contents.quartiles),
        times=sections.times(contents.markers),
        verdicts=sections.verdict_rows(known),
        settings=sections.settings(config),
        made_with=sections.made_with(contents.markers),
        duration=rounds.duration,
    )

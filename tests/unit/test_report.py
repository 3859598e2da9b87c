"""The report of a made-up run: every part, nothing from elsewhere, nothing unescaped, nothing fatal."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsi_jobs.layout import StageRef
from rsi_jobs.marker import MarkerReader, take_back
from rsi_jobs.report import charts, words
from rsi_jobs.stages import report
from rsi_jobs.stages.attempt import main
from rsi_jobs.store import Store, open_store
from tests import fakerun

SECTIONS = ["test", "curves", "side-by-side", "candidates", "prompts", "weights", "training", "time",
            "verdicts", "configuration"]  # fmt: skip
REFERS = {"src", "href", "xlink:href", "action", "poster", "srcset", "data"}


class Page(HTMLParser):
    """What a browser would see: elements, references and text by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.references: list[str] = []
        self.sections: dict[str, str] = {"": ""}
        self._section = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        found = dict(attrs)
        self.references += [found[name] or "" for name in REFERS & set(found)]
        if tag == "section":
            self._section = found["id"] or ""
            self.sections[self._section] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "li", "h3"):
            self.sections[self._section] += " "

    def handle_data(self, data: str) -> None:
        self.sections[self._section] += data


def render(store: Store, round_: int, attempt_no: int = 0) -> str:
    arguments = [
        "--run",
        f"{store.uri}/made-up",
        "--round",
        str(round_),
        "--phase",
        "report",
        "--try",
        str(attempt_no),
    ]
    assert main("report", report.work, arguments) == 0
    return store.get("made-up/report.html").decode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """A whole run with its last report, the test prompts included."""
    store = open_store(str(tmp_path_factory.mktemp("store")))
    run = fakerun.whole_run(store)
    run.evaluation(0, 0, "test")
    run.evaluation(5, 0, "test")
    return store, render(store, 5, 1)


def test_every_part_is_there_in_order(whole: tuple[Store, str]) -> None:
    page = Page(whole[1])
    assert [name for name in page.sections if name] == SECTIONS
    assert all(text.strip() for text in page.sections.values())
    assert page.elements.count("svg") == 8 + 3  # a curve for each metric; weights, loss, time
    assert "no round has" not in whole[1].lower()


def test_rounds_that_were_rolled_back_or_rejected_are_told_with_their_reasons(
    whole: tuple[Store, str],
) -> None:
    words_ = re.sub(r"\s+", " ", Page(whole[1]).sections["verdicts"])
    assert "1 accepted no worse" in words_
    assert "2 once more at half the step the held-out score fell 2 accepted (half step)" in words_
    assert "3 rolled back (half step)" in words_
    assert "4 rejected finetune was rejected: the loss is not finite at step 12" in words_
    curve = whole[1].split("<svg")[1]
    assert curve.count('class="kept"') == 4  # rounds 0, 1, 2, 5
    assert curve.count('class="dropped"') == 1  # round 3; round 4 was never evaluated


def test_images_are_shown_for_every_evaluated_round(whole: tuple[Store, str]) -> None:
    page = Page(whole[1])
    images = [r for r in page.references if r.startswith("data:image/png;base64,")]
    assert len(images) == report.STRIPS * 5 + 2 * report.SHOWN
    assert "round 5" in page.sections["candidates"]


def test_the_page_needs_nothing_from_elsewhere(whole: tuple[Store, str]) -> None:
    page = Page(whole[1])
    assert all(reference.startswith("data:image/") for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.elements)
    assert not re.search(r"https?:|url\(|@import", whole[1])


def test_text_from_outside_is_escaped(whole: tuple[Store, str]) -> None:
    page = Page(whole[1])
    assert "script" not in page.elements
    for section in ("side-by-side", "prompts"):
        assert fakerun.EVIL in page.sections[section]
    assert "<b>why</b>" in page.sections["prompts"]


def test_dropped_prompts_are_counted_with_different_examples(whole: tuple[Store, str]) -> None:
    words_ = re.sub(r"\s+", " ", Page(whole[1]).sections["prompts"])
    assert "kept 20 20 20 20 20" in words_
    assert "vague 10 10 10 10 10" in words_
    assert words_.count("a vague thing") == report.EXAMPLES
    assert words_.count("<script>") == 1


def test_what_is_not_the_default_stands_out(whole: tuple[Store, str]) -> None:
    assert re.search(r'class="changed"[^>]*><dt>keep</dt><dd>20 <small>default 200</small>', whole[1])
    assert re.search(r"<div title=[^>]*><dt>guidance</dt><dd>3.0</dd>", whole[1])


def test_an_early_report_says_what_there_is_not(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    run = fakerun.FakeRun(store, fakerun.small_config())
    run.commit(StageRef(1, "train", 0, "prompts"), {}, reason="only 3 of 20 prompts passed the filters")
    run.decide(1, 0, "rollback", "prompts was rejected: only 3 of 20 prompts passed the filters")
    page = Page(render(store, 1))
    for section in ("curves", "side-by-side", "candidates"):
        assert "No round has been evaluated yet." in page.sections[section]
    assert "Nothing was trained yet." in page.sections["training"]
    assert "only 3 of 20 prompts" in page.sections["verdicts"]


def test_a_world_without_an_exact_judge_has_no_word_of_it(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    run = fakerun.FakeRun(store, fakerun.small_config(), judge=False)
    run.evaluation(0)
    run.round(1, "accept")
    html = render(store, 1)
    page = Page(html)
    assert page.elements.count("svg") == 5 + 3
    assert not [name for name, text in page.sections.items() if "judge" in text]
    assert "✓" not in html
    assert "all (20)" in page.sections["weights"]


def test_a_report_made_again_does_not_hide_a_newer_one(whole: tuple[Store, str]) -> None:
    store, newest = whole
    assert render(store, 2) == newest
    old = MarkerReader(store, "made-up").read()[StageRef(2, "report", 0, "report"), 0].output("report.html")
    page = Page(store.get(old.key).decode())
    assert "test" not in page.sections
    assert "3 rolled back" not in re.sub(r"\s+", " ", page.sections["verdicts"])
    take_back(store, "made-up", StageRef(2, "report", 0, "report"), 0)


def test_the_headline_names_the_best_round_and_its_gain(whole: tuple[Store, str]) -> None:
    store, _ = whole
    markers = MarkerReader(store, "made-up").read()
    found = words.headline(fakerun.small_config(), markers, final=True)
    scores = {n: markers[StageRef(n, "eval", t, "select"), 0].metrics["heldout"] or 0.0
              for n, t in ((0, 0), (1, 0), (2, 1), (5, 0))}  # fmt: skip
    best = max(scores, key=lambda n: scores[n])
    assert found.best.startswith(f"Round {best} is the best." if best else "No round was better")
    assert "2 of 5 rounds were taken back by the gate" in found.collapse


def test_a_run_below_its_base_is_called_collapsed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    run = fakerun.FakeRun(store, fakerun.small_config())
    worse = {
        "heldout": -1.0,
        "heldout.vs_base": -1.0,
        "heldout.vs_base.low": -1.2,
        "heldout.vs_base.high": -0.8,
    }
    run.commit(StageRef(0, "eval", 0, "select"), {}, metrics={"heldout": 0.0})
    run.commit(StageRef(1, "eval", 0, "select"), {}, metrics=worse)
    run.decide(1, 0, "accept", "the gate is off")
    found = words.headline(run.config, MarkerReader(store, "made-up").read(), final=True)
    assert not found.good
    assert "It collapsed: round 1" in found.collapse
    assert "No round was better than the base" in found.best


def test_large_images_are_shown_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (512, 768, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    data, kind = report.shrink(buffer.getvalue())
    with Image.open(io.BytesIO(data)) as small:
        assert (kind, small.size) == ("jpeg", (240, 160))
    assert len(data) < 40_000


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (-0.3, 0.52, [-0.5, -0.25, 0.0, 0.25, 0.5, 0.75]),
        (3.0, 3.0, None),
    ],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, ticks: list[float] | None) -> None:
    found = charts.nice_ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert len(found) >= 2
    if ticks is not None:
        assert found == pytest.approx(ticks)

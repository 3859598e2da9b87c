"""The report's first sentences: which round is best, by how much, and whether the run collapsed."""

from __future__ import annotations

from dataclasses import dataclass

from rsi_jobs import plan, rounds
from rsi_jobs.config import RunConfig
from rsi_jobs.marker import Markers
from rsi_jobs.rounds import Round

RIGHT = "judge.right"


@dataclass(frozen=True)
class Headline:
    """The sentences, and the figures beside them as (name, figure, remark)."""

    best: str
    collapse: str
    good: bool  # nothing to worry about
    figures: tuple[tuple[str, str, str], ...]


def headline(config: RunConfig, markers: Markers, final: bool) -> Headline:
    """What stands at the top of the page; `final`: the run is over."""
    known = rounds.rounds(markers)
    last = max((r.number for r in known), default=0)
    number, _ = plan.best_round(markers, last + 1)
    best = next((r for r in known if r.number == number), None)
    good, collapse = collapsed(config, known)
    if not number:
        done = "No round was better than the base" if final or last else "Only the base was evaluated yet"
        sentence = f"{done}: the best checkpoint is the untouched model (round 0)."
    else:
        sentence = f"Round {number} is the best so far." if not final else f"Round {number} is the best."
        gain = rounds.interval(best.metrics, f"{plan.GATE_SCORE}.vs_base") if best else None
        if gain is not None:
            sentence += f" Its held-out score lies {_gain(gain)} the base's, in units of the base's spread."
    return Headline(sentence, collapse, good, _figures(config, markers, known, best))


def _gain(gain: tuple[float, float, float]) -> str:
    side = "above" if gain[0] >= 0 else "below"
    return f"{abs(gain[0]):.3f} (95 % interval {gain[1]:+.3f} to {gain[2]:+.3f}) {side}"


def collapsed(config: RunConfig, known: list[Round]) -> tuple[bool, str]:
    """Whether all is well, and a sentence that says why or why not.

    Surely worse means that the whole 95 % interval lies on the wrong side of the base.
    """
    tried = [r for r in known if r.number and r.standing != "open"]
    if not tried:
        return True, "No round has been decided yet."
    in_a_row = 0
    for round_ in tried:
        in_a_row = 0 if round_.accepted else in_a_row + 1
    if in_a_row >= config.identity.gate.patience:
        first = tried[-in_a_row].number
        return False, (
            f"It stopped improving: rounds {first} to {tried[-1].number} were not accepted, "
            "so the run ended with the best round kept."
        )
    accepted = [r for r in tried if r.accepted and r.metrics]
    latest = accepted[-1] if accepted else None
    if latest is not None and _surely_below(latest, plan.GATE_SCORE):
        return False, f"It collapsed: round {latest.number} was accepted, yet surely lies below the base."
    if latest is not None and _surely_below(latest, RIGHT):
        return False, (
            f"The scores hold, but the exact judge calls surely fewer images of round {latest.number} right "
            "than of the base: the scorers are being fooled."
        )
    back = [r for r in tried if not r.accepted]
    caught = f" {len(back)} of {len(tried)} rounds were taken back by the gate." if back else ""
    return True, f"It did not collapse: no accepted round surely lies below the base.{caught}"


def _surely_below(round_: Round, name: str) -> bool:
    high = round_.metrics.get(f"{name}.vs_base.high")
    return high is not None and high < 0


def _figures(
    config: RunConfig, markers: Markers, known: list[Round], best: Round | None
) -> tuple[tuple[str, str, str], ...]:
    found: list[tuple[str, str, str]] = []
    base = next((r for r in known if r.number == 0), None)
    if best is not None and best.number:
        gain = rounds.interval(best.metrics, f"{plan.GATE_SCORE}.vs_base")
        if gain is not None:
            found.append(("held-out vs base", f"{gain[0]:+.3f}", f"{gain[1]:+.3f} to {gain[2]:+.3f}"))
        wins = best.metrics.get(f"{plan.GATE_SCORE}.win_base")
        if wins is not None:
            found.append(("win rate vs base", f"{wins:.0%}", "same prompt, same noise"))
    for name, title in ((RIGHT, "right images"), ("judge.extra", "extra objects an image")):
        if best is not None and base is not None and name in best.metrics and name in base.metrics:
            form = "{:.1%}" if name == RIGHT else "{:.2f}"
            remark = f"base {form.format(base.metrics[name])}" if best.number else "the base itself"
            found.append((title, form.format(best.metrics[name]), remark))
    if best is not None:
        gain = rounds.gain_on_test(markers, best.number)
        if gain is not None:
            found.append(("held-out on test prompts", f"{gain[0]:+.3f}", f"{gain[1]:+.3f} to {gain[2]:+.3f}"))
    done = sum(1 for r in known if r.number and r.standing != "open")
    accepted = sum(1 for r in known if r.number and r.accepted)
    found.append(("rounds accepted", f"{accepted} of {done}", f"{config.rounds} wanted"))
    found.append(("work", rounds.duration(sum(m.seconds for m in markers.values())), "all stages"))
    return tuple(found)

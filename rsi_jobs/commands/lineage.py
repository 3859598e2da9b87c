"""`rsi lineage`: where an image came from and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from rsi_jobs.commands.options import STORE, JsonOption, RunArgument, StoreOption, open_run, say_json

if TYPE_CHECKING:
    from rsi_jobs.lineage import Lineage


def lineage(
    run: RunArgument,
    *,
    image: Annotated[str, typer.Option(metavar="ID", help="round-prompt-candidate, e.g. r003-00012-05")],
    store: StoreOption = STORE,
    json: JsonOption = False,
) -> None:
    """Trace an image: what made it, what used it.

    The prompt, the checkpoint, the scores, and the rounds that were trained on it.

    Example: rsi lineage shapes --image r003-00012-05
    """
    from rsi_jobs import lineage as lineages

    wanted = lineages.parse_id(image)
    where, config, markers = open_run(store, run)
    found = lineages.trace(where, config, markers, wanted)
    if json:
        say_json(_lineage_json(found, where.uri))
        return
    for line in _lineage_lines(found, where.uri):
        typer.echo(line)


def _lineage_json(found: Lineage, uri: str) -> dict[str, Any]:
    names = ("prompt", "category", "source", "seed", "selected", "weight", "reason", "scores")
    files = [{"uri": f"{uri}/{o.key}", "sha256": o.sha256} for o in found.checkpoint]
    return {
        "id": str(found.id),
        **{name: getattr(found, name) for name in names},
        "made_by": {"round": found.made_by[0], "try": found.made_by[1], "base": found.base, "files": files},
        "uses": [vars(use) for use in found.uses],
    }


def _lineage_lines(found: Lineage, uri: str) -> list[str]:
    round_, attempt_no = found.made_by
    half = " at half step" if attempt_no else ""
    maker = f"the checkpoint of round {round_}{half}" if round_ else f"the base {found.base}"
    lines = [
        f"image     {found.id}, seed {found.seed}",
        f"prompt    {found.prompt!r} ({found.category or 'no category'}), from prompts.source={found.source}",
        f"made by   {maker}",
        *(f"          {uri}/{o.key} sha256 {o.sha256}" for o in found.checkpoint),
        "scores    " + ", ".join(f"{name} {value:.4g}" for name, value in found.scores.items()),
        f"selected  with weight {found.weight:.3f}" if found.selected else f"not selected: {found.reason}",
    ]
    for use in found.uses:
        part = "" if use.part == "round" else f" as {use.part}"
        often = f"{use.uses} times, weight {use.weight:.3f}"
        if use.uses is None:
            often = "perhaps: it kept no record of its samples"
        lines.append(f"trained   in round {use.round}{part} ({use.standing}), {often}")
    return lines if found.uses else [*lines, "trained   in no round so far"]

"""What to take out of a run, and what to throw away: `rsi export`, `rsi prune`."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rsi_jobs.commands.options import (
    STORE,
    JsonOption,
    RoundOption,
    RunArgument,
    StoreOption,
    open_run,
    say_json,
)

if TYPE_CHECKING:
    from rsi_jobs.marker import Markers
    from rsi_jobs.store import Store


def export(
    run: RunArgument,
    *,
    to: Annotated[Path, typer.Option(metavar="DIR", help="a new or empty folder")],
    round_: RoundOption = "best",
    store: StoreOption = STORE,
) -> None:
    """Write a round's model for `diffusers`.

    Example: rsi export shapes --round best --to shapes-best
    """
    from rsi_jobs import outputs
    from rsi_jobs.diffusion import base_folder
    from rsi_jobs.errors import CannotCreate

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CannotCreate(f"--to {to} is there already and not empty: name a new folder")
    where, config, markers = open_run(store, run)
    number = outputs.pick_round(round_, markers, config.rounds)
    base = base_folder(config.identity.model.path)
    place = outputs.checkpoint_place(markers, number)
    beside = to.absolute().with_name(f".{to.absolute().name}-{uuid.uuid4().hex[:8]}")
    try:
        with tempfile.TemporaryDirectory(prefix="rsi-export-") as scratch:
            checkpoint = _fetch_checkpoint(where, markers, place, Path(scratch))
            from rsi_jobs.diffusion.checkpoints import export_pipeline

            beside.mkdir(parents=True)
            export_pipeline(base, checkpoint, beside)
        if to.exists():
            to.rmdir()  # empty, as seen above
        beside.rename(to)
    except OSError as error:
        raise CannotCreate(f"--to {to} cannot be written: {error.strerror}; name another folder") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    name = f"round {number} of run {run}" if number else f"the base of run {run}"
    typer.echo(f"# {name} is in {to}; to use it:")
    typer.echo("from diffusers import DiffusionPipeline")
    typer.echo(f"pipe = DiffusionPipeline.from_pretrained({str(to)!r})")
    typer.echo('pipe("a large red circle above a small blue square").images[0].save("image.png")')


def _fetch_checkpoint(store: Store, markers: Markers, place: tuple[int, int], scratch: Path) -> Path | None:
    """A verified copy of a checkpoint, or None for the base."""
    from rsi_jobs import outputs

    if place == (0, 0):
        return None
    for output in outputs.checkpoint_files(markers[outputs.finetune(*place), 0]):
        outputs.fetch(store, output, scratch / output.name)
    return scratch / outputs.CHECKPOINT


def prune(
    run: RunArgument,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it nothing is")] = False,
    store: StoreOption = STORE,
    json: JsonOption = False,
) -> None:
    """List what a run no longer needs, or delete it.

    That is losing attempts, damaged markers and the training state of finished stages.

    Example: rsi prune shapes --yes
    """
    from rsi_jobs import prune as pruning

    where, _, _ = open_run(store, run)
    waste = pruning.find(where, run)
    removed = pruning.remove(where, run, waste) if yes else 0
    swept = where.sweep() if yes else 0
    if json:
        say_json({"objects": [vars(each) for each in waste], "removed": removed, "swept": swept})
        return
    kinds: dict[str, list[int]] = defaultdict(list)
    for each in waste:
        kinds[each.why].append(each.size)
        if not yes:
            typer.echo(f"{each.why:<16} {_size(each.size):>10}  {each.key}")
    for why, sizes in kinds.items():
        typer.echo(f"{why}: {len(sizes)} objects, {_size(sum(sizes))}")
    if not waste:
        typer.echo(f"run {run} has nothing to prune")
    elif yes:
        typer.echo(f"{removed} objects deleted, and {swept} unfinished writes older than a day")
    else:
        typer.echo(f"nothing was deleted: `rsi prune {run} --yes` deletes these")


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.1f} GiB"

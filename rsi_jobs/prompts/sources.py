"""Where raw prompts come from: plain functions `(n, rng, **settings) -> list[RawPrompt]`.

`SOURCES` names the built-in ones; `package.module:function` names a user's own, which may also
return plain strings.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rsi_jobs.errors import ConfigError, DataError, NotFoundError
from rsi_jobs.plugins import is_spec, load_function

FORMATS = (".txt", ".jsonl", ".json", ".tsv", ".csv")


class RawPrompt(NamedTuple):
    """A prompt before any filter, and the category that quotas go by ("" if it has none)."""

    prompt: str
    category: str = ""


def shapes(n: int, rng: np.random.Generator) -> list[RawPrompt]:
    """`n` untidy prompts of the shapes world; the category is what the picture has to show."""
    from rsi_jobs.shapes.scene import parse
    from rsi_jobs.shapes.source import untidy_prompts

    def category(prompt: str) -> str:
        scene = parse(prompt)
        if scene is None:
            return ""
        return "one object" if len(scene.things) == 1 else scene.relation

    return [RawPrompt(prompt, category(prompt)) for prompt in untidy_prompts(rng, n)]


def shapes_key(prompt: str) -> str | None:
    """The scene that a caption of the shapes world describes, or None if it is no such caption."""
    from rsi_jobs.shapes.scene import parse

    scene = parse(prompt)
    return None if scene is None else scene.key()


def from_file(n: int, rng: np.random.Generator, *, path: str | Path, skip: int = 0) -> list[RawPrompt]:
    """`n` prompts of a file, shuffled, none twice.

    With an `rng` seeded alike in every round and `skip` = prompts handed out before, rounds
    share one shuffle and never meet the same line. Raises DataError when the file is used up.
    """
    prompts = read_file(path)
    if skip + n > len(prompts):
        raise DataError(
            f"{path} holds {len(prompts)} prompts, of which {skip} are used, and {n} are asked "
            f"for: give a longer file, fewer rounds, or fewer raw prompts a round"
        )
    order = rng.permutation(len(prompts))[skip : skip + n]
    return [prompts[i] for i in order]


def read_file(path: str | Path) -> list[RawPrompt]:
    """All prompts of a file, in its order.

    TXT: one a line. JSONL: objects with `prompt` and perhaps `category`, or strings; JSON: a list
    of the same. TSV, CSV: a header with Prompt and perhaps Category (PartiPrompts' own format).
    Empty lines are passed over. Raises NotFoundError, or DataError naming the file and the line.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: prompts are read from {', '.join(FORMATS)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    prompts = reader(path, text)
    if not prompts:
        raise DataError(f"{path} holds no prompts")
    return prompts


def _read_txt(path: Path, text: str) -> list[RawPrompt]:
    return [RawPrompt(line.strip()) for line in text.splitlines() if line.strip()]


def _read_jsonl(path: Path, text: str) -> list[RawPrompt]:
    # Not splitlines(): JSON strings may hold U+2028, which is no end of a line here.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_from_json(_json(path, line, number), f"{path}:{number}") for number, line in lines]


def _read_json(path: Path, text: str) -> list[RawPrompt]:
    rows = _json(path, text, 1)
    if not isinstance(rows, list):
        raise DataError(f"{path} is a JSON {type(rows).__name__}, not a list of prompts")
    return [_from_json(row, f"{path}, entry {i}") for i, row in enumerate(rows)]


def _json(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}:{line} is not JSON ({error})") from error


def _from_json(row: Any, where: str) -> RawPrompt:
    if isinstance(row, str):
        row = {"prompt": row}
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f"{where}: wanted a string or an object with a text under 'prompt'")
    return RawPrompt(prompt.strip(), str(row.get("category") or ""))


def _read_table(path: Path, text: str) -> list[RawPrompt]:
    # PartiPrompts has quotation marks that belong to the prompt: in TSV they are plain characters.
    if path.suffix.lower() == ".tsv":
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
    if "prompt" not in columns:
        raise DataError(f"{path} has no column Prompt, only {', '.join(columns) or 'an empty file'}")
    prompts = []
    for row in reader:
        prompt = (row[columns["prompt"]] or "").strip()
        category = (row[columns["category"]] or "").strip() if "category" in columns else ""
        if prompt:
            prompts.append(RawPrompt(prompt, category))
    return prompts


_READERS: Mapping[str, Callable[[Path, str], list[RawPrompt]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".tsv": _read_table,
    ".csv": _read_table,
}

SOURCES: Mapping[str, Callable[..., list[RawPrompt]]] = {"shapes": shapes, "file": from_file}
"""The built-in sources by name."""

DOMAIN_KEYS: Mapping[str, Callable[[str], str | None]] = {"shapes": shapes_key}
"""For each closed world, what tells whether two prompts mean the same picture."""


def draw(name: str, n: int, rng: np.random.Generator, settings: Mapping[str, Any]) -> list[RawPrompt]:
    """`n` raw prompts of the source `name`: a key of SOURCES or `package.module:function`.

    Raises ConfigError for an unknown source or a setting that it does not take, DataError when
    a user's own source returns something else than `n` prompts.
    """
    function = _find(name)
    try:
        inspect.signature(function).bind(n, rng, **settings)
    except TypeError as error:
        raise ConfigError(f"prompt source {name!r}: {error} (settings: {dict(settings)})") from error
    rows = function(n, rng, **settings)
    if not isinstance(rows, list) or len(rows) != n:
        got = f"{len(rows)} prompts" if isinstance(rows, list) else f"a {type(rows).__name__}"
        raise DataError(f"prompt source {name!r} returned {got}, not a list of {n}")
    return [_raw(row, name) for row in rows]


def _find(name: str) -> Callable[..., Any]:
    if is_spec(name):
        return load_function(name)
    if name not in SOURCES:
        raise ConfigError(
            f"prompt source {name!r} is unknown: use {', '.join(SOURCES)} or package.module:function"
        )
    return SOURCES[name]


def _raw(row: Any, name: str) -> RawPrompt:
    if isinstance(row, str):
        return RawPrompt(row)
    if isinstance(row, tuple) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return RawPrompt(*row)
    raise DataError(f"prompt source {name!r} returned {row!r}: wanted RawPrompt or a string")

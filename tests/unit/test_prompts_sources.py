"""Prompt sources and functions that users name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rsi_jobs.errors import ConfigError, DataError, NotFoundError, UserError
from rsi_jobs.plugins import is_spec, load_function
from rsi_jobs.prompts.sources import RawPrompt, draw, from_file, read_file, shapes_key


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's module on the path, under a name that no other test uses."""
    (tmp_path / "my_rsi_plugin.py").write_text(
        "from rsi_jobs.prompts.sources import RawPrompt\n"
        "number = 3\n"
        "class Box:\n"
        "    @staticmethod\n"
        "    def inner(n, rng): return ['a red ball'] * n\n"
        "def two(n, rng, word='cat'): return [RawPrompt(f'a {word} {i}', 'x') for i in range(n)]\n"
        "def short(n, rng): return ['a red ball']\n"
        "def wrong(n, rng): return [1] * n\n"
        "def lazy(n, rng): return ('a' for _ in range(n))\n"
    )
    (tmp_path / "my_rsi_broken.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_rsi_plugin"
    sys.modules.pop("my_rsi_plugin", None)
    sys.modules.pop("my_rsi_broken", None)


PARTI = 'Prompt\tCategory\tNote\nbond\tAbstract\tx\n"G I" on a wall\tArts\t\n\t\t\n'

FILES = {
    "a.txt": ("a red cat\n\n  a blue dog \r\n", [("a red cat", ""), ("a blue dog", "")]),
    "bom.txt": ("\ufeffa red cat\n", [("a red cat", "")]),
    "b.jsonl": (
        '{"prompt": "a red cat", "category": "Animals"}\n\n"a\u2028dog"\n',
        [("a red cat", "Animals"), ("a\u2028dog", "")],
    ),
    "c.json": ('["a red cat", {"prompt": "x", "category": null}]', [("a red cat", ""), ("x", "")]),
    "parti.tsv": (PARTI, [("bond", "Abstract"), ('"G I" on a wall', "Arts")]),
    "d.csv": ('category, PROMPT \nPets,"a cat, a dog"\n', [("a cat, a dog", "Pets")]),
}


@pytest.mark.parametrize("name", FILES)
def test_reads_every_format(tmp_path: Path, name: str) -> None:
    text, wanted = FILES[name]
    (tmp_path / name).write_bytes(text.encode())
    assert read_file(tmp_path / name) == [RawPrompt(*row) for row in wanted]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.md", b"a red cat", ".jsonl"),
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}', "a.jsonl:1: wanted"),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl:1: wanted"),
        ("a.json", b'{"prompt": "a"}', "JSON dict"),
        ("a.csv", b"text,category\na,b\n", "no column Prompt, only text, category"),
        ("a.tsv", b"", "an empty file"),
    ],
)
def test_refuses_what_is_no_prompt_file(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=said):
        read_file(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.txt cannot be read"):
        read_file(tmp_path / "none.txt")


def test_rounds_share_one_shuffle_until_the_file_is_used_up(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    lines = [f"prompt number {i}" for i in range(20)]
    path.write_text("\n".join(lines))
    rounds = [from_file(10, rng(7), path=path, skip=skip) for skip in (0, 10)]
    drawn = [row.prompt for rows in rounds for row in rows]
    assert sorted(drawn) == sorted(lines)
    assert drawn != lines
    assert from_file(10, rng(7), path=path) == rounds[0]
    assert from_file(10, rng(8), path=path) != rounds[0]
    with pytest.raises(DataError, match=r"p\.txt holds 20 prompts, of which 15 are used, and 6"):
        from_file(6, rng(7), path=path, skip=15)
    assert len(from_file(5, rng(7), path=path, skip=15)) == 5


def test_shapes_source_repeats_with_its_seed_and_names_what_is_shown() -> None:
    rows = draw("shapes", 200, rng(1), {})
    assert rows == draw("shapes", 200, rng(1), {})
    assert rows != draw("shapes", 200, rng(2), {})
    assert {row.category for row in rows} == {"", "one object", "above", "below", "left", "right"}
    assert all((row.category == "") == (shapes_key(row.prompt) is None) for row in rows)


def test_a_users_own_source(mine: str) -> None:
    assert draw(f"{mine}:two", 2, rng(), {"word": "dog"}) == [("a dog 0", "x"), ("a dog 1", "x")]
    assert draw(f"{mine}:Box.inner", 2, rng(), {}) == [("a red ball", "")] * 2


@pytest.mark.parametrize(
    ("function", "settings", "error", "said"),
    [
        ("two", {"colour": 1}, ConfigError, "unexpected keyword argument 'colour'"),
        ("short", {}, DataError, "returned 1 prompts, not a list of 2"),
        ("wrong", {}, DataError, "returned 1: wanted RawPrompt or a string"),
        ("lazy", {}, DataError, "returned a generator"),
    ],
)
def test_a_users_source_gone_wrong(
    mine: str, function: str, settings: dict[str, int], error: type[UserError], said: str
) -> None:
    with pytest.raises(error, match=said):
        draw(f"{mine}:{function}", 2, rng(), settings)


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match="'llm' is unknown: use shapes, file"):
        draw("llm", 2, rng(), {})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("my_rsi_plugin:nothing", "has no 'nothing'"),
        ("my_rsi_plugin:number", "is a int, not a function"),
        ("my_rsi_broken:f", r"RuntimeError: no licence"),
        ("no_such_package.x:f", "ModuleNotFoundError"),
        ("my_rsi_plugin:", "write package.module:function"),
        ("my_rsi_plugin", "write package.module:function"),
        (":f", "write package.module:function"),
        ("a b:f", "write package.module:function"),
    ],
)
def test_a_spec_that_names_no_function(mine: str, spec: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_function(spec)


def test_load_function_returns_the_function_itself() -> None:
    assert load_function("json:dumps") is json.dumps
    assert is_spec("json:dumps")
    assert not is_spec("shapes")

"""Addresses, keys and the probe of the object store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rsi_jobs.errors import ConfigError, NotFoundError, StoreDenied
from rsi_jobs.store import Entry, check_key, open_store, probe, sha256_file
from rsi_jobs.store_folder import FolderStore


@pytest.mark.parametrize("form", ["{}", "file:{}", "file://{}", "file://localhost{}"])
def test_every_way_to_name_a_folder_is_the_same_store(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "my runs"
    path = str(folder).replace(" ", "%20") if form.startswith("file") else str(folder)
    assert open_store(form.format(path)).uri == str(folder)


def test_a_relative_folder_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert open_store("./runs").uri == str(tmp_path / "runs")
    assert open_store("~/runs").uri == str(tmp_path / "home/runs")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        " ",
        "gs://bucket/x",
        "https://bucket.s3.amazonaws.com/x",
        "s3:bucket",
        "s3://",
        "s3:///prefix",
        "s3://Not_A_Bucket/x",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "file://elsewhere/runs",
        "file:runs",
        "file:///runs?x=1",
        "~nobody-has-this-name/runs",
    ],
)
def test_other_addresses_are_refused_with_what_is_accepted(uri: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        open_store(uri)
    assert repr(uri) in str(refusal.value)
    assert "give a" in str(refusal.value)


def test_a_missing_folder_is_only_made_on_request(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        open_store(str(tmp_path / "no"), create=False)
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").write_text("x")
    for create in (True, False):
        with pytest.raises((ConfigError, NotFoundError), match="is not a folder"):
            open_store(str(tmp_path / "file"), create=create)


@pytest.mark.parametrize(
    "key",
    [
        *("", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a"),
        *("a\\b", "a\0b", "a\nb", "\ud800", ".rsi-lock", "a/.rsi-tmp-1"),
        *("x" * 256, "/".join(["x" * 200] * 6), "é" * 128),
    ],
)
def test_keys_that_one_kind_of_store_cannot_hold_are_refused(tmp_path: Path, key: str) -> None:
    store = open_store(str(tmp_path / "runs"))
    with pytest.raises(ConfigError):
        store.put(key, b"x")
    with pytest.raises(ConfigError):
        store.get(key)
    assert list(store.list("")) == []


def test_keys_of_every_language_are_kept() -> None:
    for key in ("r003/train/t0/_SUCCESS.json", "a b+c%20&=é", "ラン/結果", ".hidden", "a..b"):
        assert check_key(key) == key


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == digest


def test_a_folder_store_loads_no_s3_library(tmp_path: Path) -> None:
    code = (
        "import sys; from rsi_jobs.store import open_store, probe; "
        "assert all(c.ok for c in probe(open_store(sys.argv[1]))); "
        "print({m.split('.')[0] for m in sys.modules} & {'boto3', 'botocore', 'numpy', 'torch'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_probe_of_a_sound_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "runs"))
    checks = probe(store)
    assert [c.name for c in checks if not c.ok] == []
    assert len(checks) == 8
    assert list(store.list("")) == []


class _NoConditions(FolderStore):
    def put_new(self, key: str, data: bytes) -> bool:
        self.put(key, data)
        return True


class _NoSwap(FolderStore):
    def replace(self, key: str, data: bytes, etag: str | None) -> str | None:
        self.put(key, data)
        return next(e.etag for e in self.list(key))


class _NoConditionalDelete(FolderStore):
    def delete_if(self, key: str, etag: str) -> bool:
        return self.delete([key]) == 1


class _WrongClock(FolderStore):
    def list(self, prefix: str) -> Iterator[Entry]:
        return (replace(e, modified=e.modified - 100) for e in super().list(prefix))


class _StaleReads(FolderStore):
    def get(self, key: str) -> bytes:
        first: dict[str, bytes] = self.__dict__.setdefault("first", {})
        return first.setdefault(key, super().get(key))


class _StaleList(FolderStore):
    def list(self, prefix: str) -> Iterator[Entry]:
        return iter(list(super().list(prefix))[:1])


class _NoDelete(FolderStore):
    def delete(self, keys: object) -> int:
        raise StoreDenied("s3://bucket: delete_objects refused (AccessDenied)")


@pytest.mark.parametrize(
    ("kind", "failing"),
    [
        (_NoConditions, {"one of two writers wins"}),
        (_NoSwap, {"compare and swap"}),
        (_NoConditionalDelete, {"conditional delete"}),
        (_WrongClock, {"clock"}),
        (_StaleReads, {"read after write"}),
        (_StaleList, {"list", "delete"}),
        (_NoDelete, {"list", "delete"}),
    ],
)
def test_probe_names_the_promise_that_a_store_breaks(
    tmp_path: Path, kind: type[FolderStore], failing: set[str]
) -> None:
    checks = probe(kind(tmp_path))
    assert {c.name for c in checks if not c.ok} == failing
    if "delete" not in failing:
        assert list(FolderStore(tmp_path).list("")) == []

"""One undisturbed run of `smoke`, made once, that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import killer


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder store of a finished run of three rounds."""
    store = tmp_path_factory.mktemp("undisturbed")
    killer.finish(store)
    return store

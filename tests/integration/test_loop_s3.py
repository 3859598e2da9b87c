"""The whole loop on a real S3 server, behind a network that fails, delays and loses answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import killer
from tests.faultproxy import Fate, faulty
from tests.s3server import serve

BAD_NETWORK = {Fate.BUSY: 0.03, Fate.RESET: 0.02, Fate.DELAY: 0.03, Fate.LOSE: 0.02}


def test_a_run_on_s3_behind_a_bad_network_has_the_bits_of_one_in_a_folder(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as server, faulty(server.environment()["AWS_ENDPOINT_URL"], BAD_NETWORK, seed=5) as proxy:
        for name, value in server.environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        store = f"s3://{server.bucket}/runs"
        killer.finish(store)
        assert sum(n for fate, n in proxy.counts.items() if fate is not Fate.PASS) >= 10, proxy.counts
        assert killer.results(store) == killer.results(undisturbed)
        assert killer.ran_after_commit(store) == []

"""The names a configuration may use, in one place that loads nothing: a controller's image has no scorers.

Everything here also takes `package.module:function`, a user's own function.
"""

from __future__ import annotations

REWARDS: dict[str, str] = {"dual": "shapes", "fused": "shapes", "heldout": "shapes", "oracle": "shapes"}
"""Each reward and its module in `rsi_jobs.rewards`."""

PROMPT_SOURCES: tuple[str, ...] = ("shapes", "file")
WEIGHTINGS: tuple[str, ...] = ("knn", "mahalanobis", "trajectory", "uniform")

"""Imports go one way, and the controller's image needs no ML library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rsi_jobs

ROOT = Path(rsi_jobs.__file__).parent
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "scipy",
    "sklearn",
    "pyarrow",
    "PIL",
)
LIGHT = ("controller", "plan", "layout", "store", "config", "marker", "tracking", "runners", "runners.local", "cli",
         "start", "view", "lease", "runs", "recipes")  # fmt: skip


def test_the_controller_side_loads_no_ml_library() -> None:
    code = (
        "import sys\n"
        + "".join(f"import rsi_jobs.{name}\n" for name in LIGHT)
        + f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


LIBRARY = ("diffusion", "prompts", "rewards", "shapes", "recipes", "selection.py", "weighting.py", "evaluation.py",
           "dataset.py", "store.py", "store_folder.py", "store_s3.py", "layout.py", "marker.py", "config.py",
           "plan.py", "errors.py", "plugins.py", "runs.py", "lease.py", "tracking.py")  # fmt: skip
FILES = [
    path
    for name in LIBRARY
    for path in sorted((ROOT / name).rglob("*.py") if name[-3:] != ".py" else [ROOT / name])
]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_never_imports_stages_runners_or_commands(path: Path) -> None:
    imported = [
        node.module or ""
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
    ]
    above = ("rsi_jobs.stages", "rsi_jobs.runners", "rsi_jobs.commands", "rsi_jobs.cli", "rsi_jobs.start")
    wrong = [module for module in imported if module.startswith(above)]
    assert not wrong, f"{path.name} imports {wrong}: stages and runners import the library, never the reverse"

"""Diffusion models, one module a family behind the same functions.

A family module has `load`, `encode`, `sample`, `decode`, `timesteps`, `loss` and
`load_base_network`; what is the same for all (training, checkpoints, noise) stands beside them.
"""

from __future__ import annotations

import hashlib
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType

from rsi_jobs.errors import ConfigError

FAMILIES = {"unet": "rsi_jobs.diffusion.unet"}


def family(name: str) -> ModuleType:
    """The module of one model family; it is imported here, so that asking costs nothing before.

    Raises ConfigError for a name that is not a family.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"model family {name!r} in the configuration is unknown: use one of {sorted(FAMILIES)}"
        )
    return import_module(FAMILIES[name])


def base_folder(path: str) -> Path:
    """The base model's diffusers folder; `shapes:base` is the one in this package.

    Raises ConfigError when there is no such folder.
    """
    if path.startswith("shapes:"):
        folder = Path(str(resources.files("rsi_jobs.shapes"))) / "weights" / path.removeprefix("shapes:")
    else:
        folder = Path(path)
    if not (folder / "model_index.json").exists():
        raise ConfigError(
            f"model.path={path!r}: {folder} is not a diffusers folder (it has no model_index.json)"
        )
    return folder


def fingerprint(folder: Path) -> str:
    """Digest of a model folder: 16 hexadecimal digits of the SHA-256 of every file's name and content."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return total.hexdigest()[:16]

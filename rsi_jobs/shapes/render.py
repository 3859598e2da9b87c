"""Real images of scenes: hard-edged shapes, 32 x 32 RGB, with margins a judge can rely on.

`fault` asks for a deliberate mistake: "extra" adds an object, "malformed" spoils one.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from rsi_jobs.shapes.scene import COLOURS, SHAPES, Scene

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

SIDE: Final = 32  # pixels
WIDTHS: Final = {"small": 8, "large": 13}  # pixels: widths at which no two shapes are near alike
GAP: Final = 3  # pixels between two objects, at least
MARGIN: Final = 1  # pixels to the border, at least
FAULTS: Final = ("extra", "malformed")

PALETTE: Final[dict[str, tuple[int, int, int]]] = {
    "red": (225, 30, 40),
    "green": (30, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (245, 225, 30),
    "purple": (140, 30, 170),
    "orange": (245, 130, 10),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
    "pink": (250, 175, 205),
    "cyan": (120, 225, 235),
}
_RGB: Final = {name: np.array(rgb, np.uint8) for name, rgb in PALETTE.items()}


@cache
def shape_mask(shape: str, height: int, width: int) -> Mask:
    """The pixels (height, width) of a shape that fills its bounding box."""
    v = ((np.arange(height) + 0.5) / height * 2 - 1)[:, None]
    u = ((np.arange(width) + 0.5) / width * 2 - 1)[None, :]
    radius = np.sqrt(u**2 + v**2)
    mask = {
        "circle": radius <= 1.0,
        "square": np.ones((height, width), bool),
        "triangle": np.abs(u) <= (v + 1) / 2 + 1e-6,
        "diamond": np.abs(u) + np.abs(v) <= 1 + 1e-6,
        "cross": (np.abs(u) < 0.3) | (np.abs(v) < 0.3),
        "ring": (radius <= 1.0) & (radius > 0.5),
    }[shape]
    mask.setflags(write=False)
    return mask


def _spoil(mask: Mask, rng: np.random.Generator) -> Mask:
    """A shape gone wrong: squashed, cut in half, or with bites taken out."""
    height, width = mask.shape
    kind = rng.integers(3)
    half = height // 2
    if kind == 0:  # squashed to half its height
        rows = np.linspace(0, height - 1, half).astype(int)
        out = np.zeros_like(mask)
        out[half // 2 : half // 2 + half] = mask[rows]
        return out
    out = mask.copy()
    if kind == 1:  # cut in half, upright or across
        if rng.random() < 0.5:
            out[:half] = False
        else:
            out[:, : width // 2] = False
        return out
    # Bites: square holes until two fifths of the shape are gone.
    bite = max(2, height // 4)
    while out.sum() > 0.6 * mask.sum():
        y, x = rng.integers(0, height - bite + 1), rng.integers(0, width - bite + 1)
        out[y : y + bite, x : x + bite] = False
    return out


def _between(low: int, high: int, u: float) -> int:
    return low + int(u * (high - low + 1))


def _lone_corner(place: str, width: int, u: npt.NDArray[np.float64]) -> tuple[int, int]:
    """The top left pixel (y, x) of a lone object at a place."""
    if place == "centre":
        middle = (SIDE - width) // 2
        return middle + _between(-1, 1, u[0]), middle + _between(-1, 1, u[1])
    dy, dx = _between(MARGIN, MARGIN + 2, u[0]), _between(MARGIN, MARGIN + 2, u[1])
    far = SIDE - width
    return (dy if "top" in place else far - dy), (dx if "left" in place else far - dx)


def _pair_corners(relation: str, widths: list[int], u: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """The top left pixels of two objects; relation is "above" or "left" (canonical)."""
    slack = SIDE - 2 * MARGIN - GAP - sum(widths)
    before = _between(0, slack, u[0])
    # The gap is kept below a third of the image, so that the two stay one composition.
    gap = GAP + _between(0, min(slack - before, 7), u[1])
    along = [MARGIN + before, MARGIN + before + widths[0] + gap]
    across = [(SIDE - width) // 2 + _between(-3, 3, u[2 + i]) for i, width in enumerate(widths)]
    if relation == "above":
        return list(zip(along, across, strict=True))
    return list(zip(across, along, strict=True))


def _add_extra(image: Image, taken: Mask, rng: np.random.Generator) -> bool:
    """Paint one more small object where there is room; False if there is none."""
    width = WIDTHS["small"]
    reach = width + 2 * 2  # two free pixels all around
    padded = np.pad(taken, 2).astype(np.int32)
    total = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    area = total[reach:, reach:] - total[:-reach, reach:] - total[reach:, :-reach] + total[:-reach, :-reach]
    free = np.argwhere(area == 0)
    if len(free) == 0:
        return False
    y, x = free[rng.integers(len(free))]
    mask = shape_mask(SHAPES[rng.integers(len(SHAPES))], width, width)
    image[y : y + width, x : x + width][mask] = _RGB[COLOURS[rng.integers(len(COLOURS))]]
    return True


def render(scene: Scene, rng: np.random.Generator, fault: str | None = None) -> Image:
    """An image (32, 32, 3) uint8 of the scene; `fault` is None, "extra" or "malformed"."""
    if fault is not None and fault not in FAULTS:
        raise ValueError(f"fault {fault!r} is none of {FAULTS}")
    scene = scene.canonical()
    while True:
        u = rng.random(4)
        widths = [WIDTHS[thing.size] for thing in scene.things]
        if len(widths) == 1:
            corners = [_lone_corner(scene.relation, widths[0], u)]
        else:
            corners = _pair_corners(scene.relation, widths, u)
        spoilt = int(u[3] * len(widths)) if fault == "malformed" else -1
        image = np.empty((SIDE, SIDE, 3), np.uint8)
        image[:] = _RGB[scene.background]
        taken = np.zeros((SIDE, SIDE), bool)
        for i, (thing, width, (y, x)) in enumerate(zip(scene.things, widths, corners, strict=True)):
            mask = shape_mask(thing.shape, width, width)
            if i == spoilt:
                mask = _spoil(mask, rng)
            image[y : y + width, x : x + width][mask] = _RGB[thing.colour]
            taken[y : y + width, x : x + width] |= mask
        # Two large objects can leave no room for a third: draw the places again.
        if fault != "extra" or _add_extra(image, taken, rng):
            return image


def render_batch(
    scenes: list[Scene], rng: np.random.Generator, faults: list[str | None] | None = None
) -> Image:
    """Images (n, 32, 32, 3) uint8 of the scenes."""
    chosen = faults or [None] * len(scenes)
    return np.stack([render(s, rng, f) for s, f in zip(scenes, chosen, strict=True)])

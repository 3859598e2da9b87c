"""The exact judge: reads an image back, and says whether a prompt is drawn right.

Palette segmentation, connected components, shape by template overlap, size, relation.
Right means that every clause of the prompt is true and nothing is added. It only judges:
nothing it says may reach selection, weighting, training or the gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from rsi_jobs.shapes.render import PALETTE, SIDE, WIDTHS, Image, Mask, shape_mask
from rsi_jobs.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, parse

SPECK: Final = 8  # pixels; a smaller blob is dirt, not an object (the smallest has 25)
WELL_FORMED: Final = 0.72  # overlap with the best template, below which a shape is malformed
ASPECT: Final = 1.35  # longer side over shorter side, above which a shape is malformed
SOLID: Final = 80.0  # RGB distance to every palette colour that makes a pixel off palette
_BETWEEN: Final = (WIDTHS["small"] + WIDTHS["large"]) / 2  # pixels: small or large
_RANGE: Final = (WIDTHS["small"] - 2, WIDTHS["large"] + 2)  # pixels, plausible
_NEAR_CENTRE: Final = 4.0  # pixels from the middle, within which a place is "centre"

_OBJECTS: Final = np.array([PALETTE[c] for c in COLOURS], np.float32)
_GROUNDS: Final = np.array([PALETTE[c] for c in BACKGROUNDS], np.float32)
_FOUR: Final = ndimage.generate_binary_structure(2, 1)
_STACK: Final = np.stack([np.zeros((3, 3), bool), _FOUR, np.zeros((3, 3), bool)])


@dataclass(frozen=True)
class Found:
    """One object in an image; centre in pixels, `overlap` with its best template 0..1."""

    thing: Thing
    y: float
    x: float
    overlap: float
    malformed: bool


@dataclass(frozen=True)
class Reading:
    """All that an image shows, without a prompt."""

    background: str
    found: tuple[Found, ...]
    off_palette: int  # pixels of no palette colour, edges excepted


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one image and its prompt."""

    right: bool
    judgeable: bool  # False: the prompt is no caption of ours, and `right` is False
    extra: int  # objects beyond those the prompt names (0 if not judgeable)
    missing: int  # objects too few
    malformed: int  # objects that are no clean shape
    off_palette: int  # pixels
    found: tuple[Found, ...]
    background: str
    wrong: tuple[str, ...]  # the clauses that fail, for people to read


@cache
def _templates(height: int, width: int) -> npt.NDArray[np.bool_]:
    """All shapes in a box, (6, height * width)."""
    return np.stack([shape_mask(s, height, width).ravel() for s in SHAPES])


def _classify(mask: Mask) -> tuple[str, float]:
    """The shape whose template overlaps best with a mask in its bounding box."""
    flat = mask.ravel()
    templates = _templates(*mask.shape)
    both = (templates & flat).sum(1)
    either = (templates | flat).sum(1)
    overlap = both / either
    best = int(overlap.argmax())
    return SHAPES[best], float(overlap[best])


def _object(mask: Mask, colour: int, box: tuple[slice, slice]) -> Found:
    height, width = mask.shape
    shape, overlap = _classify(mask)
    longest = max(height, width)
    size = "small" if longest < _BETWEEN else "large"
    malformed = (
        overlap < WELL_FORMED
        or longest / min(height, width) > ASPECT
        or not _RANGE[0] <= longest <= _RANGE[1]
    )
    y = (box[0].start + box[0].stop - 1) / 2
    x = (box[1].start + box[1].stop - 1) / 2
    return Found(Thing(size, COLOURS[colour], shape), y, x, overlap, malformed)


def _segment(
    images: Image,
) -> tuple[npt.NDArray[np.intp], Mask, npt.NDArray[np.intp], Mask]:
    """Background (n,), foreground (n, 32, 32), object colour (n, 32, 32), off palette."""
    pixels = images.astype(np.float32)

    def distances(colours: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        square = [((pixels - c) ** 2).sum(-1) for c in colours]
        return np.sqrt(np.stack(square, -1))

    to_object, to_ground = distances(_OBJECTS), distances(_GROUNDS)
    nearest_object = to_object.min(-1)
    is_ground = to_ground.min(-1) < nearest_object
    votes = (to_ground.argmin(-1)[..., None] == np.arange(len(BACKGROUNDS))) & (is_ground[..., None])
    background = votes.sum((1, 2)).argmax(-1)
    own_ground = to_ground[np.arange(len(images)), :, :, background]
    foreground = nearest_object < own_ground
    stray = np.minimum(nearest_object, own_ground) > SOLID
    return background, foreground, to_object.argmin(-1), stray


def _split(mask: Mask, colours: npt.NDArray[np.intp]) -> list[tuple[Mask, int]]:
    """The parts of one component by colour: touching objects of two colours are two."""
    counts = np.bincount(colours[mask], minlength=len(COLOURS))
    main = int(counts.argmax())
    parts: list[tuple[Mask, int]] = []
    rest = mask.copy()
    for colour in np.flatnonzero(counts >= SPECK):
        if colour == main:
            continue
        # A blurred edge takes a third colour too, but only as a thin line: what an
        # erosion leaves nothing of stays with the main colour.
        part = mask & (colours == colour)
        if ndimage.binary_erosion(part, _FOUR).sum() >= 2:
            parts.append((part, int(colour)))
            rest &= ~part
    return [(rest, main), *parts]


def read_batch(images: Image) -> list[Reading]:
    """What each image (n, 32, 32, 3) uint8 shows."""
    if images.ndim != 4 or images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
        raise ValueError(f"expected (n, 32, 32, 3) uint8, got {images.shape} {images.dtype}")
    background, foreground, colours, stray = _segment(images)
    # One call for all images; the structure does not reach from one image to the next.
    labels, count = ndimage.label(foreground, _STACK)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    found: list[list[Found]] = [[] for _ in images]
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or sizes[label] < SPECK:
            continue
        image = box[0].start
        mask = labels[image, box[1], box[2]] == label
        for part, colour in _split(mask, colours[image, box[1], box[2]]):
            inner = ndimage.find_objects(part.astype(np.int8))
            if part.sum() < SPECK or not inner:
                continue
            (rows, cols) = inner[0]
            y, x = box[1].start, box[2].start
            place = (slice(y + rows.start, y + rows.stop), slice(x + cols.start, x + cols.stop))
            found[image].append(_object(part[rows, cols], colour, place))
    # Edges may be blurred: only a stray pixel with stray neighbours all around counts.
    solid = ndimage.binary_erosion(stray, _STACK)
    return [
        Reading(BACKGROUNDS[background[i]], tuple(found[i]), int(solid[i].sum())) for i in range(len(images))
    ]


def place_of(found: Found) -> str:
    """The place of a lone object."""
    middle = (SIDE - 1) / 2
    dy, dx = found.y - middle, found.x - middle
    if abs(dy) < _NEAR_CENTRE and abs(dx) < _NEAR_CENTRE:
        return "centre"
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def relation_of(first: Found, second: Found) -> str:
    """The relation of the first object to the second: the larger offset decides."""
    dy, dx = second.y - first.y, second.x - first.x
    if abs(dy) >= abs(dx):
        return "above" if dy > 0 else "below"
    return "left" if dx > 0 else "right"


def scene_of(reading: Reading) -> Scene | None:
    """The scene an image shows, or None if it shows no scene."""
    things = tuple(f.thing for f in reading.found)
    if len(things) == 1:
        return Scene(things, place_of(reading.found[0]), reading.background)
    if len(things) == 2:
        return Scene(things, relation_of(*reading.found), reading.background)
    return None


def _assignment(wanted: Scene, reading: Reading) -> list[str]:
    """The clauses that fail, under the kindest matching of objects to the prompt's."""
    things, found = wanted.things, reading.found
    orders = [found] if len(things) == 1 else [found, found[::-1]]
    best: list[str] | None = None
    for order in orders:
        wrong: list[str] = []
        for thing, one in zip(things, order, strict=True):
            for name in ("size", "colour", "shape"):
                if getattr(thing, name) != getattr(one.thing, name):
                    wrong.append(name)
        shown = place_of(order[0]) if len(things) == 1 else relation_of(*order)
        if shown != wanted.relation:
            wrong.append("place" if len(things) == 1 else "relation")
        if best is None or len(wrong) < len(best):
            best = wrong
    return best or []


def judge_reading(reading: Reading, prompt: str) -> Verdict:
    """The verdict on a reading, for one prompt."""
    wanted = parse(prompt)
    malformed = sum(f.malformed for f in reading.found)
    wrong: list[str] = []
    extra = missing = 0
    if wanted is not None:
        extra = max(0, len(reading.found) - len(wanted.things))
        missing = max(0, len(wanted.things) - len(reading.found))
        if reading.background != wanted.background:
            wrong.append("background")
        wrong += ["extra"] * bool(extra) + ["missing"] * bool(missing)
        wrong += ["malformed"] * bool(malformed)
        wrong += ["off palette"] * (reading.off_palette > 0)
        if not extra and not missing:
            wrong += _assignment(wanted, reading)
    return Verdict(
        right=wanted is not None and not wrong,
        judgeable=wanted is not None,
        extra=extra,
        missing=missing,
        malformed=malformed,
        off_palette=reading.off_palette,
        found=reading.found,
        background=reading.background,
        wrong=tuple(wrong),
    )


def judge_batch(images: Image, prompts: Sequence[str]) -> list[Verdict]:
    """One verdict an image (n, 32, 32, 3) uint8 and prompt."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
    if len(images) == 0:
        return []
    readings = read_batch(images)
    return [judge_reading(r, p) for r, p in zip(readings, prompts, strict=True)]


def judge(image: Image, prompt: str) -> Verdict:
    """The verdict on one image (32, 32, 3) uint8."""
    return judge_batch(image[None], [prompt])[0]

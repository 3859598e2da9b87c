"""Distribution-based weights: how far an image lies from the good ones, and what it counts for.

Plain functions on arrays. The paper (arXiv 2502.09963) weights samples by their distribution, to
keep hallucinations out; its formulas were not available: these are ours. Images off the
distribution of good images are the suspects; good images are the better half of the round's
candidates (`reference_set`): most candidates can be wrong, and the middle of all is no reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf

from rsi_jobs.selection import MAD_TO_SD

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]
Array: TypeAlias = NDArray[Any]
Scheme = Literal["knn", "mahalanobis", "trajectory", "uniform"]
# (features (n, d), reference (n,)) -> distances (n,): a scheme of one's own
Measure: TypeAlias = Callable[[Floats, Bools], Floats]

COMPONENTS = 64  # most principal components under a Mahalanobis distance
FOLDS = 5  # of the reference, so that no image is measured by a fit it took part in
SMALLEST_GROUP = 32  # reference images below which a median and a MAD of a group say little


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of a round's selected images."""

    weights: Floats
    """(n,) in the caller's order; they add up to the number of selected rows; others are 0"""
    tau: float
    """exponent the weights were tempered with; 1 is not at all"""
    ess: float
    """effective sample size of the selected rows, at most their number"""


def reference_set(score: Floats, share: float = 0.5, *, group: Array | None = None) -> Bools:
    """The best `share` of the candidates within each group, by score: (n,).

    Scores that tie with the last one in are in too, so that the order of rows does not matter.
    A score that is not finite is never in. For several rewards, `selection.rank_average` with one
    prompt number for all rows gives a score over the round.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} is outside (0, 1]")
    reference = np.zeros(score.shape, dtype=np.bool_)
    for members in _rows_by_group(group, score.size):
        rows = members[np.isfinite(score[members])]
        if rows.size:
            count = math.ceil(share * rows.size)
            least = np.partition(score[rows], rows.size - count)[rows.size - count]
            reference[rows] = score[rows] >= least
    return reference


def distances(
    features: Array,
    reference: Bools,
    *,
    scheme: Scheme | Measure = "knn",
    k: int = 15,
    group: Array | None = None,
    prompt: Array | None = None,
    residual: bool = False,
    variance: Array | None = None,
) -> Floats:
    """Distance of each image from the reference images, larger is further off: (n,).

    features: (n, d) image embeddings, L2-normalised by the scorer that made them.
    scheme: `knn`, the mean Euclidean distance to the `k` nearest reference images other than itself
    (or to as many as there are); `mahalanobis`, the squared distance under a Ledoit-Wolf covariance
    of at most 64 principal components; `trajectory`, `variance` (n,) of the predicted clean sample
    over the last sampling steps (arXiv 2406.09358); `uniform`, 0; or a function
    (features, reference) -> (n,).
    group: (n,) ids; the reference is then that of the image's own group (small groups share one).
    residual: measure features less the mean of their prompt's candidates (`prompt` (n,) ids).

    A row whose features (or variance) are not finite gets infinity and is in nobody's reference.
    """
    n = len(features)
    if scheme == "uniform":
        return np.zeros(n)
    if scheme == "trajectory":
        if variance is None or variance.shape != (n,):
            raise ValueError("scheme trajectory needs the variance of each of the candidates")
        return np.where(np.isfinite(variance), variance, np.inf).astype(np.float64)
    if reference.shape != (n,) or k < 1:
        raise ValueError(f"features ({n}, d) need a reference ({n},) and k >= 1, got {k}")

    finite = np.isfinite(features).all(axis=1)
    points = np.asarray(features, np.float64)[finite]
    known = reference[finite]
    if residual:
        if prompt is None:
            raise ValueError("residual distances need prompt, the prompt of each candidate")
        points = _residuals(points, prompt[finite])
    kind = _merged(None if group is None else group[finite], known)
    result = np.full(n, np.inf)
    inner = np.zeros(len(points))
    for rows in _rows_by_group(kind, len(points)):
        if not known[rows].any():
            raise ValueError("no reference image has finite features")
        if scheme == "knn":
            inner[rows] = _knn(points[rows], known[rows], k)
        elif scheme == "mahalanobis":
            inner[rows] = _mahalanobis(points[rows], known[rows])
        elif callable(scheme):
            inner[rows] = scheme(points[rows], known[rows])
        else:
            raise ValueError(f"scheme {scheme!r} is none of knn, mahalanobis, trajectory, uniform")
    result[finite] = inner
    return result


def weights(
    distance: Array,
    reference: Bools,
    *,
    selected: Bools | None = None,
    group: Array | None = None,
    temperature: float = 2.0,
    low: float = 0.05,
    high: float = 3.0,
    cut: float = 0.99,
    min_ess: float = 0.5,
) -> Weights:
    """Weights of the selected rows (all, when None) from the distances (n,) of all candidates.

    z = (distance - median) / (1.4826 MAD) over the reference rows of the row's group (small groups
    share one); w = clip(exp(-z / temperature), low, high), 0 above the `cut` quantile of the
    reference's z (1 is no cut), then tempered to w ** tau with the largest tau <= 1 that brings the
    effective sample size to `min_ess` times the number selected, and scaled to mean 1 over the
    selected rows.

    A group whose distances do not spread (MAD 0) has z = 0. An infinite or NaN distance is above
    the cut. Where the cut leaves too few rows to reach `min_ess`, they get `low` instead of 0.
    """
    if not (0 < low <= 1 <= high and temperature > 0 and 0 <= cut <= 1 and 0 <= min_ess <= 1):
        raise ValueError(
            "weights need 0 < low <= 1 <= high, temperature > 0, cut and min_ess from 0 to 1; got "
            f"low={low}, high={high}, temperature={temperature}, cut={cut}, min_ess={min_ess}"
        )
    distance = np.asarray(distance, np.float64)
    chosen = np.ones(distance.shape, dtype=np.bool_) if selected is None else selected
    count = int(chosen.sum())
    result = np.zeros(distance.shape)
    if count == 0:
        return Weights(result, 1.0, 0.0)

    known = reference & np.isfinite(distance)
    z = _robust_z(distance, known, _merged(group, known))
    limit = np.quantile(z[known], cut) if cut < 1 and known.any() else np.inf
    bounded = np.clip(z, -50.0 * temperature, 50.0 * temperature)  # exp cannot overflow
    raw = np.clip(np.exp(-bounded / temperature), low, high)
    cut_off = (z > limit) | ~np.isfinite(distance)
    if count - int(cut_off[chosen].sum()) >= max(min_ess * count, 1):
        raw[cut_off] = 0.0
    else:
        raw[cut_off] = low
    tempered, tau = _temper(raw[chosen], min_ess)
    result[chosen] = tempered * (count / tempered.sum())
    return Weights(result, tau, effective_sample_size(result[chosen]))


def effective_sample_size(w: Floats) -> float:
    """(sum w)^2 / sum w^2 (Kish): between 1 and the number of weights; 0 when all are 0."""
    squares = float(np.square(w).sum())
    return float(w.sum()) ** 2 / squares if squares > 0 else 0.0


def _temper(raw: Floats, min_ess: float) -> tuple[Floats, float]:
    """(raw ** tau, tau) for the largest tau in [0, 1] with ESS >= min_ess * n.

    The ESS falls as tau rises (d log ESS / d tau is twice the mean of log w under w less that under
    w^2), so bisection finds it. Weights of 0 stay 0; the caller has seen that enough are not.
    """
    needed = min_ess * raw.size
    if effective_sample_size(raw) >= needed:
        return raw, 1.0
    positive = raw > 0
    enough, too_much = 0.0, 1.0
    for _ in range(60):
        tau = (enough + too_much) / 2
        if effective_sample_size(np.where(positive, raw**tau, 0.0)) >= needed:
            enough = tau
        else:
            too_much = tau
    return np.where(positive, raw**enough, 0.0), enough


def _robust_z(distance: Floats, known: Bools, group: Array | None) -> Floats:
    z = np.zeros(distance.shape)
    for rows in _rows_by_group(group, distance.size):
        scale = distance[rows[known[rows]]]
        if not scale.size:
            continue
        middle = np.median(scale)
        mad = np.median(np.abs(scale - middle))
        if mad > 1e-9 * abs(middle):  # below it, the spread is rounding
            z[rows] = (distance[rows] - middle) / (MAD_TO_SD * mad)
    return np.nan_to_num(z, nan=np.inf, posinf=np.inf, neginf=-np.inf)


def _merged(group: Array | None, known: Bools) -> Array | None:
    """Group numbers in which groups with few reference rows are one; None when all rows are one."""
    if group is None:
        return None
    _, number = np.unique(group, return_inverse=True)
    size = np.bincount(number, weights=known)
    small = size < SMALLEST_GROUP
    if small.any() and size[small].sum() < SMALLEST_GROUP:
        small[np.argmax(np.where(small, -1, size))] = True  # too few even together: the largest joins
    merged: Array = np.where(small[number], -1, number)
    return merged


def _rows_by_group(group: Array | None, n: int) -> list[Array]:
    if group is None:
        return [np.arange(n)] if n else []
    order = np.argsort(group, kind="stable")
    _, start = np.unique(group[order], return_index=True)
    return np.split(order, start[1:]) if n else []


def _residuals(points: Floats, prompt: Array) -> Floats:
    _, number = np.unique(prompt, return_inverse=True)
    total = np.zeros((number.max(initial=-1) + 1, points.shape[1]))
    np.add.at(total, number, points)
    mean = total / np.bincount(number)[:, None]
    residuals: Floats = points - mean[number]
    return residuals


def _knn(points: Floats, known: Bools, k: int, chunk: int = 512) -> Floats:
    """Mean distance to the k nearest reference rows other than itself."""
    centred = points - points[known].mean(axis=0)  # a common offset would cost digits below
    targets = centred[known]
    place = np.full(len(points), -1)
    place[known] = np.arange(len(targets))
    squares = np.square(targets).sum(axis=1)
    most = min(k, max(len(targets) - 1, 1))  # a member has one neighbour fewer to choose from
    result = np.zeros(len(points))
    for start in range(0, len(points), chunk):
        block = centred[start : start + chunk]
        near = squares - 2 * block @ targets.T  # squared distance less the row's own square
        own = place[start : start + chunk]
        near[np.flatnonzero(own >= 0), own[own >= 0]] = np.inf
        index = np.argpartition(near, most - 1, axis=1)[:, :most]
        # The product is only good for the order: differences keep equal images at exactly 0.
        exact = np.linalg.norm(block[:, None] - targets[index], axis=2)
        result[start : start + chunk] = exact.mean(axis=1)
    return result


def _mahalanobis(points: Floats, known: Bools) -> Floats:
    """Squared Mahalanobis distance from the reference rows, none of them judged by its own fit.

    Members pull axes, mean and covariance towards themselves and would seem closer than equal
    images outside. So the reference is cut into folds: a member is measured by the fit without its
    fold, the others by all fits, averaged. Folds go by rank of distance from the mean: they are
    alike, and depend neither on the order of rows nor on a rotation of the features.
    """
    members = np.flatnonzero(known)
    if members.size < 2:
        return np.zeros(len(points))
    points = points - points[members].mean(axis=0)
    fold = np.full(len(points), -1)
    ranked = members[np.argsort(np.square(points[members]).sum(axis=1), kind="stable")]
    fold[ranked] = np.arange(ranked.size) % FOLDS
    folds = min(FOLDS, ranked.size)
    total = np.zeros(len(points))
    for number in range(folds):
        judged = (fold == number) | ~known
        share = np.where(known[judged], 1.0, 1.0 / folds)
        total[judged] += share * _from_fit(points[judged], points[known & (fold != number)])
    return total


def _from_fit(points: Floats, members: Floats) -> Floats:
    """Squared Mahalanobis distance from members, on at most 64 of their principal components."""
    middle = members.mean(axis=0)
    _, axes = np.linalg.eigh((members - middle).T @ (members - middle))
    axes = axes[:, -min(COMPONENTS, axes.shape[1], max(len(members) - 1, 1)) :]
    covariance = ledoit_wolf((members - middle) @ axes, assume_centered=True)[0]
    if np.trace(covariance) <= 0:  # all members are one image: there is no scale to measure in
        return np.zeros(len(points))
    inner = (points - middle) @ axes
    distance: Floats = np.einsum("nd,dn->n", inner, np.linalg.solve(covariance, inner.T))
    return distance

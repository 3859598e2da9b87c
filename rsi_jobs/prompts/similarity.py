"""How alike prompts are, without a model: MinHash over character n-grams.

MinHash estimates the Jaccard index |A & B| / |A | B| of two sets as the share of hash functions
whose minimum over A equals that over B (Broder, "On the resemblance and containment of
documents", 1997); with 128 of them the standard error is at most 0.045. Nothing is random: the
hash functions are constants, the same on every machine and numpy version.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

N_HASHES = 128
GRAM = 4
_COLUMNS = 4096
_PROMPTS_AT_ONCE = 4096
_NOT_WORD = re.compile(r"[^\w]+|_")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b ?")

Signatures = npt.NDArray[np.uint32]


def normalise(prompt: str) -> str:
    """Lower case, Unicode-folded, words apart by single spaces, no punctuation."""
    return " ".join(_NOT_WORD.sub(" ", unicodedata.normalize("NFKC", prompt).casefold()).split())


def signatures(prompts: Sequence[str]) -> Signatures:
    """MinHash signatures, (len(prompts), N_HASHES) uint32."""
    chunks = [
        _signatures(prompts[i : i + _PROMPTS_AT_ONCE]) for i in range(0, len(prompts), _PROMPTS_AT_ONCE)
    ]
    return np.concatenate(chunks) if chunks else np.empty((0, N_HASHES), np.uint32)


def similarity(a: Signatures, b: Signatures) -> npt.NDArray[np.float32]:
    """Estimated Jaccard index of every row of `a` with every row of `b`: (len(a), len(b)), 0..1."""
    out = np.empty((len(a), len(b)), np.float32)
    for start in range(0, len(b), _COLUMNS):
        stop = min(start + _COLUMNS, len(b))
        out[:, start:stop] = _agreement(a, b[start:stop])
    return out


def nearest(a: Signatures, b: Signatures) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    """For every row of `a`, the highest similarity to a row of `b` and that row's index.

    Memory stays small whatever len(b) is. With `b` empty: 0.0 and index -1.
    """
    best = np.zeros(len(a), np.float32)
    index = np.full(len(a), -1, np.intp)
    rows = np.arange(len(a))
    for start in range(0, len(b), _COLUMNS):
        block = _agreement(a, b[start : start + _COLUMNS])
        at = block.argmax(1)
        better = block[rows, at] > best
        best[better] = block[rows, at][better]
        index[better] = start + at[better]
    return best, index


def _agreement(a: Signatures, b: Signatures) -> npt.NDArray[np.float32]:
    equal = np.zeros((len(a), len(b)), np.uint8)
    columns_a, columns_b = np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)
    for x, y in zip(columns_a, columns_b, strict=True):
        equal += x[:, None] == y[None, :]
    return equal.astype(np.float32) / np.float32(N_HASHES)


def _signatures(prompts: Sequence[str]) -> Signatures:
    # Articles say nothing of the picture, and would make "a red ball" unlike "the red ball".
    # Padding gives even an empty prompt one n-gram, and marks where a prompt begins and ends.
    texts = [f"  {_ARTICLES.sub('', normalise(prompt))}  " for prompt in prompts]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.array([len(text) for text in texts])
    grams = np.zeros(len(codes) - GRAM + 1, np.uint64)
    for k in range(GRAM):
        grams = grams * np.uint64(0x100000001B3) + codes[k : k + len(grams)]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    inside = np.ones(len(grams), bool)
    for k in range(1, GRAM):  # n-grams that run over into the next prompt
        inside[ends[:-1] - k] = False
    hashed = _mix(grams[inside])
    first = starts - (GRAM - 1) * np.arange(len(texts))
    out = np.empty((len(texts), N_HASHES), np.uint32)
    for i in range(N_HASHES):
        multiplier, offset = _CONSTANTS[2 * i] | np.uint64(1), _CONSTANTS[2 * i + 1]
        values = ((hashed * multiplier + offset) >> np.uint64(32)).astype(np.uint32)
        out[:, i] = np.minimum.reduceat(values, first)
    return out


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_CONSTANTS = _mix(np.arange(1, 2 * N_HASHES + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))

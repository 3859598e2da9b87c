"""MinHash: an estimate of the Jaccard index, the same everywhere."""

from __future__ import annotations

import numpy as np

from rsi_jobs.prompts.similarity import nearest, normalise, signatures, similarity

WORDS = ["red", "blue", "cat", "dog", "owl", "house", "boat", "river", "glass", "large", "night"]


def prompts(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(n)]


def jaccard(a: str, b: str) -> float:
    """The same by hand: sets of four characters, two spaces at either end."""
    one, two = ({f"  {t}  "[i : i + 4] for i in range(len(t) + 1)} for t in (a, b))
    return len(one & two) / len(one | two)


def test_the_estimate_is_unbiased_and_near_the_exact_index() -> None:
    texts = prompts(60, 0)
    exact = np.array([[jaccard(a, b) for b in texts] for a in texts])
    error = similarity(signatures(texts), signatures(texts)) - exact
    off = error[~np.eye(60, dtype=bool)]
    assert abs(off.mean()) < 0.01
    assert np.sqrt((off**2).mean()) < 0.045
    assert np.all(np.diag(error) == 0)


def test_a_signature_does_not_depend_on_the_prompts_around_it() -> None:
    texts = [*prompts(5000, 1), "", "é", "日本"]  # more than one chunk, and the shortest there are
    together = signatures(texts)
    assert together.shape == (5003, 128)
    for i in (0, 1, 4095, 4096, 4999, 5000, 5001, 5002):
        assert np.array_equal(together[i], signatures([texts[i]])[0])
    assert signatures([]).shape == (0, 128)


def test_signatures_are_the_same_on_every_machine() -> None:
    assert signatures(["a red ball"])[0, :3].tolist() == [409713458, 176449399, 104766107]


def test_articles_case_and_punctuation_do_not_count() -> None:
    one, two, three = signatures(["A red ball, on the grass!", "red ball on grass", "red ballon"])
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)
    assert normalise("  The RED-ball,\n№ 5! ") == "the red ball no 5"


def test_nearest_equals_the_full_matrix_in_any_number_of_blocks() -> None:
    few, many = signatures(prompts(20, 2)), signatures(prompts(9000, 3))
    best, at = nearest(few, many)
    full = similarity(few, many)
    assert np.array_equal(best, full.max(1))
    assert np.array_equal(at, full.argmax(1))
    none, nowhere = nearest(few, many[:0])
    assert not none.any()
    assert (nowhere == -1).all()

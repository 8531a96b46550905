"""Estimates against what brute force and simulation say."""

import math

import numpy as np
import pytest

from rerail.evaluate.estimates import mean_and_se, paired_difference, recovery_of


def blocks(seed: int, count: int = 12) -> tuple[np.ndarray, ...]:
    """Return tokens and sums of teacher, compressed and repaired over uneven blocks."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 40, count).astype(float)
    hard = rng.normal(3.0, 0.5, count)
    teacher = hard * tokens
    compressed = (hard + rng.normal(0.8, 0.2, count)) * tokens
    repaired = (hard + rng.normal(0.4, 0.2, count)) * tokens
    return tokens, teacher, compressed, repaired


def test_the_mean_weighs_tokens_and_its_error_is_the_ratio_estimator() -> None:
    tokens, sums, *_ = blocks(0)
    mean, se = mean_and_se(sums, tokens)
    total = sum(tokens)
    by_hand = sum(sums) / total
    squares = sum((s - by_hand * n) ** 2 for s, n in zip(sums, tokens, strict=True))
    assert mean == pytest.approx(by_hand, rel=1e-14)
    assert se == pytest.approx(math.sqrt(12 / 11 * squares) / total, rel=1e-14)


def test_with_equal_blocks_the_error_is_the_plain_one_of_block_means() -> None:
    means = np.random.default_rng(1).normal(size=30)
    mean, se = mean_and_se(means * 8, np.full(30, 8))
    assert mean == pytest.approx(means.mean())
    assert se == pytest.approx(means.std(ddof=1) / math.sqrt(30))


def test_the_clustered_interval_covers_the_truth_where_the_one_of_tokens_does_not() -> None:
    rng = np.random.default_rng(2)
    trials, count, length = 400, 60, 25
    shared = rng.normal(0.0, 1.0, (trials, count, 1))
    values = 3.0 + shared + rng.normal(0.0, 1.0, (trials, count, length))
    kept = np.arange(length) < rng.integers(5, length + 1, (trials, count, 1))
    inside = naive = 0
    for value, keep in zip(values, kept, strict=True):
        mean, se = mean_and_se((value * keep).sum(1), keep.sum(1))
        inside += abs(mean - 3.0) < 1.96 * se
        naive += abs(mean - 3.0) < 1.96 * value[keep].std() / math.sqrt(keep.sum())
    assert 0.91 < inside / trials < 0.98
    assert naive / trials < 0.7


def test_blocks_without_a_token_count_for_nothing() -> None:
    tokens, sums, *_ = blocks(3)
    with_empty = mean_and_se([*sums, 0.0, 0.0], [*tokens, 0, 0])
    assert with_empty == mean_and_se(sums, tokens)


def test_one_block_has_a_mean_but_no_error() -> None:
    assert mean_and_se([6.0], [3]) == (2.0, None)


def test_pairing_cancels_what_both_models_find_hard() -> None:
    tokens, teacher, compressed, _ = blocks(4)
    difference, se = paired_difference(compressed, teacher, tokens)
    (mean_c, se_c), (mean_t, se_t) = mean_and_se(compressed, tokens), mean_and_se(teacher, tokens)
    assert difference == pytest.approx(mean_c - mean_t)
    assert se < 0.7 * math.hypot(se_c, se_t)


@pytest.mark.parametrize("seed", range(3))
def test_recovery_and_its_error_are_those_of_a_brute_force_jackknife(seed: int) -> None:
    tokens, teacher, compressed, repaired = blocks(seed)
    found = recovery_of(teacher, compressed, repaired, tokens)

    def recovery(kept: np.ndarray) -> float:
        total = tokens[kept].sum()
        t, c, r = (sums[kept].sum() / total for sums in (teacher, compressed, repaired))
        return (c - r) / (c - t)

    everything = np.arange(len(tokens))
    without = np.array([recovery(np.delete(everything, b)) for b in everything])
    n = len(tokens)
    se = math.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    assert found.value == pytest.approx(recovery(everything), rel=1e-12)
    assert found.se == pytest.approx(se, rel=1e-12)


@pytest.mark.parametrize(
    ("gaps", "blank"),
    [
        ([0.5, 0.6, 0.55, 0.45], False),
        ([0.5, -0.4, 0.1, 0.02], True),  # positive, but under two standard errors
        ([-0.5, -0.6, -0.55, -0.45], True),  # the compressed model is better
        ([0.0, 0.0, 0.0, 0.0], True),
        ([0.5], True),  # one block has no error
    ],
)
def test_recovery_is_blank_where_nothing_was_measurably_lost(gaps: list, blank: bool) -> None:
    teacher = np.full(len(gaps), 3.0)
    compressed = teacher + gaps
    found = recovery_of(teacher, compressed, compressed - 0.2, np.ones(len(gaps)))
    assert (found.value is None) == blank
    assert (found.se is None) == blank


def test_the_blank_begins_at_two_standard_errors() -> None:
    spread = np.array([1.0, -1.0, 1.0, -1.0])
    se = paired_difference(spread, np.zeros(4), np.ones(4))[1]
    for factor, blank in ((1.99, True), (2.01, False)):
        lost = factor * se + spread
        assert (recovery_of(np.zeros(4), lost, lost / 2, np.ones(4)).value is None) == blank


def test_a_repair_that_hurts_has_a_negative_recovery() -> None:
    tokens, teacher, compressed, _ = blocks(5)
    worse = compressed + 0.5 * (compressed - teacher)
    assert recovery_of(teacher, compressed, worse, tokens).value == pytest.approx(-0.5)


@pytest.mark.parametrize(
    ("sums", "tokens", "message"),
    [
        ([1.0, 2.0], [1], "equally long"),
        ([[1.0]], [[1]], "1-D"),
        ([1.0], [0], "at least one must be positive"),
        ([1.0, 2.0], [1, -1], "must not be negative"),
        ([1.0, math.nan], [1, 1], "not finite"),
    ],
)
def test_wrong_sums_are_refused(sums: list, tokens: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mean_and_se(sums, tokens)

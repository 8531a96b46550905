import dataclasses
import logging

import pytest
import torch

from rerail.compress.solvers.whitening import (
    Moments,
    effective_ranks,
    low_rank,
    mixtures,
    most_used,
    own_columns,
    principal,
    refitted,
    stack_rows,
)
from rerail.errors import InputError

SHAPES = [(6, 10), (10, 6)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tokens_of(size: int, count: int = 400, seed: int = 1) -> torch.Tensor:
    """Return inputs whose directions differ much in strength."""
    turned = torch.linalg.qr(draw(size, size, seed=seed)).Q
    return draw(count, size, seed=seed + 1) * torch.logspace(0, -2, size).double() @ turned


def loss(weight: torch.Tensor, made: torch.Tensor, moment: torch.Tensor) -> float:
    gap = weight - made
    return float((gap @ moment @ gap.mT).trace())


def truncated(weight: torch.Tensor, moment: torch.Tensor, rank: int) -> torch.Tensor:
    _, u, v = principal(weight, moment)
    return u[:, :rank] @ v[:rank]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_on_the_text_is_what_was_dropped(shape: tuple[int, int]) -> None:
    weight, x = draw(*shape), tokens_of(shape[1])
    values, _, _ = principal(weight, x.T @ x)
    assert (values.diff() <= 0).all()
    losses = []
    for rank in range(7):
        made = truncated(weight, x.T @ x, rank)
        measured = (x @ (weight - made).T).square().sum()
        torch.testing.assert_close(measured, values[rank:].sum(), rtol=1e-8, atol=1e-8)
        losses.append(float(measured))
    assert losses == sorted(losses, reverse=True)
    torch.testing.assert_close(made, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_candidate_of_the_same_rank_does_better(shape: tuple[int, int], rank: int) -> None:
    weight, x = draw(*shape), tokens_of(shape[1])
    moment = x.T @ x
    best = loss(weight, truncated(weight, moment, rank), moment)
    assert best < 0.9 * loss(weight, truncated(weight, torch.eye(shape[1]).double(), rank), moment)
    for seed in range(20):
        rows = draw(rank, shape[1], seed=seed)
        columns = weight @ moment @ rows.T @ torch.linalg.inv(rows @ moment @ rows.T)
        assert best <= loss(weight, columns @ rows, moment)


@pytest.mark.parametrize("shape", SHAPES)
def test_cholesky_symmetric_root_and_projector_give_the_same_matrix(shape: tuple[int, int]) -> None:
    weight, x = draw(*shape), tokens_of(shape[1])
    moment, rank = x.T @ x, 4
    values, q = torch.linalg.eigh(moment)
    roots = [torch.linalg.cholesky(moment), q * values.sqrt() @ q.T]
    made = truncated(weight, moment, rank)
    for root in roots:
        u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
        other = u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(root)
        torch.testing.assert_close(made, other, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(loss(weight, made, moment), float(s[rank:].square().sum()))


def test_the_transposed_cholesky_factor_would_break_the_identity() -> None:
    weight, x = draw(6, 10), tokens_of(10)
    moment = x.T @ x
    wrong = torch.linalg.cholesky(moment).T
    u, s, vt = torch.linalg.svd(weight @ wrong, full_matrices=False)
    made = u[:, :3] * s[:3] @ vt[:3] @ torch.linalg.inv(wrong)
    dropped = float(s[3:].square().sum())
    assert abs(loss(weight, made, moment) - dropped) > 0.1 * dropped
    assert loss(weight, made, moment) > 1.2 * loss(weight, truncated(weight, moment, 3), moment)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_moment_it_is_plain_svd(shape: tuple[int, int]) -> None:
    stack = draw(3, *shape)
    u, v = low_rank(stack, Moments(None, torch.zeros(3), shape[1], 0.5, 1e-3), [4, 4, 4])
    for e in range(3):
        a, s, b = torch.linalg.svd(stack[e], full_matrices=False)
        expected = a[:, :4] * s[:4] @ b[:4]
        torch.testing.assert_close(u[:, 4 * e : 4 * e + 4] @ v[4 * e : 4 * e + 4], expected)


@pytest.mark.parametrize("seen", [0, 2, 5, 200])
def test_scale_and_number_of_tokens_change_nothing(seen: int) -> None:
    x = tokens_of(10)
    sums = torch.stack([x.T @ x, x[:seen].T @ x[:seen]])
    moments = Moments(sums, torch.tensor([400, seen]), 10, 0.25, 1e-4)
    twice = dataclasses.replace(moments, sums=2 * sums, count=2 * moments.count)
    louder = dataclasses.replace(moments, sums=1e6 * sums)
    stack = draw(2, 6, 10)
    made = [u @ v for u, v in (low_rank(stack[:1], m, [3]) for m in (moments, louder, twice))]
    torch.testing.assert_close(made[1], made[0], rtol=1e-6, atol=1e-8)
    rare = [truncated(stack[1], m.of(1, stack.device), 3) for m in (moments, louder)]
    torch.testing.assert_close(rare[1], rare[0], rtol=1e-6, atol=1e-8)


def test_ranks_may_differ_and_lie_side_by_side() -> None:
    stack, moments = draw(3, 6, 10), Moments(None, torch.zeros(3), 10)
    u, v = low_rank(stack, moments, [1, 4, 2])
    assert u.shape == (6, 7)
    assert v.shape == (7, 10)
    for e, rows in enumerate([slice(0, 1), slice(1, 5), slice(5, 7)]):
        torch.testing.assert_close(
            u[:, rows] @ v[rows],
            truncated(stack[e], torch.eye(10).double(), rows.stop - rows.start),
        )
    assert low_rank(stack.bfloat16(), moments, [1, 4, 2])[0].dtype == torch.float32


def test_rare_experts_lean_on_the_layer_and_never_routed_ones_have_it_alone() -> None:
    x = tokens_of(10)
    counts = [300, 10, 0]
    parts = [x[:300], x[300:310], x[:0]]
    sums = torch.stack([p.T @ p for p in parts])
    moments = Moments(sums, torch.tensor(counts), 10, shrink=2.0)
    pooled = x[:310].T @ x[:310] / 310
    for e, count in enumerate(counts):
        w = 20 / (20 + count)
        own = sums[e] / max(count, 1)
        torch.testing.assert_close(moments.of(e, x.device), (1 - w) * own + w * pooled)
    torch.testing.assert_close(moments.layer(x.device), pooled)
    bare = Moments(sums, torch.tensor(counts), 10)
    torch.testing.assert_close(bare.of(2, x.device), pooled)
    torch.testing.assert_close(bare.of(1, x.device), sums[1] / 10)


def test_shrinkage_keeps_the_weights_that_ten_tokens_do_not_show() -> None:
    x, weight = tokens_of(30), draw(1, 20, 30)
    few = tokens_of(30, 10, seed=7)
    sums = torch.stack([x.T @ x, few.T @ few])
    made = {}
    for shrink in (0.0, 0.5):
        moments = Moments(sums, torch.tensor([400, 10]), 30, shrink, 1e-12)
        made[shrink] = truncated(weight[0], moments.of(1, x.device), 12)
    unseen = tokens_of(30, 400, seed=1)
    assert loss(weight[0], made[0.5], unseen.T @ unseen) < 0.5 * loss(
        weight[0], made[0.0], unseen.T @ unseen
    )


def test_a_singular_or_dead_moment_stays_finite() -> None:
    sums = torch.zeros(2, 10, 10).double()
    sums[0, 0, 0] = 5.0
    for shrink in (0.0, 0.5):
        u, v = low_rank(draw(2, 6, 10), Moments(sums, torch.tensor([1, 3]), 10, shrink), [3, 3])
        assert torch.isfinite(u @ v).all()
    dead = Moments(0 * sums, torch.tensor([0, 0]), 10, 0.5, 1e-6)
    torch.testing.assert_close(dead.of(0, sums.device), torch.eye(10).double())
    u, v = low_rank(torch.zeros(2, 6, 10), dead, [3, 3])
    assert torch.isfinite(u @ v).all()


def test_too_little_text_says_how_much_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    sums = torch.eye(10).repeat(3, 1, 1).double()
    moments = Moments(sums, torch.tensor([30, 4, 0]), 10, shrink=0.5)
    with pytest.raises(InputError, match=r"here: .* at least 10 calibration tokens, and .* 9;"):
        moments.check("here", 9)
    with caplog.at_level(logging.INFO, "rerail"):
        moments.check("here", 10)
    assert "experts [2] were never routed to" in caplog.text
    with pytest.raises(
        InputError, match=r"at least 10 tokens at each expert, and experts \[1\] .* 4"
    ):
        dataclasses.replace(moments, shrink=0.0).check("here", 34)
    dataclasses.replace(moments, sums=None).check("here", 0)


def test_effective_ranks_are_counts_of_equal_directions() -> None:
    flat = torch.linalg.qr(draw(10, 6)).Q.T
    one = torch.outer(draw(6), draw(10))
    moments = Moments(None, torch.zeros(3), 10)
    found = effective_ranks(torch.stack([flat, one, draw(6, 10)]), moments)
    torch.testing.assert_close(found[:2], torch.tensor([6.0, 1.0]).double())
    assert 1 < found[2] < 6
    stack = draw(3, 6, 10)
    louder = effective_ranks(7 * stack, moments)
    torch.testing.assert_close(louder, effective_ranks(stack, moments))


def shared_case() -> tuple[torch.Tensor, torch.Tensor, Moments]:
    x = tokens_of(10)
    parts = [x[:200], x[200:300], x[300:]]
    sums = torch.stack([p.T @ p for p in parts])
    return (
        draw(3, 6, 10),
        torch.tensor([0.5, 0.25, 0.25]).double(),
        Moments(sums, torch.tensor([200, 100, 100]), 10),
    )


def test_rows_of_the_stack_are_normed_and_beat_those_of_one_expert() -> None:
    stack, share, moments = shared_case()
    moment = moments.layer(stack.device)
    rows = stack_rows(stack, share, moment, 4)
    torch.testing.assert_close(rows @ moment @ rows.T, torch.eye(4).double(), atol=1e-9, rtol=1e-9)
    same = Moments(moment.expand(3, 10, 10), torch.ones(3), 10)
    alone = principal(stack[0], moment)[2][:4]

    def total(v: torch.Tensor) -> float:
        u = refitted(stack, v, same)
        return sum(float(share[e]) * loss(stack[e], u[e] @ v, moment) for e in range(3))

    assert total(rows) < total(alone)
    for seed in range(5):
        assert total(rows) <= total(draw(4, 10, seed=seed))
    weighted = (stack * share.sqrt().view(-1, 1, 1)).flatten(0, 1) @ torch.linalg.cholesky(moment)
    dropped = torch.linalg.svdvals(weighted)[4:].square().sum()
    assert total(rows) == pytest.approx(float(dropped), rel=1e-8)


def test_refitted_columns_leave_what_the_rows_cannot_say() -> None:
    stack, _, moments = shared_case()
    rows = stack_rows(stack, torch.ones(3), moments.layer(stack.device), 4)
    fitted, own = refitted(stack, rows, moments), own_columns(stack, rows, moments)
    for e in range(3):
        moment = moments.of(e, stack.device)
        said = (fitted[e] @ rows @ moment @ rows.T @ fitted[e].T).trace()
        found = loss(stack[e], fitted[e] @ rows, moment)
        all_of_it = (stack[e] @ moment @ stack[e].T).trace()
        assert found == pytest.approx(float(all_of_it - said), rel=1e-8)
        assert found <= loss(stack[e], own[e] @ rows, moment)
    full = stack_rows(stack, torch.ones(3), moments.layer(stack.device), 10)
    torch.testing.assert_close(refitted(stack, full, moments) @ full, stack, atol=1e-7, rtol=1e-7)


def test_own_columns_take_their_sign_from_the_shared_rows() -> None:
    stack, _, moments = shared_case()
    rows = stack_rows(stack, torch.ones(3), moments.layer(stack.device), 4)
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0]).double().unsqueeze(1)
    made, turned = (own_columns(stack, v, moments) @ v for v in (rows, flip * rows))
    torch.testing.assert_close(made, turned)


def test_few_columns_are_those_of_the_most_used_experts() -> None:
    columns, count = draw(4, 6, 3), torch.tensor([5, 40, 0, 10])
    few, mix = most_used(columns, count, 2)
    assert torch.equal(few, columns[[1, 3]])
    expected = [[0.8, 0.2], [1.0, 0.0], [0.8, 0.2], [0.8, 0.2]]
    torch.testing.assert_close(mix, torch.tensor(expected).double())
    assert torch.isfinite(most_used(columns, torch.zeros(4), 3)[1]).all()


def test_mixtures_are_the_best_and_exact_when_there_are_enough() -> None:
    columns, count = draw(4, 6, 3), torch.tensor([5, 40, 0, 10])
    few, mix = mixtures(columns, count, 4)
    made = torch.einsum("ek,kor->eor", mix, few)
    torch.testing.assert_close(made[[0, 1, 3]], columns[[0, 1, 3]])
    twice = torch.stack([columns[0], columns[1], columns[0] + columns[1], 3 * columns[0]])
    few, mix = mixtures(twice, torch.ones(4), 2)
    assert few.shape == (2, 6, 3)
    torch.testing.assert_close(torch.einsum("ek,kor->eor", mix, few), twice)

    def gap(few: torch.Tensor, mix: torch.Tensor) -> float:
        made = torch.einsum("ek,kor->eor", mix, few)
        return float((made - columns).square().sum(dim=(1, 2)) @ count.double())

    assert gap(*mixtures(columns, count, 2)) <= gap(*most_used(columns, count, 2))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_weights_in_float32_lose_no_more_than_in_float64(
    shape: tuple[int, int], decay: float
) -> None:
    """Whether the spectrum is flat or falls by 8 orders of magnitude, at every rank."""
    out, inner = shape
    x = draw(3000, inner) * torch.logspace(0, -decay, inner).double()
    moments = Moments((x.T @ x).unsqueeze(0), torch.tensor([3000]), inner, 0.0, 1e-6)
    weight = draw(1, out, inner, seed=5)
    moment = moments.of(0, weight.device)
    whole = loss(weight[0], torch.zeros(shape).double(), moment)
    for rank in (1, 7, 24, 40, 47):
        errors = []
        for stack in (weight.float(), weight.float().double()):
            u, v = low_rank(stack, moments, [rank])
            made = u.double() @ v.double()
            errors.append((loss(weight[0].float().double(), made, moment) / whole) ** 0.5)
        assert abs(errors[0] - errors[1]) < 1e-6, (rank, errors)

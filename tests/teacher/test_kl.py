import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3MoeForCausalLM

from families import CONFIGS, tiny, tokens
from rerail.moe.model import MoEModel
from rerail.teacher.kl import (
    chunked_kl,
    esap_of,
    kl_of,
    log_distribution,
    target_weights,
    token_kl,
)
from students import sliced
from watching import RowsOfWidth


def brute(student_logits, teacher_logits, tau):
    """tau^2 KL(teacher || student) of each token, as the definition says."""
    p, q = (torch.softmax(z / tau, dim=-1) for z in (teacher_logits, student_logits))
    return tau**2 * (p * (p.log() - q.log())).sum(-1)


@pytest.fixture
def problem():
    """A float64 linear head over 53 words, 11 tokens, uneven weights."""
    torch.manual_seed(0)
    matrix = torch.randn(53, 7, dtype=torch.float64)
    student, teacher = torch.randn(2, 11, 7, dtype=torch.float64)
    weights = torch.rand(11, dtype=torch.float64).float().double()
    return student, teacher, weights, lambda h: h @ matrix.T


@pytest.mark.parametrize("chunk", [1, 3, 11, 1000])
@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_loss_and_gradient_are_those_of_full_logits_at_any_chunk(problem, chunk, tau):
    student, teacher, weights, head = problem
    ours = student.clone().requires_grad_()
    loss = chunked_kl(ours, teacher, weights, head, temperature=tau, chunk=chunk)
    (3 * loss).backward()
    full = student.clone().requires_grad_()
    expected = (weights * brute(head(full), head(teacher), tau)).sum()
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.grad, full.grad, rtol=1e-10, atol=1e-14)


def test_the_kl_of_single_tokens_is_the_same_and_has_no_gradient(problem):
    student, teacher, _, head = problem
    found = token_kl(student.requires_grad_(), teacher, head, 2.0, 4)
    torch.testing.assert_close(found, brute(head(student), head(teacher), 2.0), rtol=1e-12, atol=0)
    assert not found.requires_grad


def soft_capped() -> MoEModel:
    class Capped(Qwen3MoeForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 0.7 * torch.tanh(out.logits / 0.7)
            return out

    model = tiny("qwen3_moe")
    model.model.__class__ = Capped
    return model


@pytest.mark.parametrize("family", [*CONFIGS, "soft cap"])
def test_the_head_is_the_models_own_in_every_family(family):
    teacher = soft_capped() if family == "soft cap" else tiny(family)
    student = sliced(teacher)
    ids = tokens(3, 10)
    logits = [m.model(input_ids=ids, use_cache=False).logits for m in (student, teacher)]
    states = [m.hidden(ids).flatten(0, 1) for m in (student, teacher)]
    ours, full = (states[0].clone().requires_grad_() for _ in range(2))
    weights = torch.rand(30)
    loss = chunked_kl(ours, states[1], weights, student.head, temperature=1.5, chunk=8)
    loss.backward()
    expected = brute(*(z.flatten(0, 1).double() for z in logits), 1.5)
    assert float(expected.mean()) > 1e-4
    torch.testing.assert_close(loss.double(), (weights * expected).sum(), rtol=1e-5, atol=1e-6)
    (weights * brute(student.head(full), teacher.head(states[1]), 1.5)).sum().backward()
    torch.testing.assert_close(ours.grad, full.grad, rtol=1e-4, atol=1e-6)


def test_equal_states_give_exactly_no_kl_and_no_gradient():
    model = tiny("granitemoe")
    states = model.hidden(tokens(2, 6)).flatten(0, 1)
    ours = states.clone().requires_grad_()
    loss = chunked_kl(ours, states, torch.ones(12), model.head, chunk=5)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not ours.grad.any()


def test_the_gradient_stops_at_the_students_states(problem):
    student, teacher, weights, _ = problem
    matrix = torch.randn(53, 7, dtype=torch.float64, requires_grad=True)
    tensors = [t.clone().requires_grad_() for t in (student, teacher, weights)]
    chunked_kl(*tensors, lambda h: h @ matrix.T, chunk=4).backward()
    assert tensors[0].grad is not None
    assert [t.grad for t in (*tensors[1:], matrix)] == [None, None, None]


def test_bf16_states_are_compared_in_float32(problem):
    student, teacher, weights, head = problem
    low = [t.bfloat16() for t in (student, teacher)]
    matrix = head(torch.eye(7, dtype=torch.float64)).T.bfloat16()
    loss = chunked_kl(*low, weights.float(), lambda h: h @ matrix.T)
    expected = (weights * brute(*((t @ matrix.T).double() for t in low), 1.0)).sum()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_no_more_rows_of_logits_exist_than_a_chunk_has_and_none_is_kept():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 97, bias=False).requires_grad_(False)
    student, teacher = torch.randn(64, 8, requires_grad=True), torch.randn(64, 8)
    kept = []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with RowsOfWidth(97) as seen, saving:
        loss = chunked_kl(student, teacher, torch.ones(64), head, chunk=16)
        inside = len(kept)
        loss.backward()
    assert seen.rows == 16
    weight = (8, 97)  # the head's own, transposed
    assert {tuple(shape) for shape in kept if shape[-1] == 97} <= {weight}
    assert inside > 0


def test_a_sequence_counts_the_same_however_long_it_is():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    expected = torch.tensor([[0.125, 0.125, 0.125, 0.125], [0.25, 0.25, 0, 0]])
    torch.testing.assert_close(target_weights(mask), expected)


def test_by_token_every_target_of_the_batch_counts_the_same():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    expected = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]) / 6
    torch.testing.assert_close(target_weights(mask, "token"), expected)


def test_both_averages_agree_when_all_lengths_are_equal():
    mask = torch.ones(3, 7, dtype=torch.bool)
    torch.testing.assert_close(target_weights(mask), target_weights(mask, "token"))


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_a_sequence_without_targets_weighs_nothing(average):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    weights = target_weights(mask, average)
    assert weights[1].tolist() == [0, 0]
    assert bool(weights.isfinite().all())


def test_the_kl_is_the_forward_one(problem):
    student, teacher, weights, head = problem
    there = chunked_kl(student, teacher, weights, head)
    back = chunked_kl(teacher, student, weights, head)
    kl = F.kl_div(head(student).log_softmax(-1), head(teacher).softmax(-1), reduction="none").sum(1)
    torch.testing.assert_close(there, (weights * kl).sum())
    assert abs(float(there - back)) > 0.01


def distributions(scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two log-distributions (200, 31) in float64, the further apart the larger the scale."""
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, 200, 31, generator=generator, dtype=torch.float64)
    return log_distribution(3 * first), log_distribution(3 * first + scale * noise)


def test_esap_is_the_sum_of_the_smaller_probabilities_and_1_less_the_total_variation():
    log_p, log_q = distributions(2.0)
    p, q = log_p.exp(), log_q.exp()
    found = esap_of(log_p, log_q)
    torch.testing.assert_close(found, torch.minimum(p, q).sum(-1), rtol=1e-12, atol=1e-12)
    largest = (p - q).clamp(min=0).sum(-1)  # the event on which they differ most
    torch.testing.assert_close(found, 1 - largest, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, esap_of(log_q, log_p), rtol=0, atol=1e-15)


def test_esap_is_1_where_distributions_are_equal_and_0_where_they_share_no_word():
    log_p, _ = distributions(0.0)
    assert torch.equal(esap_of(log_p.float(), log_p.float()), torch.ones(200))
    certain = torch.eye(31).log()
    assert not esap_of(certain, certain.roll(1, 0)).any()


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 4.0])
def test_esap_and_the_kl_obey_the_inequality_of_pinsker(scale):
    log_p, log_q = distributions(scale)
    kl, esap = kl_of(log_p, log_q), esap_of(log_p, log_q)
    assert bool(((esap >= 0) & (esap <= 1)).all())
    assert bool((1 - esap <= (kl / 2).sqrt() + 1e-12).all())
    assert float(esap.mean()) < 1

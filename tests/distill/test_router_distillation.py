import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from families import CONFIGS, tiny
from rerail.distill.router_distillation import RouterDistillation
from rerail.distill.settings import RouterKD
from rerail.distill.trainable import master_copies
from rerail.plan.apply import apply_plan
from rerail.plan.plan import Plan
from rerail.teacher.hidden_states import CachedTeacher, LiveTeacher, final_hidden_states
from rerail.teacher.kl import chunked_kl
from students import blocks, merged, sliced
from watching import RowsOfWidth


@contextlib.contextmanager
def distillation(student, teacher, **settings):
    """Yield a module without a trainer, and its masters."""
    with master_copies(student, "router_rows") as trained:
        yield RouterDistillation(student, teacher, RouterKD(**settings), trained, 10), trained


def batch_of(text, *index):
    chosen = torch.tensor(index or range(len(text)))
    return {"input_ids": text.input_ids[chosen], "mask": text.mask[chosen], "index": chosen}


def loss_and_gradients(student, teacher, text, **settings):
    with distillation(student, teacher, **settings) as (module, trained):
        loss = module.loss(batch_of(text))
        loss.backward()
        return float(loss.detach()), [p.grad.clone() for p in trained.values()]


@pytest.mark.parametrize("average", ["sequence", "token"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_loss_and_row_gradients_are_those_of_the_definition(family, average):
    teacher = tiny(family)
    student, text, tau = sliced(teacher), blocks(4, 9), 1.7
    settings = {"average": average, "temperature": tau, "chunk": 5}
    loss, found = loss_and_gradients(student, LiveTeacher(teacher), text, **settings)
    with master_copies(student, "router_rows") as trained:
        per_sequence, counts = [], []
        for ids, mask in zip(text.input_ids, text.mask, strict=True):
            real = ids[mask][None]
            z_s, z_t = (m.model(real, use_cache=False).logits[0, :-1] for m in (student, teacher))
            p, q = ((z.double() / tau).log_softmax(-1) for z in (z_t, z_s))
            per_sequence.append(tau**2 * (p.exp() * (p - q)).sum())
            counts.append(int(mask.sum()) - 1)
        assert len(set(counts)) > 1
        if average == "sequence":
            means = [s / n for s, n in zip(per_sequence, counts, strict=True)]
            expected = torch.stack(means).mean()
        else:
            expected = torch.stack(per_sequence).sum() / sum(counts)
        expected.backward()
        expected = float(expected.detach())
        gradients = [p.grad for p in trained.values()]
    assert loss == pytest.approx(expected, rel=1e-4)
    assert max(float(g.abs().max()) for g in gradients) > 1e-4
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "gpt_oss"])
def test_more_padding_changes_neither_loss_nor_gradient(family):
    teacher = tiny(family)
    student, short = sliced(teacher), blocks(3, 8)
    longer = blocks(3, 13)
    longer.input_ids[:, :8], longer.mask[:, :8] = short.input_ids, short.mask
    longer.input_ids[:, 8:], longer.mask[:, 8:] = 7, False
    results = [loss_and_gradients(student, LiveTeacher(teacher), t) for t in (short, longer)]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


def test_an_uncompressed_student_has_no_loss_and_no_gradient():
    teacher = tiny("qwen3_moe")
    student = apply_plan(teacher, Plan())
    loss, gradients = loss_and_gradients(student, LiveTeacher(teacher), blocks(4, 9))
    assert loss == 0.0
    assert not any(g.any() for g in gradients)


def test_the_loss_of_a_lossy_student_falls_on_a_repeated_batch():
    teacher = tiny("qwen3_moe")
    batch = batch_of(blocks(4, 9))
    with distillation(merged(teacher), LiveTeacher(teacher)) as (module, trained):
        adam = torch.optim.AdamW(trained.values(), lr=1e-2)
        losses = []
        for _ in range(30):
            adam.zero_grad()
            loss = module.loss(batch)
            loss.backward()
            adam.step()
            losses.append(float(loss.detach()))
    assert losses[0] > 0.01
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("family", "renormalises"), [("qwen3_moe", True), ("mixtral", True), ("olmoe", False)]
)
def test_only_the_rows_that_a_token_selects_get_gradient_under_renormalisation(
    family, renormalises
):
    teacher = tiny(family)
    student = merged(teacher)
    chosen, text = [], blocks(1, 2, padded=False)
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1][0]))
        for layer in student.layers
    ]
    _, gradients = loss_and_gradients(student, LiveTeacher(teacher), text)
    for hook in hooks:
        hook.remove()
    for slots, gradient in zip(chosen, gradients, strict=True):
        rows = gradient.abs().amax(dim=1)
        others = torch.ones(8, dtype=torch.bool)
        others[slots] = False
        assert float(rows[slots].min()) > 1e-7
        share = float(rows[others].max() / rows[slots].max())
        assert share < 1e-5 if renormalises else share > 1e-3


@pytest.mark.parametrize(("renormalises", "moves"), [(True, False), (False, True)])
def test_top_1_has_a_gradient_only_without_renormalisation(renormalises, moves):
    teacher = tiny("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=renormalises)
    student, text = merged(teacher), blocks(2, 9, padded=False)
    rows = [layer.router_rows.requires_grad_() for layer in student.layers]
    states = [m.hidden(text.input_ids).flatten(0, 1) for m in (student, teacher)]
    chunked_kl(states[0], states[1].detach(), torch.ones(18) / 18, student.head).backward()
    largest = max(float(r.grad.abs().max()) for r in rows)
    assert largest > 1e-4 if moves else largest < 1e-7


def test_the_graph_begins_at_the_first_router_and_ends_at_no_expert():
    teacher = tiny("qwen3_moe")
    student, text = sliced(teacher), blocks(2, 8, padded=False)
    body = student.model.base_model
    seen = {}
    watched = {"embeddings": body.embed_tokens, "attention": body.layers[0].self_attn}
    watched |= {"router": student.layers[0].router, "second": body.layers[1].self_attn}
    for name, module in watched.items():
        module.register_forward_hook(
            lambda _, inputs, out, name=name: seen.update(
                {
                    name: (out[-1] if name == "router" else out[0]).requires_grad
                    or bool(name == "router" and out[1].requires_grad)
                }
            )
        )
    with distillation(student, LiveTeacher(teacher)) as (module, trained):
        module.loss(batch_of(text)).backward()
        kept = {id(p) for p in trained.values()}
        others = [p for p in student.model.parameters() if id(p) not in kept]
        assert [p for p in others if p.grad is not None] == []
        assert all(p.grad is not None for p in trained.values())
    assert seen == {"embeddings": False, "attention": False, "router": True, "second": True}


def flops(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_a_step_costs_two_forwards_and_three_heads_with_a_cached_teacher():
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 6}
    teacher = tiny("qwen3_moe", vocab_size=512, **sizes)
    student, text = sliced(teacher), blocks(4, 16, padded=False)
    cached = CachedTeacher(final_hidden_states(teacher, list(text.batches(4))))
    states = cached.states[:, :-1].flatten(0, 1)
    body = flops(lambda: student.hidden(text.input_ids))
    head = flops(lambda: student.head(states))
    costs = {}
    for name, source in (("cached", cached), ("live", LiveTeacher(teacher))):
        with distillation(student, source) as (module, _):
            costs[name] = flops(lambda module=module: module.loss(batch_of(text)).backward())
    floor = 2 * body + 3 * head
    assert 0.9 * floor < costs["cached"] < 1.02 * floor
    assert costs["live"] - costs["cached"] == flops(lambda: teacher.hidden(text.input_ids))


def test_no_logits_of_all_tokens_exist_and_none_wait_for_the_backward():
    teacher = tiny("qwen3_moe", vocab_size=97)
    student, text = sliced(teacher), blocks(4, 16, padded=False)
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with distillation(student, LiveTeacher(teacher), chunk=20) as (module, _):
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with saving, RowsOfWidth(97) as seen:
            module.loss(batch_of(text)).backward()
    assert seen.rows == 20
    head = (16, 97)  # the head's own weight, transposed
    assert {shape for shape in kept if shape[-1] == 97} <= {head}
    experts = {tuple(layer.stack().gate.shape) for layer in student.layers}
    assert len(kept) > 10
    assert not experts & set(kept)


def test_lightning_sees_the_masters_and_nothing_else():
    teacher = tiny("qwen3_moe")
    with distillation(sliced(teacher), LiveTeacher(teacher)) as (module, trained):
        assert list(module.state_dict()) == [
            "masters.layers_0_router_weight",
            "masters.layers_1_router_weight",
        ]
        assert {id(p) for p in module.parameters()} == {id(p) for p in trained.values()}


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1]),
        ("cosine", 0, [1.0, None, None, 0.55, None]),
        ("cosine", 2, [0.5, None, None, 0.55, None]),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule, warmup, expected):
    teacher = tiny("qwen3_moe")
    options = {"schedule": schedule, "warmup": warmup, "learning_rate": 2.0}
    with distillation(sliced(teacher), LiveTeacher(teacher), **options) as (module, _):
        module.steps = 6
        made = module.configure_optimizers()
        adam, rates = made["optimizer"], []
        for _ in range(7):
            rates.append(adam.param_groups[0]["lr"] / 2.0)
            adam.step()
            made["lr_scheduler"]["scheduler"].step()
    for found, wanted in zip(rates, expected, strict=False):
        assert wanted is None or found == pytest.approx(wanted)
    assert rates[6] == pytest.approx(0.1 if schedule == "cosine" else 1)
    assert made["lr_scheduler"]["interval"] == "step"


def test_validation_counts_tokens_not_batches():
    teacher = tiny("qwen3_moe")
    student, text = sliced(teacher), blocks(5, 9)
    with distillation(student, LiveTeacher(teacher), temperature=1.3) as (module, _):
        for index in ((0, 1), (2, 3), (4,)):
            batch = batch_of(text, *index)
            module.validation_step({**batch, "weights": batch["mask"][:, 1:].float()}, 0)
        total, count = module._validation
    z_s, z_t = (m.hidden(text.input_ids, text.mask) for m in (student, teacher))
    p, q = ((m.head(z) / 1.3).log_softmax(-1) for m, z in ((teacher, z_t), (student, z_s)))
    kl = 1.3**2 * (p.exp() * (p - q)).sum(-1)[:, :-1][text.mask[:, 1:]]
    assert count == len(kl) == 3 * 8 + 2 * 5
    assert total == pytest.approx(float(kl.sum()), rel=1e-4)

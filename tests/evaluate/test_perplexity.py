import dataclasses

import pytest
import torch

from families import CONFIGS, tiny
from rerail.evaluate.perplexity import score_blocks
from students import blocks, merged, sliced
from watching import RowsOfWidth


@pytest.fixture(scope="module")
def text():
    return blocks(5, 11)


@pytest.mark.parametrize("family", CONFIGS)
def test_nll_is_the_loss_that_transformers_computes(family, text):
    model = tiny(family)
    scores = score_blocks(model, list(text.batches(2)), chunk=7)
    for i, (ids, mask) in enumerate(zip(text.input_ids, text.mask, strict=True)):
        labels = ids.masked_fill(~mask, -100)[None]
        out = model.model(ids[None], attention_mask=mask[None].long(), labels=labels)
        counted = int(mask.sum()) - 1
        assert int(scores.tokens[i]) == counted
        assert float(scores.nll[i]) == pytest.approx(float(out.loss) * counted, rel=1e-5)


def test_the_teacher_agrees_with_itself_and_returns_its_states(text):
    model = tiny("qwen3_moe")
    scores = score_blocks(model, list(text.batches(2)))
    assert not scores.kl.any()
    assert torch.equal(scores.esap, scores.tokens)
    assert torch.equal(scores.agree, scores.tokens)
    assert scores.hidden is not None
    torch.testing.assert_close(
        scores.hidden[text.mask], model.hidden(text.input_ids, text.mask)[text.mask]
    )
    again = score_blocks(model, list(text.batches(2)), scores.hidden)
    assert not again.kl.any()
    assert again.hidden is None


@pytest.mark.parametrize("chunk", [1, 6, 1000])
@pytest.mark.parametrize("make", [sliced, merged])
def test_kl_esap_and_agreement_are_those_of_full_logits(text, make, chunk):
    teacher = tiny("granitemoe")
    student = make(teacher)
    states = score_blocks(teacher, list(text.batches(2))).hidden
    scores = score_blocks(student, list(text.batches(2)), states, chunk=chunk)
    for i, (ids, mask) in enumerate(zip(text.input_ids, text.mask, strict=True)):
        z_t, z_s = (m.model(ids[mask][None]).logits[0, :-1].double() for m in (teacher, student))
        p, q = z_t.log_softmax(-1), z_s.log_softmax(-1)
        kl = (p.exp() * (p - q)).sum()
        assert float(scores.kl[i]) == pytest.approx(float(kl), rel=1e-3, abs=1e-6)
        esap = torch.minimum(p.exp(), q.exp()).sum()
        assert float(scores.esap[i]) == pytest.approx(float(esap), rel=1e-5)
        assert int(scores.agree[i]) == int((z_t.argmax(-1) == z_s.argmax(-1)).sum())
    assert float(scores.kl.min()) > 0
    assert bool((scores.esap < scores.tokens).all())
    assert 0 < float(scores.agree.sum()) < float(scores.tokens.sum())


def test_batches_change_nothing(text):
    teacher = tiny("mixtral")
    student = sliced(teacher)
    states = score_blocks(teacher, list(text.batches(5))).hidden
    singles, together = (score_blocks(student, list(text.batches(n)), states) for n in (1, 5))
    for field in dataclasses.fields(singles)[:5]:
        torch.testing.assert_close(
            getattr(singles, field.name), getattr(together, field.name), rtol=1e-5, atol=1e-5
        )


def test_only_a_chunk_of_logits_exists_at_once(text):
    model = tiny("qwen3_moe", vocab_size=97)
    with RowsOfWidth(97) as seen:
        score_blocks(model, list(text.batches(5)), chunk=20)
    assert seen.rows == 20


def test_a_progress_bar_sees_every_batch(text):
    seen = []

    def watch(batches):
        for batch in batches:
            seen.append(len(batch[0]))
            yield batch

    score_blocks(tiny("qwen3_moe"), list(text.batches(2)), progress=watch)
    assert seen == [2, 2, 1]

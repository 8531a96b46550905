import torch

from families import tiny, tokens
from rerail.statistics.collect import collect
from rerail.statistics.segments import Segments
from rerail.statistics.token_sample import TokenSample


def filled(statistic: TokenSample, step: int, length: int = 24) -> torch.Tensor:
    ids = tokens(9, length)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[7:, length // 2 :] = False
    batches = list(zip(ids.split(step), mask.split(step), strict=True))
    return collect(tiny("qwen3_moe"), batches, (statistic,)).tensors[1][statistic.name]


def test_whole_segments_are_kept_whatever_the_batches() -> None:
    some = Segments(7, 8)
    first, second = filled(some, 9), filled(some, 2)
    assert first.shape == second.shape == (7 * 8, 18)
    labels = Segments.labels(first)
    assert torch.bincount(labels).tolist() == [8] * 7
    assert torch.equal(labels, Segments.labels(second))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_rows_of_a_segment_are_neighbours_in_the_text() -> None:
    everything = filled(Segments(10**6, 8), 9)
    assert len(everything) == 7 * 24 + 2 * 12
    ids = tokens(9, 24)
    model, seen = tiny("qwen3_moe"), []
    hook = model.layers[1].experts.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.hidden(ids)
    hook.remove()
    blocks = [b for row in seen[0].view(9, 24, 16)[:7] for b in row.split(8)]
    hidden, labels = Segments.hidden(everything), Segments.labels(everything)
    found = 0
    for label in labels.unique():
        segment = hidden[labels == label]
        found += any(
            len(segment) == 8 and torch.allclose(segment, block, atol=1e-5) for block in blocks
        )
    assert found == 7 * 3


def test_fewer_segments_are_a_part_of_more() -> None:
    few, more = filled(Segments(3, 8), 9), filled(Segments(5, 8), 9)
    assert torch.equal(few, more[: len(few)])


def test_no_rows_have_no_labels() -> None:
    assert Segments.labels(torch.zeros(0, 18)).shape == (0,)

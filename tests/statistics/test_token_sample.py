import pytest
import torch
from torch import Tensor

from families import tiny, tokens
from measuring import Seen, batches
from rerail.statistics.collect import Batch, collect
from rerail.statistics.statistic import RoutedTokens
from rerail.statistics.token_sample import TokenSample

WORD = (1 << 64) - 1


def key(position: int) -> int:
    """The upper 48 bits of splitmix64, in Python's own integers."""
    z = ((position + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return (z ^ (z >> 31)) >> 16


def keys_of(rows: Tensor) -> list[int]:
    return [(int(a) << 24) + int(b) for a, b in rows[:, :2].tolist()]


def test_the_rows_with_the_smallest_hashes_are_kept_in_their_order() -> None:
    model = tiny("qwen3_moe")
    seen = Seen(model)
    found = collect(model, batches(), [TokenSample(20)])
    valid = torch.cat([mask.flatten() for _, mask in batches()])
    for i, held in found.tensors.items():
        hidden = torch.cat([args[0] for args in seen.handed[i] if len(args[0]) == 32])[:96]
        expected = sorted(valid.nonzero().flatten().tolist(), key=key)[:20]
        assert keys_of(held["token_sample_20"]) == [key(p) for p in expected]
        assert torch.equal(TokenSample.hidden(held["token_sample_20"]), hidden[expected])


def test_the_first_step_of_the_hash_is_the_published_one() -> None:
    """Splitmix64 seeded with 0 begins with e220a8397b1dcdaf, 6e789e6aa1b965f4 (Vigna)."""
    assert [key(0), key(1)] == [0xE220A8397B1DCDAF >> 16, 0x6E789E6AA1B965F4 >> 16]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_any_cut_of_the_text_keeps_the_same_rows(size: int) -> None:
    """Each batch is a shard of its own here; only its first position tells where it stands."""
    model, statistic = tiny("qwen3_moe"), TokenSample(13)
    whole = collect(model, batches(), [statistic])
    shards, first = [], 0
    for batch in batches(size=size):
        shards.append(collect(model, [batch], [statistic], first=first))
        first += batch[0].numel()
    merged = shards[-1]
    for shard in shards[-2::-1]:
        merged = shard.merge(merged, [statistic])
    for i, held in whole.tensors.items():
        rows = merged.tensors[i]["token_sample_13"]
        assert keys_of(rows) == keys_of(held["token_sample_13"])
        torch.testing.assert_close(rows, held["token_sample_13"], atol=1e-5, rtol=1e-5)


def test_a_short_text_gives_fewer_rows_and_masked_tokens_none() -> None:
    model = tiny("qwen3_moe")
    ids = tokens(1, 10)
    mask = torch.arange(10).expand(1, 10) < 7
    rows = collect(model, [(ids, mask)], [TokenSample(50)]).tensors[0]["token_sample_50"]
    assert rows.shape == (7, 18)
    assert sorted(keys_of(rows)) == sorted(key(p) for p in range(7))


def test_no_text_gives_no_rows() -> None:
    none: list[Batch] = []
    rows = collect(tiny("qwen3_moe"), none, [TokenSample(5)]).tensors[0]["token_sample_5"]
    assert rows.shape == (0, 18)
    assert TokenSample.hidden(rows).shape == (0, 16)


def test_keys_of_far_positions_survive_float32() -> None:
    position = torch.tensor([0, 1, 2**31, 2**40 + 3])
    hidden = torch.arange(4.0).unsqueeze(1)
    index = torch.zeros(4, 1, dtype=torch.int64)
    rows = TokenSample(4).measure(
        RoutedTokens(hidden=hidden, index=index, gates=hidden, position=position, num_experts=1)
    )
    expected = sorted((key(p), float(i)) for i, p in enumerate(position.tolist()))
    assert list(zip(keys_of(rows), rows[:, 2].tolist(), strict=True)) == expected

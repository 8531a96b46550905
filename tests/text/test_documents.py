import random
from collections import Counter

import pytest

from rerail.text.documents import SPLITS, Document, split_of, without_near_duplicates


def words(seed: int, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    return [f"word{rng.randrange(10**6)}" for _ in range(count)]


def a_name(split: str, nth: int = 0) -> str:
    return [f"d{i}" for i in range(500) if split_of(f"d{i}") == split][nth]


def test_names_split_70_20_10():
    counts = Counter(split_of(f"module.name{i}") for i in range(20_000))
    for split, share in zip(SPLITS, (0.7, 0.2, 0.1), strict=True):
        assert counts[split] / 20_000 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("1790-Washington-1", "calibration"),
        ("1973-Nixon-4", "heldout"),
        ("1945-Roosevelt-1", "calibration"),
        ("torch.xpu.device_of", "heldout"),
        ("transformers.vision_utils", "train"),
        ("sklearn.compose._column_transformer.ColumnTransformer.get_params", "calibration"),
    ],
)
def test_the_split_of_a_name_never_changes_because_models_were_trained_on_it(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(("shared", "kept"), [(1.0, False), (0.8, False), (0.2, True), (0.0, True)])
@pytest.mark.parametrize(
    ("first", "second"),
    [("train", "calibration"), ("train", "heldout"), ("calibration", "heldout")],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_what_an_earlier_split_says_is_dropped_from_later_ones(
    shared, kept, first, second, backwards
):
    text = words(1)
    cut = int(shared * len(text))
    other = text[:cut] + words(2)[cut:]
    early = Document(a_name(first), " ".join(text))
    late = Document(a_name(second), "  \n".join(other).upper())
    given = [late, early] if backwards else [early, late]
    assert without_near_duplicates(given) == ([early, late] if kept else [early])


def test_a_document_made_of_pieces_of_several_training_documents_is_dropped():
    pieces = [Document(a_name("train", i), " ".join(words(i))) for i in range(4)]
    mosaic = Document(a_name("heldout"), " ".join(w for i in range(4) for w in words(i)[:100]))
    kept = without_near_duplicates([mosaic, *pieces])
    assert len(kept) == 4
    assert mosaic not in kept


@pytest.mark.parametrize("text", ["two words", "one two three four five six seven eight nine ten"])
def test_short_copies_are_found_too(text):
    early, late = Document(a_name("train"), text), Document(a_name("heldout"), text)
    assert without_near_duplicates([late, early]) == [early]


def test_what_is_held_out_has_no_say_in_what_is_trained_on():
    rng = random.Random(0)
    pool = [words(i, 60) for i in range(300)]
    documents = [
        Document(f"d{i}", " ".join(w for part in rng.sample(pool, 2) for w in part))
        for i in range(300)
    ]
    both = without_near_duplicates(documents)
    for count in (1, 2):
        early = SPLITS[:count]
        alone = without_near_duplicates([d for d in documents if split_of(d.name) in early])
        assert alone == [d for d in both if split_of(d.name) in early]
        assert 0 < len(alone) < len(both) < len(documents)

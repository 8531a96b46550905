"""Rows: paired errors do not depend on the order in which texts were scored or read back."""

import numpy as np

from rerail.run.rows import layer_means, pooled, recovery_columns


def scores(shift: float, names: tuple[str, ...]) -> dict:
    found = {}
    for name in names:
        generator = np.random.default_rng(len(name))
        nll = generator.normal(50, 20, 30) + shift * generator.normal(10, 1, 30)
        found[name] = {"nll": nll.tolist(), "tokens": [15] * 30}
    return {**found, "seconds": 1.0}


def test_blocks_are_pooled_in_the_order_of_the_texts_names():
    one, other = scores(1, ("speeches", "docs")), scores(1, ("docs", "speeches"))
    assert np.array_equal(pooled(one, "nll"), pooled(other, "nll"))
    assert len(pooled(one, "nll")) == 60


def test_a_recovery_is_paired_whatever_the_order_of_the_texts():
    texts = ("speeches", "docs")
    compressed, repaired = scores(1, texts), scores(0.5, texts)
    expected = recovery_columns(scores(0, texts), compressed, repaired)
    assert expected["recovery_se"] < 0.02
    assert recovery_columns(scores(0, texts[::-1]), compressed, repaired) == expected


def test_each_text_has_a_recovery_of_its_own_by_its_own_blocks():
    texts = ("speeches", "docs")
    stages = [scores(shift, texts) for shift in (0, 1, 0.5)]
    found = recovery_columns(*stages)["nll_by"]
    for name in texts:
        alone = recovery_columns(*({name: s[name], "seconds": 1.0} for s in stages))
        assert found[name]["recovery"] == alone["recovery"] is not None
        assert found[name]["recovery_se"] == alone["recovery_se"]
        assert found[name]["tokens"] == 450
    equal = recovery_columns(stages[0], stages[0], stages[2])["nll_by"]
    assert equal["docs"]["recovery"] is None


def routed(tokens: int, **layer) -> dict:
    return {"tokens": [tokens], "layers": [{"layer": 3, "load_entropy": 0.5, **layer}]}


def test_loads_are_weighted_by_tokens_and_none_where_an_expert_is_gone():
    texts = {"a": routed(10, load=[0.8, 0.2, None]), "b": routed(30, load=[0.4, 0.6, None])}
    expected = {"layer": 3, "load_entropy": 0.5, "load": [0.5, 0.5, None]}
    assert layer_means({**texts, "seconds": 1.0}) == [expected]


def test_what_an_earlier_version_scored_without_loads_is_still_a_row():
    old = routed(10, routing_changed=0.25)
    expected = {"layer": 3, "routing_changed": 0.25, "load_entropy": 0.5}
    assert layer_means({"a": old}) == [expected]
    assert layer_means({"a": old, "b": routed(10, routing_changed=0.25, load=[1.0])}) == [expected]

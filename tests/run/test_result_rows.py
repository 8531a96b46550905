"""Rows: paired errors do not depend on the order in which texts were scored or read back."""

import json

import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation

from rerail.evaluate.scores import LayerRouting, Scores, TextScores
from rerail.run.rows import layer_column, recovery_columns, score_columns


def text_scores(nll: list[float], tokens: list[float], layers: list[LayerRouting]) -> TextScores:
    zeros = [0.0] * len(nll)
    return TextScores(nll, tokens, zeros, zeros, zeros, active=2.0, layers=layers)


def scores(shift: float, names: tuple[str, ...]) -> Scores:
    texts = {}
    for name in names:
        generator = np.random.default_rng(len(name))
        nll = generator.normal(50, 20, 30) + shift * generator.normal(10, 1, 30)
        texts[name] = text_scores(nll.tolist(), [15.0] * 30, [])
    return Scores(texts)


def test_blocks_are_pooled_in_the_order_of_the_texts_names():
    one, other = scores(1, ("speeches", "docs")), scores(1, ("docs", "speeches"))
    assert np.array_equal(one.pooled("nll"), other.pooled("nll"))
    assert len(one.pooled("nll")) == 60
    assert one.tokens == 900


def test_a_recovery_is_paired_whatever_the_order_of_the_texts():
    texts = ("speeches", "docs")
    compressed, repaired = scores(1, texts), scores(0.5, texts)
    expected = recovery_columns(scores(0, texts), compressed, repaired)
    assert expected["recovery_se"] < 0.02
    assert recovery_columns(scores(0, texts[::-1]), compressed, repaired) == expected


def test_each_text_has_a_recovery_of_its_own_by_its_own_blocks():
    texts = ("speeches", "docs")
    stages = [scores(shift, texts) for shift in (0, 1, 0.5)]
    columns = recovery_columns(*stages)["nll_by"]
    for name in texts:
        alone = recovery_columns(*(Scores({name: s.texts[name]}) for s in stages))
        assert columns[name]["recovery"] == alone["recovery"] is not None
        assert columns[name]["recovery_se"] == alone["recovery_se"]
        assert columns[name]["tokens"] == 450
    equal = recovery_columns(stages[0], stages[0], stages[2])["nll_by"]
    assert equal["docs"]["recovery"] is None


def routed(tokens: float, load: list[float | None], moved: float | None = None) -> TextScores:
    return text_scores([1.0], [tokens], [LayerRouting(3, 0.5, load, moved)])


def test_loads_are_weighted_by_tokens_and_none_where_an_expert_is_gone():
    texts = {"a": routed(10, [0.8, 0.2, None]), "b": routed(30, [0.4, 0.6, None])}
    [layer] = Scores(texts).layers()
    assert layer == LayerRouting(3, 0.5, [0.5, 0.5, None])
    assert layer_column(layer) == {
        "layer": 3,
        "changed_choices": 0.0,
        "changed_mass": 0.0,
        "load_entropy": 0.5,
        "load": [0.5, 0.5, None],
    }


def test_moved_routing_is_weighted_too():
    [layer] = Scores({"a": routed(10, [1.0], 0.5), "b": routed(30, [1.0], 0.1)}).layers()
    assert layer.routing_changed == pytest.approx(0.2)
    assert layer_column(layer)["routing_changed"] == layer.routing_changed


def test_changed_choices_are_weighted_by_tokens_and_average_over_layers():
    def one(tokens: float, *shares: float) -> TextScores:
        layers = [LayerRouting(i, 0.5, [1.0], 0.1, s, s / 2) for i, s in enumerate(shares)]
        return text_scores([1.0], [tokens], layers)

    both = Scores({"a": one(10, 0.8, 0.0), "b": one(30, 0.4, 0.2)})
    assert [layer.changed_choices for layer in both.layers()] == pytest.approx([0.5, 0.15])
    columns = score_columns(both)
    assert columns["changed_choices"] == pytest.approx(0.325)
    assert columns["changed_mass"] == pytest.approx(0.1625)


def test_scores_survive_json_and_a_field_that_does_not_fit_names_itself():
    before = Scores({"a": routed(10, [0.5, None, 0.5], 0.25)})
    plain = json.loads(json.dumps(before.plain()))
    assert Scores.from_plain(plain, {}).texts == before.texts
    with pytest.raises(TypeError, match="'kl'"):
        Scores.from_plain({"a": {n: v for n, v in plain["a"].items() if n != "kl"}}, {})
    with pytest.raises(BeartypeCallHintViolation, match="active"):
        Scores.from_plain({"a": {**plain["a"], "active": "two"}}, {})


def test_scores_print_as_their_means():
    assert repr(scores(0, ("docs",))).startswith("Scores(nll=")
    assert repr(scores(0, ("docs",))).endswith("tokens=450)")

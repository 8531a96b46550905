import pytest

from rerail.distill.settings import RouterKD
from rerail.errors import InputError


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("learning_rate", 0.0, "must be greater than 0"),
        ("temperature", -1.0, "must be greater than 0"),
        ("epochs", 0, "must be greater than 0"),
        ("batch_size", 0, "must be greater than 0"),
        ("accumulate", 0, "must be greater than 0"),
        ("chunk", 0, "must be greater than 0"),
        ("evaluations", 0, "must be greater than 0"),
        ("weight_decay", -0.1, "must be at least 0"),
        ("warmup", -1, "must be at least 0"),
        ("clip", -1.0, "must be at least 0"),
        ("validation", 0.0, "between 0 and 1"),
        ("validation", 1.0, "between 0 and 1"),
        ("schedule", "linear", "one of constant, cosine"),
        ("average", "mean", "one of sequence, token"),
        ("teacher", "dead", "one of cached, live"),
        ("trains", "experts", r"one of router_rows, router_rows\+bias"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(name, value, sentence):
    with pytest.raises(InputError, match=f"distill.{name}={value!r} .*{sentence}"):
        RouterKD(**{name: value})


def test_the_defaults_are_the_papers():
    s = RouterKD()
    found = (s.learning_rate, s.epochs, s.batch_size, s.accumulate, s.temperature, s.average)
    assert found == (5e-5, 1, 2, 4, 1.0, "sequence")

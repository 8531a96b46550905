"""Every field of every class of a configuration is checked against its annotation."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from rerail.config.fields import check_value
from rerail.config.instantiate import build
from rerail.config.presets import config_root
from rerail.config.trust import BASES
from rerail.errors import InputError

CLASSES = sorted(
    {
        (group, target)
        for group in BASES
        for path in (config_root() / "conf" / group).glob("*.yaml")
        if (target := OmegaConf.load(path).get("_target_"))
    }
)


def wrong_for(hint: Any) -> list[Any]:
    """Values that do not fit an annotation: for a list, mapping, bool, number, word and null."""
    origin, args = get_origin(hint), get_args(hint)
    kinds = {origin or hint} | {get_origin(one) or one for one in args}
    text = str in kinds
    wrong: list[Any] = [{"a": object()}, [object()]]
    if not any(isinstance(k, type) and issubclass(k, Sequence) and k is not str for k in kinds):
        wrong.append(["slice"])
    if bool not in kinds and origin is not Literal:
        wrong.append(True)
    if float in kinds:
        wrong += [math.inf, -math.inf, math.nan, 10**400, "1.0"]
    if int in kinds and float not in kinds:
        wrong += [1.5, math.inf]
    if bool in kinds and int not in kinds:
        wrong += [1, 0]
    return wrong if text else [*wrong, "no such word"]


@pytest.mark.parametrize(("group", "target"), CLASSES)
def test_every_field_refuses_what_its_annotation_does_not_take(group, target):
    node = {"_target_": target}
    made = get_class(target)
    hints = get_type_hints(made)
    required = {
        field.name: "x"
        for field in dataclasses.fields(made)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for field in dataclasses.fields(made):
        hint = hints[field.name]
        assert get_origin(hint) is not ClassVar
        for value in wrong_for(hint):
            order = {
                **node,
                field.name: value,
                **{k: v for k, v in required.items() if k != field.name},
            }
            with pytest.raises(InputError, match=rf"^{group}\.\w+"):
                build(order, group)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (["slice"], Literal["slice", "mask"], "is not one of slice, mask; to sweep over several"),
        ([0.25, 0.5], float, "x=[0.25, 0.5] is not float; to sweep over several values, use -m"),
        (["a", 1], Sequence[str], "x.1=1 is not str"),
        ("abc", Sequence[str], "x='abc' is not a list of str"),
        ({"a": 1.5}, Mapping[str, int | str], "x.a=1.5 is not int or str"),
        ({1: "a"}, Mapping[str, str], "x (a name)=1 is not str"),
        (True, int | None, "x=True is not int or null"),
        (math.inf, float, "x=inf is not a finite number"),
        (1, bool, "x=1 is not bool"),
        ([True], Sequence[int] | None, "x.0=True is not int"),
    ],
)
def test_the_sentence_names_the_innermost_value_and_what_fits(value, hint, message):
    with pytest.raises(InputError) as refused:
        check_value(value, hint, "x")
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, float),
        (None, float | None),
        (["a"], Sequence[str]),
        ((1, 2), tuple[int, ...]),
        ({"": 0, "b": "cpu"}, str | Mapping[str, str | int] | None),
        ("mask", Literal["slice", "mask"]),
        (Path("a"), Path | None),
    ],
)
def test_what_fits_is_taken(value, hint):
    check_value(value, hint, "x")

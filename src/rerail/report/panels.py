"""Settings as panels of figures: apart by model, by paradigm where they are many, in parts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rerail.report.cells import Setting, by_model, by_paradigm
from rerail.report.drawing import panels
from rerail.report.labels import varying


class Panel(NamedTuple):
    """The settings of one figure.

    Attributes:
        title: model, paradigm and part.
        paradigm: what the figure is folded under; empty where settings are few.
        settings: at most as many as were asked for.
        fields: the columns that vary among all settings of the model.
    """

    title: str
    paradigm: str
    settings: Sequence[Setting]
    fields: Sequence[str]


def panels_of(settings: Sequence[Setting], at_most: int) -> Iterator[Panel]:
    """Yield the panels of all settings, in their order."""
    for model, whole in by_model(settings).items():
        fields = varying(whole)
        for paradigm, group in by_paradigm(whole).items():
            for part, some in panels(group, at_most):
                yield Panel(f"{model}{paradigm and f', {paradigm}'}{part}", paradigm, some, fields)

"""What a page is made of, and the page: one template that escapes every text."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rerail.report.chart import Chart

FEW = 24  # rows that need no folding


class Field(NamedTuple):
    """One field of a table: its text, a smaller line below it, and what it is sorted by."""

    text: str
    note: str = ""
    sort: float | None = None


class Words(NamedTuple):
    """A heading or a paragraph."""

    tag: str
    words: str
    style: str = ""
    kind: str = "words"


class Table(NamedTuple):
    """A table that scrolls by itself; the first field of a row is its header.

    Attributes:
        id: of the table, for its filter.
        find: what the filter suggests and what the rows are; no filter where empty.
        foldable: fold it where it has many rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Field | str]]
    style: str = "sortable"
    id: str = ""
    find: Sequence[str] = ()
    foldable: bool = False
    kind: str = "table"

    @property
    def folded(self) -> str:
        """What it is folded under; empty where it is open."""
        return f"{len(self.rows)} rows" if self.foldable and len(self.rows) > FEW else ""


class Warned(NamedTuple):
    """Sentences that warn, below a lead."""

    lead: str
    sentences: Sequence[str]
    kind: str = "warned"


class Continuation(NamedTuple):
    """What the models of a cell wrote after the prompt, as (stage, text)."""

    title: str
    prompt: str
    texts: Sequence[tuple[str, str]]
    kind: str = "continuation"


class Figures(NamedTuple):
    """Charts side by side."""

    charts: Sequence[Chart]
    kind: str = "figures"


class Folded(NamedTuple):
    """Something that opens at a click, and on paper."""

    title: str
    parts: Sequence[Any]
    kind: str = "folded"


class Section(NamedTuple):
    """A section with a heading; left out where it has no parts."""

    key: str
    title: str
    parts: Sequence[Any]


def figures(charts: Iterable[Chart]) -> list[Figures | Folded]:
    """Return charts side by side, those of a group folded; nothing without any."""
    groups: dict[str, list[Chart]] = {}
    for chart in charts:
        groups.setdefault(chart.group, []).append(chart)
    parts: list[Figures | Folded] = []
    for group, inside in groups.items():
        count = f"{len(inside)} figure" + ("s" if len(inside) > 1 else "")
        grid = Figures(inside)
        parts.append(Folded(f"{group} ({count})", [grid]) if group else grid)
    return parts


def page(title: str, lead: Sequence[str], sections: Iterable[Section]) -> str:
    """Return the whole document: nothing is loaded from anywhere."""
    environment = Environment(
        loader=PackageLoader("rerail.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["svg"] = _drawer()
    shown = [section for section in sections if section.parts]
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, lead=lead, sections=shown)


def _drawer() -> Callable[[Chart], Markup]:
    """Return what draws charts; each has a name of its own, that ids of the page may differ."""
    numbers = itertools.count()
    # matplotlib escapes the texts of its drawings
    return lambda chart: Markup(chart.svg(f"f{next(numbers)}"))

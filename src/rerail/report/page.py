"""Pieces of HTML: every text is escaped here, and nothing is loaded from anywhere."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rerail.report.drawing import Picture

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Shown(NamedTuple):
    """One field of a table: its text, a smaller line below it, and what it is sorted by."""

    text: str
    note: str = ""
    sort: float | None = None


def escaped(value: Any) -> str:
    """Return a value as text that is safe inside an element and inside a quoted attribute."""
    return html.escape("" if value is None else str(value), quote=True)


def tag(name: str, inner: str, **attributes: str) -> str:
    """Return an element around safe HTML; `_` in the names of attributes becomes `-`."""
    said = "".join(
        f' {key.strip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
    )
    return f"<{name}{said}>{inner}</{name}>"


def text(name: str, words: Any, **attributes: str) -> str:
    """Return an element around plain text."""
    return tag(name, escaped(words), **attributes)


def section(title: str, *parts: str, key: str) -> str:
    """Return a section with a heading of level 2; empty without any part."""
    inner = "".join(parts)
    if not inner:
        return ""
    heading = text("h2", title, id=f"{key}-title")
    return tag("section", heading + inner, id=key, aria_labelledby=f"{key}-title")


def table(
    caption: str, columns: Sequence[str], rows: Iterable[Sequence[Shown | str]], **attributes: str
) -> str:
    """Return a table in a box that scrolls by itself; the first field of a row is its header."""
    head = "".join(text("th", column, scope="col") for column in columns)
    body = "".join(tag("tr", "".join(map(_field, row, range(len(row))))) for row in rows)
    inner = (
        tag("caption", text("span", caption)) + tag("thead", tag("tr", head)) + tag("tbody", body)
    )
    box = {"class_": "scroll", "tabindex": "0", "role": "region", "aria_label": caption}
    return tag("div", tag("table", inner, **attributes), **box)


def _field(value: Shown | str, place: int) -> str:
    shown = Shown(value) if isinstance(value, str) else value
    inner = escaped(shown.text) + (text("small", shown.note) if shown.note else "")
    attributes = {} if shown.sort is None else {"data_sort": repr(shown.sort), "class_": "number"}
    if place == 0:
        return tag("th", inner, scope="row", **attributes)
    return tag("td", inner, **attributes)


def figure(picture: Picture) -> str:
    """Return a drawing with its words: a label for screen readers, a caption, and its numbers."""
    drawn = tag("div", picture.svg, class_="drawn", role="img", aria_label=picture.spoken)
    numbers = table(f"Numbers of: {picture.title}", picture.columns, picture.numbers)
    details = tag("details", text("summary", "Numbers") + numbers, class_="numbers")
    heading = text("strong", picture.title)
    caption = tag("figcaption", f"{heading} {escaped(picture.caption)}")
    return tag("figure", caption + drawn + details)


def figures(pictures: Sequence[Picture]) -> str:
    """Return drawings side by side where there is room, those of a group folded; empty without."""
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.group, []).append(picture)
    parts = []
    for group, held in groups.items():
        grid = tag("div", "".join(map(figure, held)), class_="grid")
        count = f"{len(held)} figure" + ("s" if len(held) > 1 else "")
        parts.append(folded(f"{group} ({count})", grid) if group else grid)
    return "".join(parts)


def folded(title: str, inner: str) -> str:
    """Return something that opens at a click, and on paper."""
    return tag("details", text("summary", title) + inner, class_="group")


def search(key: str, label: str, placeholder: str, unit: str) -> str:
    """Return a field that filters the rows of the table with id `key`; shown where scripts run."""
    return tag(
        "div",
        text("label", label, for_=f"{key}-filter")
        + f'<input id="{key}-filter" type="search" data-table="{key}" data-unit="{unit}"'
        f' placeholder="{placeholder}">'
        + text("output", "", for_=f"{key}-filter", aria_live="polite"),
        class_="filter",
        hidden="",
    )


def page(title: str, body: str) -> str:
    """Return the whole document."""
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escaped(title)}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>
{script}</script>
</body>
</html>
"""

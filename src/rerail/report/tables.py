"""What tables of the page show beyond the columns of a row: stages, seeds, differences."""

from collections.abc import Sequence
from typing import Any

from rerail.report.cells import Cell
from rerail.report.frame import Results, varying
from rerail.run.results import COLUMNS
from rerail.run.settings import label_of

FORMATS: dict[type, str] = {float: "{:.4g}", int: "{:,}"}


def by_stage(cell: Cell, name: str) -> tuple[str, str, float | None]:
    """Return the field of a column: once, or stage by stage where the stages differ.

    It is sorted by the last stage.
    """
    values = [row[name] for row in cell.rows if row[name] is not None]
    words = [FORMATS.get(COLUMNS[name].kind, "{}").format(value) for value in values]
    last = values[-1] if values and isinstance(values[-1], int | float) else None
    return " → ".join(words if len(set(words)) > 1 else words[:1]), "", last


def sizes(cells: Sequence[Cell]) -> list[tuple[Any, ...]]:
    """Return what each method leaves of a model: its name, two removed shares, four sizes, use.

    The sizes (bytes) are of the whole model, of its experts, on disk and in memory; in use are
    parameters a token, experts a token and layer. Seeds agree and are one row.
    """
    rows = [
        (
            cell.name(["ratio"]),
            *(cell.get("compressed", n) for n in ("removed_of_experts", "removed_of_model")),
            *(cell.last(n) for n in ("bytes", "expert_bytes", "disk_bytes", "memory_bytes")),
            *(cell.get("compressed", n) for n in ("active_parameters", "active_experts")),
        )
        for cell in cells
        if cell.get("compressed", "bytes") is not None
    ]
    return list(dict.fromkeys(rows))


def means(results: Results) -> list[dict[str, Any]]:
    """Return setting, label, losses and recovery over seeds; nothing where none has several."""
    settings = results.settings
    several = settings[settings["cells"].map(len) > 1]
    fields = list(dict.fromkeys(["ratio", *varying(settings)]))
    asked = (("nll", "compressed"), ("nll", "repaired"), ("kl", "repaired"), ("recovery",))
    estimates = [results.estimate(several, *what).itertuples() for what in asked]
    return [
        {
            "setting": setting,
            "label": label_of(setting.head, fields),
            "losses": losses,
            "recovery": recovery,
        }
        for setting, *losses, recovery in zip(several.itertuples(), *estimates, strict=True)
    ]


def differences(results: Results) -> list[dict[str, Any]]:
    """Return label, models, sides and gap of fine minus coarse; nothing without a pair."""
    gaps = results.differences(results.pairs(results.settings))
    fine, coarse = (results.settings.loc[gaps[grain]] for grain in ("fine", "coarse"))
    fields = varying(results.settings.loc[[*fine.index, *coarse.index]])
    sides = [results.estimate(side, "recovery").itertuples() for side in (fine, coarse)]
    models = fine["model"].to_numpy() + " - " + coarse["model"].to_numpy()
    labels = [label_of(head, fields) for head in fine["head"]]
    names = ("label", "models", "sides", "gap")
    rows = zip(labels, models, zip(*sides, strict=True), gaps.itertuples(), strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]

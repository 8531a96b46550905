"""What a mirror logs of rows and points: flat records, each with a name."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from rerail.run.results import SCALARS
from rerail.run.settings import label_of, setting_of

Row = Mapping[str, Any]  # a result row

FLAT = (
    *("model", "granularity", "compressor", "paradigm", "paper", "ratio", "bits", "allocation"),
    *("samples", "calibration", "distill", "seed", "heldout"),
)


def point_record(point: Mapping[str, float | None]) -> tuple[str, dict[str, Any]]:
    """Return name and record of a point; what is not finite is left out, as in the rows."""
    kind = "validation" if "val_kl" in point else "batch"
    values = {f"repair/{n}": v for n, v in point.items() if v is not None and math.isfinite(v)}
    return f"repair/{kind}/{point['step']:g}", values


def records(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what is logged of a row, each with a name: its curve, its stage, layers and tasks.

    The stage is one record `<stage>/<column>`, each layer one of `<stage>/layers/<column>`, each
    point of the curve one of `repair/<column>`.
    """
    stage = row["stage"] or "cell"
    yield from map(point_record, row["curve"] or ())
    yield stage, scalars(row)
    for layer in row["layers"] or ():
        values = {f"{stage}/layers/{name}": value for name, value in of_layer(layer).items()}
        yield f"{stage}/layers/{layer['layer']}", values
    for score in row["tasks"] or ():
        name = f"{stage}/tasks/{score['task']}/{score['metric']}"
        yield name, {name: score["value"], f"{name}_se": score["se"], f"{name}_n": score["n"]}


def of_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain numbers of a layer; result.json alone has its lists."""
    return {name: value for name, value in layer.items() if not isinstance(value, list)}


def scalars(row: Row) -> dict[str, Any]:
    """Return the plain columns of a row as `<stage>/<column>`."""
    stage = row["stage"] or "cell"
    return {f"{stage}/{name}": row[name] for name in SCALARS if row[name] is not None}


def flat(row: Row) -> dict[str, Any]:
    """Return the choices by which runs are grouped, sorted and filtered.

    `setting` names what only seeds differ in, by its last four digits also apart from other models
    and other held-out tokens, so that a mean over a setting never mixes them.
    """
    known = {name: row[name] for name in FLAT if row[name] is not None}
    label = label_of(row, ["ratio", "samples"])
    return {**known, "setting": f"{label}, {row['granularity']} {setting_of(row)[:4]}"}

"""A W&B workspace and a report over the runs of `logger=wandb`, made by wandb-workspaces.

Both show the same panels: recovery fine against coarse for each method, NLL against size (Pareto),
recovery against ratio and against calibration size, training and routing, and a table of runs. A
mean is only ever taken over a setting, in which runs differ in nothing but their seeds. Who has no
account reads report.html instead, which lies beside the results.
"""

import importlib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from rerail.errors import InputError
from rerail.files import write_json
from rerail.tracking import wandb as client

SHOWN = 1000  # runs and bars a panel; W&B shows 10 where it is not told
PINNED = (
    *("config:model.value", "config:granularity.value", "config:compressor.value"),
    *("config:ratio.value", "config:samples.value", "config:calibration.value"),
    *("config:seed.value", "summary:teacher/nll", "summary:compressed/nll"),
    *("summary:repaired/nll", "summary:repaired/nll_se", "summary:repaired/recovery"),
    *("summary:repaired/recovery_se", "summary:repaired/bytes", "config:heldout.value"),
    "config:revision.value",
)


def _sections(wr: Any) -> dict[str, list[Any]]:
    """Return new panels, section by section."""

    def scatter(title: str, x: Any, y: str, **options: Any) -> Any:
        layout = wr.Layout(w=12, h=9)
        return wr.ScatterPlot(title=title, x=x, y=wr.SummaryMetric(y), layout=layout, **options)

    def line(title: str, x: str, y: str) -> Any:
        layout = wr.Layout(w=12, h=8)
        return wr.LinePlot(title=title, x=x, y=[y], max_runs_to_show=SHOWN, layout=layout)

    layers, recovery = "repaired/layers", "repaired/recovery"
    ratio, samples = wr.Config("ratio"), wr.Config("samples")
    bars = wr.BarPlot(
        title="Recovery, fine against coarse: mean over seeds, bars one standard deviation",
        metrics=[recovery],
        groupby=wr.Config("setting"),
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
        max_runs_to_show=SHOWN,
        max_bars_to_show=SHOWN,
        layout=wr.Layout(w=24, h=12),
    )
    fronts = [  # the best NLL at this size or below
        scatter(
            f"Held-out NLL against bytes, {n}",
            wr.SummaryMetric(f"{n}/bytes"),
            f"{n}/nll",
            running_ymin=True,
        )
        for n in ("compressed", "repaired")
    ]
    return {
        "Recovery, fine against coarse": [bars],
        "Quality against size": fronts,
        "Recovery against ratio and calibration": [
            scatter("Recovery against removed share", ratio, recovery, log_x=False),
            scatter("Recovery against calibration blocks", samples, recovery, log_x=True),
        ],
        "Training and routing": [
            line("Validation KL of the repair", "repair/step", "repair/val_kl"),
            line("Training KL of the repair", "repair/step", "repair/batch_kl"),
            line("Changed routing by layer", f"{layers}/layer", f"{layers}/routing_changed"),
            line("Load entropy by layer", f"{layers}/layer", f"{layers}/load_entropy"),
        ],
    }


def workspace(entity: str, project: str, claim: str | None = None) -> Any:
    """Return the workspace (`wandb_workspaces.workspaces.Workspace`), not saved."""
    wr, ws = _library("reports.v2"), _library("workspaces")
    sections = [
        ws.Section(name=name, panels=panels, is_open=True) for name, panels in _sections(wr).items()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"rerail: {claim or 'all claims'}",
        sections=sections,
        settings=ws.WorkspaceSettings(max_runs=SHOWN),
        runset_settings=ws.RunsetSettings(filters=_filters(claim), pinned_columns=list(PINNED)),
    )


def report(entity: str, project: str, claim: str | None = None, online: bool = False) -> Any:
    """Return the report (`wandb_workspaces.reports.v2.Report`), not saved.

    Args:
        entity, project: where the report and its runs lie.
        claim: group of the runs to show, or None for all.
        online: name entity and project in every run set, for which the client asks the server.
    """
    wr = _library("reports.v2")

    def runs() -> Any:
        place = {"entity": entity, "project": project} if online else {}
        columns = {"pinned_columns": list(PINNED), "lock_columns": True}
        return wr.Runset(name="done", filters=_filters(claim), **place, **columns)

    lead = "Each bar is a setting: only seeds are averaged, never other models or held-out tokens."
    blocks: list[Any] = [wr.TableOfContents(), wr.P(lead)]
    for name, panels in _sections(wr).items():
        grid = wr.PanelGrid(runsets=[runs()], panels=panels, hide_run_sets=True)
        blocks += [wr.H1(name), grid]
    blocks += [wr.H1("Runs"), wr.PanelGrid(runsets=[runs()])]
    title = f"rerail: {claim or 'all claims'}"
    return wr.Report(entity=entity, project=project, title=title, blocks=blocks, width="fluid")


def _filters(claim: str | None) -> Any:
    expr = _library("expr")
    chosen = [expr.Metric("Group") == claim] if claim else []
    return expr.And(expr.Metric("State") == "finished", *chosen)


def _library(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is written for pydantic 1
        return importlib.import_module(f"wandb_workspaces.{name}")


def specification(entity: str, project: str, claim: str | None = None) -> dict[str, Any]:
    """Return both as plain data, without asking any server."""
    made = {"workspace": workspace, "report": report}
    return {
        name: make(entity, project, claim)
        ._to_model()
        .model_dump(mode="json", by_alias=True, exclude_none=True)
        for name, make in made.items()
    }


def save(entity: str, project: str, claim: str | None, instead: Path) -> list[str]:
    """Save both, each anew, and return their addresses.

    Raises:
        InputError: no key is known, or the server cannot be used; then the specification is in
            `instead`.
    """
    url = client.server()
    if not client.has_key(url):
        raise InputError(
            f"no W&B key is known for {url}; run `wandb login`, or give --spec FILE to write the "
            "specification without an account"
        )
    try:
        parts = [workspace(entity, project, claim), report(entity, project, claim, online=True)]
        return [str(part.save().url) for part in parts]
    except Exception as error:  # whatever the client raises
        write_json(instead, specification(entity, project, claim))
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"W&B at {url} did not save the dashboard of {entity}/{project} ({why}); its "
            f"specification is in {instead}"
        ) from error

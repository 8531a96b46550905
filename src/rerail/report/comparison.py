"""One sentence that compares recovery on fine and coarse models."""

import pandas as pd

from rerail.report.frame import Results, largest_error, varying
from rerail.report.words import share
from rerail.run.settings import label_of

SPELLED_OUT = 8  # settings that one line can hold


def comparison(results: Results) -> str:
    """Return the sentence; empty without a fine and a coarse model.

    Only settings that a fine and a coarse model share, on the same held-out tokens, are compared;
    the mean is over the settings where both have a recovery, if all have the same tokens.
    """
    settings = results.settings
    pairs = results.pairs(settings)
    if pairs.empty:
        return ""
    sides = {grain: settings.loc[pairs[grain]] for grain in ("fine", "coarse")}
    fields = varying(pd.concat(sides.values()))
    recovery = {grain: results.estimate(side, "recovery") for grain, side in sides.items()}
    words = [_words(recovery[grain], side["blank"]) for grain, side in sides.items()]
    models = list(zip(*(side["model"] for side in sides.values()), strict=True))
    several = len(set(models)) > 1
    parts = []
    for head, names, left, right in zip(sides["fine"]["head"], models, *words, strict=True):
        of = f"{names[0]} vs {names[1]}, " if several else ""
        parts.append(f"{of}{label_of(head, fields)} {left} vs {right}")
    if len(pairs) > SPELLED_OUT:
        parts = [f"{len(pairs)} settings, each in the report"]
    both = (recovery["fine"]["n"].to_numpy() > 0) & (recovery["coarse"]["n"].to_numpy() > 0)
    if both.sum() > 1 and not several and sides["fine"]["tokens"].nunique() == 1:
        means = [share(e[both]["value"].mean(), largest_error(e[both])) for e in recovery.values()]
        of = "" if both.all() else f" of {both.sum()} settings"
        parts.append(f"mean{of} {means[0]} vs {means[1]}")
    return f"recovery fine vs coarse: {'; '.join(parts)}"


def _words(recovery: pd.DataFrame, blanks: pd.Series) -> list[str]:
    """Return recoveries with their errors and the number of seeds, or why they are blank."""
    return [
        f"{share(e.value, e.error)}{f' (n={e.n})' if e.n > 1 else ''}"
        if e.n
        else f"blank ({blank})"
        for e, blank in zip(recovery.itertuples(), blanks, strict=True)
    ]

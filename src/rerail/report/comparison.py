"""Fine against coarse: what may be compared, and one sentence of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student_t

from rerail.report.cells import Estimate, Setting, choices_without, grouped_by, tokens_of
from rerail.report.labels import label_of, varying
from rerail.report.words import share

SPELLED_OUT = 8  # settings that one line can hold


def pairs_of(settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """Return (fine, coarse) settings that differ in the model only, on the same tokens."""
    alike = grouped_by(settings, lambda s: choices_without(s.head, ["model"]))
    found = []
    for group in alike.values():
        fine, coarse = (
            [s for s in group if s.head["granularity"] == grain] for grain in ("fine", "coarse")
        )
        found += [(one, other) for one in fine for other in coarse]
    return found


class Difference(NamedTuple):
    """A paired difference, half its 95 % interval (None where unknown), and the number of pairs."""

    value: float
    half: float | None
    n: int


def mean_difference(differences: Sequence[float]) -> Difference:
    """Return the mean of at least one paired difference, its interval by Student's t."""
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return Difference(mean, None, n)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Difference(mean, float(student_t.ppf(0.975, n - 1)) * error, n)


def difference(fine: Setting, coarse: Setting) -> Difference | None:
    """Return recovery of fine minus coarse, paired by seed; None where no seed has both.

    With one seed the interval is made of the two standard errors, as if they were independent.
    """
    held: list[dict[int, tuple[float, float | None]]] = [
        {
            cell.head["seed"]: (found, cell.get("repaired", "recovery_se"))
            for cell in setting.cells
            if (found := cell.get("repaired", "recovery")) is not None
        }
        for setting in (fine, coarse)
    ]
    both = [(held[0][seed], held[1][seed]) for seed in held[0] if seed in held[1]]
    if not both:
        return None
    found = mean_difference([one[0] - other[0] for one, other in both])
    errors = both[0][0][1], both[0][1][1]
    if found.n > 1 or errors[0] is None or errors[1] is None:
        return found
    return found._replace(half=1.96 * math.hypot(errors[0], errors[1]))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over methods; its error is the mean error.

    That is the largest standard error the mean can have: the methods share models and held-out
    text, so their errors go together to an unknown degree.
    """
    errors = [e.error / math.sqrt(e.n) for e in estimates if e.error is not None]
    error = float(np.mean(errors)) if len(errors) == len(estimates) else None
    return Estimate(float(np.mean([e.value for e in estimates])), error, 1)


def comparison(settings: Sequence[Setting]) -> str:
    """Return one sentence that compares recovery on fine and coarse; empty without both.

    Only settings that a fine and a coarse model share, on the same held-out tokens, are compared;
    the mean is over the settings where both have a recovery, if all have the same tokens.
    """
    pairs = pairs_of(settings)
    if not pairs:
        return ""
    fields = varying(setting for pair in pairs for setting in pair)
    several = len({(fine.head["model"], coarse.head["model"]) for fine, coarse in pairs}) > 1
    said, known = [], []
    for pair in pairs:
        found = [setting.estimate("repaired", "recovery") for setting in pair]
        words = [
            _recovery(one) or f"blank ({setting.no_recovery})"
            for one, setting in zip(found, pair, strict=True)
        ]
        name = label_of(pair[0].head, fields)
        if several:
            name = f"{pair[0].head['model']} vs {pair[1].head['model']}, {name}"
        said.append(f"{name} {words[0]} vs {words[1]}")
        if found[0] and found[1]:
            known.append((found[0], found[1]))
    if len(pairs) > SPELLED_OUT:
        said = [f"{len(pairs)} settings, each in the report"]
    if len(known) > 1 and not several and len({tokens_of(fine.head) for fine, _ in pairs}) == 1:
        fine, coarse = (mean_of(side) for side in zip(*known, strict=True))
        of = "" if len(known) == len(pairs) else f" of {len(known)} settings"
        said.append(f"mean{of} {_recovery(fine)} vs {_recovery(coarse)}")
    return f"recovery fine vs coarse: {'; '.join(said)}"


def _recovery(found: Estimate | None) -> str:
    if not found:
        return ""
    seeds = f" (n={found.n})" if found.n > 1 else ""
    return share(found.value, found.error) + seeds

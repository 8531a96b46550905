"""How numbers are written: with their errors, in percent, in MB; nothing where there is none."""

from typing import Any

import pandas as pd

Value = float | None  # None or NaN where there is none


def percent(value: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * value:.0f} %"


def plus_minus(value: Value, error: Value = None, digits: int = 3) -> str:
    """Return `3.512 ± 0.012`, without the error where there is none, empty without a value."""
    if pd.isna(value):
        return ""
    return f"{value:.{digits}f}" + ("" if pd.isna(error) else f" ± {error:.{digits}f}")


def share(value: Value, error: Value = None) -> str:
    """Return `56 % ± 3`, empty without a value."""
    if value is None or pd.isna(value):
        return ""
    return percent(value) + ("" if error is None or pd.isna(error) else f" ± {100 * error:.0f}")


def interval(value: float, half: Value) -> str:
    """Return `50 % to 62 %`, empty where its half width is unknown."""
    if half is None or pd.isna(half):
        return ""
    return f"{percent(value - half)} to {percent(value + half)}"


def megabytes(size: Value) -> str:
    """Return a size in MB (10^6 bytes), empty without a size."""
    if size is None or pd.isna(size):
        return ""
    return f"{size / 1e6:,.2f}" if size < 1e8 else f"{size / 1e6:,.0f}"


def form(value: Any, pattern: str) -> str:
    """Return the value in a format, empty without a value."""
    return "" if value in (None, "") else pattern.format(value)

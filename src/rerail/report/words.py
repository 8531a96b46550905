"""How numbers are written: with their errors, in percent, in MB."""

from typing import Any


def number(value: Any) -> str:
    """Return a number without needless zeros, any other value as text, nothing for None."""
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def percent(value: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * value:.0f} %"


def plus_minus(value: float | None, error: float | None, digits: int = 3) -> str:
    """Return `3.512 ± 0.012`, without the error where there is none, empty without a value."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def share(value: float | None, error: float | None) -> str:
    """Return `56 % ± 3`, empty without a value."""
    if value is None:
        return ""
    return percent(value) + ("" if error is None else f" ± {100 * error:.0f}")


def interval(value: float, half: float | None) -> str:
    """Return `50 % to 62 %`, empty where its half width is unknown."""
    return "" if half is None else f"{percent(value - half)} to {percent(value + half)}"


def megabytes(size: int | None) -> str:
    """Return a size in MB (10^6 bytes), empty without a size."""
    return "" if size is None else f"{size / 1e6:,.2f}" if size < 1e8 else f"{size / 1e6:,.0f}"

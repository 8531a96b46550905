"""Compress Mixture-of-Experts language models and re-align their routers.

Importing this package costs nothing: the functions of `rerail.run.door` are loaded on first use.
"""

from typing import Any

__all__ = ["collect", "compress", "evaluate", "load", "preset", "repair", "save", "text"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rerail' has no attribute {name!r}")
    from rerail.run import door

    return getattr(door, name)


def __dir__() -> list[str]:
    return __all__

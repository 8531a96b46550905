"""Compress Mixture-of-Experts language models and re-align their routers.

Importing this package costs nothing; `from rerail import api` loads the functions for notebooks.
"""

import importlib
from typing import Any

__all__ = ["api"]


def __getattr__(name: str) -> Any:
    if name != "api":
        raise AttributeError(f"module 'rerail' has no attribute {name!r}")
    return importlib.import_module("rerail.api")

"""Compress Mixture-of-Experts language models and re-align their routers.

Importing this package costs nothing: `rerail.load(...)` imports what it needs when it is called.
The names below are those of `rerail.api`; `rerail.text`, `rerail.plan`, `rerail.compress` and
`rerail.evaluate` are packages, so the functions of these names are reached by `from rerail import
api`, as all the others are, too.
"""

import importlib
from typing import Any

__all__ = [
    "Bits",
    "LanguageModel",
    "Plan",
    "Ratio",
    "Recorder",
    "Repaired",
    "Scores",
    "Skip",
    "api",
    "apply",
    "collect",
    "load",
    "preset",
    "repair",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'rerail' has no attribute {name!r}")
    api = importlib.import_module("rerail.api")
    return api if name == "api" else getattr(api, name)

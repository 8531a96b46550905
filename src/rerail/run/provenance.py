"""Which code and libraries a number comes from."""

import platform
import subprocess
from pathlib import Path
from typing import Any

from rerail.versions import package_version

PACKAGES = ("rerail", "torch", "transformers", "lightning", "numpy", "scipy", "tokenizers")


def revision() -> str | None:
    """Return the git revision of this code, `+` where it was edited; None outside git."""
    here = Path(__file__).parents[1]
    snapshot = here / "revision.txt"  # of a sweep: outside git, or in another place of it
    if snapshot.exists():
        return snapshot.read_text(encoding="utf-8").strip() or None
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def provenance() -> dict[str, Any]:
    """Return the git revision and the versions of the libraries that numbers depend on."""
    versions = {name: package_version(name) for name in PACKAGES}
    return {"revision": revision(), "python": platform.python_version(), "versions": versions}

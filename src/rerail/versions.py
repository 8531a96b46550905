"""The versions of packages, also of a checkout that runs without having been installed."""

from importlib.metadata import PackageNotFoundError, version


def package_version(package: str) -> str:
    """Return a package's version; `not installed` for a checkout on PYTHONPATH."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

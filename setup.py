"""conf/, experiments/ and slurm/ travel in the wheel as data of the package."""

from pathlib import Path

from setuptools import find_packages, setup

DATA = ("conf", "experiments", "slurm")


def yamls(folder: str) -> list[str]:
    """Return the yaml files below a folder, relative to it."""
    return [str(p.relative_to(folder)) for p in sorted(Path(folder).rglob("*.yaml"))]


setup(
    packages=[*find_packages("src"), *(f"rerail.{folder}" for folder in DATA)],
    package_dir={"": "src", **{f"rerail.{folder}": folder for folder in DATA}},
    package_data={
        "rerail": [
            "py.typed",
            "evaluate/tasks/*.yaml",
            "report/page.*",
            "report/*.json",
            "text/docs/*",
            "zoo/**/*",
        ],
        **{f"rerail.{folder}": yamls(folder) for folder in DATA},
    },
)

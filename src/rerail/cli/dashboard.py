"""`rerail-dashboard`: the workspace and the report in W&B, or their specification in a file."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rerail.config.presets import config_root
from rerail.config.secrets import guard_streams
from rerail.errors import InputError
from rerail.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: exit status 0, or 2 where something could not be used or saved."""
    guard_streams()
    parser = argparse.ArgumentParser(prog="rerail-dashboard", description=__doc__)
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="user or team")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", "rerail"))
    parser.add_argument("--claim", help="show the runs of one claim only")
    parser.add_argument("--spec", type=Path, metavar="FILE", help="write JSON, save nothing")
    options = parser.parse_args(arguments)
    try:
        for line in _lines(options):
            print(line)
    except InputError as error:
        sys.stderr.write(f"rerail-dashboard: {error}\n")
        return 2
    return 0


def _lines(options: argparse.Namespace) -> list[str]:
    folders = (config_root() / "experiments", Path.cwd() / "experiments")
    claims = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    if options.claim is not None and options.claim not in claims:
        raise InputError(f"--claim {options.claim} does not exist; allowed: {', '.join(claims)}")
    if not options.entity and not options.spec:
        raise InputError(
            "--entity is missing: give the user or team that owns the project, or set WANDB_ENTITY"
        )
    from rerail.tracking import dashboard

    if options.spec:
        made = dashboard.specification(options.entity or "", options.project, options.claim)
        write_json(options.spec, made)
        return [f"specification: {options.spec}"]
    return dashboard.save(
        options.entity, options.project, options.claim, Path("rerail-dashboard.json")
    )


if __name__ == "__main__":
    sys.exit(main())

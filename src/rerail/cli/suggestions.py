"""What a mistyped override could have meant; runs only after Hydra refused, and imports no more."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ADDED = ("experiments", "slurm")  # groups of which the defaults choose nothing


def hints(overrides: Sequence[str], root: Path) -> list[str]:
    """Return one sentence for each override that names a key which does not exist.

    Args:
        overrides: the words of the command line that are no flags.
        root: the folder that holds conf/.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        return []  # Hydra's own message points at the word already
    groups = [p.name for p in sorted((root / "conf").iterdir()) if p.is_dir()]
    chosen = [str(o.input_line) for o in parsed if o.key_or_group in groups]
    composed = _defaults(root, chosen)
    added = [o for o in parsed if o.key_or_group in _ADDED and not o.is_add()]
    if added:
        return [
            f"{o.input_line} chooses a file of {o.key_or_group}/, which no cell has by default; "
            f"add it with a plus, and run its grid with -m: rerail -m +{o.input_line} (there are "
            f"{', '.join(sorted(p.stem for p in (root / str(o.key_or_group)).glob('*.yaml')))})"
            for o in added
        ]
    if several := [o for o in parsed if o.key_or_group in groups and isinstance(o.value(), list)]:
        return [
            f"{o.input_line} is a list, and one name is chosen of {o.key_or_group}; to sweep over "
            f"several, use -m and commas: -m {o.key_or_group}=A,B"
            for o in several
        ]
    sentences = [
        _missing(o.key_or_group, composed, "")
        for o in parsed
        if not (o.is_add() or o.is_force_add() or o.is_delete()) and o.key_or_group not in groups
    ]
    return [sentence for sentence in sentences if sentence]


def _defaults(root: Path, chosen: Sequence[str]) -> Mapping[str, Any]:
    """Compose what the command line chose, or the defaults where that is what failed."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    for overrides in (list(chosen), []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(root / "conf"), version_base="1.3"):
                composed = OmegaConf.to_container(compose("config", overrides))
            return {str(k): v for k, v in composed.items()} if isinstance(composed, dict) else {}
        except Exception:  # Hydra fails anywhere over what it does not expect
            continue
    return {}


def _missing(key: str, node: Any, where: str) -> str | None:
    if key.startswith("hydra."):
        return None
    name, _, rest = key.partition(".")
    if not isinstance(node, Mapping):
        return None
    if name not in node:
        known = sorted(str(k) for k in node)
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {where}{near[0]}? " if near else ""
        return f"{where}{name} does not exist; {hint}allowed here: {', '.join(known)}"
    if not rest:
        return None
    return _missing(rest, node[name], f"{where}{name}.")

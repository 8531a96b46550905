"""The store: one safetensors file a statistic, keyed by a fingerprint of model and text."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rerail.files import digest, file_digest, whole_file
from rerail.statistics.statistic import Statistic, StatisticSet

log = logging.getLogger(__name__)


class StatisticStore:
    """Statistics on disk; a damaged file is reported and counts as absent."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder = folder / fingerprint

    def load(self, statistics: Sequence[Statistic]) -> tuple[StatisticSet, list[Statistic]]:
        """Return what is there, and the statistics that are missing."""
        held: dict[int, dict[str, Tensor]] = {}
        missing = []
        for statistic in dict.fromkeys(statistics):
            tensors = self._read(statistic)
            if tensors is None:
                missing.append(statistic)
                continue
            for index, tensor in tensors.items():
                held.setdefault(index, {})[statistic.name] = tensor
        return StatisticSet(held), missing

    def save(self, filled: StatisticSet, statistics: Sequence[Statistic]) -> None:
        """Write each statistic whole or not at all, then its hash."""
        for statistic in statistics:
            tensors = {str(i): t[statistic.name].contiguous() for i, t in filled.tensors.items()}
            path = self._path(statistic)
            with whole_file(path) as temporary:
                temporary.write_bytes(save(tensors))
            seal = {"file": path.name, "sha256": file_digest(path)}
            with whole_file(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(seal), encoding="utf-8")

    def _path(self, statistic: Statistic) -> Path:
        return self.folder / f"{statistic.name}-{digest(repr(statistic))[:8]}.safetensors"

    def _read(self, statistic: Statistic) -> dict[int, Tensor] | None:
        path = self._path(statistic)
        seal = path.with_suffix(".json")
        if not path.exists() or not seal.exists():
            return None
        try:
            if json.loads(seal.read_text(encoding="utf-8"))["sha256"] == file_digest(path):
                with safe_open(path, framework="pt") as file:
                    return {int(k): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (ValueError, KeyError, TypeError, SafetensorError):
            pass
        log.warning("%s is damaged (its hash does not match) and will be collected again", path)
        return None


def merge_sets(sets: Sequence[StatisticSet]) -> StatisticSet:
    """Return one set that holds different statistics of the same layers and text."""
    held: dict[int, dict[str, Tensor]] = {}
    for one in sets:
        for index, tensors in one.tensors.items():
            held.setdefault(index, {}).update(tensors)
    return StatisticSet(held)

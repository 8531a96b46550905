"""Statistics in the store: one artefact a statistic, versioned by its class and by the passes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rerail import store
from rerail.code_version import code_version
from rerail.files import digest
from rerail.parallel import broadcast_from_first, is_first
from rerail.statistics.collect import collect
from rerail.statistics.statistic import Statistic, StatisticSet, join_sets


def cached_statistics(
    folder: Path,
    statistics: Sequence[Statistic],
    measure: Callable[[list[Statistic]], StatisticSet],
) -> StatisticSet:
    """Return statistics, and measure those that are not stored, all in one go.

    In a group of processes all must call it. The first one gets all statistics, the others those
    that were measured.

    Args:
        folder: of this model and text.
        statistics: what is wanted; duplicates count once.
        measure: makes and returns statistics.
    """
    wanted = dict.fromkeys(statistics)
    stored = {s: _read(folder, s) for s in wanted} if is_first() else {}
    # only the first process looks: files may appear between two looks, and all measure the same
    missing = broadcast_from_first(
        lambda: [s for s, stored_set in stored.items() if stored_set is None]
    )
    sets = [stored_set for stored_set in stored.values() if stored_set is not None]
    if missing:
        fresh = measure(missing)
        if is_first():
            for statistic in missing:
                _write(folder, statistic, fresh)
        sets.append(fresh)
    return join_sets(sets)


def _read(folder: Path, statistic: Statistic) -> StatisticSet | None:
    artefact = store.read(_path(folder, statistic), _version(statistic))
    if artefact is None:
        return None
    return StatisticSet({int(i): {statistic.name: t} for i, t in artefact.tensors.items()})


def _write(folder: Path, statistic: Statistic, measured: StatisticSet) -> None:
    tensors = {str(i): layer[statistic.name] for i, layer in measured.tensors.items()}
    artefact = store.Artefact(repr(statistic), tensors)
    store.write(_path(folder, statistic), artefact, _version(statistic))


def _path(folder: Path, statistic: Statistic) -> Path:
    return folder / f"{statistic.name}-{digest(repr(statistic))[:8]}.json"


def _version(statistic: Statistic) -> str:
    return code_version(type(statistic), collect)

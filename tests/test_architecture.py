"""The architecture picture shows what the code imports."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
architecture = pytest.importorskip("architecture")
sys.path.pop(0)


def write_package(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / "src" / "rerail" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.with_suffix(".py").write_text(f'"""About {name}; and more."""\n{text}\n')


def test_the_committed_picture_shows_the_rooms_and_arrows_of_the_code():
    graph = architecture.read_graph()
    assert {"api", "cli", "moe", "methods", "distill"} <= graph.rooms.keys()
    assert ("conf", "methods") in graph.arrows["named"]
    svg = architecture.PICTURE.read_text(encoding="utf-8")
    assert architecture.shows(svg, graph), "run: python experiments/architecture.py"
    assert "prefers-color-scheme: dark" in svg
    assert len(svg) < 40_000


def test_a_new_arrow_or_room_makes_the_picture_wrong():
    graph = architecture.read_graph()
    svg = architecture.draw(graph)
    assert architecture.shows(svg, graph)
    graph.arrows["imports"].add(("moe", "cli"))
    assert not architecture.shows(svg, graph)
    graph.arrows["imports"].remove(("moe", "cli"))
    graph.rooms["attic"] = "New"
    assert not architecture.shows(svg, graph)


def test_implied_arrows_are_left_out_and_imports_inside_functions_count(tmp_path):
    write_package(
        tmp_path,
        top="from rerail import middle\nfrom rerail.base import x",
        middle="def f():\n    import rerail.base",
        base="x = 1",
    )
    graph = architecture.read_graph(tmp_path)
    assert graph.arrows["imports"] == {("top", "middle"), ("middle", "base")}
    assert graph.arrows["cycle"] == set()
    assert graph.rooms["base"] == "About base"
    layers = {"top": 2, "middle": 1, "base": 0, "conf": 0}
    assert architecture.layers_of(graph) == layers


def test_of_a_cycle_the_arrow_of_the_fewest_statements_is_drawn_as_closing_it(tmp_path):
    write_package(
        tmp_path,
        a__one="from rerail.b import x",
        a__two="from rerail.b import y",
        b="from rerail.a.one import z",
    )
    graph = architecture.read_graph(tmp_path)
    assert graph.arrows == {"imports": {("a", "b")}, "cycle": {("b", "a")}, "named": set()}
    assert architecture.shows(architecture.draw(graph), graph)


def test_rooms_of_a_layer_do_not_overlap():
    graph = architecture.read_graph()
    centres, _, width = architecture.place(graph)
    places = [centres[room] for room in graph.rooms]
    for i, (x, y) in enumerate(places):
        assert architecture.WIDTH / 2 <= x <= width - architecture.WIDTH / 2
        for other_x, other_y in places[i + 1 :]:
            assert y != other_y or abs(x - other_x) >= architecture.WIDTH

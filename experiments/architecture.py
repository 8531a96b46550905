"""Draw the rooms of the package, and who imports whom: `python experiments/architecture.py`.

Writes docs/architecture.svg from the import statements of src/rerail, so that the picture says what
the code does. A room is a package or a module directly below rerail. An arrow means
"imports"; one that follows from longer paths is left out. A dashed arrow means that a yaml of conf/
names a class. A red arrow closes a cycle: of its arrows it stands for the fewest import statements.
`--check` writes nothing, and fails where the committed picture shows other rooms or arrows.
"""

import argparse
import ast
import itertools
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from html import escape
from pathlib import Path
from textwrap import wrap
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
Arrow = tuple[str, str]
WIDTH, HEIGHT, GAP, BETWEEN = 168, 66, 22, 46  # of a room; between two rooms, and two layers
STYLE = """
 svg { background: #ffffff; font-family: system-ui, sans-serif; text-anchor: middle }
 rect { fill: #eef3fa; stroke: #4a6fa5 } .name { fill: #16202e; font-size: 14px; font-weight: 600 }
 .about { fill: #48566a; font-size: 10.5px } path { fill: none; stroke: #7b8ba1; stroke-width: 1.3 }
 .named { stroke-dasharray: 5 4 } .cycle { stroke: #c2453d }
 marker path { fill: #7b8ba1; stroke: none }
 @media (prefers-color-scheme: dark) {
  svg { background: #0d1117 } rect { fill: #1b2735; stroke: #6f98d0 } .name { fill: #e8eef6 }
  .about { fill: #a9b6c6 } path { stroke: #8292a8 } marker path { fill: #8292a8 } }
"""


@dataclass
class Graph:
    """Rooms and arrows.

    Attributes:
        rooms: name -> first sentence of the docstring.
        arrows: kind -> (from, to): `imports`, `cycle` (the imports that close one) and `named`.
    """

    rooms: dict[str, str] = field(default_factory=dict)
    arrows: dict[str, set[Arrow]] = field(default_factory=dict)

    @property
    def downward(self) -> set[Arrow]:
        """The arrows that decide which room lies above which: all but those that close cycles."""
        return self.arrows["imports"] | self.arrows["named"]


def imported_rooms(tree: ast.AST) -> Iterator[str]:
    """Yield the rooms that a file imports, also inside functions."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "rerail":
            names = [f"rerail.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name.split(".")[1] for name in names if name.startswith("rerail."))


def read_graph(root: Path = ROOT) -> Graph:
    """Return rooms and arrows of a checkout; an arrow that longer paths imply is left out."""
    graph, source = Graph(), root / "src" / "rerail"
    statements: Counter[Arrow] = Counter()
    for path in sorted(source.rglob("*.py")):
        room = path.relative_to(source).with_suffix("").parts[0]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if room.startswith("__") or not tree.body[1:]:  # a docstring alone is no code
            continue
        main = path if path.parent == source else source / room / "__init__.py"
        prose = ast.get_docstring(ast.parse(main.read_text(encoding="utf-8"))) or ""
        graph.rooms[room] = re.split(
            r"(?<=\w)[.;](?:\s|$)", prose.replace("`", "").replace("\n", " ")
        )[0]
        statements.update((room, other) for other in imported_rooms(tree) if other != room)
    statements = Counter({a: n for a, n in statements.items() if set(a) <= graph.rooms.keys()})
    cycle = closing_arrows(statements)
    imports = without_implied(statements.keys() - cycle)
    yamls = (path.read_text(encoding="utf-8") for path in (root / "conf").rglob("*.yaml"))
    targets = {t for text in yamls for t in re.findall(r"_target_: rerail\.(\w+)", text)}
    # of the rooms that conf/ names, only what nobody imports is told by no other arrow
    named = {("conf", t) for t in targets & graph.rooms.keys() - {b for _, b in statements}}
    graph.rooms["conf"] = "One yaml a choice: it names a class and what differs from its defaults"
    graph.arrows = {"imports": imports, "cycle": cycle, "named": named}
    return graph


def closing_arrows(statements: Mapping[Arrow, int]) -> set[Arrow]:
    """Return arrows without which there is no cycle, those of the fewest import statements."""
    below = {a: {c for b, c in statements if b == a} for a, _ in statements}
    closing: set[Arrow] = set()
    while True:
        try:
            TopologicalSorter(below).prepare()
            return closing
        except CycleError as error:
            path = error.args[1]  # each is imported by the next
            arrows = [(b, a) for a, b in itertools.pairwise(path)]
            least = min(arrows, key=lambda arrow: (statements[arrow], arrow))
            closing.add(least)
            below[least[0]].remove(least[1])


def without_implied(arrows: Collection[Arrow]) -> set[Arrow]:
    """Return the arrows, without cycles among them, that no longer path implies."""

    def reach(start: str) -> set[str]:
        return {start}.union(*(reach(b) for a, b in arrows if a == start))

    return {
        (a, b) for a, b in arrows if not any(b in reach(c) for x, c in arrows if x == a and c != b)
    }


def layers_of(graph: Graph) -> dict[str, int]:
    """Return each room's layer: 0 imports nothing, others lie just above all that they import."""
    below = {room: {b for a, b in graph.downward if a == room} for room in graph.rooms}
    layers: dict[str, int] = {}
    for room in TopologicalSorter(below).static_order():
        layers[room] = max((layers[b] + 1 for b in below[room]), default=0)
    return layers


def place(graph: Graph) -> tuple[dict[str, tuple[float, float]], dict[Arrow, list[str]], float]:
    """Return the centre of each node, the nodes that each arrow passes, and the picture's width.

    An arrow over several layers passes an invisible node in each, so that it runs between rooms.
    Nodes are sorted by where their neighbours lie, up and down in turns (Sugiyama's method).
    """
    layer = {room: float(n) for room, n in layers_of(graph).items()}
    routes: dict[Arrow, list[str]] = {}
    for a, b in sorted(graph.downward):
        steps = range(int(layer[a]) - 1, int(layer[b]), -1)
        bends = [f"{a}>{b}:{n}" for n in steps]
        layer |= dict(zip(bends, map(float, steps), strict=True))
        routes[a, b] = [a, *bends, b]
    pairs = [p for r in routes.values() for p in itertools.pairwise(r)]
    near = {n: [*(b for a, b in pairs if a == n), *(a for a, b in pairs if b == n)] for n in layer}
    rows = [sorted(n for n in layer if layer[n] == i) for i in range(int(max(layer.values())) + 1)]
    x = {node: float(i) for row in rows for i, node in enumerate(row)}
    for sweep in range(40):
        for row in rows if sweep % 2 else reversed(rows):
            wish = {n: sum(x[m] for m in near[n]) / len(near[n]) if near[n] else x[n] for n in row}
            row.sort(key=lambda n: (wish[n], n))
            x |= spread(row, wish, graph)
    half = {n: WIDTH / 2 if n in graph.rooms else 2 for n in layer}
    left = min(x[n] - half[n] for n in layer) - GAP
    top = len(rows)
    centres = {
        n: (x[n] - left, (top - layer[n]) * (HEIGHT + BETWEEN) - HEIGHT / 2 - 10) for n in layer
    }
    return centres, routes, max(centres[n][0] + half[n] for n in layer) + GAP


def spread(row: list[str], wish: dict[str, float], graph: Graph) -> dict[str, float]:
    """Return positions in the order of the row, near what each node wishes, without overlaps."""
    half = [(WIDTH / 2 if node in graph.rooms else 2) + GAP / 2 for node in row]
    apart = [a + b for a, b in itertools.pairwise(half)]
    right = [wish[node] for node in row]
    left = list(right)
    for i, distance in enumerate(apart):
        right[i + 1] = max(right[i + 1], right[i] + distance)
    for i, distance in reversed(list(enumerate(apart))):
        left[i] = min(left[i], left[i + 1] - distance)
    # both keep the distances, so their mean does, and it drifts to neither side
    return {node: (a + b) / 2 for node, a, b in zip(row, left, right, strict=True)}


def curve(points: Iterable[tuple[float, float]]) -> str:
    """Return an SVG path from the bottom of one room through the bends to the top of another."""
    (x, y), *others = points
    y += HEIGHT / 2
    words = [f"M{x:.0f} {y:.0f}"]
    for n, (to_x, to_y) in enumerate(others):
        end = to_y - HEIGHT / 2 - 3 if n == len(others) - 1 else to_y
        bend = (end - y) / 2
        words.append(f"C{x:.0f} {y + bend:.0f} {to_x:.0f} {end - bend:.0f} {to_x:.0f} {end:.0f}")
        x, y = to_x, end
    return "".join(words)


def beside(start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return an SVG path upwards, from the right side of one room to that of another."""
    (x, y), (to_x, to_y) = start, end
    x, to_x, out = x + WIDTH / 2, to_x + WIDTH / 2 + 3, max(x, to_x) + WIDTH / 2 + 40
    return f"M{x:.0f} {y:.0f}C{out:.0f} {y:.0f} {out:.0f} {to_y:.0f} {to_x:.0f} {to_y:.0f}"


def draw(graph: Graph) -> str:
    centres, routes, width = place(graph)
    height = max(y for _, y in centres.values()) + HEIGHT / 2 + 12
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">The rooms of rerail; an arrow means: imports</title>',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for kind, arrows in graph.arrows.items():
        for a, b in sorted(arrows):
            points = [centres[node] for node in routes.get((a, b), [a, b])]
            shape = beside(*points) if kind == "cycle" else curve(points)
            out.append(
                f'<path class="{kind}" data-from="{a}" data-to="{b}" d="{shape}" '
                'marker-end="url(#tip)"/>'
            )
    for room, about in sorted(graph.rooms.items()):
        x, y = centres[room]
        lines = wrap(about, 30, max_lines=3, placeholder=" ...")
        out.append(
            f'<g data-room="{room}"><rect x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" '
            f'width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
            f'<text class="name" x="{x:.0f}" y="{y - 16:.0f}">{room}</text>'
        )
        out += [
            f'<text class="about" x="{x:.0f}" y="{y + 13 * i:.0f}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ]
        out.append("</g>")
    return "\n".join([*out, "</svg>", ""])


def read_picture(svg: str) -> Graph:
    """Return the rooms (without their prose) and arrows that a picture shows."""
    nodes = list(ElementTree.fromstring(svg).iter())
    shown = Graph({n.attrib["data-room"]: "" for n in nodes if "data-room" in n.attrib})
    shown.arrows = {"imports": set(), "cycle": set(), "named": set()}
    for a in (n.attrib for n in nodes if "data-from" in n.attrib):
        shown.arrows[a["class"]].add((a["data-from"], a["data-to"]))
    return shown


def shows(svg: str, graph: Graph) -> bool:
    """Return whether a picture has the rooms and arrows of a graph; places do not matter."""
    shown = read_picture(svg)
    return shown.rooms.keys() == graph.rooms.keys() and shown.arrows == graph.arrows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    graph = read_graph()
    if check:
        return int(not (PICTURE.exists() and shows(PICTURE.read_text(encoding="utf-8"), graph)))
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw(graph), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

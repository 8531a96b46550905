"""The page in headless Chromium: no errors, no requests, and its controls do what they say."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rerail.report.report import render
from result_rows import demo_rows, every_kind, failed_cell

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"),
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

SCRIPT = """
const cells = document.getElementById("cells");
const names = () => [...cells.tBodies[0].rows].filter((row) => !row.hidden)
  .map((row) => [...row.cells].slice(0, 2).map((c) => c.childNodes[0].textContent).join(" "));
const header = (name) => [...cells.tHead.rows[0].cells].find((c) => c.textContent.trim() === name);
const sorted = (name) => { header(name).querySelector("button").click();
  return [names(), header(name).getAttribute("aria-sort")]; };
const filter = document.getElementById("cells-filter");
const filtered = (words) => { filter.value = words; filter.dispatchEvent(new Event("input"));
  return [names(), document.querySelector("output").textContent]; };
const groups = () => [...document.querySelectorAll("details.group")].map((one) => one.open);
const count = (list) => list.filter(Boolean).length;
const shut = count(groups());
window.dispatchEvent(new Event("beforeprint"));
const printed = count(groups());
const numbers = [...document.querySelectorAll("details.numbers")].filter((one) => one.open).length;
window.dispatchEvent(new Event("afterprint"));
const again = count(groups());
for (const one of document.querySelectorAll("details")) one.open = true;
const found = {
  groups: [groups().length, shut, printed, again, numbers],
  rows: document.querySelectorAll("#commands tbody tr").length,
  first: names(),
  up: sorted("recovery"),
  down: sorted("recovery"),
  model: sorted("model"),
  marks: document.querySelectorAll("#cells [aria-sort]").length,
  coarse: filtered("COARSE reap"),
  nothing: filtered("no such words"),
  all: filtered(""),
  requests: performance.getEntriesByType("resource").map((entry) => entry.name),
  wide: document.documentElement.scrollWidth - window.innerWidth,
  boxes: [...document.querySelectorAll(".scroll")].filter((b) => b.scrollWidth > b.clientWidth)
    .map((b) => getComputedStyle(b).overflowX),
  hidden: [...document.querySelectorAll("svg text")].filter((t) => {
    const text = t.getBoundingClientRect(), box = t.closest("svg").getBoundingClientRect();
    return text.left < box.left - 1 || text.right > box.right + 1 || !text.width
      || text.top < box.top - 1 || text.bottom > box.bottom + 1;
  }).map((t) => t.textContent),
  crossed: [...document.querySelectorAll("svg")].flatMap((drawing) => {
    const texts = [...drawing.querySelectorAll("text")];
    const boxes = texts.map((text) => text.getBoundingClientRect());
    return boxes.flatMap((a, i) => boxes.slice(i + 1).flatMap((b, j) => {
      const over = Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.4 * a.height;
      return over ? [[texts[i].textContent, texts[i + 1 + j].textContent]] : [];
    }));
  }),
  silent: [...document.querySelectorAll("svg")].filter((drawing) => {
    const box = drawing.closest("[role=img]");
    return !box || box.getAttribute("aria-label").length < 60;
  }).length,
  back: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector("svg text")).fill,
};
const out = document.createElement("pre");
out.id = "found";
out.textContent = JSON.stringify(found);
document.body.append(out);
"""


def browse(folder: Path, content: str, *flags: str) -> tuple[str, str]:
    """Return the document after its scripts ran, and what the browser logged."""
    page = folder / "page.html"
    page.write_text(content, encoding="utf-8")
    arguments = [*FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout, done.stderr


def console(log: str) -> list[str]:
    """Return what the page wrote to the console: errors, warnings and blocked loads."""
    return re.findall(r"CONSOLE[:(]\d+\)?\] .*", log)


@pytest.fixture(scope="module")
def page() -> str:
    return render([*demo_rows(), failed_cell()], "the demo")


@pytest.fixture(scope="module")
def everything() -> str:
    return render(every_kind(), "every kind", ["a/result.json is not a list of result rows"])


def look(folder: Path, page: str, *flags: str) -> dict:
    """Return what `SCRIPT` found in a copy of the page."""
    before, rest = page.rsplit("</body>", 1)
    seen, log = browse(folder, f"{before}<script>{SCRIPT}</script></body>{rest}", *flags)
    assert console(log) == []
    text = re.search(r'<pre id="found">(.*?)</pre>', seen, flags=re.DOTALL)
    assert text, seen[-500:]
    return json.loads(text[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


def test_the_browser_would_tell_of_errors_and_of_loads(tmp_path: Path, page: str) -> None:
    broken = page.replace("</body>", '<img src="https://example.org/a.png"></body>')
    _, log = browse(tmp_path, broken)
    assert any("example.org" in line for line in console(log))


def test_the_page_sorts_filters_and_loads_nothing(tmp_path: Path, page: str) -> None:
    actual = look(tmp_path, page, "--window-size=1280,900")
    methods = ["hc_smoe", "mobe", "reap"]
    fine, coarse = ([f"{m} {x}" for x in methods] for m in ("tiny_fine", "tiny_coarse"))
    assert actual["first"] == [*fine, "tiny_fine reap", *coarse]
    ascending = [coarse[1], coarse[2], coarse[0], fine[0], fine[2]]
    blank = {fine[1], "tiny_fine reap"}
    names, mark = actual["up"]
    assert (names[:5], set(names[5:]), mark) == (ascending, blank, "ascending")
    names, mark = actual["down"]
    assert (names[:5], set(names[5:]), mark) == (ascending[::-1], blank, "descending")
    names, mark = actual["model"]
    assert [name.split()[0] for name in names] == ["tiny_coarse"] * 3 + ["tiny_fine"] * 4
    assert (mark, actual["marks"]) == ("ascending", 1)
    assert actual["coarse"] == [["tiny_coarse reap"], "1 of 7 cells"]
    assert actual["nothing"] == [[], "0 of 7 cells"]
    assert actual["all"][1] == "7 of 7 cells"
    assert actual["requests"] == []
    assert actual["silent"] == 0
    assert actual["hidden"] == []
    assert actual["crossed"] == []


@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_a_page_of_every_kind_of_figure_is_legible_when_all_is_opened(
    tmp_path: Path, everything: str, size: str
) -> None:
    actual = look(tmp_path, everything, f"--window-size={size}")
    assert actual["requests"] == []
    assert actual["silent"] == 0
    assert actual["hidden"] == []
    assert actual["wide"] <= 0
    crossed = [pair for pair in actual["crossed"] if not all(item.isdigit() for item in pair)]
    assert crossed == []  # but for the numbers of points of a front that lie close together
    assert actual["rows"] == 51


def test_on_paper_the_groups_are_open_and_the_numbers_are_not(
    tmp_path: Path, everything: str
) -> None:
    groups, shut, printed, again, numbers = look(tmp_path, everything)["groups"]
    assert groups > 8
    assert (shut, printed, again, numbers) == (0, groups, 0, 0)


def test_a_phone_scrolls_tables_but_not_the_page(tmp_path: Path, page: str) -> None:
    actual = look(tmp_path, page, "--window-size=390,844")
    assert actual["wide"] <= 0
    assert actual["boxes"]
    assert set(actual["boxes"]) == {"auto"}
    assert actual["hidden"] == []


def test_light_and_dark_swap_paper_and_ink(tmp_path: Path, page: str) -> None:
    light, dark = (
        look(tmp_path, page, f"--blink-settings=preferredColorScheme={scheme}") for scheme in (1, 0)
    )

    def brightness(colour: str) -> float:
        return sum(map(float, re.findall(r"\d+", colour)[:3])) / 765

    assert brightness(light["back"]) > 0.9 > 0.3 > brightness(light["ink"])
    assert brightness(dark["back"]) < 0.2 < 0.8 < brightness(dark["ink"])

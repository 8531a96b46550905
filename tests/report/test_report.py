"""The page: whole, self-contained, safe, and with every number of the rows."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rerail.errors import InputError
from rerail.report.charts import before_after, fine_against_coarse, pareto
from rerail.report.frame import Results
from rerail.report.report import render, write_report
from rerail.report.routing_charts import heat_maps, load_maps
from rerail.report.words import plus_minus
from result_rows import MODELS, Row, cell, demo_rows, every_kind, failed_cell

VOID = {"meta", "input", "br", "hr", "img", "link"}


class Page(HTMLParser):
    """Parses strictly: every element is closed in its turn."""

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        shown = self.open[-1:] not in (["script"], ["style"])
        self.text += data if shown and data.strip() else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def demo() -> str:
    return render([*demo_rows(), failed_cell()], "the <demo>")


SEVERAL = {
    "no rows": [],
    "a failed cell": [failed_cell()],
    "an unknown failed cell": [failed_cell(model=None, compressor=None, ratio=None, key=None)],
    "teachers": [row for row in demo_rows() if row["stage"] == "teacher"],
    "no repair": [row for row in demo_rows() if row["stage"] != "repaired"],
    "no errors": [{**row, "nll_se": None, "kl_se": None, "recovery_se": None} for row in cell()],
    "one stage without a size": [{**row, "bytes": None} for row in cell()],
    "seeds": [row for seed in range(3) for row in cell(seed=seed, recovery=0.4 + seed / 10)],
    "ratios": [row for q in (0.25, 0.5) for m in MODELS for row in cell(m, ratio=q)],
    "samples": [row for n in (16, 64) for m in MODELS for row in cell(m, samples=n)],
    "two sets of tokens": [*cell(), *cell("tiny_coarse", texts={"wiki": 9000})],
    "every kind": every_kind(),
    "dollars and braces": cell(calibration="$x_{", allocation="a$b") + cell(calibration="%s"),
}


@functools.cache
def several(name: str) -> str:
    return render(SEVERAL[name])


@pytest.mark.parametrize("name", SEVERAL)
def test_every_kind_of_rows_gives_a_whole_page(name: str) -> None:
    page = Page(several(name))
    assert page.all("h1")
    assert ("There are no result rows yet." in page.text) == (not SEVERAL[name])


def test_ids_are_unique_and_everything_that_is_referred_to_exists(demo: str) -> None:
    page = Page(demo)
    counts = Counter(a["id"] for _, a, _ in page.elements if "id" in a)
    assert counts.most_common(1)[0][1] == 1
    used = set(re.findall(r"url\(#([^)]+)\)", demo))
    for _, a, _ in page.elements:
        used |= {a[name] for name in ("for", "aria-labelledby", "data-table") if name in a}
        used |= {a["href"].removeprefix("#") for name in ("href",) if name in a}
    assert used <= counts.keys()
    assert len(used) > 20


def test_nothing_is_loaded_from_anywhere(demo: str) -> None:
    page = Page(demo)
    for name in ("src", "srcset", "data", "action", "poster"):
        assert not [a for _, a, _ in page.elements if name in a]
    assert all(
        a["href"].startswith("#") for tag, a, _ in page.elements if "href" in a and tag != "image"
    )
    images = [a["xlink:href"] or "" for a in page.all("image")]
    assert images
    assert all(message.startswith("data:image/png;base64,") for message in images)
    assert "://" not in demo
    assert "@import" not in demo
    assert "default-src 'none'" in str(page.all("meta"))
    assert "img-src data:;" in str(page.all("meta"))


def test_all_numbers_of_all_rows_are_there() -> None:
    rows = [
        {**row, "nll": row["nll"] + i / 1000, "kl": row["kl"] + i / 1000, "seconds": 100.0 + i}
        for i, row in enumerate(demo_rows())
    ]
    text = Page(render(rows)).text
    for row in rows:
        assert plus_minus(row["nll"], row["nll_se"]) in text
        assert f"ppl {row['perplexity']:.2f}" in text
        assert row["stage"] == "teacher" or f"{row['kl']:.3f}" in text
        assert row["stage"] == "teacher" or f"{row['esap']:.3f}" in text
        assert f"{row['bytes'] / 1e6:.2f}" in text
        assert row["samples_text"] in text
        assert row["choices"]["command"] in text
        assert row["key"] in text
        assert row["revision"] in text
        for entry in row["nll_by"].values():
            assert plus_minus(entry["nll"], entry["se"]) in text
        for layer in row["layers"] or []:
            assert row["stage"] == "teacher" or f"{layer['load_entropy']:.3f}" in text
            assert row["stage"] == "teacher" or f"{layer['routing_changed']:.3f}" in text
        if row["recovery"] is not None:
            assert f"{100 * row['recovery']:.0f} % ± 3" in text
        if row["curve"]:
            assert f"{row['curve'][0]['val_kl']:.4f}" in text
    assert f"{100 + 101 + 102}" in text


def test_a_blank_recovery_shows_its_reason_and_no_number() -> None:
    text = Page(render(cell(recovery=None))).text
    assert "gap under two standard errors" in text
    assert "no repair" in Page(render(cell()[:2])).text


def test_failed_and_not_applicable_cells_show_their_reasons() -> None:
    reason = "ratio=0.9 cannot be reached by mobe; allowed ratios are 0 to 0.7"
    rows = [*cell(), failed_cell("not_applicable", compressor="mobe", reason=reason)]
    text = Page(render(rows)).text
    assert "2 cells: 1 done, 1 not applicable." in text
    assert reason in text
    assert "Failed and not applicable" in text
    assert "Failed and not applicable" not in Page(render(cell())).text


def test_texts_of_rows_cannot_become_markup() -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"
    rows = [
        {**row, "samples_text": evil, "prompt": evil, "model": evil, "compressor": evil}
        for row in cell()
    ]
    rows += [failed_cell(reason=evil, model=evil)]
    content = render(rows, evil)
    page = Page(content)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert page.text.count(evil) > 5


def test_every_figure_and_table_can_be_read_without_sight(demo: str) -> None:
    page = Page(demo)
    figures = [(a, up) for tag, a, up in page.elements if tag == "svg"]
    labels = [a["aria-label"] for _, a, _ in page.elements if a.get("role") == "img"]
    assert len(figures) == len(labels) == len(page.all("figcaption")) > 8
    assert all(re.search(r"\d", label) and len(label) > 60 for label in labels)
    assert any("reap on tiny_fine: 56 % ± 3" in label for label in labels)
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_drawings_take_their_colours_from_the_page(demo: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", demo, flags=re.DOTALL))
    assert "var(--ink)" in drawn
    assert not re.findall(r"#0[1-5]0[1-5]0[0-9]", drawn)
    style = demo[demo.index("<style>") : demo.index("</style>")]
    used = set(re.findall(r"var\((--\w+)\)", drawn))
    for scheme in (style.split("@media")[0], style.split("prefers-color-scheme: dark")[1]):
        assert used <= set(re.findall(r"(--\w+):", scheme))


@pytest.mark.parametrize(
    ("draw", "column"),
    [(before_after, "nll_se"), (pareto, "nll_se"), (fine_against_coarse, "recovery_se")],
)
def test_an_error_is_drawn_as_a_whisker_and_stands_in_the_numbers(
    draw: Callable, column: str
) -> None:
    rows = [*cell(), *cell("tiny_coarse")]
    bare = [{**row, column: None} for row in rows]
    made = [Results.of(some) for some in (rows, bare)]
    drawn, without = (next(draw(results, results.settings)) for results in made)
    assert drawn.svg("x").count("<use") >= without.svg("x").count("<use") + 2
    assert "±" in str(drawn.numbers)
    assert "±" not in str(without.numbers)


@pytest.mark.parametrize(("layers", "printed"), [(4, True), (48, False)])
def test_a_heat_map_prints_its_numbers_where_there_is_room_and_is_never_an_image(
    layers: int, printed: bool
) -> None:
    rows = cell()
    for row in rows[1:]:
        row["layers"] = [
            {"layer": i, "routing_changed": 0.37, "load_entropy": 0.59} for i in range(layers)
        ]
    entropy, changed = heat_maps(Results.of(rows).settings)
    for picture, number in ((entropy, "0.59"), (changed, "0.37")):
        assert (f">{number}</text>" in picture.svg("x")) == printed
        assert "<image" not in picture.svg("x")
        assert picture.rows[0][1:] == (f"{number}0",) * layers


def test_load_by_expert_is_over_an_even_share_and_empty_where_an_expert_is_gone() -> None:
    [picture] = load_maps(Results.of(cell()).settings)
    teacher, compressed, repaired = (list(row) for row in picture.rows)
    assert teacher[1:] == ["2.00", "layer 0, expert 0", "0 of 16", "0"]
    assert compressed[1:] == repaired[1:] == ["2.00", "layer 0, expert 0", "0 of 12", "4"]
    assert "Heat map of the load of 4 experts in 4 layers" in picture.spoken
    assert picture.svg("x").count("<image") == 1
    assert all(
        f">{stage}</text>" in picture.svg("x") for stage in ("teacher", "compressed", "repaired")
    )


def test_load_by_expert_is_the_mean_over_seeds_and_absent_where_no_row_has_it() -> None:
    rows = [*cell(seed=0), *cell(seed=1)]
    for row in rows[3:]:
        row["layers"] = [{**layer, "load": [0.1, 0.5, 0.4, None]} for layer in row["layers"]]
    [picture] = load_maps(Results.of(rows).settings)
    assert picture.rows[1][1:3] == ("1.60", "layer 0, expert 1")
    for row in rows:
        row["layers"] = [{n: v for n, v in layer.items() if n != "load"} for layer in row["layers"]]
    assert list(load_maps(Results.of(rows).settings)) == []


def test_layers_and_models_with_different_numbers_of_experts_share_a_picture() -> None:
    wide, narrow = cell("tiny_fine", "reap")[:1], cell("tiny_fine", "mobe")[:1]
    wide[0]["layers"] = [{"layer": 1, "load": [0.25] * 4}, {"layer": 2, "load": [0.5, 0.5, None]}]
    narrow[0]["layers"] = [{"layer": 0, "load": [0.9, 0.1]}]
    [picture] = load_maps(Results.of([*wide, *narrow]).settings)
    message = {row[0].split(",")[0]: list(row[1:]) for row in picture.rows}
    assert message["reap"] == ["1.50", "layer 2, expert 0", "0 of 6", "1"]
    assert message["mobe"] == ["1.80", "layer 0, expert 0", "0 of 2", "0"]


def test_rare_experts_are_counted_and_layers_keep_their_indices() -> None:
    rows = cell()[:1]
    rows[0]["layers"] = [
        {"layer": 3 + i, "load": [0.9 * i, 1 - 0.9 * i - 0.02, 0.02]} for i in (0, 1)
    ]
    [picture] = load_maps(Results.of(rows).settings)
    assert picture.rows[0][1:] == ("2.94", "layer 3, expert 1", "3 of 6", "0")


@pytest.mark.parametrize(
    ("rows", "sentence", "there"),
    [
        ("two sets of tokens", "different sets of held-out tokens", True),
        ("ratios", "different sets of held-out tokens", False),
        ("ratios", "reap: recovery against removed share of the routed experts", True),
        ("ratios", "recovery against calibration blocks", False),
        ("samples", "reap: recovery against calibration blocks", True),
        ("samples", "recovery against removed share", False),
        ("two sets of tokens", "Recovery, fine against coarse", False),
        ("ratios", "Recovery, fine against coarse", True),
        ("seeds", "Mean ± standard deviation over seeds", True),
        ("seeds", "50 % ± 10", True),
        ("every kind", "rtn: recovery against bits of an expert's number", True),
        ("every kind", "tiny_fine: NLL against bits of an expert's number", True),
        ("every kind", "tiny_coarse: NLL against experts computed a token and layer", True),
        ("every kind", "Recovery by calibration text", True),
        ("every kind", "tiny_fine: recovery on each held-out text", True),
        ("every kind", "Fine minus coarse, paired by seed", True),
        ("every kind", "Recovery by paradigm", True),
        ("ratios", "Recovery by paradigm", False),
        ("ratios", "Recovery by calibration text", False),
        ("ratios", ": NLL against", False),
        ("ratios", "Fine minus coarse, paired by seed", False),
        ("ratios", "Mean ± standard deviation over seeds", False),
    ],
)
def test_figures_and_tables_are_there_exactly_where_they_mean_something(
    rows: str, sentence: str, there: bool
) -> None:
    assert (sentence in Page(several(rows)).text) == there


def test_the_budget_of_a_quantiser_is_bits_and_of_a_skipper_a_share_or_a_rule() -> None:
    text = Page(several("every kind")).text
    assert "rtn 3 bits" in text
    assert "odp skips 0.25" in text
    assert "odp skips by rule" in text
    assert not re.search(r"(rtn|odp) r0", text)
    for words in ("4bits", "0.25skipped", "by ruleskipped", "0.75removed"):
        assert words in text


def test_many_settings_are_folded_by_paradigm_and_no_figure_is_overcrowded() -> None:
    page = Page(several("every kind"))
    folded = re.findall(r"<summary>(\w+) \((\d+) figures?\)", several("every kind"))
    assert {"pruning", "merging", "editing", "quantisation", "skipping"} == {n for n, _ in folded}
    drawn = re.findall(r"<svg.*?</svg>", several("every kind"), flags=re.DOTALL)
    assert len(drawn) == len(page.all("figcaption"))
    heights = [float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', svg)[1]) for svg in drawn]
    assert max(heights) < 72 * 10
    assert "<summary>pruning" not in several("ratios")


def test_negative_recoveries_are_drawn_and_counted() -> None:
    page = Page(several("every kind"))
    labels = [str(a["aria-label"]) for _, a, _ in page.elements if a.get("role") == "img"]
    assert any("odp skips 0.5 n256 mix on tiny_coarse: -4 % ± 3" in label for label in labels)
    assert any("skipping (3) on coarse: -4 % ± 0" in label for label in labels)


def test_sizes_are_in_the_checkpoint_on_disk_in_memory_and_in_use() -> None:
    rows = cell()
    known = {"removed_of_experts": 0.5, "removed_of_model": 0.37, "memory_bytes": 31_000_000}
    rows[1] |= {**known, "active_experts": 1.75, "active_parameters": 1_234_567}
    rows[2] |= {**known, "disk_bytes": 9_876_543}
    text = Page(render(rows)).text
    assert "tiny_fine, reap, ratio 0.550 %37 %9.805.809.8831.001,234,5671.75" in text


def test_files_that_could_not_be_read_are_named_on_the_page() -> None:
    sentence = "out/a/result.json is not a list of result rows (<b>)"
    text = Page(render(cell(), problems=[sentence])).text
    assert sentence in text
    assert "left untouched" in text
    assert "left untouched" not in Page(render(cell())).text


def test_further_columns_stand_in_the_overview_stage_by_stage() -> None:
    rows = cell()
    for row, count in zip(rows, (4.0, 2.5, 2.25), strict=True):
        row["active_experts"] = count
    text = Page(render(rows, columns=["active_experts", "host"])).text
    assert "active experts" in text
    assert "4 → 2.5 → 2.25" in text
    assert "node-1" in text
    with pytest.raises(InputError, match=r"column nil does not exist; allowed: key, status.*nll"):
        render(rows, columns=["nil"])


def test_known_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef-not-a-key")
    rows = cell(prompt="0123456789abcdef-not-a-key")
    rows[0]["choices"]["command"] = "rerail logger.key=0123456789abcdef-not-a-key"
    content = render(rows)
    assert "not-a-key" not in content
    assert "rerail logger.key=(hidden)" in content


def test_tasks_stand_side_by_side_with_errors_and_counts() -> None:
    rows = cell()
    for row, value in zip(rows, (0.81, 0.62, 0.73), strict=True):
        entry = {"task": "local_blimp", "metric": "acc", "value": value, "se": 0.014, "n": 987}
        row["tasks"] = [entry, {**entry, "metric": "acc_norm", "value": 0.5, "se": None}]
    text = " ".join(Page(render(rows)).text.split())
    assert "local_blimpacc0.810 ± 0.0140.620 ± 0.0140.730 ± 0.014987" in text
    assert "local_blimpacc_norm0.5000.5000.500987" in text
    assert "lm-eval" not in Page(render(cell())).text


def test_the_same_rows_give_the_same_page() -> None:
    rows: list[Row] = cell()
    assert render(rows) == render(rows)


def test_the_file_is_written_whole(tmp_path: Path) -> None:
    path = write_report(cell(), tmp_path / "new" / "report.html", "one cell")
    assert path.read_text(encoding="utf-8") == render(cell(), "one cell")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]

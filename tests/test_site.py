"""The page's data and the cells' pages: what stands in them, what is left alone, what escapes."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ballast.declare import discover
from ballast.layout import Layout
from ballast.results import Results
from ballast.site import write_site
from ballast.site.bibtex import entries
from ballast.site.cells import page_name
from ballast.site.data import page_data
from ballast.site.page import script_json
from ballast.site.quantities import rounded
from ballast.statistics.analysis import analyse
from ballast.tables import tidy
from fake_records import failed, record
from fake_results import fake_results
from site_fakes import fake_analyses, many_results, with_folder
from test_tables import HOSTILE


def parts(text: str) -> list[tuple[str, dict[str, str | None]]]:
    """Every element of a page with its attributes."""
    found: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(text)
    return found


def data_of(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    made = fake_results(methods=len(HOSTILE) + 1, ranks=(2, 8), names=HOSTILE)
    return with_folder(made, tmp_path_factory.mktemp("suite"), HOSTILE[1])


@pytest.fixture(scope="module")
def site(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    write_site(results, fake_analyses(results), folder)
    return folder


def test_every_number_of_the_page_is_the_analysis_rounded(results: Results, site: Path) -> None:
    place = data_of((site / "index.html").read_text("utf-8"))["places"][0]
    rows = fake_analyses(results)[("micro-lm", "codes")].rows
    assert place["rows"]["n"] == len(rows)
    keys = [place["rows"]["text"]["key"]["v"][i] for i in place["rows"]["text"]["key"]["i"]]
    assert keys == list(rows.index)
    for q in ("E", "F", "O", "score.facts", "front"):
        assert place["rows"]["mean"][q] == pytest.approx(rows[q].tolist(), abs=0.006)
    for end in ("low", "high"):
        assert place["rows"][end]["E"] == pytest.approx(rows[f"E.{end}"].tolist(), abs=0.006)
    assert place["rows"]["ranks"]["O"][0] == rows["O.rank_low"].tolist()
    assert place["notes"] == list(fake_analyses(results)[("micro-lm", "codes")].notes)
    assert place["facts"]["O.minimum_detectable"] == 3.2


def test_cells_point_to_their_rows_and_churn_adds_up(results: Results, site: Path) -> None:
    place = data_of((site / "index.html").read_text("utf-8"))["places"][0]
    ids = [place["cells"]["text"]["id"]["v"][i] for i in place["cells"]["text"]["id"]["i"]]
    for at, cell in enumerate(ids):
        identity = results.records[cell]["identity"]
        row = place["cells"]["row"][at]
        assert place["rows"]["rank"][row] == identity["rank"]
        assert (
            place["rows"]["text"]["method"]["v"][place["rows"]["text"]["method"]["i"][row]]
            == (identity["method"])
        )
        assert (site / place["cells"]["page"][at]).is_file()
    for block in place["churn"].values():
        for n, *kinds in zip(
            block["n"], block["kept"], block["gained"], block["forgotten"], block["never"],
            strict=True,
        ):  # fmt: skip
            assert sum(kinds) == n == 3 * 40
    mine = [r for r in results.records.values() if r["identity"]["method"] == "lora"]
    mine = [r for r in mine if r["identity"]["rank"] == 2]
    row = next(i for i, c in enumerate(ids) if c == mine[0]["id"])
    forgotten = place["churn"]["facts"]["forgotten"][place["cells"]["row"][row]]
    assert forgotten == sum(r["churn"]["facts"]["forgotten"] for r in mine)


def test_the_same_results_give_the_same_bytes(results: Results, site: Path, tmp_path: Path) -> None:
    write_site(results, fake_analyses(results), tmp_path)
    names = sorted(p.relative_to(site) for p in site.rglob("*.html"))
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.html"))
    assert all((site / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_a_page_is_written_again_only_if_what_it_shows_has_changed(tmp_path: Path) -> None:
    one, two = record(seed=0), record(seed=1)

    def write(records: list[dict]) -> dict[str, tuple[int, int]]:
        made = Results("tiny", tidy(records), {r["id"]: r for r in records}, fake_results(1).items)
        write_site(made, fake_analyses(made), tmp_path)
        return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in tmp_path.glob("cells/*")}

    first = write([one, two])
    assert len(first) == 2
    assert write([one, two]) == first
    two["costs"]["tokens"] += 1
    second = write([one, two])
    changed = {name for name in first if second[name] != first[name]}
    assert changed == {page_name(two["id"])}
    assert set(write([two])) == changed  # the page of a cell that is gone is gone


def test_failed_cells_have_a_page_and_their_reason(tmp_path: Path) -> None:
    bad = failed(record(seed=1), reason=HOSTILE[1])
    records = [record(seed=0), bad]
    made = Results("tiny", tidy(records), {r["id"]: r for r in records}, fake_results(1).items)
    write_site(made, fake_analyses(made), tmp_path)
    page = (tmp_path / "cells" / page_name(bad["id"])).read_text("utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "diverged" in page
    place = data_of((tmp_path / "index.html").read_text("utf-8"))["places"][0]
    assert f"diverged: {HOSTILE[1]}" in place["cells"]["text"]["reason"]["v"]
    assert place["cells"]["mean"]["E"][1] is None


def test_pages_of_hostile_cells_have_no_elements_but_their_own(site: Path) -> None:
    own = {
        "html", "head", "meta", "link", "title", "script", "style", "body", "main", "nav", "a",
        "h1", "h2", "h3", "p", "span", "ul", "li", "b", "i", "section", "div", "table", "thead",
        "tbody", "tr", "th", "td", "dl", "dt", "dd", "code", "details", "summary", "svg",
        "polyline", "line", "text",
    }  # fmt: skip
    pages = sorted((site / "cells").glob("*.html"))
    assert len(pages) == 2 * 3 * (len(HOSTILE) + 1)
    for page in pages[:20]:
        elements = parts(page.read_text("utf-8"))
        assert {tag for tag, _ in elements} <= own
        assert sum(tag == "script" for tag, _ in elements) == 1
        assert not any(name.startswith("on") for _, attributes in elements for name in attributes)
        links = {a["href"] for tag, a in elements if tag == "a"}
        assert links == {"../index.html"}


def test_samples_gained_and_lost_stand_on_the_page_as_text(site: Path) -> None:
    page = next(iter(sorted((site / "cells").glob("*.html")))).read_text("utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; after" in page
    assert "Forgotten" in page
    assert 'class="curve"' in page


def test_script_json_ends_no_script() -> None:
    value = {"a": "</script><!-- \u2028 <script>", "b": list(HOSTILE)}
    text = script_json(value)
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == value


def test_rounding_keeps_what_numbers_mean() -> None:
    assert rounded([1.005001, -0.001, math.nan, None, math.inf, 12.0], 2) == [
        1.01, 0, None, None, None, 12,
    ]  # fmt: skip
    assert rounded([1.23456e-7, 123456.0, 0.0], None) == [1.235e-7, 123500, 0]


def test_bibtex_says_what_the_citation_says() -> None:
    entry = entries(
        "lora", "LoRA", "Hu et al., LoRA: Low-Rank Adaptation, ICLR 2022, arXiv:2106.09685"
    )
    assert entry == (
        "@misc{lora,\n  author = {Hu and others},\n  title = {{LoRA: Low-Rank Adaptation}},\n"
        "  howpublished = {ICLR},\n  year = {2022},\n  eprint = {2106.09685},\n"
        "  archivePrefix = {arXiv},\n}"
    )
    assert "Guo and Rush and Kim" in entries("d", "D", "Guo, Rush and Kim, Diff, ACL 2021")
    assert "no citation declared" in entries("x", "X", None)
    odd = entries("x y", HOSTILE[1], "nobody knows")
    assert odd.startswith("@misc{x-y,")
    assert "note = {nobody knows}" in odd


@pytest.mark.parametrize("text", HOSTILE)
def test_bibtex_of_anything_has_balanced_braces(text: str) -> None:
    for entry in (entries(text, text, text), entries("m", "M", f"Hu et al., {text}, 2022")):
        depth = 0
        for c in entry:
            depth += (c == "{") - (c == "}")
            assert depth >= 0
        assert depth == 0
        assert entry.count("@misc") == 1
        assert re.match(r"@misc\{[A-Za-z0-9_.:+-]+,\n", entry)


def test_every_method_of_the_checkout_has_an_author_a_title_and_a_year() -> None:
    for name, method in discover(Layout.here().methods).items():
        text = entries(name, method.declaration.title, method.declaration.citation)
        assert "author = {" in text, name
        assert re.search(r"year = \{(19|20)\d\d\}", text), name


def test_kept_results_without_a_folder_have_no_curves_and_still_a_page(tmp_path: Path) -> None:
    made = fake_results(methods=2, ranks=(None,), seeds=1)
    write_site(made, fake_analyses(made), tmp_path)
    place = data_of((tmp_path / "index.html").read_text("utf-8"))["places"][0]
    assert place["losses"] == {}
    assert place["curves"]["rewind"]["0"][0][:3] == [0, 0, 0]
    assert place["rows"]["low"] == {} or "E" not in place["rows"]["low"]


def test_no_results_at_all(tmp_path: Path) -> None:
    made = Results("tiny", tidy([]), {}, fake_results(1).items, problems=("run.json: damaged",))
    assert write_site(made, {}, tmp_path) == [tmp_path / "index.html"]
    found = data_of((tmp_path / "index.html").read_text("utf-8"))
    assert found["places"] == []
    assert found["problems"] == ["run.json: damaged"]


def test_page_names_stay_in_their_folder() -> None:
    for cell in ("../../etc", "a b", "%2e%2e", "x" * 300, "#", "?q", '"', "<i>"):
        name = page_name(cell)
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.html", name)
    assert page_name("a b") != page_name("a-b")


def test_many_cells_are_fast(tmp_path: Path) -> None:
    made = many_results(600)
    data = page_data(made, fake_analyses(made), {})
    assert sum(place["cells"]["n"] for place in data["places"]) == 600
    assert len(script_json(data)) < 600 * 2500


def test_published_numbers_stand_on_the_page_where_a_suite_names_them(tmp_path: Path) -> None:
    made = fake_results(methods=3)
    analyses = {place: analyse(made, *place) for place in made.places()}
    tables = {}
    for protocol in (None, "peft_metamathqa"):
        write_site(made, analyses, tmp_path, protocol)
        page = data_of((tmp_path / "index.html").read_text("utf-8"))
        tables[protocol] = page["published"]
    assert tables[None] == []
    assert tables["peft_metamathqa"]
    for table in tables["peft_metamathqa"]:
        assert len(table["columns"]) == len(table["values"])
        assert {"Published", "Ours"} <= set(table["columns"])

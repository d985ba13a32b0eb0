"""The leaderboard in a real headless Chromium, opened from its file."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ballast import escape
from ballast.site import write_site
from ballast.site.page import SCRIPTS
from ballast.tables import render
from fake_records import failed
from fake_results import fake_results
from site_fakes import fake_analyses, many_results, rebuilt, with_folder
from test_tables import HOSTILE

NAMES = ("chromium", "chromium-browser", "google-chrome")
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is on the path")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as runner:
        started = runner.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = fake_results(
        methods=len(HOSTILE) + 2, ranks=(2, 8), names=HOSTILE, targets=("codes", "facts")
    )
    records = list(made.records.values())
    records[7] = failed(records[7], reason=HOSTILE[1])
    for record in records[-3:]:  # the seeds of a row
        record["origin"] = "elsewhere"
    made = rebuilt(made, records)
    made = with_folder(made, tmp_path_factory.mktemp("suite"), HOSTILE[1])
    folder = tmp_path_factory.mktemp("site with blanks & <signs>")
    write_site(made, fake_analyses(made), folder)
    return folder


@pytest.fixture
def open_page(browser: Any, site: Path) -> Iterator[Open]:
    """Open the page; at the end nothing may have been requested, logged, thrown or asked."""
    trouble: list[str] = []
    contexts = []

    def opened(address: str = "", folder: Path = site, **settings: Any) -> Any:
        settings = {"viewport": {"width": 1400, "height": 900}} | settings
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)  # two slow cores may be shared
        own = (folder / "index.html").as_uri()
        page.on("console", lambda m: trouble.append(f"console: {m.text}"))
        page.on("pageerror", lambda e: trouble.append(f"error: {e}"))
        page.on("dialog", lambda d: (trouble.append(f"dialog: {d.message}"), d.dismiss()))
        page.on(
            "request",
            lambda r: (
                None
                if r.url.split("#")[0] == own or r.url.startswith(("data:", "blob:"))
                else trouble.append(f"request: {r.url}")
            ),
        )
        page.goto(own + address)
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


def names_of(page: Any) -> list[str]:
    return page.locator("#results tbody td.name button").all_inner_texts()


def column(page: Any, title: str) -> list[str]:
    """Texts of a column as they are shown."""
    heads = [t.strip() for t in page.locator("#results thead th").all_text_contents()]
    at = heads.index(title) + 1
    return page.locator(f"#results tbody td:nth-child({at}) .v").all_text_contents()


def rows_are(page: Any, count: int) -> None:
    """Wait until the table shows that many rows."""
    page.locator(f"#results tbody tr:nth-child({count})").wait_for()
    page.locator(f"#results tbody tr:nth-child({count + 1})").wait_for(state="detached")


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace("−", "-").replace("+", "")) for text in texts if text != "–"]


def test_it_opens_sorts_and_says_so(open_page: Open) -> None:
    page = open_page()
    assert page.locator("#results tbody tr").count() == 2 * (len(HOSTILE) + 2)
    assert numbers(column(page, "O")) == sorted(numbers(column(page, "O")), reverse=True)
    head = page.locator("#results thead th", has_text="Target").first
    for way, backwards in (("descending", True), ("ascending", False)):
        head.click()
        page.locator(f"#results th[aria-sort={way}]", has_text="Target").wait_for()
        found = numbers(column(page, "Target"))
        assert found == sorted(found, reverse=backwards)
        assert len(set(found)) > 5
    assert page.locator("#results caption").count() == 1
    assert "3.2 points" in page.locator(".under").inner_text()
    assert "noise floor" in page.locator(".under").inner_text()


def test_search_and_facets_filter(open_page: Open) -> None:
    page = open_page()
    page.fill("#search", "lora r8")
    rows_are(page, 1)
    assert names_of(page) == ["lora"]
    page.click("text=Clear")
    rows_are(page, 2 * (len(HOSTILE) + 2))
    page.locator('[data-facet="family"] > summary').click()
    page.locator('[data-facet="family"] [data-value="additive"] input').check()
    families = page.eval_on_selector_all(
        "#results tbody td.name .dot", "nodes => [...new Set(nodes.map(n => n.title))]"
    )
    assert families == ["additive"]
    assert "f.family=additive" in page.url
    page.locator('[data-facet="family"] [data-value="additive"] input').uncheck()
    assert "f.family" not in page.url


def test_failed_cells_are_found_with_their_reason(open_page: Open) -> None:
    page = open_page()
    page.click("text=All cells")
    assert page.locator("#results tbody tr").count() == 50
    page.locator('[data-facet="status"] > summary').click()
    page.locator('[data-facet="status"] [data-value="failed"] input').check()
    rows_are(page, 1)
    assert f"diverged: {HOSTILE[1]}" in page.locator("#results td.reason").inner_text()
    page.go_back()
    assert page.locator("#results tbody tr").count() == 50
    page.go_back()
    assert page.locator('[data-key="rows"]').get_attribute("aria-pressed") == "true"


def test_hostile_names_stay_text(open_page: Open) -> None:
    page = open_page()
    shown = names_of(page)
    for name in HOSTILE:
        assert any(escape.one_line(name) == escape.one_line(text) for text in shown), name
    for view in ("tradeoff", "curves", "forgetting", "cost", "notes", "table"):
        page.click(f"#tab-{view}")
        assert (
            page.evaluate("document.querySelectorAll('main script, main img, aside script').length")
            == 0
        )
    page.locator("#results td.name button", has_text="<script>").first.click()
    assert "<script>alert(1)</script>" in page.locator("#detail h2").inner_text()
    assert page.locator("#detail script").count() == 0
    page.locator('[data-facet="method"] > summary').click(force=True)
    page.keyboard.press("Escape")


def test_plot_hovers_and_opens_the_row(open_page: Open) -> None:
    page = open_page("#view=tradeoff")
    page.wait_for_selector("#scatter .point")
    point = page.locator("#scatter .scatterlayer .trace .points .point").first
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#scatter .hoverlayer .hovertext")
    tip = page.locator("#scatter .hoverlayer .hovertext").first.text_content()
    assert "seeds" in tip
    assert re.search(r"E\s+[+−]?\d", tip)
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("#detail:not([hidden])")
    assert "row=" in page.url
    page.keyboard.press("Escape")
    assert page.locator("#detail").is_hidden()
    for axis, key in (("Across", "seconds.train"), ("Up", "source_mean")):
        page.get_by_label(axis, exact=True).select_option(key)
    assert "x=seconds.train" in page.url
    assert "y=source_mean" in page.url
    label = page.locator("#scatter").get_attribute("aria-label")
    assert "Source against Training" in label
    assert "On the front" in label


def test_front_of_the_page_is_the_front(open_page: Open, site: Path) -> None:
    from ballast.tradeoff import non_dominated

    page = open_page("#view=tradeoff")
    where = page.locator("#place").input_value()
    text = (site / "index.html").read_text("utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    place = next(p for p in data["places"] if f"{p['base']} → {p['target']}" == where)
    means = place["rows"]["mean"]
    keep = non_dominated(list(zip(means["F"], means["E"], strict=True)))
    assert page.locator("#front button").count() == sum(keep) > 0
    shown = {float(t) for t in page.locator("#front button .muted").all_inner_texts()}
    assert shown == {round(f, 2) for f, k in zip(means["front"], keep, strict=True) if k}


def test_deep_link_restores_what_was_seen(open_page: Open) -> None:
    page = open_page()
    page.get_by_label("Base and target").select_option(index=1)
    page.fill("#search", "r8")
    page.wait_for_timeout(250)
    page.locator("#results thead th", has_text="Source").first.click()
    page.locator("#columns > summary").click()
    page.locator('#columns input[data-column="H"]').check()
    page.keyboard.press("Escape")
    page.locator("#results td.name button").nth(1).click()
    seen = (names_of(page), column(page, "H"), page.locator("#detail h2").inner_text())
    other = open_page("#" + page.url.partition("#")[2])
    again = (names_of(other), column(other, "H"), other.locator("#detail h2").inner_text())
    assert again == seen
    assert other.input_value("#search") == "r8"
    assert other.locator("#place").input_value() == page.locator("#place").input_value()
    page.go_back()
    assert page.locator("#detail").is_hidden()


BROKEN = (
    "#view=nonsense", "#sort=zz:desc&cols=nope&row=none&page=99", "#x=1&y=2&view=tradeoff",
    "#place=%3Cscript%3E", "#f.method=gone", "#n=abc", "#x=%00&y=E&view=tradeoff", "#main",
)  # fmt: skip


def test_a_broken_link_still_shows_the_page(open_page: Open) -> None:
    page = open_page(BROKEN[0])
    for address in BROKEN:
        page.evaluate("hash => { location.hash = hash; }", address)
        page.wait_for_timeout(80)
        assert page.locator("#results, #scatter").count() == 1, address


def exported(page: Any, name: str) -> str:
    page.click("#export")
    page.locator("#exporter .switch button", has_text=name).click()
    text = page.input_value("#exporter textarea")
    page.keyboard.press("Escape")
    return text


def test_exports_have_the_rows_and_the_order_of_the_table(open_page: Open) -> None:
    page = open_page("#q=r8&sort=E:asc")
    names = names_of(page)
    rows = list(csv.reader(io.StringIO(exported(page, "CSV"))))
    assert len(rows) == len(names) + 1
    assert {len(row) for row in rows} == {len(rows[0])}
    at = rows[0].index("E")
    assert rows[0][at : at + 3] == ["E", "E.low", "E.high"]
    values = [float(row[at]) for row in rows[1:]]
    assert values == sorted(values)
    for row, name in zip(rows[1:], names, strict=True):
        assert escape.one_line(row[0].removeprefix("'")).startswith(escape.one_line(name))
        assert row[0][:1] not in tuple("=+-@\t\r")
    lines = exported(page, "Markdown").strip().split("\n")
    assert len(lines) == len(names) + 2
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    for line, name in zip(lines[2:], names, strict=True):
        assert line.startswith(f"| {escape.markdown(name)}")
    latex = exported(page, "LaTeX")
    body = latex.split("\\midrule\n")[1].split("\\bottomrule")[0].strip().split("\n")
    for line, name in zip(body, names, strict=True):
        assert line.startswith(escape.latex(name))
    assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
    bibtex = exported(page, "BibTeX")
    assert bibtex.count("@misc{") == len({name.split(" @")[0] for name in names})
    assert "Low-Rank Adaptation" in bibtex


def test_export_is_copied(open_page: Open) -> None:
    page = open_page("#q=lora", permissions=["clipboard-read", "clipboard-write"])
    page.click("#export")
    text = page.input_value("#exporter textarea")
    page.click("#copy")
    page.wait_for_selector("#toast.shown")
    assert page.evaluate("navigator.clipboard.readText()") == text


ODD = (
    *HOSTILE, "", " ", "a_b _c_ __", "www.x.y http://a WWW.b ähttp:x", "\u200b\u2028x\u00a0y",
    "−5", "@x", "\tx", "a\rb", "Ωß–ż𝔸", "x\\", "$$", "^~", "-1,2", "é_", "'", "🎉🎉🎉🎉",
)  # fmt: skip


def test_escapes_are_those_of_the_library(browser: Any) -> None:
    from ballast.site.templates import asset

    assert "text.js" in SCRIPTS
    page = browser.new_page()
    names = ("csvCell", "markdownText", "latexText", "oneLine")
    calls = ", ".join([*(f"{name}(t)" for name in names), "shorten(t, 5)"])
    script = f"(texts) => {{ {asset('text.js')}\n return texts.map((t) => [{calls}]); }}"
    found = page.evaluate(script, list(ODD))
    page.close()
    for text, (as_csv, markdown, latex, line, short) in zip(ODD, found, strict=True):
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerow([render._csv_cell(text), "x"])
        if "\r" not in text:  # which Python's writer leaves without quotes
            assert as_csv == stream.getvalue().removesuffix(",x\n"), text
        parsed = next(csv.reader(io.StringIO(f"{as_csv},x\n", newline="")))
        assert parsed == [render._csv_cell(text), "x"]
        assert markdown == escape.markdown(text), text
        assert latex == escape.latex(text), text
        assert line == escape.one_line(text), text
        assert short == escape.shorten(text, 5), text


def test_keyboard_reaches_everything(open_page: Open) -> None:
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    assert "skip" not in page.url
    page.focus("#tab-table")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-tradeoff"
    assert page.locator("#tab-tradeoff").get_attribute("aria-selected") == "true"
    page.keyboard.press("ArrowLeft")
    name = page.locator("#results td.name button").first
    name.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelector('#detail').contains(document.activeElement)")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.closest('td.name') !== null")
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, select, textarea, [role=region]')]
        .filter((n) => !(n.textContent.trim() || n.getAttribute('aria-label') || n.labels?.length))
        .map((n) => n.outerHTML)"""
    )
    assert unnamed == []


def test_dark_by_preference_and_by_the_button(open_page: Open) -> None:
    def ground(page: Any) -> int:
        return int(
            re.search(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0]
        )

    page = open_page(color_scheme="dark")
    assert ground(page) < 60
    page.click("#theme")
    assert ground(page) > 200
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert ground(page) > 200
    assert ground(open_page(color_scheme="light")) > 200


def test_a_phone_never_scrolls_sideways(open_page: Open) -> None:
    page = open_page(viewport={"width": 375, "height": 812})
    box = page.locator(".box").first
    assert box.evaluate("b => b.scrollWidth > b.clientWidth")
    for view in ("table", "tradeoff", "curves", "forgetting", "cost", "notes"):
        page.click(f"#tab-{view}")
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, view
        if view not in ("table", "notes"):
            assert page.locator(".plot .main-svg").count() > 0
    page.locator("#tab-table").click()
    page.locator("#results td.name button").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_curves_follow_the_ticked_rows(open_page: Open) -> None:
    page = open_page()
    for at in (0, 3):
        page.locator("#results td.pin input").nth(at).check()
    names = [names_of(page)[at] for at in (0, 3)]
    page.click("#tab-curves")
    page.wait_for_selector("section.chart .main-svg")
    assert "2 rows ticked" in page.locator("#panel").inner_text()
    assert page.locator("section.chart h2").all_inner_texts() == [
        "Rewinding the update",
        "Training loss",
    ]
    legend = page.locator("section.chart").first.locator(".legendtext").all_text_contents()
    assert len(legend) == len(names)


def test_cell_page_links_back_and_shows_samples(open_page: Open, browser: Any, site: Path) -> None:
    page = browser.new_page()
    trouble: list[str] = []
    page.on("console", lambda m: trouble.append(m.text))
    page.on("dialog", lambda d: (trouble.append("dialog"), d.dismiss()))
    page.goto(next(iter(sorted((site / "cells").glob("*.html")))).as_uri())
    assert "<script>alert(1)</script> question" in page.locator("body").inner_text()
    page.click("nav a")
    page.wait_for_selector("html[data-ready]")
    assert "tiny" in page.title()
    page.close()
    assert trouble == []


def test_ten_thousand_cells_open(open_page: Open, tmp_path: Path, record_property: Any) -> None:
    from ballast.files import write_text
    from ballast.site.data import page_data
    from ballast.site.page import render_page

    made = many_results(10_000)
    data = page_data(made, fake_analyses(made), {})
    write_text(tmp_path / "index.html", render_page(data))
    begin = time.perf_counter()
    page = open_page("#place=all&of=cells", folder=tmp_path)
    page.wait_for_selector("#results tbody tr")
    opened = time.perf_counter() - begin
    assert "10,000" in page.locator(".dt-info").inner_text()
    page.fill("#search", "Method 33 r8")
    texts = [
        f"{r['method']['title']} r{r['identity']['rank']} {r['id']}" for r in made.records.values()
    ]
    found = sum(all(word in text.lower() for word in ("method", "33", "r8")) for text in texts)
    assert 0 < found < 5000
    page.locator(f".dt-info:has-text('of {found}')").wait_for()
    record_property("seconds_to_open", opened)
    record_property("megabytes", (tmp_path / "index.html").stat().st_size / 1e6)
    assert opened < 20

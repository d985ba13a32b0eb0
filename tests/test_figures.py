"""Figures: what they show, the same bytes every time, nothing read as mathematics."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast.declare import FAMILIES
from ballast.figures import curves, difference, forgetting, palette, ranks, tradeoff
from ballast.figures.output import write_figures
from ballast.tables import output
from ballast.tables.summary import Place
from fake_records import record
from fake_results import fake_results
from test_tables import HOSTILE, contents, hostile, place_of, results_of, seeds


@pytest.fixture(scope="module")
def place() -> Place:
    return output.places_of(fake_results(6, (2, 4, 16), 3, 40))[0]


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.findobj(lambda o: hasattr(o, "get_text"))]


def test_the_same_results_give_the_same_bytes_without_dates(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        results = fake_results(3, (2, 8), 2, 20, names=HOSTILE[:2])
        write_figures(output.places_of(results), tmp_path / folder)
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    of_place = [f"{kind}-micro-lm-codes" for kind in ("ranks", "difference", "forgetting")]
    expected = [f"{n}.{k}" for n in ("tradeoff", "curves", *of_place) for k in ("svg", "pdf")]
    assert sorted(one) == sorted([*expected, "tradeoff.png"])
    assert one == two
    for data in one.values():
        for word in (b"Software", b"dc:date", b"CreationDate", b"<script"):
            assert word not in data


def test_figures_of_targets_that_are_gone_are_removed(tmp_path: Path) -> None:
    both = [place_of([record()]), place_of([record(target="other")])]
    write_figures(both, tmp_path, ["svg"])
    assert (tmp_path / "ranks-micro-lm-other.svg").exists()
    (tmp_path / "mine.svg").touch()
    write_figures(both[:1], tmp_path, ["svg"])
    assert not list(tmp_path.glob("*other*"))
    assert (tmp_path / "ranks-micro-lm-codes.svg").exists()
    assert (tmp_path / "mine.svg").exists()


@pytest.mark.parametrize("records", [[], hostile(), [record()]], ids=["none", "hostile", "one"])
def test_nothing_breaks_them(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    written = write_figures(output.places_of(results_of(records)), tmp_path, ["svg"])
    assert all(path.stat().st_size > 500 for path in written)


def test_a_family_has_one_colour_everywhere(place: Place) -> None:
    assert len(set(palette.COLOURS.values())) == len(FAMILIES)
    drawn = [
        tradeoff.scatter([place]), ranks.rank_sweep(place), difference.critical_difference(place),
        curves.learn_forget([place]),
    ]  # fmt: skip
    known = {row["family"] for row in place.rows.values()}
    for figure in drawn:
        assert figure is not None
        handles = {line.get_label(): line.get_color() for line in figure.legends[0].legend_handles}
        shown = {f: handles[f] for f in known if f in handles}
        assert all(colour == palette.COLOURS[family] for family, colour in shown.items())
    for row, line in zip(
        _paths(place), ranks.rank_sweep(place).legends[0].legend_handles, strict=True
    ):
        assert line.get_color() == palette.colour_of(row["family"])
    assert palette.colour_of("made up") == palette.colour_of(None) == palette.OTHER


def _paths(place: Place) -> list[dict[str, Any]]:
    return [path[0] for path in ranks._paths(place)]


def test_scatter_shows_each_mean_where_it_is(place: Place) -> None:
    axes = tradeoff.scatter([place]).axes[0]
    points = {
        (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if line.get_marker() not in ("None", None, "+") and len(line.get_xdata()) == 1
    }
    assert points == {(row["F"], row["E"]) for row in place.rows.values()}
    spans = {
        tuple(line.get_xdata()) for line in axes.lines if line.get_alpha() == 0.6
    }  # fmt: skip
    assert {(row["F.low"], row["F.high"]) for row in place.rows.values()} <= spans


def test_intervals_do_not_stretch_the_scatter() -> None:
    wide = seeds("lora", [0, 100], [-50, -5])  # the t interval of two seeds is 12.7 times as wide
    axes = tradeoff.scatter([place_of(wide + seeds("dora", [40, 41], [-9, -8]))]).axes[0]
    assert axes.get_ylim()[1] < 120


def test_many_rows_name_only_those_on_the_front() -> None:
    place = output.places_of(fake_results(25, (2, 8), 2, 30))[0]
    shown = {text.get_text() for text in tradeoff.scatter([place]).axes[0].texts}
    names = {palette.label_of(row) for row in place.rows.values()}
    rows = list(place.rows.values())
    front = tradeoff.non_dominated([(row["F"], row["E"]) for row in rows])
    best = {palette.label_of(row) for row, keep in zip(rows, front, strict=True) if keep}
    assert shown & names == best


def test_rank_sweep_draws_every_method_with_two_ranks(place: Place) -> None:
    figure = ranks.rank_sweep(place)
    assert len(figure.axes) == 3
    methods = {row["name"] for row in place.rows.values()}
    assert {text.get_text() for text in figure.legends[0].get_texts()} == methods
    for axes, quantity in zip(figure.axes, ("E", "F", "O"), strict=True):
        drawn = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3]
        rows = list(place.rows.values())
        for name in methods:
            path = sorted((r["rank"], r[quantity]) for r in rows if r["name"] == name)
            assert [value for _, value in path] in drawn
    assert "no method at two ranks" in texts(
        ranks.rank_sweep(place_of(seeds("lora", [1, 2], [0, 0])))
    )


def test_mean_ranks_against_a_count(place: Place) -> None:
    found = difference.mean_ranks(place, "O")
    cells = place.cells
    for key, row in found.iterrows():
        mine = place.rows[str(key)]
        per_seed = []
        for seed, group in cells.groupby("seed"):
            own = group[(group["method"] == mine["method"]) & (group["rank"] == mine["rank"])]["O"]
            value = own.iloc[0]
            higher, same = (group["O"] > value).sum(), (group["O"] == value).sum()
            per_seed.append(higher + (same + 1) / 2)
            assert seed in mine["seeds"]
        assert row["mean"] == pytest.approx(np.mean(per_seed))
    assert found["mean"].sum() == pytest.approx(len(found) * (len(found) + 1) / 2)


@given(st.integers(2, 9), st.data())
def test_bars_join_neighbours_that_no_test_tells_apart(n: int, data: st.DataObject) -> None:
    order = [f"row{i}" for i in range(n)]
    both = list(itertools.combinations(order, 2))
    p = [data.draw(st.sampled_from([0.01, 0.5])) for _ in both]
    pairs = pd.DataFrame(
        {"a": [b for _, b in both], "b": [a for a, _ in both], "p_adjusted": p}
    )  # fmt: skip
    apart = {pair for pair, value in zip(both, p, strict=True) if value < 0.05}

    def whole(first: int, last: int) -> bool:
        return not any(pair in apart for pair in itertools.combinations(order[first : last + 1], 2))

    every = [(i, j) for i in range(n) for j in range(i + 1, n) if whole(i, j)]
    inside = {(i, j) for i, j in every for a, b in every if (a, b) != (i, j) and a <= i and b >= j}
    longest = [run for run in every if run not in inside]
    runs = difference.joined(order, pairs)
    assert runs == longest
    columns = difference.columns_of(runs)
    for (one, at), (two, where) in itertools.combinations(zip(runs, columns, strict=True), 2):
        assert at != where or one[1] < two[0] or two[1] < one[0]


def test_difference_without_seeds_says_so() -> None:
    figure = difference.critical_difference(place_of([record(), record("dora")]))
    assert "fewer than two rows have two seeds" in texts(figure)


def test_heat_map_shows_the_changes(place: Place) -> None:
    figure = forgetting.heat_map(place)
    (image,) = figure.axes[0].images
    rows = list(place.rows.values())
    shown = np.asarray(image.get_array())
    assert shown.shape == (len(rows), 3)
    for at, row in enumerate(rows):
        changes = [row["score.facts"] - 90, row["score.sums"] - 80]
        assert shown[at] == pytest.approx([*changes, np.mean(changes)])
        assert np.mean(changes) == pytest.approx(row["F"])
    assert image.norm(0.0) == pytest.approx(0.5)
    assert -image.norm.vmin == image.norm.vmax
    written = {text.get_text() for text in figure.axes[0].texts}
    assert f"{round(shown[0, 0])}".replace("-", "−") in written


def test_a_long_heat_map_has_two_columns() -> None:
    place = output.places_of(fake_results(25, (2, 8), 2, 10))[0]
    figure = forgetting.heat_map(place)
    maps = [axes for axes in figure.axes if axes.images]
    assert sum(axes.images[0].get_array().shape[0] for axes in maps) == len(place.rows) == 50
    assert len(maps) == 2


def test_curves_end_where_they_end(place: Place) -> None:
    means = curves.mean_curves(place)
    assert set(means["kind"]) == {"rewind"}
    key = next(iter(place.rows))
    row = place.rows[key]
    cells = place.cells[
        (place.cells["method"] == row["method"]) & (place.cells["rank"] == row["rank"])
    ]
    known = place.results.curves
    ends = known[known["cell"].isin(cells["id"]) & (known["share"] == 1.0)]
    mine = means[(means["row"] == key) & (means["share"] == 1.0)].iloc[0]
    assert mine["E"] == pytest.approx(ends["E"].mean())
    assert curves.learn_forget([place_of([record()])]) is None


def test_text_is_no_mathematics() -> None:
    found = seeds("lora", [1, 2], [0, 0], title=r"$\frac{1}{$ $x^2$")
    svg = tradeoff.scatter([place_of(found)])
    assert any(r"$\frac{1}{$" in text for text in texts(svg))


def test_figures_take_nobodys_settings(tmp_path: Path) -> None:
    import matplotlib as mpl

    one = palette.save(tradeoff.scatter([place_of([record()])]), tmp_path / "a", "x", ["svg"])
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        two = palette.save(tradeoff.scatter([place_of([record()])]), tmp_path / "b", "x", ["svg"])
    assert one[0].read_bytes() == two[0].read_bytes()
    assert not re.search(rb"<text", one[0].read_bytes())  # letters are paths: the same everywhere

"""The papers' numbers are what they say, and stand beside ours without hiding what differs."""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ballast import published
from ballast.declare import discover
from ballast.errors import DataError, SuiteError
from ballast.layout import Layout
from ballast.published.data import IDENTITY, check_published, typed
from ballast.published.matching import match, plain_name
from ballast.results import Results
from ballast.statistics.analysis import Analysis
from ballast.suite import load_suite, read_config
from ballast.tables import tidy
from ballast.tables.render import to_csv
from fake_records import record

ROWS = published.read_published()
UPSTREAM = ["OKVQA", "OCRVQA", "GQA", "TextVQA"]
COMMONSENSE = [
    "BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"
]  # fmt: skip
GLUE = ["MNLI", "SST-2", "MRPC", "CoLA", "QNLI", "QQP", "RTE", "STS-B"]


def wide(source: str, **where: str) -> pd.DataFrame:
    """Tasks as columns, one row per model, target, label, rank and variant."""
    rows = ROWS[ROWS["source"] == source]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    keys = ["protocol", "model", "target", "label", "rank", "variant"]
    return rows.set_index([*keys, "task"])["value"].unstack("task")


# The transcription: identities that the numbers must obey, and counts.


def test_source_and_average_follow_from_the_tasks() -> None:
    checked = 0
    for source in ("llavaflow", "lorasculpt", "lorasculpt_repro"):
        for target in ("ScienceQA", "COCO-Caption", "IconQA"):
            table = wide(source, target=target)
            if not len(table):
                continue
            source_mean = table[UPSTREAM].mean(axis=1, skipna=False)
            whole = source_mean.notna() & table["Source"].notna()
            off = (source_mean - table["Source"])[whole].abs()
            assert (off <= 0.0051).all(), off
            checked += int(whole.sum())
            if "Avg" in table:
                average = (table["Source"] + table[target]) / 2
                off = (average - table["Avg"]).dropna().abs()
                assert (off <= 0.0051).all(), off
                checked += len(off)
    assert checked == 27 + 1 + 2 + 31 + 1 + 1


@pytest.mark.parametrize(
    ("source", "tasks", "within", "rows"),
    [
        ("dora", COMMONSENSE, 0.1, 10),
        ("dora_readme", COMMONSENSE, 0.1, 8),
        ("llm_adapters", COMMONSENSE, 0.1, 8),
        ("milora", COMMONSENSE, 0.1, 4),
        ("lora_dash", COMMONSENSE, 0.1, 4),
        ("llm_adapters", ["GSM8K", "AQuA", "MAWPS", "SVAMP"], 0.1, 4),
        ("pissa", GLUE, 0.1, 3),
        ("spectral_adapter", GLUE, 0.02, 3),
        ("lora", GLUE, 0.1, 1),
        ("vera", ["SST-2", "MRPC", "CoLA", "QNLI", "RTE", "STS-B"], 0.1, 2),
        ("peft_mllm", None, 0.1, 4),
    ],
)
def test_printed_averages(source: str, tasks: list[str] | None, within: float, rows: int) -> None:
    if tasks is None:  # each data set is a target of its own there
        block = ROWS[ROWS["source"] == source]
        table = block.set_index(["label", "task"])["value"].unstack("task")
        tasks = [name for name in table if name != "average"]
    else:
        table = wide(source)
    mean = table[tasks].mean(axis=1, skipna=False)
    off = (mean - table["average"]).dropna().abs()
    assert len(off) == rows
    assert (off <= within + 1e-9).all(), off


def test_adalora_averages_pairs_first() -> None:
    table = wide("adalora")
    pairs = {
        "MNLI": table[["MNLI-m", "MNLI-mm"]].mean(axis=1),
        "QQP": table[["QQP", "QQP F1"]].mean(axis=1),
    }
    both = pd.DataFrame(pairs)
    rest = table[["SST-2", "CoLA", "QNLI", "RTE", "MRPC", "STS-B"]]
    mean = pd.concat([both, rest], axis=1).mean(axis=1)
    # Printed averages are those of unrounded numbers, and of MNLI's own mean in some rows.
    assert ((mean - table["average"]).abs() <= 0.15).all()
    assert len(mean) == 7


def test_cgm_identities() -> None:
    for target, rows in (("OKVQA", 8), ("Flickr30k", 5)):
        table = wide("cgm", target=target)
        p, t = table["PreAvg"], table[target]
        assert len(table) == rows
        assert ((2 * t * p / (t + p) - table["H"]).abs() <= 0.1).all()  # of rounded numbers
    table = wide("cgm", target="OKVQA")
    fits = [
        n
        for n in range(1, 20)
        if ((table["OKVQA"] + n * table["PreAvg"]) / (n + 1) - table["Avg"]).abs().max() <= 0.1
    ]
    assert fits, "no number of upstream sets gives the printed Avg of every row"


def test_the_inconsistent_rows_are_flagged_and_no_other() -> None:
    flagged = ROWS[ROWS["note"].str.contains("unreliable")]
    assert set(flagged["source"]) == {"model_dowser"}
    assert set(flagged["metric"]) == {"harmonic_mean"}
    assert len(flagged) == 5
    spider = ROWS[(ROWS["source"] == "model_dowser") & (ROWS["label"] == "SPIDER")]
    t, p, h = (float(spider.loc[spider["task"] == k, "value"].iloc[0]) for k in
               ("downstream", "upstream", "H"))  # fmt: skip
    assert abs(2 * t * p / (t + p) - h) > 0.2
    assert f"{2 * t * p / (t + p):.1f}" in spider.loc[spider["task"] == "H", "note"].iloc[0]
    dora = ROWS[(ROWS["source"] == "miss") & (ROWS["label"] == "DoRA")]
    olora = ROWS[(ROWS["source"] == "miss_readme") & (ROWS["label"] == "OLoRA")]
    for task in ("GSM8K", "MATH"):
        same = dora[(dora["task"] == task) & (dora["model"] == "LLaMA2-7B")]
        assert same["value"].iloc[0] == olora.loc[olora["task"] == task, "value"].iloc[0]
        assert "OLoRA" in same["note"].iloc[0]


def test_counts() -> None:
    peft = ROWS[ROWS["source"] == "peft"]
    assert (peft["task"] == "GSM8K").sum() == 63
    assert (peft["task"] == "finewiki").sum() == 63
    assert peft["label"].nunique() == 63
    image = ROWS[ROWS["source"] == "peft_image"]
    assert (image["role"] == "target").sum() == 31
    assert (image["role"] == "upstream").sum() == 30  # full fine-tuning has none
    assert not ROWS.duplicated(list(IDENTITY)).any()
    assert len(ROWS) == 2330


def test_every_name_exists() -> None:
    methods = set(discover(Layout.here().methods))
    assert set(ROWS["method"]) - {""} <= methods
    assert set(ROWS["protocol"]) <= set(published.protocols())
    without = set(published.protocols()) - set(ROWS["protocol"])
    assert without == {"keeping_yourself"}  # its tables could not be read
    assert (ROWS.loc[ROWS["tuned"] == "no", "method"] == "").all()
    known = ROWS["value"].notna()
    assert set(ROWS.loc[~known, "source"]) == {"rslora"}
    points = ROWS[(ROWS["unit"] == "points") & known]
    assert points["value"].between(0, 100).all()
    assert ROWS["rank"].dropna().gt(0).all()
    assert ROWS["learning_rate"].dropna().between(1e-6, 1).all()


def test_statistics_of_pefts_table() -> None:
    """Numbers that were computed from PEFT's own result files, not from this table."""
    rows = ROWS[(ROWS["source"] == "peft") & (ROWS["task"] == "GSM8K")]
    top = rows.sort_values("value", ascending=False, kind="stable")["value"].to_numpy()
    n = 1319
    right = np.round(top / 100 * n)
    assert np.allclose(100 * right / n, top, atol=0.0051)
    share = right / n

    def p_of(i: int, j: int) -> float:
        both = (right[i] + right[j]) / (2 * n)
        error = sqrt(both * (1 - both) * 2 / n)
        return 2 * stats.norm.sf(abs(share[i] - share[j]) / error) if error else 1.0

    pairs = [(i, j) for i in range(20) for j in range(i + 1, 20)]
    assert sum(p_of(i, j) < 0.05 for i, j in pairs) == 23
    assert sum(p_of(i, i + 1) < 0.05 for i in range(62)) == 5
    assert [p_of(0, j) < 0.05 for j in range(1, 11)] == [False] * 9 + [True]
    se = 100 * np.sqrt(share * (1 - share) / n)
    spread = rows.sort_values("value", ascending=False, kind="stable")["spread"]
    assert np.allclose(se, spread.astype(float), atol=0.0051)


def test_the_pareto_set_of_pefts_table() -> None:
    table = wide("peft").reset_index("label")
    dominated = [
        ((table["GSM8K"] >= a) & (table["finewiki"] <= f)
         & ((table["GSM8K"] > a) | (table["finewiki"] < f))).any()
        for a, f in zip(table["GSM8K"], table["finewiki"], strict=True)
    ]  # fmt: skip
    front = set(table.loc[~np.array(dominated), "label"])
    assert front == {
        "lily/rank140-mlp-a2-b2-s8.0", "lora/rank64-rslora", "shira/lr_0.0003-random_seed_42",
        "lora/rank10-target-mlp", "lora/rank14-target-mlp-bdlora", "osf/rank128",
        "unilora/default",
    } | ({"ln_tuning/default"} & front)  # fmt: skip


# Reading refuses what it cannot trust.


def text_rows(**change: str) -> pd.DataFrame:
    row = dict.fromkeys(published.COLUMNS, "") | {
        "source": "x", "protocol": "peft_metamathqa", "label": "a", "tuned": "yes", "task": "t",
        "role": "target", "better": "higher", "value": "1.5", "evidence": "P",
    }  # fmt: skip
    return pd.DataFrame([row | change], dtype=str)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"value": "many"}, "value 'many'"),
        ({"rank": "8.5"}, "rank '8.5'"),
        ({"role": "goal"}, "role 'goal'"),
        ({"better": ""}, "better ''"),
        ({"protocol": "peft"}, "protocol 'peft'"),
        ({"evidence": "Z"}, "evidence 'Z'"),
        ({"tuned": "perhaps"}, "tuned 'perhaps'"),
    ],
)
def test_bad_rows_are_refused(change: dict[str, str], word: str) -> None:
    with pytest.raises(DataError, match=word):
        check_published(typed(text_rows(**change), "x.csv"), published.protocols())


def test_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no published tables"):
        published.read_published(tmp_path)
    (tmp_path / "protocols.yaml").write_text("peft_metamathqa: {title: T}\n")
    text_rows().to_csv(tmp_path / "a.csv", index=False)
    assert len(published.read_published(tmp_path)) == 1
    other = tmp_path / "other"
    other.mkdir()
    text_rows().drop(columns="note").to_csv(other / "a.csv", index=False)
    with pytest.raises(DataError, match="note"):
        published.read_published(other)
    check_published(typed(text_rows(), "x"), {"peft_metamathqa": {}})
    twice = typed(pd.concat([text_rows(), text_rows(value="2")], ignore_index=True), "x")
    with pytest.raises(DataError, match="twice"):
        check_published(twice, {"peft_metamathqa": {}})


def test_a_suite_names_a_protocol() -> None:
    layout = Layout.here()
    config = read_config(layout.root / "config" / "config.yaml")
    assert load_suite(config | {"protocol": "llavaflow"}, layout).config["protocol"] == "llavaflow"
    with pytest.raises(SuiteError, match="did you mean 'llavaflow'"):
        load_suite(config | {"protocol": "lavaflow"}, layout)


# Agreement of orders.


def test_agreement_is_scipys_tau() -> None:
    draw = np.random.default_rng(1)
    for n in (3, 4, 5, 12):
        x, y = draw.integers(0, 8, n).astype(float), draw.normal(size=n)
        found = published.agreement(x, y)
        wanted = stats.kendalltau(x, y)
        assert found.tau == pytest.approx(wanted.statistic)
        assert found.p == pytest.approx(wanted.pvalue)
        assert (found.low is None) == (n < 5)


def test_agreement_where_there_is_none() -> None:
    assert published.agreement([1, 2], [1, 2]).tau is None
    assert published.agreement([1, 1, 1], [1, 2, 3]).tau is None
    same = published.agreement(range(8), range(8))
    assert same.tau == 1
    assert same.high == 1
    assert 0.5 < same.low < 1
    upside = published.agreement(range(8), range(8, 0, -1))
    assert (upside.low, upside.tau) == (-1, -1)
    assert upside.high == pytest.approx(-same.low)


@pytest.mark.parametrize(("n", "rho"), [(6, 0.0), (8, 0.6), (12, 0.3), (21, 0.7)])
def test_the_interval_covers_the_true_tau(n: int, rho: float) -> None:
    """Bivariate normal: tau = 2 asin(rho) / pi."""
    draw = np.random.default_rng(7)
    truth, hits, trials = 2 / np.pi * np.arcsin(rho), 0, 400
    for _ in range(trials):
        x = draw.normal(size=n)
        y = rho * x + sqrt(1 - rho**2) * draw.normal(size=n)
        found = published.agreement(x, y)
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / trials <= 1.0


# Matching.


def entries(*rows: tuple[str, str, int | None]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["method", "variant", "rank"])
    return frame.assign(rank=frame["rank"].astype("Int64"))


def test_match_by_variant_and_rank() -> None:
    theirs = entries(
        ("lora", "", 32), ("lora", "", 64), ("lora", "mlp", 10), ("dora", "", 16), ("dora", "", 32),
        ("bone", "strided", 64), ("ia3", "", None), ("", "", 8), ("dare", "", 32),
        ("prefix_tuning", "a", None), ("prefix_tuning", "b", None), ("vera", "x", 4),
    )  # fmt: skip
    ours = entries(
        ("lora", "", 8), ("lora", "", 46), ("dora", "", 16), ("dora", "", 32), ("bone", "", 16),
        ("bone", "strided", 16), ("ia3", "", None), ("", "", 8), ("dare", "of-full_st", None),
        ("prefix_tuning", "", None), ("vera", "other", 4), ("pissa", "", 8),
    )  # fmt: skip
    found = match(theirs, ours, main="b")
    assert (1, 1) in found  # 64 is nearer to 46 than 32 is, by ratio
    assert {(3, 2), (4, 3)} <= set(found)  # common ranks, each of them
    assert (5, 5) in found
    assert not any(b == 4 for _, b in found)
    assert {(6, 6), (8, 8)} <= set(found)
    assert (10, 9) in found  # the variant that stands for the method
    assert len(found) == 7
    assert len({a for a, _ in found}) == len({b for _, b in found}) == 7


def test_names_of_models() -> None:
    assert plain_name("LLaMA2-7B") == plain_name("llama-2-7b")
    assert plain_name("LLaVA-1.5-7B") != plain_name("LLaVA-1.5-13B")


# Side by side.


def own_rows(scores: dict[str, float], **columns: float) -> pd.DataFrame:
    rows = [
        {"method": k, "variant": "", "rank": 32, "n_ok": 3, "target_mean": v, "source_mean": 50.0}
        for k, v in scores.items()
    ]
    frame = pd.DataFrame(rows).assign(**columns)
    frame["Avg"] = (frame["target_mean"] + frame["source_mean"]) / 2
    return frame.assign(rank=frame["rank"].astype("Int64"))


FACTS = {k.lower(): {"role": "upstream", "unit": "points"} for k in UPSTREAM} | {
    "scienceqa": {"role": "target", "unit": "points"}
}


def test_the_papers_own_setting_has_differences() -> None:
    mine = own_rows({"lora": 88.0, "dora": 88.5, "lorasculpt": 86.0, "vera": 70.0})
    mine["score.okvqa"] = [57.0, 55.0, 53.0, 50.0]
    mine["score.scienceqa"] = mine["target_mean"]
    found = published.side_by_side(mine, "llavaflow", "llava-1.5-7b", "scienceqa", FACTS)
    assert [(x.model, x.trained_on) for x in found] == [("LLaVA-1.5-7B", "ScienceQA")]
    table = found[0].table
    target = table[table["quantity"] == "Target: ScienceQA, points"].set_index("method")
    assert target["differs_in"].eq("").all()
    assert target.loc["lora", "difference"] == pytest.approx(88.0 - 87.57)
    assert list(target["place"]) == [1, 2, 3]
    assert list(target["same_order"]) == ["yes"] * 3
    assert found[0].agreements["Target: ScienceQA, points"].tau == 1
    source = table[table["quantity"] == "Upstream: Source, points"].set_index("method")
    assert source.loc["dora", "difference"] == pytest.approx(50 - 57.50)
    okvqa = table[table["our_quantity"] == "okvqa"].set_index("method")
    assert okvqa.loc["lora", "difference"] == pytest.approx(57.0 - 56.99)
    assert "Published, not run here: dare, model_tailor." in found[0].notes


def test_what_differs_is_said() -> None:
    mine = own_rows({"lora": 88.0, "dora": 88.5, "lorasculpt": 86.0}).assign(rank=8)
    mine["rank"] = mine["rank"].astype("Int64")
    few = {k: v for k, v in FACTS.items() if k != "gqa"}
    table = published.side_by_side(mine, "llavaflow", "llava-1.5-7b", "scienceqa", few)[0].table
    source = table[table["quantity"].str.startswith("Upstream: Source")]
    assert set(source["differs_in"]) == {"task, rank"}
    assert source["difference"].isna().all()
    other = published.side_by_side(mine, "llavaflow", "micro-lm", "codes", {})
    assert {x.trained_on for x in other} == {"ScienceQA", "COCO-Caption"}
    for item in other:
        assert item.table["difference"].isna().all()
        assert item.table["differs_in"].str.startswith("model, target, task").all()
        assert not item.table["quantity"].str.contains("mixed").any()
    cider = next(x for x in other if x.trained_on == "COCO-Caption").table
    assert (
        cider.loc[cider["quantity"].str.contains("CIDEr"), "differs_in"].str.contains("unit").all()
    )


def test_lower_is_better_turns_the_order() -> None:
    """PEFT's forgetting is better the lower it is; ours, as Source, the higher."""
    mine = own_rows({"lora": 90.0, "dora": 80.0, "adalora": 70.0})
    mine["source_mean"] = [50.0, 40.0, 60.0]
    item = published.side_by_side(mine, "peft_metamathqa", "micro", "codes", {})[0]
    part = item.table[item.table["quantity"].str.startswith("Upstream")].set_index("method")
    assert part["place"].to_dict() == {"adalora": 1, "lora": 2, "dora": 3}
    assert part["our_place"].to_dict() == {"adalora": 1, "lora": 2, "dora": 3}
    assert item.agreements["Upstream: finewiki, nats"].tau == 1
    assert item.agreements["Target: GSM8K, points"].tau == 1


def test_fewer_than_three_have_no_tau() -> None:
    item = published.side_by_side(own_rows({"lora": 9.0, "dora": 8.0}), "peft_metamathqa")[0]
    assert all(found.tau is None and found.n == 2 for found in item.agreements.values())
    assert any("no tau" in note for note in item.notes)
    assert published.side_by_side(own_rows({"unheard": 9.0}), "peft_metamathqa") == []
    assert published.side_by_side(own_rows({"lora": 9.0}), "keeping_yourself") == []
    with pytest.raises(SuiteError, match="protocol"):
        published.side_by_side(own_rows({"lora": 9.0}), "nothing")


def analysis(frame: pd.DataFrame, pairs: list[tuple[str, str, float, float]]) -> Analysis:
    table = pd.DataFrame(pairs, columns=["a", "b", "difference", "p_adjusted"])
    return Analysis(
        "m", "t", None, frame, table.assign(quantity="E"), pd.DataFrame(), {}, ()
    )  # fmt: skip


def test_the_noise_of_our_order_is_told() -> None:
    frame = own_rows({"lora": 80.0, "dora": 90.0, "adalora": 70.0}).set_index(
        pd.Index(["lora-r32", "dora-r32", "adalora-r32"])
    )
    pairs = [
        ("lora-r32", "dora-r32", -10.0, 0.4),
        ("lora-r32", "adalora-r32", 10.0, 0.01),
        ("adalora-r32", "dora-r32", -20.0, 0.001),
    ]
    item = published.side_by_side(analysis(frame, pairs), "peft_metamathqa")[0]
    part = item.table[item.table["quantity"].str.startswith("Target")].set_index("method")
    assert part["same_order"].to_dict() == {
        "lora": "within noise", "dora": "within noise", "adalora": "yes"
    }  # fmt: skip
    assert (part.loc["lora", "our_place_low"], part.loc["lora", "our_place_high"]) == (1, 2)
    assert (part.loc["adalora", "our_place_low"], part.loc["adalora", "our_place_high"]) == (3, 3)
    plain = published.side_by_side(frame, "peft_metamathqa")[0].table.set_index("method")
    assert plain.loc["lora", "same_order"].iloc[0] == "no"


def test_tables_of_results() -> None:
    methods = ["lora", "dora", "vera", "adalora", "pissa", "full_st"]
    records = [
        record(m, s, 8, e=40.0 + 3 * i + s, f=-10.0 + i, target="codes")
        for i, m in enumerate(methods)
        for s in range(3)
    ]
    found = Results("mine", tidy(records, None), {r["id"]: r for r in records}, pd.DataFrame())
    assert published.tables_of(found) == []
    tables = published.tables_of(found, "peft_metamathqa")
    assert len(tables) == 1
    table = tables[0]
    assert len(table) == 2 * 5  # pissa is not in PEFT's table
    assert table.attrs["title"].startswith("PEFT's method comparison")
    assert table.attrs["key"] == "peft_metamathqa-peft-Llama-3.2-3B-MetaMathQA-micro-lm-codes"
    assert to_csv(table) == to_csv(published.tables_of(found, "peft_metamathqa")[0])
    lora = table[(table["Method"] == "lora") & table["Quantity"].str.startswith("Target")]
    assert lora["Ours"].iloc[0] == pytest.approx(51.0)
    assert lora["Ours ±"].iloc[0] == pytest.approx(1.0)


def test_many_rows_stay_fast() -> None:
    draw = np.random.default_rng(0)
    names = [*sorted(set(ROWS["method"]) - {""}), *(f"m{i}" for i in range(400))]
    frame = pd.DataFrame(
        [(m, v, r) for m in names for v in ("", "tuned") for r in (2, 8, 32, 128)],
        columns=["method", "variant", "rank"],
    )
    for name in ("target_mean", "source_mean", "Avg"):
        frame[name] = draw.uniform(0, 100, len(frame))
    frame = frame.assign(n_ok=3, rank=frame["rank"].astype("Int64"))
    item = published.side_by_side(frame, "peft_metamathqa", "m", "t")[0]
    assert item.agreements["Target: GSM8K, points"].n == 16


def test_text_stays_text() -> None:
    rows = typed(
        text_rows(
            label="=1+<script>|x|</script>", method="lora", task="a & b_c", metric="mean",
            unit="points", protocol="llavaflow",
        ),
        "x",
    )  # fmt: skip
    item = published.side_by_side(own_rows({"lora": 1.0}), "llavaflow", "<b>", "%t", {}, rows)[0]
    text = published.markdown(item)
    assert "<script>" not in text
    assert "<b>" not in text
    latex = published.latex(item)
    assert r"a \& b\_c" in latex
    assert "<script>" not in latex
    assert r"\%t" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1
    row = next(line for line in latex.splitlines() if "textbar" in line and "1.50" in line)
    assert row.replace(r"\&", "").count("&") == 9
    assert "'=1+" in to_csv(published.plain(item))


def test_protocols_are_read_once_and_stay_whole() -> None:
    first = published.read_published()
    first.loc[:, "value"] = 0.0
    assert published.read_published()["value"].max() > 0
    assert json.dumps(published.protocols())

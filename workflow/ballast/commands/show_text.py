"""What `ballast show` prints for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ballast.commands.screen import Screen, count, interval
from ballast.measures import MEASURES
from ballast.tables.printed import absent, compact, figures, number, p_value

Shown = Mapping[str, Any]
DIGITS = {"points": 1, "nats": 3, "perplexity": 3}
STATUSES = {
    "ok": "ok",
    "failed": "failed",
    "missing": "not run yet",
    "stale": "stale",
    "rescore": "to be scored again",
    "unplanned": "not in the suite's plan any more",
}


def show_described(found: Shown, screen: Screen) -> None:
    """Print what `show.describe` found."""
    for at, one in enumerate(found["shown"]):
        if at:
            screen.line()
            screen.line()
        (_cell if one["kind"] == "cell" else _row)(one, found["suite"], screen)


def _title(one: Shown, suite: str, screen: Screen) -> None:
    seed = f", seed {one['seed']}" if one["kind"] == "cell" else ""
    screen.line(f"{one['name']}{seed}: {one['base']} tuned on {one['target']}", style="bold")
    screen.line(
        f"{one.get('id') or one['key']} ({one['family'] or 'family unknown'}; suite {suite})"
    )


def _cell(one: Shown, suite: str, screen: Screen) -> None:
    _title(one, suite, screen)
    status = STATUSES[one["status"]]
    reason = "" if absent(one["reason"]) or one["status"] == "missing" else f": {one['reason']}"
    origin = f"; from {one['origin']}" if isinstance(one["origin"], str) and one["origin"] else ""
    screen.line(f"Status: {status}{reason}{origin}")
    if one["status"] == "ok":
        screen.line()
        screen.line(_measures(one["measures"]), style="bold")
    _scores(one, screen)
    _churn(one, screen)
    _samples(one, screen)
    _drift(one["drift"], screen)
    _costs(one["costs"], screen)
    _settings(one["settings"], one["report"], screen)
    _provenance(one, screen)


def _measures(measures: Shown) -> str:
    e, f, o = (number(measures[name], 1, True) for name in ("E", "F", "O"))
    source, target = (number(measures[f"{name}_mean"], 1) for name in ("source", "target"))
    return f"E {e}, F {f}, O {o} points (Target {target}, Source {source})"


def _scores(one: Shown, screen: Screen) -> None:
    if not one["tasks"]:
        return
    screen.heading(
        "Scores" if one["status"] == "ok" else "Tasks (no scores, as the cell is not ok)"
    )
    rows = []
    for task in one["tasks"]:
        digits = DIGITS[task["unit"]]
        shown = [number(task[key], digits) for key in ("base", "score")]
        change, loss = number(task["change"], digits, True), number(task["loss_change"], 3, True)
        unit = "" if task["unit"] == "points" else f" ({task['unit']})"
        rows.append(
            [task["title"] + unit, task["role"], *shown, change, loss, number(task["n"], 0)]
        )
    screen.table(["task", "role", "base", "tuned", "change", "ΔCE", "items"], rows, left=2)


def _churn(one: Shown, screen: Screen) -> None:
    rows = []
    for task in one["tasks"]:
        churn = task.get("churn")
        if churn:
            keys = ("kept", "gained", "forgotten", "never", "forgotten_form", "forgotten_likely")
            rows.append([task["title"], *(number(churn.get(key), 0) for key in keys)])
    if rows:
        screen.heading("Items against the base")
        headers = ["task", "kept", "gained", "forgotten", "never", "no answer", "still likely"]
        screen.table(headers, rows)
        screen.line(
            "no answer: of the forgotten, those whose text holds no answer of the task's form; "
            "still likely: those whose true answer kept a probability of one half per token."
        )


def _samples(one: Shown, screen: Screen) -> None:
    titles = {task["task"]: task["title"] for task in one["tasks"]}
    for task, lists in one["samples"].items():
        for kind in ("gained", "forgotten"):
            for at, entry in enumerate(lists.get(kind, [])):
                if at == 0:
                    screen.heading(f"{kind.capitalize()}: {titles.get(task, task)}")
                keys = ("question", "reference", "before", "after")
                screen.facts([(key, str(entry.get(key, ""))) for key in keys])
                screen.line()


def _drift(drift: Shown, screen: Screen) -> None:
    if drift:
        screen.heading("Drift from the base")
        screen.facts(
            [(_measure_title(name), figures(_mean(value))) for name, value in drift.items()]
        )


def _measure_title(name: str) -> str:
    measure = MEASURES.get(name)
    if measure is None:
        return name
    return f"{measure.title} ({measure.unit})" if measure.unit else measure.title


def _mean(value: Any) -> Any:
    return value["mean"] if isinstance(value, Mapping) else value


def _costs(costs: Shown, screen: Screen) -> None:
    def of(name: str) -> Any:
        return _mean(costs.get(name))

    screen.heading("Costs")
    share = ""
    if not absent(of("trainable_parameters")) and of("total_parameters"):
        percent = 100 * of("trainable_parameters") / of("total_parameters")
        share = f" of {compact(of('total_parameters'))} ({figures(percent)} %)"
    adapter = of("adapter_bytes")
    screen.facts(
        [
            ("trained parameters", compact(of("trainable_parameters")) + share),
            ("adapter", "–" if absent(adapter) else f"{number(adapter / 1e6, 2)} MB"),
            ("training", f"{number(of('seconds.train'), 1)} s, {number(of('steps'), 0)} steps of "
                         f"{number(of('step_ms'), 1)} ms, {compact(of('tokens'))} tokens"),
            ("in all", f"{number(of('seconds.total'), 1)} s, of which "
                       f"{number(of('seconds.evaluate'), 1)} s of evaluation"),
            ("highest memory", f"{number(of('memory_mb.train'), 0)} MB in training, "
                               f"{number(of('memory_mb.evaluate'), 0)} MB in evaluation"),
        ]
    )  # fmt: skip


def _settings(settings: Shown, report: Shown, screen: Screen) -> None:
    screen.heading("Settings")
    rates, source = settings.get("learning_rate"), settings.get("learning_rate_source")
    rates, source = (v if isinstance(v, list) else [v] for v in (rates, source))
    rate = " / ".join(figures(value) for value in rates if not absent(value))
    said = " / ".join(str(value) for value in source if not absent(value))
    facts = [("learning rate", f"{rate} ({said})" if rate and said else rate or "none of its own")]
    facts += [(key, _value(settings[key])) for key in ("scale", "modules", "connector")
              if not absent_value(settings.get(key))]  # fmt: skip
    facts += [("hyper-parameters", _pairs(settings.get("hyper") or {}))]
    facts += [("training settings", _pairs(settings.get("training") or {}))]
    few = dict(list(report.items())[:12])
    more = f", and {len(report) - len(few)} more (--json)" if len(report) > len(few) else ""
    facts += [("measured by itself", _pairs(few) + more)]
    screen.facts(facts)


def absent_value(value: Any) -> bool:
    """Whether a setting is not there; lists and dictionaries are."""
    return not isinstance(value, (list, dict)) and absent(value)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return figures(value, 4)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pairs(values: Shown) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items())


def _provenance(one: Shown, screen: Screen) -> None:
    provenance = dict(one["provenance"])
    if not provenance:
        return
    packages = provenance.pop("packages", {})
    provenance.pop("keys", None)
    commit, dirty = provenance.pop("commit", None), provenance.pop("dirty", None)
    screen.heading("Provenance")
    facts = [("commit", f"{commit} {'(with changes)' if dirty else ''}")] if commit else []
    facts += [(key.replace("_", " "), _value(v)) for key, v in provenance.items() if v is not None]
    shown = ("ballast", "torch", "transformers", "lm-eval")
    facts.append(("packages", _pairs({k: packages[k] for k in shown if packages.get(k)})))
    if one["parents"]:
        facts.append(("made from", ", ".join(one["parents"])))
    screen.facts(facts)


def _row(one: Shown, suite: str, screen: Screen) -> None:
    _title(one, suite, screen)
    seeds = count(len(one["seeds"]), "seed")
    note = f"; {one['note']}" if one["note"] else ""
    screen.line(f"{seeds} of {one['planned']} ok{note}")
    screen.heading("Measures, points")
    against = one["control"] if one["control"] != one["key"] else None
    headers = [
        "",
        "mean",
        "sd",
        "95 %",
        *([f"− {against}", "95 %", "p"] if against else []),
        "ranks",
    ]
    rows = [_measure(name, m, against) for name, m in one["measures"].items()]
    screen.table(headers, rows, spare=["sd", "p"])
    for line in _reading(one, against):
        screen.line(line)
    _row_scores(one["tasks"], screen)
    screen.heading("Cells")
    cells = [
        [c["id"], STATUSES[c["status"]], *(number(c[q], 1, True) for q in ("E", "F", "O"))]
        for c in one["cells"]
    ]
    screen.table(["cell", "status", "E", "F", "O"], cells, left=2)
    for cell in one["cells"]:
        if cell["status"] not in ("ok", "missing"):
            screen.line(f"{cell['id']}: {cell['reason']}", indent=2)
    _drift(one["drift"], screen)
    _costs(one["costs"], screen)
    _settings(one["settings"], {}, screen)


def _measure(name: str, m: Shown, against: str | None) -> list[str]:
    cells = [name, number(m["mean"], 1, True), number(m["sd"], 1)]
    cells.append(interval(m["low"], m["high"], 1, True))
    if against:
        cells += [number(m["diff"], 1, True), interval(m["diff_low"], m["diff_high"], 1, True)]
        cells.append(p_value(m["p_adjusted"]))
    ranks = "–"
    if not absent(m["rank_low"]):
        low, high = int(m["rank_low"]), int(m["rank_high"])
        ranks = f"{low}" if low == high else f"{low} to {high}"
    return [*cells, ranks]


def _reading(one: Shown, against: str | None) -> Iterable[str]:
    if len(one["seeds"]) < 2:
        yield "One seed: no interval, no test and no rank."
        return
    said = f"; p: test against {against}, corrected (Holm)" if against else ""
    yield (
        f"95 %: t interval over seeds{said}; ranks: those that the row may hold among "
        f"{one['rows']}."
    )
    if not absent(one["front"]):
        yield f"On the front of E and F in {number(100 * one['front'], 0)} % of bootstrap draws."


def _row_scores(tasks: list[Shown], screen: Screen) -> None:
    rows = []
    for task in tasks:
        score = task["score"]
        if score is not None:
            digits = DIGITS[task["unit"]]
            unit = "" if task["unit"] == "points" else f" ({task['unit']})"
            rows.append(
                [task["title"] + unit, task["role"], number(task["base"], digits),
                 number(score["mean"], digits), interval(score["low"], score["high"], digits),
                 number(task["loss_change"], 3, True)]
            )  # fmt: skip
    if rows:
        screen.heading("Scores")
        screen.table(["task", "role", "base", "tuned", "95 %", "ΔCE"], rows, left=2)

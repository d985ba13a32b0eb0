// What stands in the panel for each view, and the panels over it.

const panel = document.getElementById("panel");
const MOST_LINES = 8;

const section = (title, note, ...nodes) => el("section", { class: "chart" }, el("h2", { text: title }), note && el("p", { text: note }), nodes);
const paragraph = (text, kind = "line") => el("p", { class: kind, text });
const switcher = (label, options, value, pick) => el("div", { class: "switch", role: "group", "aria-label": label },
  options.map(([key, text]) => el("button", { type: "button", "aria-pressed": String(key === value), "data-key": key, text, onclick: () => pick(key) })));

function chooser(label, options, value, pick) {
  const groups = new Map();
  for (const [key, text, group] of options) {
    if (!groups.has(group ?? "")) groups.set(group ?? "", []);
    groups.get(group ?? "").push(el("option", { value: key, text, selected: key === value }));
  }
  const nodes = [...groups].map(([group, items]) => (group ? el("optgroup", { label: group }, items) : items)).flat();
  return el("label", {}, `${label} `, el("select", { "aria-label": label, onchange: (event) => pick(event.target.value) }, nodes));
}

function needsPlace() {
  panel.replaceChildren(paragraph("Rows of different bases or targets do not share axes. Pick one:"),
    el("ul", { class: "front-list" }, DATA.places.map((place) => el("li", {}, el("button", { type: "button", text: place.name, onclick: () => change({ place: place.name }) })))));
}

function tableView() {
  const box = el("div", { class: "box", tabindex: "0", role: "region", "aria-label": "Results table, scrolls sideways" });
  const holder = el("div", {});
  box.append(holder);
  panel.replaceChildren(
    el("div", { class: "bar-of-tools" }, switcher("Show", [["rows", "Methods"], ["cells", "All cells"]], state.of, (of) => change({ of, sort: "", cols: "", page: "0" })), columnChooser(), ),
    box, underTable());
  buildTable(holder);
  const container = holder.querySelector(".dt-container");
  const rest = [...container.querySelectorAll(":scope > .dt-layout-row")].filter((row) => !row.classList.contains("dt-layout-table"));
  const foot = el("div", { class: "dt-container" }, rest);
  box.after(foot);
}

// The noise of the table, and the sentences at its foot.
function underTable() {
  const box = el("div", { class: "under" });
  for (const place of places()) {
    if (places().length > 1) continue;
    const facts = noiseFacts(place);
    if (facts.length) box.append(el("ul", { class: "facts" }, facts.map(([value, text]) => el("li", {}, el("b", { text: value }), el("span", { text })))));
    for (const note of place.notes) box.append(el("p", { text: note }));
  }
  return box;
}

function noiseFacts(place) {
  const found = [];
  const points = (value) => `${shown(value, { u: "points" })} points`;
  for (const q of ["E", "F", "O"]) {
    const [least, floor] = [place.facts[`${q}.minimum_detectable`], place.facts[`${q}.noise_floor`]];
    if (least != null) found.push([points(least), `least difference in ${q} that would be found (power 0.8)`]);
    if (floor != null) found.push([points(floor), `A/A noise floor of ${q}: two runs of one row, 95 %`]);
  }
  const volume = place.facts.hypervolume;
  if (volume != null) found.push([volume.toFixed(3), `hypervolume of the front${place.facts.hypervolume_low == null ? "" : ` (${place.facts.hypervolume_low.toFixed(3)} to ${place.facts.hypervolume_high.toFixed(3)})`}`]);
  return found;
}

function columnChooser() {
  const menu = el("div", { class: "menu" });
  const box = el("details", { class: "facet", id: "columns" }, el("summary", { text: "Columns" }), menu);
  box.addEventListener("toggle", () => {
    if (!box.open) return;
    const now = new Set(visibleColumns().map((column) => column.key));
    const groups = new Map();
    for (const column of columns.filter((column) => !column.fixed)) {
      if (!groups.has(column.group)) groups.set(column.group, []);
      groups.get(column.group).push(column);
    }
    const pick = (key, on) => {
      if (on) now.add(key); else now.delete(key);
      const usual = columns.filter((column) => column.visible).map((column) => column.key);
      const asked = columns.filter((column) => now.has(column.key)).map((column) => column.key);
      table.column(columns.findIndex((column) => column.key === key)).visible(on);
      change({ cols: joined(usual) === joined(asked) ? "" : joined(asked.map(encodeURIComponent)) });
    };
    menu.replaceChildren(el("button", { type: "button", text: "Usual columns", onclick: () => { box.open = false; change({ cols: "" }); } }),
      ...[...groups].flatMap(([group, members]) => [el("h4", { text: group }), ...members.map((column) => {
        const tick = el("input", { type: "checkbox", "data-column": column.key, onchange: (event) => pick(column.key, event.target.checked) });
        tick.checked = now.has(column.key);
        return el("label", { title: column.help }, tick, column.title || column.key);
      })]));
  });
  return box;
}

function tradeoffView() {
  const place = onePlace();
  if (!place) return needsPlace();
  const used = quantityKeys("rows").map((key) => [key, QUANTITIES[key].t + (QUANTITIES[key].u ? ` (${QUANTITIES[key].u})` : ""), QUANTITIES[key].g]);
  const show = new Set(listed(state.show));
  const tick = (key, text) => {
    const box = el("input", { type: "checkbox", onchange: (event) => { if (event.target.checked) show.add(key); else show.delete(key); change({ show: joined(show) }); } });
    box.checked = show.has(key);
    return el("label", {}, box, text);
  };
  const box = el("div", { class: "plot tall", id: "scatter" });
  const list = el("ul", { class: "front-list", id: "front" });
  const line = el("p", { class: "line" });
  panel.replaceChildren(
    el("div", { class: "bar-of-tools" }, chooser("Across", used, state.x, (x) => change({ x })), chooser("Up", used, state.y, (y) => change({ y })),
      el("button", { type: "button", text: "Swap", onclick: () => change({ x: state.y, y: state.x }) }), tick("front", "Front"), tick("paths", "Rank paths"), tick("bars", "Intervals")),
    box, line, list);
  const rows = sortedRows();
  const { front, hidden } = scatter(box, rows, place);
  line.textContent = `${front.length ? "On the front of the means" : "No front: one of the two has no better direction"}${front.some((row) => row.value("front") !== null) && state.x + state.y !== "" ? ", with the share of bootstrap draws in which each stays on that of E and F" : ""}.${hidden ? ` ${hidden} rows have no such numbers.` : ""} Larger marks: higher rank; hollow: one seed.`;
  list.append(...front.map((row) => el("li", {}, el("button", { type: "button", onclick: () => change({ row: row.id }) }, dot(row.family), row.name, row.value("front") === null ? null : el("span", { class: "muted", text: row.value("front").toFixed(2) })))));
}

// The rows that a plot of lines shows: those ticked, or the first of the table.
function linesShown(has) {
  const ticked = chosenRows();
  const rows = (ticked.length ? ticked : sortedRows()).filter(has);
  return [rows.slice(0, ticked.length ? 20 : MOST_LINES), ticked.length];
}

function curvesView() {
  const place = onePlace();
  if (!place) return needsPlace();
  const parts = [];
  const add = (title, note, has, drawn, kind = "plot line-plot") => {
    if (!place.allRows.some(has)) return;
    const [rows] = linesShown(has);
    const box = el("div", { class: kind });
    parts.push([section(title, note, box), () => { if (!rows.length || !drawn(box, rows)) box.replaceWith(paragraph("None of the rows in view has this curve.")); }]);
  };
  const withKind = (kind) => (row) => Boolean(row.place.curves[kind]?.[row.at]?.length);
  const rated = new Set(place.rates.map((curve) => curve.key));
  add("Learning and forgetting along the way", "Specialization and stability at checkpoints of the training, mean over seeds.", withKind("trajectory"), (box, rows) => pathChart(box, rows, "trajectory"));
  add("Rewinding the update", "W0 + αΔW from α = 0, the base, to 1: what each method retains where it reaches the same E.", withKind("rewind"), (box, rows) => pathChart(box, rows, "rewind"));
  if (place.rates.some((curve) => curve.E && curve.F)) add("Frontier over learning rates", "E against F at every learning rate that was tried, on validation.", (row) => rated.has(row.key), (box, rows) => frontierChart(box, rows, place));
  add("Learning rates", "Validation score of the target at every rate that was tried.", (row) => rated.has(row.key), (box, rows) => rateChart(box, rows, place, "score"));
  add("Training loss", "Means of equal runs of steps, a line for each seed.", (row) => row.cells.some((cell) => row.place.losses.of?.[cell.at]), lossChart);
  const ticked = chosenRows().length;
  const head = parts.length
    ? paragraph(ticked ? `The ${ticked} rows ticked in the table.` : `The first ${MOST_LINES} rows of the table in its order; tick rows there to choose others.`)
    : paragraph("This suite has no curves: none were kept with its records. Training curves appear where the cells' folders are, trajectories and rewinds after `snakemake curves`, rates after `snakemake tune`.");
  panel.replaceChildren(head, ticked ? el("p", {}, el("button", { type: "button", text: "Untick all", onclick: () => change({ sel: "" }) })) : "", ...parts.map(([node]) => node));
  for (const [, drawn] of parts) drawn();
}

function frontierChart(box, rows, place) {
  const curves = new Map(place.rates.map((curve) => [curve.key, curve]));
  const traces = rows.map((row, at) => [row, at, curves.get(row.key)]).filter(([, , curve]) => curve?.E).map(([row, at, curve]) => lineTrace(row, at, curve.F, curve.E, {
    text: curve.x.map((rate, i) => `<b>${plotText(row.name)}</b><br>rate ${rate}<br>E  ${curve.E[i]}<br>F  ${curve.F[i]}`), hoverinfo: "text",
  }));
  return traces.length ? draw(box, traces, { xaxis: axisOf("F"), yaxis: axisOf("E") }, "E against F over learning rates") : null;
}

function forgettingView() {
  const place = onePlace();
  if (!place) return needsPlace();
  const rows = sortedRows();
  const counted = place.tasks.filter((task) => place.churn[task.name]);
  const upstream = counted.filter((task) => task.role === "upstream").map((task) => task.name);
  const nodes = [], later = [];
  if (counted.length) {
    const options = [["", "all upstream tasks"], ...counted.map((task) => [task.name, `${task.title} (${task.role})`])];
    const chosen = counted.some((task) => task.name === state.task) ? [state.task] : upstream;
    const box = el("div", { class: "plot", id: "churn" });
    nodes.push(section("What became of the items", "Each bar is every item of every seed, against the untouched base. An answer that is empty or not of the task's form is lost format rather than lost knowledge.",
      el("div", { class: "bar-of-tools" }, chooser("Task", options, state.task, (task) => change({ task }))), box));
    later.push(() => churnChart(box, rows, chosen) ?? box.replaceWith(paragraph("No items counted for these rows.")));
  }
  const heat = el("div", { class: "plot", id: "heat" });
  nodes.push(section("Change of every task", "Score after tuning minus the base's, in points. ◎ marks the target.", heat));
  later.push(() => heatChart(heat, rows, place) ?? heat.replaceWith(paragraph("No scores in points for these rows.")));
  const first = counted.length ? [MOST_BARS, `Bars show the first ${MOST_BARS} of ${rows.length} rows, the map the first 60, in the table's order.`] : [60, `The first 60 of ${rows.length} rows, in the table's order.`];
  if (rows.length > first[0]) nodes.unshift(paragraph(first[1]));
  panel.replaceChildren(...nodes);
  for (const drawn of later) drawn();
}

function costView() {
  const place = onePlace();
  if (!place) return needsPlace();
  const rows = sortedRows();
  const nodes = [], later = [];
  const add = (title, note, drawn) => {
    const box = el("div", { class: "plot" });
    const node = section(title, note, box);
    nodes.push(node);
    later.push(() => drawn(box) ?? node.remove());
  };
  add("Time by phase", "Training is training steps alone; evaluation and start stand apart. Post-hoc methods train nothing: their parents' costs are not in their bars.", (box) => timeChart(box, rows));
  const pair = el("div", { class: "two" });
  for (const [key, title] of [["memory_mb.train", "Memory while training"], ["adapter_bytes", "What has to be kept"]]) {
    const box = el("div", { class: "plot" });
    const node = section(title, null, box);
    pair.append(node);
    later.push(() => costDots(box, rows, key) ?? node.remove());
  }
  nodes.push(pair);
  if (rows.length > MOST_BARS) nodes.unshift(paragraph(`The first ${MOST_BARS} of ${rows.length} rows, in the table's order.`));
  panel.replaceChildren(...nodes);
  for (const drawn of later) drawn();
}

function plainTable(heads, rows, numeric = []) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": heads.join(", ") }, el("table", { class: "plain" },
    el("thead", {}, el("tr", {}, heads.map((text, i) => el("th", { scope: "col", class: numeric.includes(i) ? "num" : "", text })))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, i) => el("td", { class: numeric.includes(i) ? "num" : "", text: value ?? "–" })))))));
}

function notesView() {
  const nodes = [];
  for (const place of places()) {
    const facts = noiseFacts(place);
    nodes.push(section(place.name, null, facts.length ? el("ul", { class: "facts" }, facts.map(([value, text]) => el("li", {}, el("b", { text: value }), el("span", { text })))) : null, el("ul", { class: "notes" }, place.notes.map((text) => el("li", { text })))));
    nodes.push(section("Tasks", null, plainTable(["Task", "Role", "Metric", "Unit", "Items", "Untouched base"], place.tasks.map((task) => [task.title, task.role, task.metric, task.unit, task.n, shown(task.base, { u: task.unit })]), [4, 5])));
    if (place.definitions.length) nodes.push(section("Would another definition rank them otherwise?", "Kendall's τ between the orders of the rows under two definitions of the best: 1 is the same order, 0 unrelated.", stabilityTable(place)));
    const papers = DATA.published.filter((found) => found.place[0] === place.base && found.place[1] === place.target);
    if (papers.length) nodes.push(section("Published and ours", "Numbers of a paper beside those of this suite; where model or data differ, only the order can be compared.", ...papers.map(paper)));
  }
  const named = Object.values(QUANTITIES).filter((q) => q.h);
  nodes.push(section("Words", null, plainTable(["Column", "Unit", "Meaning"], named.map((q) => [q.t, q.u ?? "", q.h]))));
  if (DATA.problems.length) nodes.push(section("Files that could not be read", null, el("ul", { class: "notes" }, DATA.problems.map((text) => el("li", { text })))));
  panel.replaceChildren(...nodes);
}

function paper(found) {
  const rows = found.values.length ? found.values[0].map((_, i) => found.values.map((column) => column[i])) : [];
  const numeric = found.values.flatMap((column, i) => (column.some((value) => typeof value === "number") ? [i] : []));
  return el("details", {}, el("summary", { text: found.title }), found.notes.map((text) => paragraph(text)), plainTable(found.columns, rows, numeric));
}

function stabilityTable(place) {
  const names = [...new Set(place.definitions.flatMap(([a, b]) => [a, b]))];
  const tau = new Map(place.definitions.flatMap(([a, b, value]) => [[`${a}\n${b}`, value], [`${b}\n${a}`, value]]));
  return plainTable(["", ...names], names.map((a) => [a, ...names.map((b) => (a === b ? "1" : tau.has(`${a}\n${b}`) ? signed(String(tau.get(`${a}\n${b}`)?.toFixed(2) ?? "–"), false) : ""))]), names.map((_, i) => i + 1));
}

const detail = document.getElementById("detail");
let cameFrom = null;

function showDetail() {
  const row = state.row ? rowOf(state.row) : null;
  if (!row) {
    if (!detail.hidden) { detail.hidden = true; cameFrom?.isConnected && cameFrom.focus(); cameFrom = null; }
    return;
  }
  if (detail.hidden) cameFrom = document.activeElement;
  const was = detail.hidden;
  detail.hidden = false;
  const close = el("button", { type: "button", text: "Close", onclick: () => change({ row: "" }) });
  const facts = DATA.methods[row.method] ?? {};
  const compared = el("input", { type: "checkbox", onchange: (event) => select(row.id, event.target.checked) });
  compared.checked = selected().includes(row.id);
  detail.replaceChildren(
    el("header", {}, el("div", {}, el("h2", {}, dot(row.family), " ", row.name), el("p", { class: "muted", text: `${row.family}, ${row.place.name}` })), close),
    ...[facts.citation, row.text("note")].filter(Boolean).map((text) => el("p", { text })),
    el("p", {}, el("label", {}, compared, " Compare in Curves")),
    el("h3", { text: "Means and intervals" }), plainTable(["", "Mean", "95 % interval"], detailRows(row), [1, 2]), ...comparison(row),
    el("h3", { text: "Cells" }), cellTable(row));
  if (was) close.focus();
}

function detailRows(row) {
  const keys = ["O", "E", "F", "front", "source_mean", "target_mean", "H", "dce.upstream", "trainable_parameters", "adapter_bytes", "seconds.train", "memory_mb.train", ...Object.keys(row.block.mean).filter((key) => key.startsWith("drift.") || /^(F|reached)@/.test(key))];
  const found = keys.filter((key) => row.value(key) !== null).map((key) => {
    const q = QUANTITIES[key];
    const spread = row.low(key) === null ? "" : `${shown(row.low(key), q)} to ${shown(row.high(key), q)}`;
    return [q.t, shown(row.value(key), q) + (q.u && !["points", "bytes", "parameters", "share"].includes(q.u) ? ` ${q.u}` : ""), spread];
  });
  for (const key of ["O", "E", "F"]) {
    const ranks = row.ranks(key);
    if (ranks) found.push([`Rank by ${key}`, ranks[0] === ranks[1] ? String(ranks[0]) : `${ranks[0]}–${ranks[1]}`, ""]);
  }
  return found;
}

function comparison(row) {
  const lines = ["O", "E", "F"].filter((key) => row.versus(`${key}.diff`) !== null).map((key) => {
    const q = QUANTITIES[key];
    const span = row.versus(`${key}.diff_low`) === null ? "" : `${shown(row.versus(`${key}.diff_low`), q, true)} to ${shown(row.versus(`${key}.diff_high`), q, true)}`;
    return [key, shown(row.versus(`${key}.diff`), q, true), span, pValue(row.versus(`${key}.p_adjusted`)), pValue(row.versus(`${key}.p_base_adjusted`))];
  });
  return lines.length ? [el("h3", { text: `Against ${row.place.control ?? "the control"}` }), plainTable(["", "Difference", "Interval", "p", "p, base"], lines, [1, 2, 3, 4])] : [];
}

function cellTable(row) {
  const body = row.cells.map((cell) => el("tr", {},
    el("td", {}, cell.page ? el("a", { href: cell.page, text: `seed ${cell.seed}` }) : `seed ${cell.seed}`), el("td", {}, el("span", { class: `state state-${cell.status}`, text: cell.status }), cell.reason ? el("div", { class: "muted", text: cell.reason }) : null),
    el("td", { class: "num", text: shown(cell.value("E"), QUANTITIES.E ?? {}) }), el("td", { class: "num", text: shown(cell.value("F"), QUANTITIES.F ?? {}) })));
  return el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ["Cell", "Status", "E", "F"].map((text, i) => el("th", { scope: "col", class: i > 1 ? "num" : "", text })))), el("tbody", {}, body));
}

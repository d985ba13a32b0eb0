// The table of rows or cells: DataTables over the filtered items, cells made of text nodes only.

let table = null;
let columns = [];

const FIRST = ["O", "E", "F", "front", "source_mean", "target_mean", "dce.upstream"];
const FIRST_COSTS = ["seconds.train", "memory_mb.train", "adapter_bytes"];

function quantityKeys(block) {
  const used = new Set(places().flatMap((place) => Object.keys(place[block].mean)));
  return Object.keys(QUANTITIES).filter((key) => used.has(key));
}

function numberColumn(key, visible) {
  const q = QUANTITIES[key];
  return {
    key, title: q.t, group: q.g, help: [q.h, q.u && `In ${q.u}.`].filter(Boolean).join(" "), visible, num: true,
    sort: (item) => item.value(key) ?? (q.b < 0 ? Infinity : -Infinity), first: q.b < 0 ? "asc" : "desc",
    cell: (item) => numberCell(item, key, q), plain: (item) => item.value(key), spread: true,
  };
}

function numberCell(item, key, q) {
  const value = item.value(key);
  const box = el("div", {}, el("span", { class: value === null ? "v muted" : "v", text: shown(value, q) }));
  const [low, high] = [item.low(key), item.high(key)];
  if (low === null || high === null || q.g === "Cost") return box;
  box.append(el("span", { class: "ci", text: `${shown(low, q)} to ${shown(high, q)}` }));
  if (["E", "F", "O"].includes(key)) box.append(whisker(value, low, high, extent(key)));
  return box;
}

const extents = new Map();
function extent(key) {
  const name = `${places().map((place) => place.name)}/${key}`;
  if (!extents.has(name)) {
    const values = places().flatMap((place) => ["mean", "low", "high"].flatMap((part) => place.rows[part][key] ?? [])).filter((v) => v !== null).sort((a, b) => a - b);
    // A few wide intervals would leave no room for the others.
    extents.set(name, [values[Math.floor(values.length * 0.02)] ?? 0, values[Math.ceil(values.length * 0.98) - 1] ?? 1]);
  }
  return extents.get(name);
}

function whisker(value, low, high, [least, most]) {
  const at = (v) => Math.min(100, Math.max(0, (100 * (v - least)) / (most - least || 1)));
  return el("span", { class: "whisker", "aria-hidden": "true" },
    el("i", { style: { left: `${at(low)}%`, width: `${at(high) - at(low)}%` } }), el("b", { style: { left: `${at(value)}%` } }));
}

function textColumn(key, title, group, visible, of, more = {}) {
  return { key, title, group, visible, sort: of, plain: of, cell: (item) => document.createTextNode(of(item) ?? ""), first: "asc", ...more };
}

function dot(family) { return el("span", { class: "dot", title: family, style: { background: `var(--family-${FAMILIES.includes(family) ? family : "other"})` } }); }

function nameCell(row, inner = null) {
  const open = el("button", { type: "button", text: row.title, onclick: () => change({ row: row.id }) });
  const tag = (row.rank === null ? "" : `r${row.rank}`) + (row.variant ? ` +${row.variant}` : "");
  return el("div", { class: "who" }, dot(row.family), el("span", {}, open, " ", el("span", { class: "tag", text: tag })), inner);
}

function rankColumn(key, visible) {
  const text = (row) => { const found = row.ranks(key); return found === null ? "" : found[0] === found[1] ? `${found[0]}` : `${found[0]}–${found[1]}`; };
  return {
    key: `rank.${key}`, title: `Rank ${key}`, group: "Ranks", visible, num: true, first: "asc", plain: text,
    help: `Ranks by ${key} that the row may hold: rows that the tests do not tell apart share them.`,
    sort: (row) => { const found = row.ranks(key); return found === null ? 1e9 : found[0] * 1e4 + found[1]; },
    cell: (row) => el("span", { class: text(row) ? "place-tie" : "muted", text: text(row) || "–" }),
  };
}

function versusColumns(key) {
  const q = QUANTITIES[key];
  if (!q) return [];
  const number = (field, title, help, show) => ({
    key: `${key}.${field}`, title, group: "Comparisons", visible: false, num: true, first: field.startsWith("p") ? "asc" : "desc", help,
    sort: (row) => row.versus(`${key}.${field}`) ?? 1e9, plain: (row) => row.versus(`${key}.${field}`), cell: (row) => document.createTextNode(show(row)),
  });
  const control = onePlace()?.control ?? "the control";
  const span = (row) => {
    const [value, low, high] = ["diff", "diff_low", "diff_high"].map((f) => row.versus(`${key}.${f}`));
    return value === null ? "–" : shown(value, q, true) + (low === null ? "" : ` (${shown(low, q, true)} to ${shown(high, q, true)})`);
  };
  return [
    number("diff", `${key} − control`, `Difference to ${control}, paired by seed, with its interval.`, span),
    number("p_adjusted", `p ${key}, control`, `Against ${control}, paired by seed and item, Holm-adjusted.`, (row) => pValue(row.versus(`${key}.p_adjusted`))),
    number("p_base_adjusted", `p ${key}, base`, "Against the untouched base, Holm-adjusted.", (row) => pValue(row.versus(`${key}.p_base_adjusted`))),
  ];
}

function rowColumns() {
  const all = state.place === "all";
  const numbers = quantityKeys("rows");
  // A level that few rows reach says little in a column of its own.
  const often = (key) => 3 * places().reduce((n, place) => n + (place.rows.mean[key] ?? []).filter((v) => v !== null).length, 0) >= places().reduce((n, place) => n + place.rows.n, 0);
  const one = ["F@", "drift."].map((start) => numbers.find((key) => key.startsWith(start) && often(key))).filter(Boolean);
  const first = new Set([...FIRST, ...FIRST_COSTS, ...one]);
  const ordered = [...FIRST, ...one, ...FIRST_COSTS].filter((key) => numbers.includes(key));
  const more = numbers.filter((key) => !first.has(key));
  return [
    pinColumn(),
    textColumn("name", "Method", "Row", true, (row) => row.name, { cell: (row) => nameCell(row), class: "name", fixed: true }),
    textColumn("base", "Base", "Row", all, (row) => row.base), textColumn("target", "Target", "Row", all, (row) => row.target),
    rankColumn("O", true), ...ordered.map((key) => numberColumn(key, true)),
    {
      ...textColumn("seeds", "Seeds", "Row", true, (row) => `${row.nOk}/${row.nPlanned}`), num: true, first: "desc", sort: (row) => row.nOk,
      help: "Seeds that are ok, of those planned.", cell: (row) => el("span", { text: `${row.nOk}/${row.nPlanned}`, title: `ok: ${row.block.seeds[row.at] || "none"}` }),
    },
    { ...textColumn("status", "Status", "Row", true, (row) => row.statuses.join(" ")), cell: (row) => el("span", {}, row.statuses.map((s) => el("span", { class: `state state-${s}`, text: s }))) },
    textColumn("note", "Why not", "Row", places().some((place) => place.rows.text.note?.v.length > 1), (row) => row.text("note"), { class: "reason" }),
    textColumn("family", "Family", "Row", false, (row) => row.family), textColumn("variant", "Variant", "Row", false, (row) => row.variant),
    { ...textColumn("rank", "r", "Row", false, (row) => row.rank), num: true, sort: (row) => row.rank ?? -1, cell: (row) => document.createTextNode(row.rank ?? "–") },
    textColumn("origin", "Origin", "Row", false, (row) => row.origins.map((o) => o || "this machine").join(" ")),
    rankColumn("E", false), rankColumn("F", false), ...["O", "E", "F"].flatMap(versusColumns), ...more.map((key) => numberColumn(key, false)),
  ];
}

function cellColumns() {
  const all = state.place === "all";
  const numbers = quantityKeys("cells");
  const first = ["E", "F", "O", "seconds.train", "learning_rate"].filter((key) => numbers.includes(key));
  return [
    {
      ...textColumn("name", "Cell", "Cell", true, (cell) => cell.name), class: "name", fixed: true,
      cell: (cell) => cell.page ? el("div", { class: "who" }, dot(cell.family), el("a", { href: cell.page, text: cell.name })) : el("div", { class: "who" }, dot(cell.family), cell.name),
    },
    { ...textColumn("seed", "Seed", "Cell", true, (cell) => cell.seed), num: true },
    textColumn("base", "Base", "Cell", all, (cell) => cell.base), textColumn("target", "Target", "Cell", all, (cell) => cell.target),
    { ...textColumn("status", "Status", "Cell", true, (cell) => cell.status), cell: (cell) => el("span", { class: `state state-${cell.status}`, text: cell.status }) },
    textColumn("reason", "Reason", "Cell", true, (cell) => cell.reason, { class: "reason" }),
    ...first.map((key) => numberColumn(key, true)),
    textColumn("origin", "Origin", "Cell", places().some((place) => place.cells.text.origin.v.some(Boolean)), (cell) => cell.origin || "this machine"),
    textColumn("family", "Family", "Cell", false, (cell) => cell.family), textColumn("id", "Id", "Cell", false, (cell) => cell.id),
    textColumn("scored", "Scored weights", "Cell", false, (cell) => cell.text("scored")), textColumn("learning_rate_source", "Rate from", "Cell", false, (cell) => cell.text("learning_rate_source")),
    ...numbers.filter((key) => !first.includes(key)).map((key) => numberColumn(key, false)),
  ];
}

function pinColumn() {
  return {
    key: "pin", title: "", label: "Compare", group: "Row", visible: true, fixed: true, class: "pin", orderable: false, sort: () => 0, plain: () => "",
    cell: (row) => {
      const box = el("input", { type: "checkbox", "aria-label": `Compare ${row.name}`, title: "Compare in Curves", onchange: (event) => select(row.id, event.target.checked) });
      box.checked = selected().includes(row.id);
      return box;
    },
  };
}

// Columns that are shown: those of the link, or the usual ones.
function visibleColumns() {
  const asked = listed(state.cols).map(decodeURIComponent);
  return columns.filter((column) => column.fixed || (asked.length ? asked.includes(column.key) : column.visible));
}

function orderOf() {
  const [key, way] = state.sort ? [state.sort.slice(0, state.sort.lastIndexOf(":")), state.sort.slice(state.sort.lastIndexOf(":") + 1)] : [];
  const at = columns.findIndex((column) => column.key === key);
  if (at >= 0) return [[at, way === "asc" ? "asc" : "desc"]];
  const usual = columns.findIndex((column) => column.key === (state.of === "cells" ? "status" : "O"));
  return usual >= 0 && state.of !== "cells" ? [[usual, "desc"]] : [];
}

function buildTable(box) {
  columns = state.of === "cells" ? cellColumns() : rowColumns();
  const shownKeys = new Set(visibleColumns().map((column) => column.key));
  const caption = el("caption", {}, el("span", { class: "hidden", text: captionText() }));
  const head = el("tr", {}, columns.map((column) => el("th", { scope: "col", class: (column.class ?? "") + (column.num ? " num" : ""), title: column.help, text: column.title }, column.label ? el("span", { class: "hidden", text: column.label }) : null)));
  const node = el("table", { id: "results" }, caption, el("thead", {}, head));
  box.replaceChildren(node);
  table = new DataTable(node, {
    data: everything(), autoWidth: false, deferRender: true, pageLength: Number(state.n) || 50, lengthMenu: [25, 50, 100, 500], order: orderOf(), orderMulti: false,
    layout: { topStart: null, topEnd: null, bottomStart: ["info", "pageLength"], bottomEnd: "paging" }, searching: true,
    language: { info: "_START_–_END_ of _TOTAL_", infoFiltered: "(of _MAX_)", infoEmpty: "none", emptyTable: "Nothing here yet.", zeroRecords: "Nothing passes the filters.", lengthMenu: "_MENU_ per page" },
    columns: columns.map((column) => ({
      visible: shownKeys.has(column.key), className: (column.class ?? "") + (column.num ? " num" : ""), type: column.num ? "num" : "string",
      orderable: column.orderable !== false, searchable: false, orderSequence: column.first === "desc" ? ["desc", "asc"] : ["asc", "desc"],
      data: (item, kind) => (kind === "sort" || kind === "type" ? column.sort(item) ?? "" : ""), render: (value, kind, item) => (kind === "display" ? column.cell(item) : value),
    })),
    createdRow: (tr, item) => { if (item.id === state.row) tr.classList.add("chosen"); },
  });
  table.search.fixed("facets", (_, item) => passes(item));
  refilter();
  table.page(Number(state.page) || 0).draw("page");
  table.on("order.dt", () => {
    const [at, way] = table.order()[0] ?? [];
    if (at !== undefined && way) change({ sort: `${columns[at].key}:${way}`, page: "0" });
  });
  table.on("page.dt", () => change({ page: String(table.page()) }));
  table.on("length.dt", (event, settings, length) => change({ n: String(length), page: "0" }));
}

let passes = () => true;
function refilter() {
  passes = matcher();
  if (table) table.draw();
}

function captionText() {
  const where = places().map((place) => place.name).join(", ");
  return state.of === "cells" ? `Every cell of ${where}, with its status` : `Methods, ranks and variants on ${where}: means over seeds with 95 % intervals; ranks are shared by rows that cannot be told apart`;
}

// Items as the table has them now: filtered and in its order.
const tableItems = () => table.rows({ search: "applied", order: "applied" }).data().toArray();

function sortedRows() {
  const rows = places().flatMap((place) => place.allRows).filter(matcher());
  const [key, way] = state.sort ? [state.sort.slice(0, state.sort.lastIndexOf(":")), state.sort.endsWith(":asc") ? 1 : -1] : ["O", -1];
  const known = QUANTITIES[key] ? key : "O";
  const missing = way > 0 ? Infinity : -Infinity;
  return rows.sort((a, b) => way * ((a.value(known) ?? missing) - (b.value(known) ?? missing)) || (a.name < b.name ? -1 : 1));
}

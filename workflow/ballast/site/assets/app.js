// Puts the parts together: what has to be drawn again after which change.

const at = (id) => document.getElementById(id);
const DRAWN = { table: tableView, tradeoff: tradeoffView, curves: curvesView, forgetting: forgettingView, cost: costView, notes: notesView };

function drawHead() {
  at("place").replaceChildren(...DATA.places.map((place) => el("option", { value: place.name, text: place.name })), ...(DATA.places.length > 1 ? [el("option", { value: "all", text: "All bases and targets" })] : []));
  at("place").addEventListener("change", (event) => change({ place: event.target.value, cols: "", row: "", page: "0" }));
  at("views").replaceChildren(...VIEWS.map(([key, text]) => el("button", { type: "button", role: "tab", id: `tab-${key}`, "aria-controls": "panel", text, onclick: () => change({ view: key }) })));
  at("views").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const here = VIEWS.findIndex(([key]) => key === state.view);
    const next = VIEWS[(here + step + VIEWS.length) % VIEWS.length][0];
    change({ view: next });
    at(`tab-${next}`).focus();
  });
  let typing;
  at("search").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ q: event.target.value, page: "0" }, false), 120);
  });
  at("export").addEventListener("click", showExport);
  at("link").addEventListener("click", () => copy(location.href));
  at("skip").addEventListener("click", (event) => { event.preventDefault(); at("main").focus(); });
  at("theme").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    try { localStorage.setItem("ballast-theme", theme); } catch { /* a browser that keeps nothing */ }
    drawTheme();
    if (state.view !== "table") drawView();
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape" && state.row && !document.querySelector("dialog[open]")) change({ row: "" }); });
  document.addEventListener("click", (event) => { for (const box of document.querySelectorAll("details.facet[open]")) if (!box.contains(event.target)) box.open = false; });
  document.addEventListener("keydown", (event) => {
    const box = event.key === "Escape" && document.querySelector("details.facet[open]");
    if (box) { box.open = false; box.querySelector("summary").focus(); }
  });
}

function drawTheme() {
  const dark = document.documentElement.dataset.theme === "dark";
  at("theme").setAttribute("aria-pressed", String(dark));
}

function drawTabs() {
  for (const [key] of VIEWS) {
    const on = key === state.view;
    at(`tab-${key}`).setAttribute("aria-selected", String(on));
    at(`tab-${key}`).tabIndex = on ? 0 : -1;
  }
  panel.setAttribute("aria-labelledby", `tab-${state.view}`);
  at("place").value = state.place === "all" ? "all" : places()[0]?.name ?? "";
  if (document.activeElement !== at("search")) at("search").value = state.q;
  at("filters").hidden = state.view === "notes";
}

function drawFacets() {
  const boxes = FACETS.map((name) => facetBox(name)).filter(Boolean);
  const clear = Object.keys(state.facets).length || state.q ? [el("button", { type: "button", text: "Clear", onclick: () => { at("search").value = ""; change({ facets: {}, q: "", page: "0" }); } })] : [];
  const open = document.querySelector("#facets details[open]")?.dataset.facet;
  if (open) return markFacets();
  at("facets").replaceChildren(...boxes, ...clear);
}

function markFacets() {
  for (const box of document.querySelectorAll("#facets details")) {
    const count = state.facets[box.dataset.facet]?.length ?? 0;
    box.classList.toggle("on", count > 0);
    box.firstElementChild.textContent = FACET[box.dataset.facet][0] + (count ? ` · ${count}` : "");
  }
}

const natural = new Intl.Collator("en", { numeric: true }).compare;

function facetBox(name) {
  const [label, of] = FACET[name];
  const counts = new Map();
  for (const item of everything()) for (const value of new Set(of(item))) counts.set(value, (counts.get(value) ?? 0) + 1);
  const wanted = state.facets[name] ?? [];
  if (counts.size < 2 && !wanted.length) return null;
  const menu = el("div", { class: "menu" });
  const box = el("details", { class: wanted.length ? "facet on" : "facet", "data-facet": name }, el("summary", { text: label + (wanted.length ? ` · ${wanted.length}` : "") }), menu);
  box.addEventListener("toggle", () => { if (box.open) fillFacet(menu, name, counts); else drawFacets(); });
  return box;
}

function fillFacet(menu, name, counts) {
  const chosen = new Set(state.facets[name] ?? []);
  const values = [...counts.keys()].sort(natural);
  const title = (value) => (name === "method" ? DATA.methods[value]?.title ?? value : value);
  const lines = values.map((value) => {
    const tick = el("input", { type: "checkbox", onchange: (event) => {
      if (event.target.checked) chosen.add(value); else chosen.delete(value);
      const facets = { ...state.facets, [name]: [...chosen] };
      if (!chosen.size) delete facets[name];
      change({ facets, page: "0" });
    } });
    tick.checked = chosen.has(value);
    return el("label", { "data-value": value }, tick, name === "family" ? dot(value) : null, el("span", { text: title(value) }), el("span", { class: "n", text: counts.get(value) }));
  });
  const find = values.length > 12 ? el("input", { type: "search", placeholder: "Find", "aria-label": `Find in ${FACET[name][0]}`, oninput: (event) => {
    const word = event.target.value.toLowerCase();
    for (const line of lines) line.hidden = !line.textContent.toLowerCase().includes(word);
  } }) : null;
  menu.replaceChildren(...[find, ...lines].filter(Boolean));
}

function drawCount() {
  const items = everything();
  const count = items.filter(matcher()).length;
  const cells = places().flatMap((place) => place.cells.text.status.i.map((i) => place.cells.text.status.v[i]));
  const states = Object.entries(Object.groupBy(cells, (status) => status)).map(([status, found]) => `${grouped(String(found.length))} ${status}`);
  const what = state.of === "cells" && state.view === "table" ? "cells" : "rows";
  at("count").textContent = state.view === "notes" ? "" : `${grouped(String(count))} of ${grouped(String(items.length))} ${what} · cells: ${states.join(", ") || "none"}`;
}

function drawView() {
  table = null;
  if (!DATA.places.length) return panel.replaceChildren(paragraph("No cells have been run yet."));
  DRAWN[state.view]();
}

const REBUILD = new Set(["place", "view", "of"]);
const FILTERS = new Set(["facets", "q"]);
let drawing = false;

// keys: what has changed, null for everything (a link, the back button).
function changed(keys) {
  if (drawing) return;
  drawing = true;
  try {
    const has = (set) => keys === null || keys.some((key) => set.has(key));
    drawTabs();
    if (has(REBUILD) || has(FILTERS)) { drawFacets(); drawCount(); }
    if (has(REBUILD) || (state.view !== "table" && !keys.every((key) => key === "row" || key === "page" || key === "n"))) drawView();
    else if (state.view === "table") {
      if (has(FILTERS)) refilter();
      if (keys.includes("cols")) for (const [i, column] of columns.entries()) table.column(i).visible(visibleColumns().includes(column), false);
    }
    showDetail();
    for (const tr of document.querySelectorAll("#results tbody tr")) tr.classList.toggle("chosen", Boolean(state.row) && table?.row(tr).data()?.id === state.row);
  } finally {
    drawing = false;
  }
}

drawHead();
drawTheme();
listen(changed);
changed(null);
document.documentElement.dataset.ready = "true";

// The data: rows and cells as objects over the columns of the JSON.

const DATA = JSON.parse(document.getElementById("data").textContent);
const QUANTITIES = DATA.quantities;
const FAMILIES = ["selective", "additive", "reparameterization", "post-hoc"];

class Item {
  constructor(place, at) { this.place = place; this.at = at; }
  get base() { return this.place.base; }
  get target() { return this.place.target; }
  value(key) { return this.block.mean[key]?.[this.at] ?? null; }
  text(key) { const column = this.block.text[key]; return column ? column.v[column.i[this.at]] : ""; }
}

class Row extends Item {
  get block() { return this.place.rows; }
  get key() { return this.text("key"); }
  get id() { return `${this.place.name}/${this.key}`; }
  get method() { return this.text("method"); }
  get title() { return this.text("title"); }
  get variant() { return this.text("variant"); }
  get family() { return this.text("family"); }
  get rank() { return this.block.rank[this.at]; }
  get nOk() { return this.block.n_ok[this.at]; }
  get nPlanned() { return this.block.n_planned[this.at]; }
  get statuses() { return this.text("status").split(" "); }
  get origins() { return this.text("origin").split(" ").filter((o, i, all) => o || all.length === 1 || i === 0); }
  get name() { return this.title + (this.rank === null ? "" : ` r${this.rank}`) + (this.variant ? ` +${this.variant}` : ""); }
  low(key) { return this.block.low[key]?.[this.at] ?? null; }
  high(key) { return this.block.high[key]?.[this.at] ?? null; }
  versus(key) { return this.block.vs[key]?.[this.at] ?? null; }
  ranks(key) {
    const found = this.block.ranks[key];
    return found && found[0][this.at] !== null ? [found[0][this.at], found[1][this.at]] : null;
  }
  get cells() { return this.place.cellsOf(this.at); }
}

class Cell extends Item {
  get block() { return this.place.cells; }
  get row() { const at = this.block.row[this.at]; return at < 0 ? null : this.place.allRows[at]; }
  get id() { return this.text("id"); }
  get seed() { return this.block.seed[this.at]; }
  get status() { return this.text("status"); }
  get reason() { return this.text("reason"); }
  get origin() { return this.text("origin"); }
  get page() { return this.block.page[this.at]; }
  get method() { return this.row.method; }
  get family() { return this.row.family; }
  get rank() { return this.row.rank; }
  get name() { return this.row.name; }
  get statuses() { return [this.status]; }
  get origins() { return [this.origin]; }
  get nOk() { return this.row.nOk; }
  low() { return null; }
  high() { return null; }
}

for (const place of DATA.places) {
  place.name = `${place.base} → ${place.target}`;
  let rows, cells, byRow;
  Object.defineProperty(place, "allRows", { get: () => (rows ??= Array.from({ length: place.rows.n }, (_, i) => new Row(place, i))) });
  Object.defineProperty(place, "allCells", { get: () => (cells ??= Array.from({ length: place.cells.n }, (_, i) => new Cell(place, i))) });
  place.cellsOf = (row) => {
    if (!byRow) {
      byRow = new Map();
      for (const cell of place.allCells) {
        const at = place.cells.row[cell.at];
        if (!byRow.has(at)) byRow.set(at, []);
        byRow.get(at).push(cell);
      }
    }
    return byRow.get(row) ?? [];
  };
}

// Without a choice, the base and target with most rows.
const USUAL_PLACE = DATA.places.reduce((most, place) => (most && most.rows.n >= place.rows.n ? most : place), undefined);

// The places in view: one, or all of them.
function places() {
  if (state.place === "all") return DATA.places;
  return [DATA.places.find((place) => place.name === state.place) ?? USUAL_PLACE].filter(Boolean);
}

const onePlace = () => (places().length === 1 ? places()[0] : null);
const everything = () => places().flatMap((place) => (state.of === "cells" && state.view === "table" ? place.allCells : place.allRows));

const FACET = {
  family: ["Family", (item) => [item.family || "other"]],
  method: ["Method", (item) => [item.method]],
  rank: ["Rank", (item) => [item.rank === null ? "none" : String(item.rank)]],
  base: ["Base", (item) => [item.base]],
  target: ["Target", (item) => [item.target]],
  seeds: ["Seeds", (item) => [String(item.nOk)]],
  status: ["Status", (item) => item.statuses],
  origin: ["Origin", (item) => item.origins.map((origin) => origin || "this machine")],
};

const haystacks = new WeakMap();
function haystack(item) {
  let found = haystacks.get(item);
  if (found === undefined) {
    const parts = [item.name, item.method, item.family, item.base, item.target];
    if (item instanceof Cell) parts.push(item.id, item.status, item.reason, item.origin);
    else parts.push(item.key, item.text("note"), item.text("status"), item.text("origin"));
    found = parts.join("\n").toLowerCase();
    haystacks.set(item, found);
  }
  return found;
}

// Whether an item passes the search and the facets; `except`: a facet that is not asked.
function matcher(except = null) {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const facets = Object.entries(state.facets).filter(([name]) => name !== except && FACET[name])
    .map(([name, values]) => [FACET[name][1], new Set(values)]);
  return (item) =>
    facets.every(([of, values]) => of(item).some((value) => values.has(value))) &&
    (words.length === 0 || words.every((word) => haystack(item).includes(word)));
}

function chosenRows() {
  const wanted = new Set(selected());
  return places().flatMap((place) => place.allRows).filter((row) => wanted.has(row.id));
}

const selected = () => listed(state.sel).map((text) => decodeURIComponent(text));
function select(id, on) {
  const now = new Set(selected());
  if (on) now.add(id); else now.delete(id);
  change({ sel: joined([...now].map(encodeURIComponent)) });
}

let rowsById;
function rowOf(id) {
  rowsById ??= new Map(DATA.places.flatMap((place) => place.allRows).map((row) => [row.id, row]));
  return rowsById.get(id) ?? null;
}

// Rows that no other is at least as good as in both quantities and better in one.
function frontOf(rows, x, y) {
  const [bx, by] = [QUANTITIES[x]?.b ?? 0, QUANTITIES[y]?.b ?? 0];
  if (!bx || !by) return [];
  const points = rows.map((row) => [bx * row.value(x), by * row.value(y), row]);
  points.sort((a, b) => b[0] - a[0] || b[1] - a[1]);
  const found = [];
  let best = -Infinity, at = null;
  for (const [u, v, row] of points) {
    if (v > best) { best = v; at = u; found.push(row); } else if (v === best && u === at) found.push(row);
  }
  return found;
}

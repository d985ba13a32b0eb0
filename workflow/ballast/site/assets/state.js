// What is seen stands in the address after #, so that a link or the back button restores it.

const VIEWS = [
  ["table", "Table"], ["tradeoff", "Trade-off"], ["curves", "Curves"],
  ["forgetting", "Forgetting"], ["cost", "Cost"], ["notes", "Notes"],
];
const FACETS = ["family", "method", "rank", "base", "target", "seeds", "status", "origin"];
const DEFAULTS = {
  place: "", view: "table", of: "rows", q: "", sort: "", cols: "", x: "F", y: "E", show: "front,paths,bars",
  row: "", sel: "", task: "", page: "0", n: "50",
};

const state = { ...DEFAULTS, facets: {} };
let listener = () => {};

function serialised() {
  const found = new URLSearchParams();
  for (const [key, value] of Object.entries(DEFAULTS)) if (state[key] !== value) found.set(key, state[key]);
  for (const facet of FACETS) for (const value of state.facets[facet] ?? []) found.append(`f.${facet}`, value);
  const text = found.toString();
  return text ? `#${text}` : "#";
}

function restore(hash) {
  const found = new URLSearchParams(hash.replace(/^#/, ""));
  for (const [key, value] of Object.entries(DEFAULTS)) state[key] = found.get(key) ?? value;
  if (!VIEWS.some(([name]) => name === state.view)) state.view = DEFAULTS.view;
  state.facets = {};
  for (const facet of FACETS) {
    const values = found.getAll(`f.${facet}`);
    if (values.length) state.facets[facet] = values;
  }
}

// push: a step that the back button undoes; otherwise the present step is changed.
function change(values, push = true) {
  Object.assign(state, values);
  const hash = serialised();
  if (hash !== (location.hash || "#")) {
    if (push) history.pushState(null, "", hash);
    else history.replaceState(null, "", hash);
  }
  listener(Object.keys(values));
}

function listen(callback) {
  listener = callback;
  const again = () => { restore(location.hash); listener(null); };
  addEventListener("popstate", again);
  restore(location.hash);
}

const listed = (text) => (text ? text.split(",").filter(Boolean) : []);
const joined = (values) => [...values].join(",");

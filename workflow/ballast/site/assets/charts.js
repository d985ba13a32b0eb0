// Plots, drawn by Plotly from the rows that pass the filters.

const LAYOUT = { margin: { l: 62, r: 16, t: 12, b: 52 }, hovermode: "closest", showlegend: true, legend: { orientation: "h", y: -0.16 }, dragmode: "zoom" };
const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], toImageButtonOptions: { format: "svg", filename: "ballast" }, plotlyServerURL: "" };
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "x", "triangle-left", "triangle-right", "star", "hexagon", "cross", "hexagram", "star-diamond"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const MOST_BARS = 30;

const narrow = () => innerWidth < 640;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (family) => css(`--family-${FAMILIES.includes(family) ? family : "other"}`);

function themed(layout) {
  const [ink, soft, line] = [css("--ink"), css("--soft"), css("--line")];
  const axis = { gridcolor: line, zerolinecolor: css("--rule"), linecolor: css("--rule"), tickfont: { color: soft }, automargin: true };
  const found = {
    ...LAYOUT, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: css("--sans"), size: 13, color: ink },
    hoverlabel: { bgcolor: css("--paper"), bordercolor: css("--rule"), font: { color: ink, size: 13 }, align: "left" }, modebar: { color: css("--faint"), activecolor: ink, bgcolor: "rgba(0,0,0,0)" }, ...layout,
  };
  if (narrow() && found.legend === LAYOUT.legend) found.legend = { ...LAYOUT.legend, y: -0.34 };
  for (const key of Object.keys(found)) if (/^[xy]axis\d*$/.test(key)) {
    const title = found[key].title && { ...found[key].title, font: { size: 13, color: soft } };
    found[key] = { ...axis, ...found[key], ...(title && { title }) };
  }
  return found;
}

function draw(box, traces, layout, label) {
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", label);
  box.setAttribute("tabindex", "0");
  return Plotly.react(box, traces, themed(layout), CONFIG);
}

function symbols() {
  const at = new Map(), counts = new Map();
  for (const [method, facts] of Object.entries(DATA.methods)) {
    const n = counts.get(facts.family) ?? 0;
    at.set(method, SYMBOLS[n % SYMBOLS.length]);
    counts.set(facts.family, n + 1);
  }
  return at;
}

const sizeOf = (rank) => (rank === null ? 9 : Math.min(17, 6 + 1.6 * Math.log2(rank + 1)));

function hoverText(row, keys) {
  const lines = [`<b>${plotText(row.name)}</b>`];
  for (const key of new Set(keys)) {
    const q = QUANTITIES[key];
    if (!q || row.value(key) === null) continue;
    const [low, high] = [row.low(key), row.high(key)];
    lines.push(`${plotText(q.t)}  ${shown(row.value(key), q)}${low === null ? "" : `  (${shown(low, q)} to ${shown(high, q)})`}`);
  }
  const ranks = row.ranks("O");
  if (ranks) lines.push(`Rank by O  ${ranks[0] === ranks[1] ? ranks[0] : `${ranks[0]}–${ranks[1]}`}`);
  lines.push(`${row.nOk} of ${row.nPlanned} seeds, ${plotText(row.family)}`);
  return lines.join("<br>");
}

function axisOf(key) {
  const q = QUANTITIES[key];
  const names = narrow()
    ? { F: "F, points (left: forgot more)", E: "E, points" }
    : { F: "Stability F: mean change upstream, points (left: forgot more)", E: "Specialization E: change downstream, points" };
  const log = q && ["parameters", "bytes"].includes(q.u);
  return { title: { text: names[key] ?? plotText(q ? q.t + (q.u ? `, ${q.u}` : "") : key) }, type: log ? "log" : "linear", zeroline: true };
}

// Of many rows only the named ones have bars: the others would cover the points.
function errors(rows, key, named) {
  const q = QUANTITIES[key];
  const has = (row) => row.low(key) !== null && (!named || named.has(row.id));
  if (!rows.some(has) || q?.g === "Cost") return undefined;
  return {
    type: "data", symmetric: false, thickness: 1, width: 2,
    array: rows.map((row) => (has(row) ? row.high(key) - row.value(key) : 0)), arrayminus: rows.map((row) => (has(row) ? row.value(key) - row.low(key) : 0)),
  };
}

function scatter(box, rows, place) {
  const { x, y } = state;
  const show = new Set(listed(state.show));
  const known = rows.filter((row) => row.value(x) !== null && row.value(y) !== null);
  const traces = [];
  if (show.has("paths")) traces.push(...rankPaths(known, x, y));
  const mark = symbols();
  const front = frontOf(known, x, y);
  const named = known.length > MOST_BARS ? new Set([...front.map((row) => row.id), state.row, ...listed(state.sel)]) : null;
  for (const family of [...FAMILIES, null]) {
    const some = known.filter((row) => (family === null ? !FAMILIES.includes(row.family) : row.family === family));
    if (!some.length) continue;
    const bars = show.has("bars");
    const faint = (found) => found && { ...found, color: colourOf(family) + "80" };
    traces.push({ type: "scatter", mode: "markers", name: family ?? "other", legendgroup: family ?? "other", x: [null], y: [null], marker: { color: colourOf(family), size: 10 } });
    traces.push({
      type: "scatter", mode: "markers", name: family ?? "other", legendgroup: family ?? "other", showlegend: false, x: some.map((row) => row.value(x)), y: some.map((row) => row.value(y)), customdata: some.map((row) => row.id),
      text: some.map((row) => hoverText(row, [x, y, "E", "F", "O", "front", "seconds.train", "memory_mb.train"])), hoverinfo: "text",
      error_x: bars ? faint(errors(some, x, named)) : undefined, error_y: bars ? faint(errors(some, y, named)) : undefined,
      marker: {
        opacity: 0.95, color: colourOf(family), size: some.map((row) => sizeOf(row.rank)), symbol: some.map((row) => mark.get(row.method) + (row.nOk < 2 ? "-open" : "")),
        line: { width: some.map((row) => (row.nOk < 2 ? 1.6 : 0.8)), color: some.map((row) => (row.id === state.row ? css("--ink") : row.nOk < 2 ? colourOf(family) : css("--paper"))) },
      },
    });
  }
  if (show.has("front") && front.length) traces.push(frontLine(front, x, y));
  const zero = untouched(place, x, y);
  if (zero) traces.push({ type: "scatter", mode: "markers", name: "untouched base", x: [zero[0]], y: [zero[1]], text: ["<b>untouched base</b>"], hoverinfo: "text", marker: { symbol: "cross-thin", size: 13, line: { width: 2.2, color: css("--ink") } } });
  const label = `Scatter of ${QUANTITIES[y]?.t} against ${QUANTITIES[x]?.t}, ${known.length} rows. On the front of the means: ${front.map((row) => row.name).join("; ") || "none"}.`;
  const axes = { xaxis: { ...axisOf(x), range: rangeOf(known, x, zero?.[0]) }, yaxis: { ...axisOf(y), range: rangeOf(known, y, zero?.[1]) } };
  const done = draw(box, traces, { ...axes, annotations: labels(front, known, x, y, box), margin: { l: 62, r: 16, t: 16, b: 52 }, uirevision: `${place?.name}/${x}/${y}` }, label);
  box.removeAllListeners?.("plotly_click");
  box.on("plotly_click", (event) => { const id = event.points[0]?.customdata; if (id) change({ row: id }); });
  return { done, front, hidden: rows.length - known.length };
}

// All means and the base, with room; an interval may leave the plot.
function rangeOf(rows, key, more) {
  const log = axisOf(key).type === "log";
  const values = [...rows.map((row) => row.value(key)), ...(more === undefined ? [] : [more])].filter((v) => !log || v > 0).map((v) => (log ? Math.log10(v) : v));
  if (!values.length) return undefined;
  const [least, most] = [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  const room = (most - least) * 0.08 || 1;
  return [least - room, most + room];
}

function untouched(place, x, y) {
  const at = (key) => (["E", "F", "O"].includes(key) || key.startsWith("dce.") || key.startsWith("drift.") ? 0 : place?.before[key] ?? null);
  return at(x) === null || at(y) === null ? null : [at(x), at(y)];
}

function rankPaths(rows, x, y) {
  const paths = new Map();
  for (const row of rows) {
    if (row.rank === null) continue;
    const key = `${row.place.name}\n${row.method}\n${row.variant}`;
    if (!paths.has(key)) paths.set(key, []);
    paths.get(key).push(row);
  }
  const lines = new Map();
  for (const path of paths.values()) {
    if (path.length < 2) continue;
    path.sort((a, b) => a.rank - b.rank);
    const line = lines.get(path[0].family) ?? { x: [], y: [] };
    for (const row of path) { line.x.push(row.value(x)); line.y.push(row.value(y)); }
    line.x.push(null); line.y.push(null);
    lines.set(path[0].family, line);
  }
  return [...lines].map(([family, line]) => ({ type: "scatter", mode: "lines", ...line, line: { color: colourOf(family), width: 1.3 }, opacity: 0.4, hoverinfo: "skip", showlegend: false }));
}

// The edge of what the front's rows dominate: nothing between them is claimed.
function frontLine(front, x, y) {
  const sorted = [...front].sort((a, b) => a.value(x) - b.value(x));
  return {
    type: "scatter", mode: "lines", name: "front of the means", x: sorted.map((row) => row.value(x)), y: sorted.map((row) => row.value(y)), hoverinfo: "skip",
    line: { shape: (QUANTITIES[x].b > 0) ? "vh" : "hv", dash: "5px,3px", width: 1.4, color: css("--soft") },
  };
}

// Names beside the points of the front, as far as they do not cover each other.
function labels(front, rows, x, y, box) {
  const span = (key) => { const v = rows.map((row) => row.value(key)); const [a, b] = [v.reduce((p, q) => Math.min(p, q), Infinity), v.reduce((p, q) => Math.max(p, q), -Infinity)]; return [a, b - a || 1]; };
  const [[x0, xs], [y0, ys]] = [span(x), span(y)];
  const [w, h] = [box.clientWidth || 900, box.clientHeight || 500];
  const log = (key) => axisOf(key).type === "log";
  const taken = [];
  const found = [];
  for (const row of front.slice(0, 40)) {
    const at = [((row.value(x) - x0) / xs) * w * 0.8, ((row.value(y) - y0) / ys) * h * 0.75];
    const left = at[0] > w * 0.6;
    const size = 7 * Math.min(26, row.name.length);
    const space = [left ? at[0] - size : at[0], at[1], size, 16];
    if (taken.some((t) => space[0] < t[0] + t[2] && t[0] < space[0] + space[2] && Math.abs(space[1] - t[1]) < 16)) continue;
    taken.push(space);
    const place = (key) => (log(key) ? Math.log10(row.value(key)) : row.value(key));
    found.push({ x: place(x), y: place(y), text: plotText(shorten(row.name, 26)), showarrow: false, xanchor: left ? "right" : "left", yanchor: "bottom", xshift: left ? -7 : 7, yshift: 3, font: { size: 12, color: css("--ink") }, bgcolor: `${css("--paper")}cc` });
  }
  return found;
}

// Lines of several rows: the family's colour, told apart by dash, symbol and a name at their end.
function lineTrace(row, at, x, y, more = {}) {
  return {
    type: "scatter", mode: "lines+markers", name: plotText(shorten(row.name, 40)), x, y, line: { color: colourOf(row.family), width: 2, dash: DASHES[at % DASHES.length] },
    marker: { symbol: SYMBOLS[at % SYMBOLS.length], size: 7 }, ...more,
  };
}

function pathChart(box, rows, kind) {
  const traces = [];
  for (const [at, row] of rows.entries()) {
    const points = row.place.curves[kind]?.[row.at];
    if (!points?.length) continue;
    const what = kind === "rewind" ? "α" : "share of the steps";
    traces.push(lineTrace(row, at, points.map((p) => p[2]), points.map((p) => p[1]), {
      text: points.map((p) => `<b>${plotText(row.name)}</b><br>${what} ${p[0]}<br>E  ${shown(p[1], QUANTITIES.E)}<br>F  ${shown(p[2], QUANTITIES.F)}<br>${p[3]} seeds`), hoverinfo: "text", customdata: points.map(() => row.id),
    }));
  }
  return traces.length ? draw(box, traces, { xaxis: axisOf("F"), yaxis: axisOf("E") }, `E against F along the ${kind} of ${traces.length} rows`) : null;
}

function lossChart(box, rows) {
  const traces = [];
  for (const [at, row] of rows.entries()) {
    for (const [n, cell] of row.cells.entries()) {
      const found = row.place.losses.of?.[cell.at];
      if (!found) continue;
      traces.push(lineTrace(row, at, row.place.losses.steps[found[0]], found[1], {
        mode: "lines", line: { color: colourOf(row.family), width: 1.4, dash: DASHES[at % DASHES.length] }, opacity: 0.85, legendgroup: row.id, showlegend: n === 0,
        text: found[1].map((loss) => `<b>${plotText(row.name)}</b>, seed ${cell.seed}<br>loss ${loss}`), hoverinfo: "text+x",
      }));
    }
  }
  return traces.length ? draw(box, traces, { xaxis: { title: { text: "training step" } }, yaxis: { title: { text: "training loss, nats per token" }, type: "log", dtick: "D2" } }, `Training loss of ${rows.length} rows`) : null;
}

function rateChart(box, rows, place, field) {
  const wanted = new Map(rows.map((row, at) => [row.key, [row, at]]));
  const traces = [];
  for (const curve of place.rates) {
    const found = wanted.get(curve.key) ?? null;
    if (!found || !curve[field]) continue;
    const [row, at] = found;
    traces.push(lineTrace(row, at, curve.x, curve[field], { text: curve.x.map((rate, i) => `<b>${plotText(row.name)}</b><br>rate ${rate}<br>${field} ${curve[field][i]}`), hoverinfo: "text" }));
  }
  return traces.length ? draw(box, traces, { xaxis: { title: { text: "peak learning rate" }, type: "log" }, yaxis: { title: { text: `${field} on validation, points` } } }, `Validation ${field} against learning rate`) : null;
}

const KINDS = [["kept", "kept", "--kept"], ["gained", "gained", "--gained"], ["form", "forgotten: answer not in the task's form", "--form"], ["lost", "forgotten: wrong answer", "--forgotten"], ["never", "never right", "--never"]];

function churnOf(row, tasks) {
  const sum = { n: 0, kept: 0, gained: 0, form: 0, lost: 0, never: 0 };
  for (const task of tasks) {
    const block = row.place.churn[task];
    const at = (kind) => block?.[kind]?.[row.at] ?? 0;
    const form = at("forgotten_form");
    sum.n += at("n"); sum.kept += at("kept"); sum.gained += at("gained"); sum.form += form; sum.lost += at("forgotten") - form; sum.never += at("never");
  }
  return sum.n ? sum : null;
}

function barLayout(count, more) {
  return { barmode: "stack", bargap: 0.32, height: 90 + 26 * count, margin: { l: 10, r: 16, t: 30, b: 40 }, legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0, traceorder: "normal" }, ...more };
}

const rowAxis = (rows) => ({ type: "category", tickmode: "array", tickvals: rows.map((row) => row.id), ticktext: rows.map((row) => plotText(shorten(row.name, narrow() ? 16 : 34))), autorange: "reversed", showgrid: false });

function churnChart(box, rows, tasks) {
  const some = rows.map((row) => [row, churnOf(row, tasks)]).filter(([, sum]) => sum).slice(0, MOST_BARS);
  if (!some.length) return null;
  const traces = KINDS.map(([kind, name, colour]) => ({
    type: "bar", orientation: "h", name, y: some.map(([row]) => row.id), x: some.map(([, sum]) => (100 * sum[kind]) / sum.n), marker: { color: css(colour), line: { width: 0 } },
    text: some.map(([row, sum]) => `<b>${plotText(row.name)}</b><br>${name}: ${sum[kind]} of ${sum.n} items (${((100 * sum[kind]) / sum.n).toFixed(1)} %)`), hoverinfo: "text", textposition: "none", customdata: some.map(([row]) => row.id),
  }));
  return draw(box, traces, barLayout(some.length, { xaxis: { range: [0, 100], ticksuffix: " %" }, yaxis: rowAxis(some.map(([row]) => row)) }), `Items kept, gained and forgotten of ${some.length} rows`);
}

function heatChart(box, rows, place) {
  const tasks = place.tasks.filter((task) => task.unit === "points" && task.role !== "probe" && task.base !== null);
  const some = rows.filter((row) => tasks.some((task) => row.value(`score.${task.name}`) !== null)).slice(0, 60);
  if (!some.length || !tasks.length) return null;
  const change_ = (row, task) => { const v = row.value(`score.${task.name}`); return v === null ? null : v - task.base; };
  const z = some.map((row) => tasks.map((task) => change_(row, task)));
  const text = some.map((row, i) => tasks.map((task, j) => `<b>${plotText(row.name)}</b><br>${plotText(task.title)} (${task.role})<br>${z[i][j] === null ? "–" : `${shown(z[i][j], { u: "points" }, true)} points, from ${task.base}`}`));
  const dark = document.documentElement.dataset.theme === "dark";
  const middle = dark ? "#20262e" : "#f7f7f7";
  return draw(box, [{
    type: "heatmap", x: tasks.map((task) => task.name), y: some.map((row) => row.id), z, text, hoverinfo: "text", zmid: 0, zmin: -100, zmax: 100, xgap: 2, ygap: 2,
    colorscale: [[0, "#b35806"], [0.25, dark ? "#a8703a" : "#f1a340"], [0.5, middle], [0.75, dark ? "#4f7fb0" : "#7fb3d9"], [1, "#0072b2"]], showscale: some.length > 6 && !narrow(), colorbar: { thickness: 10, outlinewidth: 0, len: 260, lenmode: "pixels", y: 1, yanchor: "top", ticksuffix: " points" },
  }], {
    height: 170 + 22 * some.length, margin: { l: 10, r: narrow() ? 10 : 90, t: 150, b: 10 }, showlegend: false, yaxis: rowAxis(some),
    xaxis: { side: "top", type: "category", tickmode: "array", tickvals: tasks.map((task) => task.name), ticktext: tasks.map((task) => plotText(shorten(task.title, 26)) + (task.role === "target" ? " ◎" : "")), tickangle: narrow() ? -75 : -32, showgrid: false },
  }, `Change of each task's score against the base, ${some.length} rows by ${tasks.length} tasks`);
}

const PHASES = [["start", "--never"], ["load", "--kept"], ["attach", "--form"], ["train", "--family-reparameterization"], ["merge", "--family-additive"], ["evaluate", "--gained"]];

function timeChart(box, rows) {
  const some = rows.filter((row) => row.value("seconds.train") !== null).slice(0, MOST_BARS);
  if (!some.length) return null;
  const traces = PHASES.filter(([phase]) => some.some((row) => row.value(`seconds.${phase}`))).map(([phase, colour]) => ({
    type: "bar", orientation: "h", name: phase, y: some.map((row) => row.id), x: some.map((row) => row.value(`seconds.${phase}`) ?? 0), marker: { color: css(colour) }, customdata: some.map((row) => row.id),
    text: some.map((row) => `<b>${plotText(row.name)}</b><br>${phase}: ${shown(row.value(`seconds.${phase}`), { u: "s" })} s`), hoverinfo: "text", textposition: "none",
  }));
  return draw(box, traces, barLayout(some.length, { xaxis: { title: { text: "seconds, mean over seeds" } }, yaxis: rowAxis(some) }), `Time by phase of ${some.length} rows`);
}

function costDots(box, rows, key) {
  const some = rows.filter((row) => row.value(key) !== null).slice(0, MOST_BARS);
  if (!some.length) return null;
  const q = QUANTITIES[key];
  return draw(box, [{
    type: "scatter", mode: "markers", x: some.map((row) => row.value(key)), y: some.map((row) => row.id), marker: { color: some.map((row) => colourOf(row.family)), size: 10 }, customdata: some.map((row) => row.id),
    text: some.map((row) => `<b>${plotText(row.name)}</b><br>${plotText(q.t)}: ${shown(row.value(key), q)}${q.u && !["bytes", "parameters"].includes(q.u) ? ` ${q.u}` : ""}`), hoverinfo: "text",
  }], { showlegend: false, height: 90 + 26 * some.length, margin: { l: 10, r: 16, t: 10, b: 44 }, xaxis: { title: { text: q.t + (q.u ? `, ${q.u}` : "") }, rangemode: "tozero", ...(q.u === "bytes" && { type: "log", dtick: "D2" }) }, yaxis: { ...rowAxis(some), showgrid: true } }, `${q.t} of ${some.length} rows`);
}

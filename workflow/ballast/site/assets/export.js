// The rows in view as CSV, Markdown, LaTeX, or the BibTeX of their methods.

const FORMATS = [["csv", "CSV"], ["md", "Markdown"], ["tex", "LaTeX"], ["bib", "BibTeX"]];

// Heads and rows as they stand in the table: visible columns, filtered items, present order.
function exported() {
  const chosen = state.view === "table" ? visibleColumns().filter((column) => column.key !== "pin") : null;
  if (chosen) return [chosen, tableItems()];
  columns = rowColumns();
  return [visibleColumns().filter((column) => column.key !== "pin"), sortedRows()];
}

const isRange = (column, items) => column.spread && QUANTITIES[column.key].g !== "Cost" && items.some((item) => item.low(column.key) !== null);

function toCsv(chosen, items) {
  const lines = [], ranged = new Set(chosen.filter((column) => isRange(column, items)));
  lines.push(chosen.flatMap((column) => { const name = csvCell(column.key === "name" ? "row" : column.key); return ranged.has(column) ? [name, csvCell(`${column.key}.low`), csvCell(`${column.key}.high`)] : [name]; }));
  for (const item of items) lines.push(chosen.flatMap((column) => (ranged.has(column) ? [item.value(column.key), item.low(column.key), item.high(column.key)].map(csvCell) : [csvCell(column.plain(item))])));
  return lines.map((line) => `${line.join(",")}\n`).join("");
}

function asText(column, item) {
  const value = column.plain(item);
  if (!column.spread) return value === null || value === undefined ? "" : typeof value === "number" ? (column.key.includes(".p_") ? pValue(value) : shown(value, { u: "points" }, true)) : String(value);
  if (value === null) return "";
  const q = QUANTITIES[column.key], text = shown(value, q).replaceAll(SPACE, " ");
  return isRange(column, [item]) ? `${text} (${shown(item.low(column.key), q)} to ${shown(item.high(column.key), q)})` : text;
}

const headOf = (column) => column.title + (QUANTITIES[column.key]?.u && !["bytes", "parameters", "share", "points"].includes(QUANTITIES[column.key].u) ? ` (${QUANTITIES[column.key].u})` : "");
const plainValue = (column, item) => (column.key === "rank" ? String(item.rank ?? "") : asText(column, item));

function toMarkdown(chosen, items) {
  const line = (cells) => `| ${cells.join(" | ")} |\n`;
  return line(chosen.map((column) => markdownText(headOf(column)))) + line(chosen.map((column) => (column.num ? "---:" : "---"))) + items.map((item) => line(chosen.map((column) => markdownText(plainValue(column, item))))).join("");
}

function toLatex(chosen, items) {
  const line = (cells) => `${cells.join(" & ")} \\\\\n`;
  return `% needs booktabs, and \\usepackage[T1]{fontenc} with pdflatex\n\\begin{tabular}{${chosen.map((column) => (column.num ? "r" : "l")).join("")}}\n\\toprule\n` +
    line(chosen.map((column) => latexText(headOf(column)))) + "\\midrule\n" + items.map((item) => line(chosen.map((column) => latexText(plainValue(column, item))))).join("") + "\\bottomrule\n\\end{tabular}\n";
}

function toBibtex(items) {
  return `${[...new Set(items.map((item) => item.method))].map((method) => DATA.methods[method]?.bibtex).filter(Boolean).join("\n\n")}\n`;
}

function exportText(format) {
  const [chosen, items] = exported();
  return format === "csv" ? toCsv(chosen, items) : format === "md" ? toMarkdown(chosen, items) : format === "tex" ? toLatex(chosen, items) : toBibtex(items);
}

let format = "csv";
function showExport() {
  const box = document.getElementById("exporter");
  const text = el("textarea", { readonly: true, "aria-label": "Text to copy", spellcheck: "false" });
  const fill = (key) => {
    format = key;
    text.value = exportText(key);
    for (const button of box.querySelectorAll(".switch button")) button.setAttribute("aria-pressed", String(button.dataset.key === key));
  };
  const [, items] = exported();
  box.replaceChildren(
    el("h2", { id: "exporter-title", text: `Copy ${items.length} rows as` }), el("p", { class: "line", text: "The columns, rows and order that the table shows now." }), switcher("Format", FORMATS, format, fill), text,
    el("div", { class: "actions" }, el("button", { type: "button", text: "Close", onclick: () => box.close() }), el("button", { type: "button", text: "Download", onclick: () => download(text.value) }),
      el("button", { type: "button", class: "primary", id: "copy", text: "Copy", onclick: async () => { await copy(text.value); box.close(); } })));
  box.showModal();
  fill(format);
}

function download(text) {
  const link = el("a", { download: `${DATA.suite}.${format}`, href: URL.createObjectURL(new Blob([text], { type: "text/plain" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "hidden" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast("Copied");
}

let toasting;
function toast(text) {
  const box = document.getElementById("toast");
  box.textContent = text;
  box.classList.add("shown");
  clearTimeout(toasting);
  toasting = setTimeout(() => box.classList.remove("shown"), 1800);
}

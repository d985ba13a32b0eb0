// Text from elsewhere reaches the page through textContent alone, and other formats through these
// functions, which do what ballast.escape and ballast.tables.to_csv do.

function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}

function oneLine(text) {
  return String(text).replace(/[\p{C}\p{Z}]/gu, " ").split(" ").filter(Boolean).join(" ");
}

function shorten(text, longest) {
  const letters = [...text];
  return letters.length <= longest ? text : letters.slice(0, longest - 1).join("").trimEnd() + "…";
}

function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return Number.isFinite(value) ? String(Number(value.toPrecision(10))) : "";
  let text = String(value).replace(/[\p{C}\p{Z}]/gu, (c) => ("\t\r\n ".includes(c) ? c : " "));
  if (/^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function markdownText(value) {
  let text = oneLine(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  text = text.replace(/[\\`*[\]|~$!#]/g, "\\$&");
  text = text.replace(/(?<![\p{L}\p{N}_])_|_(?![\p{L}\p{N}_])/gu, "\\_");
  return text.replace(/(?<![\p{L}\p{N}_])(https?|www)(?=[:.])/giu, "$1&#8203;");
}

const LATEX = new Map(Object.entries({
  "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", $: "\\$", "&": "\\&", "#": "\\#", _: "\\_",
  "%": "\\%", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}",
  ">": "\\textgreater{}", "|": "\\textbar{}", '"': "''", "[": "{[}", "]": "{]}", "*": "{*}",
  "`": "\\textasciigrave{}", "-": "{-}", Δ: "$\\Delta$", "±": "$\\pm$", "−": "$-$", "×": "$\\times$",
  α: "$\\alpha$", β: "$\\beta$", λ: "$\\lambda$", "≥": "$\\geq$", "≤": "$\\leq$", "…": "\\ldots{}",
}));

function latexText(value) {
  return [...oneLine(value)].map((c) => LATEX.get(c) ?? latinLetter(c)).join("");
}

function latinLetter(c) {
  const code = c.codePointAt(0);
  return code < 0x180 || c === "–" ? c : `{[}U+${code.toString(16).toUpperCase().padStart(4, "0")}{]}`;
}

// Plotly reads a little HTML in its labels, and mathematics between dollars.
function plotText(value) {
  const text = oneLine(value).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  return text.replaceAll("$", "&#36;");
}

const SPACE = "\u202f";

function grouped(text) {
  const [whole, rest] = text.split(".");
  const digits = whole.replace(/\B(?=(\d{3})+(?!\d))/g, SPACE);
  return rest === undefined ? digits : `${digits}.${rest}`;
}

function signed(text, plus) {
  if (text.startsWith("-")) return /^-[0.\u202f]*$/.test(text) ? text.slice(1) : `−${text.slice(1)}`;
  return plus && !/^[0.\u202f]*$/.test(text) ? `+${text}` : text;
}

const BYTES = ["B", "kB", "MB", "GB", "TB"];
const COUNTS = ["", "k", "M", "G", "T"];

function scaled(value, units) {
  let at = 0;
  while (Math.abs(value) >= 1000 && at < units.length - 1) { value /= 1000; at += 1; }
  const digits = at === 0 || Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return `${value.toFixed(digits)}${units[at] ? SPACE + units[at] : ""}`;
}

// How a quantity is shown: at most one decimal of a point, three significant digits elsewhere.
function shown(value, quantity, plus = quantity.s) {
  if (value === null || value === undefined) return "–";
  if (quantity.u === "bytes") return scaled(value, BYTES);
  if (quantity.u === "parameters") return scaled(value, COUNTS);
  if (quantity.d === 0) return grouped(value.toFixed(0));
  if (quantity.u === "points" || quantity.g === "Scores") return signed(value.toFixed(1), plus);
  if (quantity.u === "share") return value.toFixed(2);
  if (quantity.u === "nats") return signed(value.toFixed(3), plus);
  if (quantity.u === "s" || quantity.u === "ms") return grouped(value.toFixed(Math.abs(value) < 0.95 ? 2 : 1));
  if (quantity.u === "MB") return grouped(value.toFixed(0));
  if (Math.abs(value) >= 1000) return grouped(value.toFixed(0));
  return signed(String(Number(value.toPrecision(3))), plus);
}

function pValue(p) {
  if (p === null || p === undefined) return "–";
  return p < 0.001 ? "< 0.001" : p.toFixed(3);
}

// Elements, numbers as text, and tables that sort and filter. Text is only ever set as text, never parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  return fill(element, attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  for (const child of children) element.append(child);
  return element;
}

// How an architecture's lines look: its mixer's colour, and a dash of its own among those of the same mixer.
const DASHES = [null, "6 3", "2 2", "8 3 2 3"];

function sample(colour, dash) {
  const attributes = {class: "series", x1: 0, x2: 22, y1: 5, y2: 5, "stroke-dasharray": DASHES[dash % DASHES.length]};
  const svg = draw("svg", {class: "sample", viewBox: "0 0 22 10", "aria-hidden": "true"}, draw("line", attributes));
  svg.style.setProperty("--c", colour);
  return svg;
}

function dot(colour) {
  const element = make("span", {class: "dot"});
  element.style.setProperty("--c", colour);
  return element;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

const text = {
  plain: value => (value === null || value === undefined ? "–" : String(value)),
  count: value => (isNumber(value) ? Math.round(value).toLocaleString("en") : "–"),
  rate(value) {
    if (!isNumber(value)) return "–";
    const plain = value === 0 || (Math.abs(value) >= 1e-4 && Math.abs(value) < 1e5);
    return plain ? String(Number(value.toPrecision(3))) : value.toExponential(2).replace(/\.?0*e\+?/, "e");
  },
  loss: value => (isNumber(value) ? value.toFixed(4) : "–"),
  score: (value, metric) =>
    !isNumber(value) ? "–" : data.metrics[metric].percent ? `${(100 * value).toFixed(1)} %` : `${value.toFixed(3)} ${data.metrics[metric].unit}`,
  bytes(value) {
    if (!isNumber(value)) return "–";
    const units = ["B", "KiB", "MiB", "GiB"];
    let power = 0;
    while (value >= 1024 && power < 3) { value /= 1024; power += 1; }
    return `${power ? Number(value.toFixed(1)) : value} ${units[power]}`;
  },
  seconds(value) {
    if (!isNumber(value)) return "–";
    if (value < 60) return `${value.toFixed(1)} s`;
    const minutes = Math.round(value / 60);
    return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  },
};

// A table of `rows`. A column has: title, value (what is sorted by), show (text; default: the value), kind "number" or
// "wrap", and optionally `cell`, which returns the content. Returns the element and `filter(words)`, which shows the
// rows that contain all of them and returns these.
function sortableTable(columns, rows, name) {
  const body = make("tbody");
  const lines = rows.map((row, index) => {
    const cells = columns.map(column => {
      const content = column.cell ? column.cell(row) : [(column.show || text.plain)(column.value(row), row)];
      return make("td", {class: column.kind || null}, ...content);
    });
    return {row, index, line: make("tr", {}, ...cells)};
  });
  const heads = columns.map((column, index) => {
    const button = make("button", {type: "button", onclick: () => sort(index)}, column.title);
    return make("th", {class: column.kind || null, scope: "col"}, button);
  });
  function sort(index, direction) {
    const way = direction || (heads[index].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    heads.forEach((head, other) => (other === index ? head.setAttribute("aria-sort", way) : head.removeAttribute("aria-sort")));
    const sign = way === "ascending" ? 1 : -1;
    lines.sort((a, b) => compare(columns[index].value(a.row), columns[index].value(b.row), sign) || a.index - b.index);
    body.replaceChildren(...lines.map(line => line.line));
    remember(name, [index, way]);
  }
  function filter(words) {
    for (const one of lines) one.line.hidden = !words.every(word => one.line.textContent.toLowerCase().includes(word));
    return lines.filter(one => !one.line.hidden).sort((a, b) => a.index - b.index).map(one => one.row);
  }
  body.append(...lines.map(line => line.line));
  const sorted = recall(name);
  if (sorted && columns[sorted[0]]) sort(...sorted);
  const element = make("div", {class: "scroll"}, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
  return {element, filter};
}

// Numbers by size, text by letters, and what is missing last whichever way.
function compare(a, b, sign) {
  const missing = value => value === null || value === undefined || value === "";
  if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
  return sign * (isNumber(a) && isNumber(b) ? a - b : String(a).localeCompare(String(b)));
}

// What outlives the page's reloading while a study runs; a browser may refuse it.
function remember(name, value) {
  try { sessionStorage.setItem(`${document.title} ${name}`, JSON.stringify(value)); } catch (error) { return; }
}

function recall(name) {
  try { return JSON.parse(sessionStorage.getItem(`${document.title} ${name}`)); } catch (error) { return null; }
}

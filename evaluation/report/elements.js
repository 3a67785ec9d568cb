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

// A link to the runs that a number is from: their configs and commands.
function link(shown, runs, label = null) {
  return runs && runs.length ? make("a", {href: address(runs), "aria-label": label}, shown) : shown;
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

const MOST_ROWS = 2000;

// A table of `rows`, of which the first column names a row. A column has: title, value (what is sorted by), show (text;
// default: the value), kind "label", "number" or "wrap", and optionally `runs`, those that its number is from, or `cell`,
// which returns the content. Returns the element and `filter(words)`, which shows the rows that contain all of them (the
// first of very many) and returns these.
function sortableTable(columns, rows, name) {
  const body = make("tbody");
  const shown = (column, row) => (column.show || text.plain)(column.value(row), row);
  const lines = rows.map((row, index) => ({row, index}));
  const rest = make("p", {class: "note"});
  let kept = lines;
  function line(one) {
    const {row} = one;
    one.line ??= make("tr", {}, ...columns.map((column, place) => {
      const content = column.cell ? column.cell(row) : [column.runs ? link(shown(column, row), column.runs(row)) : shown(column, row)];
      return make(place ? "td" : "th", {class: column.kind || null, scope: place ? null : "row"}, ...content);
    }));
    return one.line;
  }
  function show() {
    body.replaceChildren(...kept.slice(0, MOST_ROWS).map(line));
    rest.textContent = kept.length > MOST_ROWS ? `The first ${text.count(MOST_ROWS)} of ${text.count(kept.length)} rows: words in the filter leave fewer.` : "";
  }
  const heads = columns.map((column, index) => {
    const button = make("button", {type: "button", onclick: () => sort(index)}, column.title);
    return make("th", {class: column.kind || null, scope: "col"}, button, ...(column.under ? [make("small", {}, column.under)] : []));
  });
  function sort(index, direction) {
    const way = direction || (heads[index].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending");
    heads.forEach((head, other) => (other === index ? head.setAttribute("aria-sort", way) : head.removeAttribute("aria-sort")));
    const sign = way === "ascending" ? 1 : -1;
    lines.sort((a, b) => compare(columns[index].value(a.row), columns[index].value(b.row), sign) || a.index - b.index);
    const left = new Set(kept);
    kept = lines.filter(one => left.has(one));
    show();
    remember(name, [columns[index].title, way]);
  }
  function filter(words) {
    for (const one of lines) one.words ??= columns.map(column => shown(column, one.row)).join(" ").toLowerCase();
    kept = lines.filter(one => words.every(word => one.words.includes(word)));
    show();
    return kept.toSorted((a, b) => a.index - b.index).map(one => one.row);
  }
  show();
  const [title, way] = recall(name) || [];
  const sorted = columns.findIndex(column => column.title === title);
  if (sorted >= 0) sort(sorted, way);
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
  // What scrolls must be reachable by the keyboard.
  const scroll = make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": `table of ${name}`}, table);
  return {element: make("div", {}, scroll, rest), filter};
}

// A box whose words filter; `changed` is called with them, in lower case, at first and whenever they change.
function filterBox(name, label, changed) {
  const read = () => changed(box.value.toLowerCase().split(/\s+/).filter(Boolean));
  const box = make("input", {id: name, type: "search", placeholder: label, "aria-label": label, oninput: () => { remember(name, box.value); read(); }});
  box.value = recall(name) || "";
  return {box, read};
}

// A choice among texts, remembered.
function choice(name, label, options, changed) {
  const select = make("select", {id: name, onchange: () => { remember(name, select.value); changed(); }},
    ...options.map(([value, title]) => make("option", {value}, title)));
  const kept = recall(name);
  if (options.some(([value]) => value === kept)) select.value = kept;
  return {select, element: make("label", {for: name}, `${label}: `, select)};
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

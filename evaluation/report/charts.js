// One chart: axes, lines and points in an SVG of its container's width, what lies under the pointer, and a way through
// its points for the keyboard.

const MARGIN = {left: 52, right: 14, top: 10, bottom: 36};

// Marks of 8 shapes around (0, 0); looks beyond the eighth have them hollow.
const SHAPES = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
  "M-3.6 -3.6h7.2v7.2h-7.2z",
  "M0 -4.8L4.6 3.4H-4.6z",
  "M0 -5L5 0L0 5L-5 0z",
  "M0 4.8L4.6 -3.4H-4.6z",
  "M-1.5 -4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
  "M-4.4 -2.2L-2.2 -4.4L0 -2.2L2.2 -4.4L4.4 -2.2L2.2 0L4.4 2.2L2.2 4.4L0 2.2L-2.2 4.4L-4.4 2.2L-2.2 0z",
  "M-4 -4.4H4L1.2 0L4 4.4H-4L-1.2 0z",
];
const DASHES = [null, "6 3", "2 2", "8 3 2 3"];

function mark(look, x, y) {
  const hollow = Math.floor(look.shape / SHAPES.length) % 2 ? " hollow" : "";
  return draw("path", {class: `mark${hollow}`, d: SHAPES[look.shape % SHAPES.length], transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`});
}

// What stands for a look in text: its line with its mark, or the mark alone.
function sample(look, line = false) {
  const width = line ? 26 : 12;
  const svg = draw("svg", {class: "sample", viewBox: `0 0 ${width} 12`, width, height: 12, "aria-hidden": "true"});
  if (line) svg.append(draw("line", {class: "series", x1: 0, x2: width, y1: 6, y2: 6, "stroke-dasharray": DASHES[look.dash % DASHES.length]}));
  svg.append(mark(look, width / 2, 6));
  svg.style.setProperty("--c", look.colour);
  return svg;
}

// Returns a figure. `specification` returns {series, x, y, guides}: a series has label, look {colour, dash, shape},
// points [{x, y, text, runs, interval}] (`text` is what the tooltip says, `runs` those it opens, `interval` [low, high]
// or nothing), line (whether they are joined) and marks ("all", "last" or nothing); an axis has title, show, and optionally log (2 or 10), from and to; guides are
// [{y, label}].
function chart(title, caption, specification, height = 270) {
  const holder = make("div", {style: `height: ${height}px`});
  const figure = make("figure", {}, make("strong", {}, title), holder, make("figcaption", {}, caption));
  function redraw() {
    const width = Math.max(260, Math.floor(holder.clientWidth || 480));
    const focused = holder.contains(document.activeElement);
    holder.replaceChildren(plot(specification(), width, height, title));
    if (focused) holder.firstChild.focus();
  }
  new ResizeObserver(redraw).observe(holder);
  figure.redraw = redraw;
  return figure;
}

function plot({series, x, y, guides = []}, width, height, title) {
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, height, class: "chart"});
  const drawable = (point, axis, name) => isNumber(point[name]) && (!axis.log || point[name] > 0);
  const shown = series.map(one => ({...one, points: one.points.filter(p => drawable(p, x, "x") && drawable(p, y, "y"))}))
    .filter(one => one.points.length);
  if (!shown.length) {
    fill(svg, {role: "img", "aria-label": `${title}: nothing to show yet`}, []);
    svg.append(draw("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to show yet"));
    return svg;
  }
  const across = scale(x, shown.flatMap(one => one.points.map(p => p.x)), MARGIN.left, width - MARGIN.right);
  const guided = guides.map(guide => guide.y);
  const up = scale(y, [...shown.flatMap(one => one.points.map(p => p.y)), ...guided], height - MARGIN.bottom, MARGIN.top);
  axes(svg, across, up, x, y, width, height);
  for (const guide of guides) {
    const place = up.place(guide.y);
    svg.append(draw("line", {class: "guide", x1: MARGIN.left, x2: width - MARGIN.right, y1: place, y2: place}));
  }
  const drawn = shown.map(one => drawSeries(svg, one, across, up));
  for (const guide of guides) {
    svg.append(draw("text", {class: "over", x: width - MARGIN.right, y: up.place(guide.y) - 5, "text-anchor": "end"}, guide.label));
  }
  follow(svg, drawn.filter(({one}) => !one.quiet), width, title);
  return svg;
}

function drawSeries(svg, one, across, up) {
  const places = one.points.map(point => [across.place(point.x), up.place(point.y)]);
  const group = draw("g", {});
  group.style.setProperty("--c", one.look.colour);
  if (one.line && places.length > 1) {
    const path = places.map(([a, b], index) => `${index ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
    group.append(draw("path", {class: "series", d: path, "stroke-dasharray": DASHES[one.look.dash % DASHES.length]}));
  }
  one.points.forEach(({interval}, index) => {
    if (!interval) return;
    const [a] = places[index];
    group.append(draw("line", {class: "series", x1: a, x2: a, y1: up.place(interval[0]), y2: up.place(interval[1])}));
  });
  const marked = one.marks === "all" || places.length === 1 ? places : one.marks === "last" ? places.slice(-1) : [];
  for (const [a, b] of marked) group.append(mark(one.look, a, b));
  svg.append(group);
  return {one, places, group};
}

// Shows a point's values beside it and dims the other series: the point nearest to the pointer, or the one that arrow
// keys have reached, which a screen reader is told of. A click, or Enter, opens the point's runs.
function follow(svg, drawn, width, title) {
  const tooltip = document.getElementById("tooltip");
  let at = null;
  const leave = () => {
    at = null;
    tooltip.hidden = true;
    for (const {group} of drawn) group.classList.remove("faint");
  };
  const point = () => drawn[at.entry].one.points[at.index];
  const words = () => `${drawn[at.entry].one.label}\n${point().text}`;
  const show = (entry, index, left, top) => {
    at = {entry, index};
    drawn.forEach(({group}, other) => group.classList.toggle("faint", other !== entry));
    tooltip.textContent = words();
    tooltip.hidden = false;
    tooltip.style.left = `${Math.max(4, Math.min(left + 14, window.innerWidth - tooltip.offsetWidth - 8))}px`;
    tooltip.style.top = `${Math.min(top + 14, window.innerHeight - tooltip.offsetHeight - 8)}px`;
  };
  const open = () => {
    if (at && point().runs.length) location.hash = address(point().runs);
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("click", open);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const [px, py] = [(event.clientX - box.left) * width / box.width, event.clientY - box.top];
    let nearest = null;
    drawn.forEach(({places}, entry) => places.forEach(([a, b], index) => {
      const distance = (a - px) ** 2 + (b - py) ** 2;
      if (!nearest || distance < nearest.distance) nearest = {distance, entry, index};
    }));
    if (nearest.distance > 60 ** 2) return leave();
    return show(nearest.entry, nearest.index, event.clientX, event.clientY);
  });
  const steps = {ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0]};
  svg.addEventListener("keydown", event => {
    if (event.key === "Enter") return open();
    if (event.key === "Escape") return leave();
    if (!(event.key in steps)) return undefined;
    event.preventDefault();
    const [line, along] = steps[event.key];
    const entry = at ? (at.entry + line + drawn.length) % drawn.length : 0;
    const index = at ? Math.max(0, Math.min(at.index + along, drawn[entry].places.length - 1)) : 0;
    const box = svg.getBoundingClientRect();
    const [a, b] = drawn[entry].places[index];
    show(entry, index, box.left + a * box.width / width, box.top + b);
    document.getElementById("announcement").textContent = words();
    return undefined;
  });
  const many = `${drawn.length} ${drawn.length === 1 ? "line" : "lines"}`;
  const help = `${title}, ${many}. Arrow keys move between points, Enter shows a point's runs.`;
  fill(svg, {role: "application", "aria-roledescription": "chart", "aria-label": help, tabindex: 0}, []);
}
function axes(svg, across, up, x, y, width, height) {
  const bottom = height - MARGIN.bottom;
  for (const value of up.ticks) {
    const place = up.place(value);
    svg.append(draw("line", {class: "tick", x1: MARGIN.left, x2: width - MARGIN.right, y1: place, y2: place}));
    svg.append(draw("text", {x: MARGIN.left - 6, y: place + 4, "text-anchor": "end"}, y.show(value)));
  }
  for (const value of across.ticks) {
    svg.append(draw("text", {x: across.place(value), y: bottom + 15, "text-anchor": "middle"}, x.show(value)));
  }
  svg.append(draw("line", {class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom}));
  svg.append(draw("text", {x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 4, "text-anchor": "middle"}, x.title));
  svg.append(draw("text", {x: 0, y: 0, transform: `translate(11 ${(MARGIN.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, y.title));
}

// Returns {place(value), ticks} of an axis whose values lie from pixel `start` to pixel `end`.
function scale(axis, values, start, end) {
  const turn = axis.log ? value => Math.log(value) / Math.log(axis.log) : value => value;
  let [low, high] = [Math.min(...values.map(turn)), Math.max(...values.map(turn))];
  if (axis.from !== undefined) low = turn(axis.from);
  if (axis.to !== undefined) high = turn(axis.to);
  const room = axis.from !== undefined && axis.to !== undefined ? 0 : (high - low) * 0.05 || (axis.log ? 0.5 : Math.abs(low) * 0.1 || 1);
  if (axis.from === undefined) low -= room;
  if (axis.to === undefined) high += room;
  const most = Math.max(2, Math.floor(Math.abs(end - start) / (end > start ? 70 : 40)));
  return {
    place: value => start + (turn(value) - low) / (high - low || 1) * (end - start),
    ticks: axis.log ? logTicks(axis.log, low, high, most) : linearTicks(low, high, most),
  };
}

function linearTicks(low, high, most) {
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find(factor => factor * unit >= rough);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + 1e-9 * step; index += 1) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  return ticks;
}

function logTicks(base, low, high, most) {
  const step = Math.max(1, Math.ceil((high - low) / most));
  const ticks = [];
  for (let power = Math.ceil(low); power <= high; power += 1) if (power % step === 0) ticks.push(base ** power);
  if (ticks.length < 2 && base === 10) return [1, 2, 5].flatMap(factor =>
    [Math.floor(low), Math.floor(high)].map(power => factor * 10 ** power)).filter(value =>
    Math.log10(value) >= low && Math.log10(value) <= high).filter((value, index, all) => all.indexOf(value) === index).sort((a, b) => a - b);
  return ticks;
}

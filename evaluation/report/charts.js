// One chart: axes, lines and points in an SVG of its container's width, and what lies under the pointer.

const MARGIN = {left: 52, right: 14, top: 10, bottom: 36};

// Returns a figure. `specification` returns {series, x, y, guides}: a series has label, colour, dash (a number), points
// [[x, y, what the tooltip says]], line (whether they are joined) and marks (whether points are drawn); an axis has
// title, show, and optionally log (2 or 10), from and to; guides are [{y, label}].
function chart(title, caption, specification) {
  const holder = make("div");
  const figure = make("figure", {}, make("strong", {}, title), holder, make("figcaption", {}, caption));
  function redraw() {
    const width = Math.max(260, Math.floor(holder.clientWidth || 480));
    holder.replaceChildren(plot(specification(), width, title));
  }
  new ResizeObserver(redraw).observe(holder);
  figure.redraw = redraw;
  return figure;
}

function plot({series, x, y, guides = []}, width, title) {
  const height = 270;
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": title});
  const drawable = (point, axis, index) => isNumber(point[index]) && (!axis.log || point[index] > 0);
  const shown = series.map(one => ({...one, points: one.points.filter(p => drawable(p, x, 0) && drawable(p, y, 1))}))
    .filter(one => one.points.length);
  if (!shown.length) {
    svg.append(draw("text", {x: width / 2, y: height / 2, "text-anchor": "middle"}, "nothing to show yet"));
    return svg;
  }
  const across = scale(x, shown.flatMap(one => one.points.map(p => p[0])), MARGIN.left, width - MARGIN.right);
  const guided = guides.map(guide => guide.y);
  const up = scale(y, [...shown.flatMap(one => one.points.map(p => p[1])), ...guided], height - MARGIN.bottom, MARGIN.top);
  axes(svg, across, up, x, y, width, height);
  for (const guide of guides) {
    const place = up.place(guide.y);
    svg.append(draw("line", {class: "guide", x1: MARGIN.left, x2: width - MARGIN.right, y1: place, y2: place}));
  }
  const drawn = shown.map(one => drawSeries(svg, one, across, up));
  for (const guide of guides) {
    svg.append(draw("text", {class: "over", x: width - MARGIN.right, y: up.place(guide.y) - 5, "text-anchor": "end"}, guide.label));
  }
  follow(svg, drawn, width);
  return svg;
}

function drawSeries(svg, one, across, up) {
  const places = one.points.map(point => [across.place(point[0]), up.place(point[1])]);
  const group = draw("g", {});
  group.style.setProperty("--c", one.colour);
  if (one.line && places.length > 1) {
    const path = places.map(([a, b], index) => `${index ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
    group.append(draw("path", {class: "series", d: path, "stroke-dasharray": DASHES[(one.dash || 0) % DASHES.length]}));
  }
  if (one.marks || places.length === 1) {
    for (const [a, b] of places) group.append(draw("circle", {class: "mark", cx: a, cy: b, r: 4}));
  }
  svg.append(group);
  return {one, places, group};
}

// Shows the nearest point's values beside the pointer, and dims the other series.
function follow(svg, drawn, width) {
  const tooltip = document.getElementById("tooltip");
  const leave = () => {
    tooltip.hidden = true;
    for (const {group} of drawn) group.classList.remove("faint", "near");
  };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const [px, py] = [(event.clientX - box.left) * width / box.width, event.clientY - box.top];
    let nearest = null;
    for (const entry of drawn) {
      entry.places.forEach(([a, b], index) => {
        const distance = (a - px) ** 2 + (b - py) ** 2;
        if (!nearest || distance < nearest.distance) nearest = {distance, entry, index};
      });
    }
    if (!nearest || nearest.distance > 60 ** 2) return leave();
    for (const entry of drawn) entry.group.classList.toggle("faint", entry !== nearest.entry);
    tooltip.textContent = `${nearest.entry.one.label}\n${nearest.entry.one.points[nearest.index][2]}`;
    tooltip.hidden = false;
    const left = Math.min(event.clientX + 14, window.innerWidth - tooltip.offsetWidth - 8);
    tooltip.style.left = `${Math.max(4, left)}px`;
    tooltip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tooltip.offsetHeight - 8)}px`;
  });
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

// A study of several tasks: mixers by tasks, recall against state on each task; and how scores depend on the rate.

const SHOWN = {
  score: {title: "score", of: one => one.best, text: one => text.score(one.best, one.metric), under: spreadOf, share: aboveChance, runs: one => one.best_runs},
  fall: {title: "loss of score one learning-rate step from the best", of: fallOf, text: one => points(fallOf(one), one), share: one => fallOf(one) / 0.5, runs: one => [...one.best_runs, ...neighbours(one).flatMap(([, , runs]) => runs)]},
  rate: {title: "best learning rate", of: one => one.learning_rate, text: one => text.rate(one.learning_rate), runs: one => one.best_runs},
  state: {title: "bytes of state", of: one => one.state_size, text: one => text.bytes(one.state_size), under: one => (one.state_length ? `at ${text.count(one.state_length)}` : ""), runs: one => one.best_runs},
  speed: {title: "tokens per second in training", of: one => one.tokens_per_second, text: one => text.count(one.tokens_per_second), runs: one => one.best_runs},
};

// 0 for what a guess scores, 1 for everything right.
function aboveChance(one) {
  const chance = one.chance || 0;
  return data.metrics[one.metric].percent ? (one.best - chance) / (1 - chance) : 0;
}

// The larger loss at the two rates beside the best one; null where none was tried there.
function fallOf(one) {
  const falls = Object.values(one.sensitivity || {});
  return falls.length && falls.every(isNumber) ? Math.max(...falls) : null;
}

// [learning rate, score, runs] of the best rate's neighbour one step below (-1) or above (1); null where none was tried.
function beside(one, step) {
  return one.rates[one.rates.findIndex(([rate]) => rate === one.learning_rate) + step] || null;
}

const neighbours = one => [-1, 1].map(step => beside(one, step)).filter(Boolean);

function points(value, one) {
  if (!isNumber(value)) return "–";
  return data.metrics[one.metric].percent ? `${(100 * value).toFixed(1)} points` : `${value.toFixed(3)} ${data.metrics[one.metric].unit}`;
}

function heatMap() {
  if (data.tasks.length < 2) return drop("atlas");
  const holder = make("div");
  const shown = choice("atlas-shows", "Cells show", Object.entries(SHOWN).map(([name, {title}]) => [name, title]), () => draw());
  const words = {mixers: [], tasks: []};
  const boxes = ["mixers", "tasks"].map(what => filterBox(`atlas-${what}`, `only ${what} with any of these words`, list => { words[what] = list; draw(); }));
  const named = (name, list) => !list.length || list.some(word => name.toLowerCase().includes(word));
  function draw() {
    const rows = data.rows.filter(row => named(row.label, words.mixers));
    const tasks = data.tasks.filter(task => named(task.name, words.tasks));
    holder.replaceChildren(rows.length && tasks.length ? matrix(rows, tasks, SHOWN[shown.select.value]) : make("p", {class: "note"}, "No mixer or no task has such a word."));
  }
  section("atlas").append(make("div", {class: "controls"}, shown.element, ...boxes.map(one => one.box)), holder,
    make("p", {class: "note"}, "A score is the mean over seeds at the best learning rate; under it stands the 95 % bootstrap interval of three seeds or more, the scores of two. " +
      "The stronger the colour, the further above what a guess scores. A column's title sorts; a number opens its runs, their commands and configs."));
  boxes.forEach(one => one.read());
  return undefined;
}

function matrix(rows, tasks, what) {
  const at = (row, task) => data.architectures.find(one => one.row === row.place && one.task === task.place && isNumber(what.of(one)));
  const several = new Set(tasks.map(task => task.metric)).size > 1;
  const columns = tasks.map(task => ({
    title: task.name,
    under: [several ? data.metrics[task.metric].unit : "", task.chance_text ? `a guess: ${task.chance_text}` : ""].filter(Boolean).join(", "),
    kind: "number",
    value: row => { const one = at(row, task); return one && what.of(one); },
    cell: row => {
      const one = at(row, task);
      if (!one) return ["–"];
      const cell = heated(link(what.text(one), what.runs(one), `${row.label} on ${task.name}: ${what.text(one)}`), what.share ? what.share(one) : 0);
      const under = what.under && what.under(one);
      if (under) cell.append(make("small", {}, under));
      return [cell];
    },
  }));
  const percent = tasks.every(task => data.metrics[task.metric].percent);
  const mean = row => {
    const cells = tasks.map(task => at(row, task)).filter(Boolean);
    return cells.length === tasks.length ? cells.reduce((sum, one) => sum + what.of(one), 0) / cells.length : null;
  };
  const meanColumn = {title: "Mean", under: `of ${tasks.length} tasks`, kind: "number", value: mean, show: value => (isNumber(value) ? (100 * value).toFixed(1) : "–")};
  const averaged = percent && tasks.length > 1 && ["score", "fall"].some(name => SHOWN[name] === what);
  const best = rows.toSorted((a, b) => compare(mean(a), mean(b), -1));
  return sortableTable([architectureColumn("Mixer"), ...(averaged ? [meanColumn] : []), ...columns], best, "mixers by tasks").element;
}

function stateByTask() {
  const tasks = data.tasks.filter(task => task.architectures.some(one => isNumber(one.state_size) && isNumber(one.best)));
  if (data.tasks.length < 2 || !tasks.length) return drop("states");
  const grid = make("div", {class: "figures"}, ...tasks.map(task => chart(task.name, "", () => stateSpecification(task, task.architectures), 220)));
  section("states").append(legend(false), grid,
    make("p", {class: "note"}, "Measured bytes of the state at the longest evaluated length; sizes of one mixer are joined, and a line up and down is the interval over three seeds or more. Point at a mark for its numbers, click it for its runs."));
  return undefined;
}

function legend(lines) {
  return make("div", {class: "legend"}, ...data.rows.map(row => make("span", {}, sample(row.look, lines), row.label)));
}

function sensitivity() {
  const tried = data.architectures.filter(one => one.rates && one.rates.length > 1);
  if (!tried.length) return drop("sensitivity");
  const at = step => ({
    title: step < 0 ? "At the rate below" : "At the rate above",
    kind: "number",
    value: one => (beside(one, step) || [])[1],
    show: (value, one) => (beside(one, step) ? `${text.score(value, one.metric)} at ${text.rate(beside(one, step)[0])}` : "not tried"),
    runs: one => (beside(one, step) || [null, null, []])[2],
  });
  const columns = [
    architectureColumn("Mixer"),
    ...taskColumn(),
    {title: "Best rate", kind: "number", value: one => one.learning_rate, show: text.rate},
    {title: "Score", kind: "number", value: one => one.best, show: (value, one) => text.score(value, one.metric), runs: one => one.best_runs},
    at(-1),
    at(1),
    {title: "Loses up to", kind: "number", value: fallOf, show: points},
    ...(tried.every(one => data.metrics[one.metric].percent) ? [{title: "From 0 to 100 %", value: fallOf, cell: one => [band(one)]}] : []),
  ];
  const table = sortableTable(columns, tried, "sensitivity to the learning rate");
  const {box, read} = filterBox("sensitivity-filter", "only rows with all of these words", words => table.filter(words));
  section("sensitivity").append(make("div", {class: "controls"}, box), table.element,
    make("p", {class: "note"}, "How much of the score is lost one step of the learning rate from the best one. Where a neighbour was not tried, a better rate may lie beyond."));
  read();
  return undefined;
}

// The band from the worst score beside the best rate to the best one.
function band(one) {
  const scores = neighbours(one).filter(([, score]) => isNumber(score)).map(([, score]) => 120 * score + 5);
  const best = 120 * one.best + 5;
  const svg = draw("svg", {class: "band", viewBox: "0 0 130 14", width: 130, height: 14, "aria-hidden": "true"},
    draw("line", {class: "axis", x1: 5, x2: 125, y1: 7, y2: 7}),
    draw("line", {class: "range", x1: Math.min(best, ...scores), x2: best, y1: 7, y2: 7}));
  if (isNumber(best)) svg.append(mark(one.look, best, 7));
  svg.style.setProperty("--c", one.look.colour);
  return svg;
}

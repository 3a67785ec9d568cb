// Builds the page from its data.

const data = JSON.parse(document.getElementById("data").textContent);
const section = name => document.getElementById(name);

// Rows, tasks and runs are named by their places; here each learns its own, and what it belongs to.
data.rows.forEach((row, place) => { row.place = place; });
data.tasks.forEach((task, place) => { task.place = place; });
data.architectures.forEach(one => {
  const {label, mixer, look} = data.rows[one.row];
  Object.assign(one, {label, mixer, look});
  if (one.rates) [, , one.best_runs] = one.rates.find(([rate]) => rate === one.learning_rate);
});
data.runs.forEach((run, place) => {
  const {label, look, task} = data.architectures[run.architecture];
  Object.assign(run, {label, look, task, place});
});
data.tasks.forEach(task => {
  task.architectures = data.architectures.filter(one => one.task === task.place);
});

function theme() {
  const root = document.documentElement;
  const kept = recall("theme");
  if (kept) root.dataset.theme = kept;
  section("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remember("theme", root.dataset.theme);
  });
}

function drop(name) {
  section(name).remove();
}

function contentsOfPage() {
  const titles = [...document.querySelectorAll("main > section")];
  section("contents").append(...titles.map(one => make("a", {href: `#${one.id}`}, one.querySelector("h2").textContent)));
}

const taskColumn = () => (data.tasks.length > 1 ? [{title: "Task", value: one => data.tasks[one.task].name}] : []);

function architectures() {
  const best = one => one.best_runs;
  const score = name => ({kind: "number", value: one => one[name], show: (value, one) => text.score(value, one.metric)});
  const several = data.architectures.some(one => one.seeds > 1);
  const spread = {
    title: data.architectures.some(one => one.interval) ? "95 % interval" : "Seeds' scores",
    kind: "number",
    value: one => one.interval && one.interval[1] - one.interval[0],
    show: (_, one) => (one.scores && spreadOf(one)) || "–",
  };
  const columns = [
    architectureColumn(),
    ...taskColumn(),
    {...score("best"), title: "Score", runs: best},
    ...(several ? [spread, {...score("spread"), title: "± sd"}] : []),
    {...score("median"), title: "Median"},
    {title: "Best rate", kind: "number", value: one => one.learning_rate, show: text.rate},
    {title: "Runs", kind: "number", value: one => one.runs, show: text.count},
    {title: "Diverged", kind: "number", value: one => one.diverged, show: text.count},
    {title: "State", kind: "number", value: one => one.state_size, show: (value, one) => text.bytes(value) + (one.state_length ? ` @${text.count(one.state_length)}` : "")},
    {title: "Parameters", kind: "number", value: one => one.parameters, show: text.count},
    {title: "Tokens/s", kind: "number", value: one => one.tokens_per_second, show: text.count},
    {title: "Time", kind: "number", value: one => one.seconds, show: text.seconds},
  ];
  const holder = section("architectures");
  const table = sortableTable(columns, data.architectures, "architectures");
  if (data.architectures.length > 12) {
    const {box, read} = filterBox("architectures-filter", "only rows with all of these words", words => table.filter(words));
    holder.append(make("div", {class: "controls"}, box));
    read();
  }
  holder.append(table.element);
  holder.append(make("p", {class: "note"}, "Score: the mean over seeds at the best setting; median: over settings; sd: over seeds. A column's title sorts; a score opens its runs, their commands and configs."));
}

function failures() {
  const failed = data.runs.filter(run => run.status === "diverged" || run.status === "damaged" || run.message);
  const waiting = data.runs.filter(run => run.status === "not finished").length;
  if (!failed.length && !waiting) return drop("failures");
  const holder = section("failures");
  if (waiting) holder.append(make("p", {class: "note"}, `${waiting} of ${data.runs.length} runs have not ended.`));
  if (!failed.length) return undefined;
  const columns = [
    {title: "Run", value: run => run.folder, kind: "wrap", runs: run => [run.place]},
    {title: "Status", value: run => run.status},
    {title: "Step", kind: "number", value: run => run.steps, show: text.count},
    {title: "What happened", kind: "wrap", value: run => run.message || "diverged: its steps were not finite"},
  ];
  holder.append(sortableTable(columns, failed, "what went wrong").element);
  return undefined;
}

function figures(shown) {
  const holder = section("figures");
  const drawn = [];
  const redraw = () => drawn.forEach(figure => figure.redraw());
  const curve = choice("curve", "Curves", ["score", "evaluation loss", "training loss"].map(kind => [kind, kind]), redraw);
  const task = choice("task", "Task", data.tasks.map(one => [one.name, one.name]), () => { slices(); redraw(); });
  const chosen = () => data.tasks.find(one => one.name === task.select.value);
  const runs = () => shown().filter(run => run.task === chosen().place);
  const grid = make("div", {class: "figures"});
  const byslice = make("div");
  const add = (title, caption, specification) => {
    drawn.push(chart(title, caption, specification));
    grid.append(drawn[drawn.length - 1]);
  };
  function slices() {
    const table = sliceTable(chosen(), chosen().architectures);
    byslice.replaceChildren(...(table ? [make("h3", {}, `${data.metrics[chosen().metric].title.replace(" (%)", "")} by slice`), table] : []));
  }
  add("Learning curves", "One line for each run; point at one for its numbers.", () => curvesSpecification(chosen(), runs(), curve.select.value));
  if (data.architectures.some(one => isNumber(one.state_size))) {
    const left = () => { const labels = new Set(runs().map(run => run.label)); return chosen().architectures.filter(one => labels.has(one.label)); };
    add("Score against state", "The longest evaluated length; sizes of one mixer are joined.", () => stateSpecification(chosen(), left()));
  }
  if (new Set(data.runs.map(run => run.learning_rate)).size > 1) {
    add("Score against learning rate", "The mean over runs of a learning rate.", () => rateSpecification(chosen(), runs()));
  }
  holder.append(make("div", {class: "controls"}, ...(data.tasks.length > 1 ? [task.element] : []), curve.element), legend(true), grid, byslice);
  slices();
  return redraw;
}

function runs(changed) {
  const columns = [
    architectureColumn(),
    ...taskColumn(),
    {title: "Status", value: run => run.status, cell: run => [make("span", {class: ["diverged", "damaged"].includes(run.status) ? "bad" : ""}, run.status)]},
    {title: "Score", kind: "number", value: run => run.score, show: (value, run) => text.score(value, run.metric), runs: run => [run.place]},
    {title: "Loss", kind: "number", value: run => run.loss, show: text.loss},
    {title: "Rate", kind: "number", value: run => run.learning_rate, show: text.rate},
    {title: "Seed", kind: "number", value: run => run.seed},
    {title: "Steps", kind: "number", value: run => run.steps, show: (value, run) => value === run.steps_asked ? text.count(value) : `${text.count(value)} of ${text.count(run.steps_asked)}`},
    {title: "Tokens/s", kind: "number", value: run => run.tokens_per_second, show: text.count},
    {title: "Time", kind: "number", value: run => run.seconds, show: text.seconds},
    {title: "Folder", kind: "wrap", value: run => run.folder},
  ];
  const table = sortableTable(columns, data.runs, "runs");
  const count = make("span", {class: "note", id: "count", role: "status"});
  let left = data.runs;
  const {box, read} = filterBox("filter", "filter: words that a row contains", words => {
    left = table.filter(words);
    count.textContent = `${left.length} of ${data.runs.length} runs, in the figures too`;
    changed();
  });
  section("runs").append(make("div", {class: "controls"}, box, count), table.element);
  return {read, shown: () => left};
}

function differences() {
  if (!data.differences.length) return drop("differences");
  const value = values => (values.length > 8 ? `${values.slice(0, 8).join(", ")} and ${values.length - 8} more` : values.join(", "));
  const columns = [
    {title: "Field", kind: "label", value: row => row.path},
    ...data.rows.map((one, index) => ({title: one.label, kind: "label", value: row => value(row.values[index])})),
  ];
  section("differences").append(sortableTable(columns, data.differences, "differences").element);
  return undefined;
}

function commands() {
  const made = [...new Set(data.runs.map(run => run.command).filter(Boolean))];
  const more = data.runs.flatMap(run => run.more);
  if (!made.length && !more.length) return drop("commands");
  const holder = section("commands");
  if (made.length) holder.append(make("p", {class: "note"}, "What started these runs:"), make("pre", {tabindex: 0}, made.join("\n")));
  if (more.length) holder.append(make("details", {}, make("summary", {}, "Look at one again"), make("pre", {tabindex: 0}, more.join("\n"))));
  return undefined;
}

function environment() {
  if (!data.environment.length) return drop("environment");
  const show = ([value, count]) => (count === data.runs.length ? value : `${value} (${count} runs)`);
  const columns = [
    {title: "What", value: row => row.name},
    {title: "Value", kind: "wrap", value: row => row.values.map(show).join("; ")},
  ];
  section("environment").append(sortableTable(columns, data.environment, "environment").element);
  return undefined;
}

section("written").textContent = `${data.runs.length} run${data.runs.length === 1 ? "" : "s"}, written ${data.written}` +
  (data.refresh ? `; loads itself again every ${data.refresh} s` : "");
theme();
heatMap();
stateByTask();
architectures();
failures();
sensitivity();
let redrawFigures = () => undefined;
const table = runs(() => redrawFigures());
redrawFigures = figures(table.shown);
table.read();
differences();
commands();
environment();
contentsOfPage();
dialogs();
if (data.refresh) setTimeout(() => location.reload(), 1000 * data.refresh);

// Builds the page from its data.

const data = JSON.parse(document.getElementById("data").textContent);
const section = name => document.getElementById(name);

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

function architectures() {
  const label = {title: "Architecture", kind: "label", value: one => one.label, cell: one => [dot(one.colour), one.label]};
  const columns = [
    label,
    {title: "Score", kind: "number", value: one => one.best, show: (value, one) => text.score(value, one.metric)},
    {title: "± sd", kind: "number", value: one => one.spread, show: (value, one) => text.score(value, one.metric)},
    {title: "Median", kind: "number", value: one => one.median, show: (value, one) => text.score(value, one.metric)},
    {title: "Best rate", kind: "number", value: one => one.learning_rate, show: text.rate},
    {title: "Runs", kind: "number", value: one => one.runs, show: text.count},
    {title: "Diverged", kind: "number", value: one => one.diverged, show: text.count},
    {title: "State", kind: "number", value: one => one.state_size, show: (value, one) => text.bytes(value) + (one.state_length ? ` @${text.count(one.state_length)}` : "")},
    {title: "Parameters", kind: "number", value: one => one.parameters, show: text.count},
    {title: "Tokens/s", kind: "number", value: one => one.tokens_per_second, show: text.count},
    {title: "Time", kind: "number", value: one => one.seconds, show: text.seconds},
  ];
  const holder = section("architectures");
  holder.append(sortableTable(columns, data.architectures, "architectures").element);
  holder.append(make("p", {class: "note"}, "Score: the mean over seeds at the best setting; median: over settings; sd: over seeds. A column's title sorts."));
}

function failures() {
  const failed = data.runs.filter(run => run.status === "diverged" || run.status === "damaged" || run.message);
  const waiting = data.runs.filter(run => run.status === "not finished").length;
  if (!failed.length && !waiting) return drop("failures");
  const holder = section("failures");
  if (waiting) holder.append(make("p", {class: "note"}, `${waiting} of ${data.runs.length} runs have not ended.`));
  if (!failed.length) return undefined;
  const columns = [
    {title: "Run", value: run => run.folder, kind: "wrap"},
    {title: "Status", value: run => run.status},
    {title: "Step", kind: "number", value: run => run.steps, show: text.count},
    {title: "What happened", kind: "wrap", value: run => run.message || "diverged: its steps were not finite"},
  ];
  holder.append(sortableTable(columns, failed, "failures").element);
  return undefined;
}

function figures(shown) {
  const metrics = [...new Set(data.runs.map(run => run.metric))];
  const drawn = [];
  const grid = make("div", {class: "figures"});
  const add = (title, caption, specification) => {
    drawn.push(chart(title, caption, specification));
    grid.append(drawn[drawn.length - 1]);
  };
  const kinds = ["score", "evaluation loss", "training loss"];
  const choice = make("select", {id: "curve", "aria-label": "What the curves show", onchange: () => redraw()},
    ...kinds.map(kind => make("option", {value: kind}, kind)));
  choice.value = recall("curve") || "score";
  const redraw = () => { remember("curve", choice.value); drawn.forEach(figure => figure.redraw()); };
  for (const metric of metrics) {
    const scored = () => shown().filter(run => run.metric === metric);
    add("Learning curves", "One line for each run; point at one for its numbers.", () => curvesSpecification(data, scored(), metric, choice.value));
    if (data.architectures.some(one => one.metric === metric && isNumber(one.state_size))) {
      add("Score against state", "The longest evaluated length; sizes of one mixer are joined.", () => stateSpecification(data, scored(), metric));
    }
    if (new Set(data.runs.map(run => run.learning_rate)).size > 1) {
      add("Score against learning rate", "The mean over runs of a learning rate.", () => rateSpecification(data, scored(), metric));
    }
  }
  const legend = make("div", {class: "legend"}, ...data.architectures.map(one => make("span", {}, sample(one.colour, styleOf(data, one.label).dash), one.label)));
  section("figures").append(make("div", {class: "controls"}, make("label", {for: "curve"}, "Curves: "), choice), legend, grid);
  for (const metric of metrics) {
    const table = sliceTable(data, metric);
    if (table) section("figures").append(make("h3", {}, `${data.metrics[metric].title.replace(" (%)", "")} by slice`), table);
  }
  return redraw;
}

function runs(changed) {
  const columns = [
    {title: "Architecture", kind: "label", value: run => run.label, cell: run => [dot(data.architectures.find(one => one.label === run.label).colour), run.label]},
    {title: "Status", value: run => run.status, cell: run => [make("span", {class: ["diverged", "damaged"].includes(run.status) ? "bad" : ""}, run.status)]},
    {title: "Score", kind: "number", value: run => run.score, show: (value, run) => text.score(value, run.metric)},
    {title: "Loss", kind: "number", value: run => run.loss, show: text.loss},
    {title: "Rate", kind: "number", value: run => run.learning_rate, show: text.rate},
    {title: "Seed", kind: "number", value: run => run.seed},
    {title: "Steps", kind: "number", value: run => run.steps, show: (value, run) => value === run.steps_asked ? text.count(value) : `${text.count(value)} of ${text.count(run.steps_asked)}`},
    {title: "Tokens/s", kind: "number", value: run => run.tokens_per_second, show: text.count},
    {title: "Time", kind: "number", value: run => run.seconds, show: text.seconds},
    {title: "Folder", kind: "label", value: run => run.folder},
  ];
  const table = sortableTable(columns, data.runs, "runs");
  const count = make("span", {class: "note", id: "count"});
  const box = make("input", {id: "filter", type: "search", placeholder: "filter: words that a row contains", "aria-label": "Filter the runs", oninput: () => apply()});
  box.value = recall("filter") || "";
  let left = data.runs;
  function apply() {
    left = table.filter(box.value.toLowerCase().split(/\s+/).filter(Boolean));
    count.textContent = `${left.length} of ${data.runs.length} runs, in the figures too`;
    remember("filter", box.value);
    changed();
  }
  section("runs").append(make("div", {class: "controls"}, box, count), table.element);
  return {apply, shown: () => left};
}

function differences() {
  if (!data.differences.length) return drop("differences");
  const value = values => (values.length > 8 ? `${values.slice(0, 8).join(", ")} and ${values.length - 8} more` : values.join(", "));
  const columns = [
    {title: "Field", kind: "label", value: row => row.path},
    ...data.architectures.map((one, index) => ({title: one.label, kind: "label", value: row => value(row.values[index])})),
  ];
  section("differences").append(sortableTable(columns, data.differences, "differences").element);
  return undefined;
}

function commands() {
  const made = [...new Set(data.runs.map(run => run.command).filter(Boolean))];
  const more = data.runs.flatMap(run => run.more);
  if (!made.length && !more.length) return drop("commands");
  const holder = section("commands");
  if (made.length) holder.append(make("p", {class: "note"}, "What started these runs:"), make("pre", {}, made.join("\n")));
  if (more.length) holder.append(make("details", {}, make("summary", {}, "Look at one again"), make("pre", {}, more.join("\n"))));
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
architectures();
failures();
let redrawFigures = () => undefined;
const table = runs(() => redrawFigures());
redrawFigures = figures(table.shown);
table.apply();
differences();
commands();
environment();
if (data.refresh) setTimeout(() => location.reload(), 1000 * data.refresh);

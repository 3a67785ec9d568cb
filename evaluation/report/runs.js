// What a number links to: its runs, with their results, the commands that made them and their configs, in a dialog.
// The address names the runs (#run:ID,ID), so that a link to a number of the page can be sent.

const PREFIX = "#run:";

function address(runs) {
  return PREFIX + runs.map(index => data.runs[index].id).join(",");
}

function showAddressed() {
  const dialog = section("run");
  const ids = location.hash.startsWith(PREFIX) ? location.hash.slice(PREFIX.length).split(",") : [];
  const chosen = data.runs.filter(run => ids.includes(run.id));
  if (!chosen.length) return dialog.close();
  dialog.replaceChildren(...contents(chosen));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  return undefined;
}

function contents(chosen) {
  const close = make("form", {method: "dialog"}, make("button", {}, "Close"));
  const on = run => (data.tasks[run.task].name ? `${run.label} on ${data.tasks[run.task].name}` : run.label);
  const names = [...new Set(chosen.map(on))].join(", ");
  const commands = [...new Set(chosen.map(run => run.command).filter(Boolean))];
  const columns = [
    {title: "Seed", value: run => run.seed},
    {title: "Rate", kind: "number", value: run => run.learning_rate, show: text.rate},
    {title: "Score", kind: "number", value: run => run.score, show: (value, run) => text.score(value, run.metric)},
    {title: "Loss", kind: "number", value: run => run.loss, show: text.loss},
    {title: "Status", value: run => run.status},
    {title: "Steps", kind: "number", value: run => run.steps, show: text.count},
    {title: "Parameters", kind: "number", value: run => run.parameters, show: text.count},
    {title: "Time", kind: "number", value: run => run.seconds, show: text.seconds},
    {title: "Folder", kind: "wrap", value: run => run.folder},
  ];
  return [
    make("div", {class: "head"}, make("h2", {id: "run-title"}, chosen.length > 1 ? `${names}: ${chosen.length} runs` : names), close),
    sortableTable(columns, chosen, "runs of a number").element,
    make("h3", {}, "Command"),
    make("pre", {tabindex: 0}, commands.join("\n") || "not kept: these runs have no environment.json"),
    ...(chosen.some(run => run.more.length) ? [make("h3", {}, "Look at it again"), make("pre", {tabindex: 0}, chosen.flatMap(run => run.more).join("\n"))] : []),
    make("h3", {}, chosen.length > 1 ? "Config (where these runs differ, each run's value)" : "Config"),
    make("pre", {tabindex: 0, class: "config"}, configLines(chosen).join("\n")),
  ];
}

// The fields of the configs of runs as `path=value`, in the order of the config; values of several runs are joined.
function configLines(chosen) {
  const {paths, values, shared} = data.configs;
  const fields = run => new Map([...shared, ...run.config]);
  const all = chosen.map(fields);
  return paths.map((path, index) => {
    const texts = [...new Set(all.map(one => (one.has(index) ? values[one.get(index)] : null)))];
    return texts.every(one => one === null) ? null : `${path}=${texts.map(one => one ?? "(none)").join(" | ")}`;
  }).filter(Boolean);
}

function dialogs() {
  const dialog = section("run");
  dialog.addEventListener("close", () => {
    if (location.hash.startsWith(PREFIX)) history.replaceState(null, "", location.pathname + location.search);
  });
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  window.addEventListener("hashchange", showAddressed);
  showAddressed();
}

// The figures of the page: each takes the runs of one task that the filter leaves.

const scaled = (score, metric) => (data.metrics[metric].percent && isNumber(score) ? 100 * score : score);

function scoreAxis(metric) {
  const {title, percent} = data.metrics[metric];
  return {title, ...(percent ? {from: 0, to: 100} : {}), show: value => String(value)};
}

function chanceGuides(task) {
  if (!isNumber(task.chance) || !data.metrics[task.metric].percent) return [];
  return [{y: 100 * task.chance, label: `a guess: ${task.chance_text}`}];
}

function curvesSpecification(task, runs, kind) {
  const source = kind === "training loss" ? "training" : "evaluations";
  const field = kind === "score" ? "score" : "loss";
  const shown = kind === "score" ? value => text.score(value, task.metric) : text.loss;
  const series = runs.map(run => {
    const curve = run[source];
    const points = curve.steps.map((step, index) => ({
      x: step,
      y: kind === "score" ? scaled(curve.score[index], task.metric) : curve[field][index],
      text: `learning rate ${text.rate(run.learning_rate)}, seed ${run.seed}\nstep ${text.count(step)}: ${shown(curve[field][index])}`,
      runs: [run.place],
    }));
    return {label: run.label, look: run.look, points, line: true, marks: "last"};
  });
  const y = kind === "score" ? scoreAxis(task.metric) : {title: `Loss in ${kind === "training loss" ? "training" : "evaluation"}`, show: value => String(value)};
  return {series, guides: kind === "score" ? chanceGuides(task) : [], y, x: {title: "Steps", from: 0, show: text.count}};
}

function rateSpecification(task, runs) {
  const [low, high] = data.rate_limits;
  const near = rate => rate >= low && (high === null || rate <= high);
  const ended = runs.filter(run => isNumber(run.score) && near(run.learning_rate));
  const labels = [...new Set(ended.map(run => run.label))];
  const series = labels.map(label => {
    const members = ended.filter(run => run.label === label);
    const rates = [...new Set(members.map(run => run.learning_rate))].sort((a, b) => a - b);
    const points = rates.map(rate => {
      const at = members.filter(run => run.learning_rate === rate);
      const mean = at.reduce((sum, run) => sum + run.score, 0) / at.length;
      const words = `learning rate ${text.rate(rate)}\n${text.score(mean, task.metric)}, mean of ${at.length}`;
      return {x: rate, y: scaled(mean, task.metric), text: words, runs: at.map(run => run.place)};
    });
    return {label, look: members[0].look, points, line: true, marks: "all"};
  });
  return {series, guides: chanceGuides(task), y: scoreAxis(task.metric), x: {title: "Learning rate", log: 10, show: text.rate}};
}

function stateSpecification(task, architectures) {
  const {metric} = task;
  const placed = architectures.filter(one => isNumber(one.state_size) && isNumber(one.best));
  const mixers = [...new Set(placed.map(one => one.mixer))];
  const series = mixers.flatMap(mixer => {
    const sizes = placed.filter(one => one.mixer === mixer).sort((a, b) => a.state_size - b.state_size);
    const points = sizes.map(one => ({
      x: one.state_size,
      y: scaled(one.best, metric),
      text: `${text.bytes(one.state_size)}${one.state_length ? ` at ${text.count(one.state_length)} tokens` : ""}\n${scoreWithSpread(one)}`,
      runs: one.best_runs,
      interval: one.interval && one.interval.map(end => scaled(end, metric)),
    }));
    const alone = sizes.map((one, index) => ({label: one.label, look: one.look, points: [points[index]], marks: "all"}));
    const line = {label: mixer, look: {...sizes[0].look, dash: 0}, points: points.map(({x, y}) => ({x, y})), line: true, quiet: true};
    return new Set(sizes.map(one => one.state_size)).size > 1 ? [line, ...alone] : alone;
  });
  return {series, guides: chanceGuides(task), y: scoreAxis(metric), x: {title: "Bytes of state", log: 2, show: text.bytes}};
}

// The mean over seeds with its interval; of fewer than three seeds, which have none, each one's score.
function scoreWithSpread(one) {
  const score = text.score(one.best, one.metric);
  const under = spreadOf(one);
  return under ? `${score} (${under})` : score;
}

function spreadOf(one) {
  const {percent} = data.metrics[one.metric];
  const plain = value => (percent ? (100 * value).toFixed(1) : value.toFixed(3));
  if (one.interval) return `${plain(one.interval[0])} to ${plain(one.interval[1])}`;
  return one.scores.length > 1 ? one.scores.filter(isNumber).map(plain).join(", ") : "";
}

// Scores by slice as a table whose cells are the darker the better; categories are never joined by lines.
function sliceTable(task, architectures) {
  const rows = architectures.filter(one => one.by_slice && Object.keys(one.by_slice).length);
  const {percent} = data.metrics[task.metric];
  if (task.slices.length < 2 || !rows.length) return null;
  const values = rows.flatMap(one => Object.values(one.by_slice)).filter(isNumber);
  const [low, high] = percent ? [0, 1] : [Math.max(...values), Math.min(...values)];
  const columns = task.slices.map(slice => ({
    title: slice.replace(/(\d)x(?=\d)/g, "$1×"),
    kind: "number",
    value: one => one.by_slice[slice],
    cell: one => {
      const value = one.by_slice[slice];
      const shown = percent ? text.score(value, task.metric) : isNumber(value) ? value.toFixed(3) : "–";
      return [heated(link(shown, one.best_runs), isNumber(value) && high !== low ? (value - low) / (high - low) : 0)];
    },
  }));
  return sortableTable([architectureColumn(), ...columns], rows, "scores by slice").element;
}

// Content on a background that is the darker the larger its share of 1.
function heated(content, share) {
  const cell = make("span", {class: "heat"}, content);
  cell.style.background = `rgba(var(--heat), ${(0.55 * Math.max(0, Math.min(1, share))).toFixed(2)})`;
  return cell;
}

function architectureColumn(title = "Architecture") {
  return {title, kind: "label", value: one => one.label, cell: one => [make("span", {class: "named"}, sample(one.look), make("span", {}, one.label))]};
}

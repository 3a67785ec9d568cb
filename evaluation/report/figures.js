// The figures of the page: each takes the runs that the filter leaves.

const scaled = (score, metric) => (data.metrics[metric].percent && isNumber(score) ? 100 * score : score);

function scoreAxis(metric) {
  const {title, percent} = data.metrics[metric];
  return {title, ...(percent ? {from: 0, to: 100} : {}), show: value => String(value)};
}

function styleOf(data, label) {
  const all = data.architectures;
  const one = all.find(other => other.label === label);
  const dash = all.filter(other => other.mixer === one.mixer).findIndex(other => other.label === label);
  return {label, colour: one.colour, dash};
}

function chanceGuides(runs) {
  const levels = new Map(runs.filter(run => isNumber(run.chance)).map(run => [run.chance, run.chance_text]));
  return [...levels].map(([level, shown]) => ({y: 100 * level, label: `a guess: ${shown}`}));
}

function curvesSpecification(data, runs, metric, kind) {
  const source = kind === "training loss" ? "training" : "evaluations";
  const field = kind === "score" ? "score" : "loss";
  const turn = kind === "score" ? score => scaled(score, metric) : value => value;
  const series = runs.filter(run => kind !== "score" || run.metric === metric).map(run => {
    const curve = run[source];
    const points = curve.steps.map((step, index) => {
      const value = curve[field][index];
      const shown = kind === "score" ? text.score(value, metric) : text.loss(value);
      return [step, turn(value), `learning rate ${text.rate(run.learning_rate)}, seed ${run.seed}\nstep ${text.count(step)}: ${shown}`];
    });
    return {...styleOf(data, run.label), points, line: true};
  });
  const y = kind === "score" ? scoreAxis(metric) : {title: `Loss in ${kind === "training loss" ? "training" : "evaluation"}`, show: value => String(value)};
  const guides = kind === "score" && data.metrics[metric].percent ? chanceGuides(runs) : [];
  return {series, guides, y, x: {title: "Steps", from: 0, show: text.count}};
}

function rateSpecification(data, runs, metric) {
  const [low, high] = data.rate_limits;
  const near = rate => rate >= low && (high === null || rate <= high);
  const ended = runs.filter(run => run.metric === metric && isNumber(run.score) && near(run.learning_rate));
  const labels = [...new Set(ended.map(run => run.label))];
  const series = labels.map(label => {
    const members = ended.filter(run => run.label === label);
    const rates = [...new Set(members.map(run => run.learning_rate))].sort((a, b) => a - b);
    const points = rates.map(rate => {
      const scores = members.filter(run => run.learning_rate === rate).map(run => run.score);
      const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
      return [rate, scaled(mean, metric), `learning rate ${text.rate(rate)}\n${text.score(mean, metric)}, mean of ${scores.length}`];
    });
    return {...styleOf(data, label), points, line: true, marks: true};
  });
  return {series, y: scoreAxis(metric), x: {title: "Learning rate", log: 10, show: text.rate}};
}

function stateSpecification(data, runs, metric) {
  const labels = new Set(runs.map(run => run.label));
  const placed = data.architectures.filter(one => labels.has(one.label) && one.metric === metric && isNumber(one.state_size));
  const mixers = [...new Set(placed.map(one => one.mixer))];
  const series = mixers.flatMap(mixer => {
    const sizes = placed.filter(one => one.mixer === mixer).sort((a, b) => a.state_size - b.state_size);
    const point = one => [one.state_size, scaled(one.best, metric), `${text.bytes(one.state_size)}${one.state_length ? ` at ${text.count(one.state_length)} tokens` : ""}\n${text.score(one.best, metric)}`];
    const line = {label: mixer, colour: sizes[0].colour, points: sizes.map(point), line: true};
    return [line, ...sizes.map(one => ({label: one.label, colour: one.colour, points: [point(one)], marks: true}))];
  });
  const guides = data.metrics[metric].percent ? chanceGuides(runs) : [];
  return {series, guides, y: scoreAxis(metric), x: {title: "Bytes of state", log: 2, show: text.bytes}};
}

// Scores by slice as a table whose cells are the darker the better; categories are never joined by lines.
function sliceTable(data, metric) {
  const rows = data.architectures.filter(one => one.metric === metric && one.by_slice && Object.keys(one.by_slice).length);
  const slices = data.slices.filter(slice => rows.some(one => slice in one.by_slice));
  const {percent} = data.metrics[metric];
  if (slices.length < 2) return null;
  const values = rows.flatMap(one => Object.values(one.by_slice)).filter(isNumber);
  const [low, high] = percent ? [0, 1] : [Math.max(...values), Math.min(...values)];
  const columns = slices.map(slice => ({
    title: slice.replace(/(\d)x(?=\d)/g, "$1×"),
    kind: "number",
    value: one => one.by_slice[slice],
    cell: one => {
      const value = one.by_slice[slice];
      const cell = make("span", {}, percent ? text.score(value, metric) : isNumber(value) ? value.toFixed(3) : "–");
      const share = isNumber(value) && high !== low ? (value - low) / (high - low) : 0;
      cell.style.background = `rgba(var(--heat), ${(0.55 * share).toFixed(2)})`;
      cell.style.padding = ".15rem .4rem";
      return [cell];
    },
  }));
  const first = {title: "Architecture", kind: "label", value: one => one.label, cell: one => [dot(one.colour), one.label]};
  return sortableTable([first, ...columns], rows, "slices").element;
}

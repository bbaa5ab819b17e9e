// The live page: which run is shown, where its numbers come from, and what is said about them.

import { Chart } from "./chart.js";
import { Table } from "./table.js";
import { MEANING_OF_UNRESOLVED, UNRESOLVED, count, duration, interval, meaningOfRho, number, quantity, statistic } from "./words.js";

const READINGS = {
  batch_snr: "SNR", noise_scale: "Noise scale", significant_share: "Significant elements",
  consecutive_cosine: "Cosine with the last step", effective_examples: "Effective examples",
  deviation_ratio: "R_t", maxva_beta: "β_t",
};
const POLL = 3000;
const SILENT = 10;

const at = (id) => document.getElementById(id);
const element = (name, text, options = {}) => Object.assign(document.createElement(name), { textContent: text, ...options });

const state = { runs: [], run: null, layer: "", facts: null, numbers: null, stream: null, heard: 0, gone: false, chosen: false };
const chart = new Chart(at("chart"), (point) => legend(point));
const table = new Table(at("layers"), (name) => choose(state.run, name === state.layer ? "" : name));
let catalogue = { statistics: {} };

// ---- which run

function address() {
  const asked = new URLSearchParams(location.hash.slice(1));
  return { run: asked.get("run"), layer: asked.get("layer") ?? "" };
}

function choose(run, layer = "") {
  state.chosen = true;
  const hash = new URLSearchParams(layer ? { run, layer } : { run });
  if (location.hash.slice(1) === String(hash)) return;
  location.hash = hash; // the event below does the rest, as it does for the browser's back button
}

async function poll() {
  try {
    const answer = await fetch("/api/runs");
    if (!answer.ok) throw new Error(answer.statusText);
    state.runs = (await answer.json()).runs;
    back();
  } catch {
    lost();
    return;
  }
  at("empty").hidden = state.runs.length > 0;
  at("run").hidden = state.runs.length === 0;
  const known = state.runs.find((run) => run.run === state.run);
  const asked = state.runs.find((run) => run.run === address().run);
  const best = asked ?? (known && (known.live || !state.runs[0].live) ? known : state.runs[0]);
  if (!best) status("Waiting for a run", "");
  else if (best.run !== state.run) await open(best.run, asked ? address().layer : "");
  else if (!state.stream && !document.hidden && best.live) follow();
  picker();
}

function picker() {
  const shown = state.runs.slice(0, 5);
  if (state.run && !shown.some((run) => run.run === state.run)) shown.unshift(...state.runs.filter((run) => run.run === state.run));
  const buttons = shown.map((run) => {
    const button = element("button", "", { type: "button", title: `${run.framework}, ${run.optimizer || "optimizer unknown"}` });
    if (run.live) button.append(element("span", "", { className: "live-dot" }));
    button.append(run.run);
    if (run.live) button.setAttribute("aria-label", `${run.run}, training`);
    button.setAttribute("aria-current", String(run.run === state.run));
    button.addEventListener("click", () => choose(run.run));
    return button;
  });
  const nav = at("runs");
  const rest = state.runs.filter((run) => !shown.includes(run));
  if (rest.length) {
    const more = element("select", "", { ariaLabel: "More runs" });
    more.append(new Option(`${rest.length} more`, ""), ...rest.map((run) => new Option(run.run, run.run)));
    more.addEventListener("change", () => choose(more.value));
    buttons.push(more);
  }
  const signature = JSON.stringify([shown, rest.map((run) => run.run), state.run]);
  if (nav.dataset.signature === signature) return; // a control that is in use is left alone
  nav.dataset.signature = signature;
  const focused = [...nav.children].indexOf(document.activeElement);
  nav.replaceChildren(...buttons);
  nav.children[focused]?.focus();
  nav.querySelector("[aria-current=true]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

// ---- where the numbers come from

async function open(run, layer) {
  close();
  const answer = await fetch(`/api/runs/${encodeURIComponent(run)}`).catch(() => null);
  if (!answer?.ok) return answer ? status("The server can't show this run", "gone") : lost();
  const body = await answer.json();
  Object.assign(state, { run, facts: body, layer: body.layers.name.includes(layer) ? layer : "" });
  table.show(body.layers);
  const options = body.layers.name.map((name) => new Option(name, name));
  at("layer").replaceChildren(new Option("whole model", ""), ...options);
  at("filter-label").hidden = body.layers.name.length < 12;
  at("filter").value = table.filter = "";
  document.title = `${run} – gradiometer`;
  return load(body);
}

// Show the chosen layer: from what was just read, or read anew; then follow a run that is in memory.
async function load(body) {
  at("layer").value = state.layer;
  table.choose(state.layer);
  chart.clear();
  if (!body || state.layer) {
    const layer = state.layer ? `?layer=${encodeURIComponent(state.layer)}` : "";
    const answer = await fetch(`/api/runs/${encodeURIComponent(state.run)}${layer}`).catch(() => null);
    if (!answer?.ok) return lost();
    body = await answer.json();
  }
  show({ ...body, anew: true });
  picker();
  if (body.source === "memory") follow();
  return null;
}

function follow() {
  close();
  if (document.hidden) return;
  const query = state.layer ? `?layer=${encodeURIComponent(state.layer)}` : "";
  const stream = new EventSource(`/api/runs/${encodeURIComponent(state.run)}/events${query}`);
  stream.addEventListener("update", (event) => { if (stream === state.stream) { back(); show(JSON.parse(event.data)); } });
  stream.addEventListener("error", () => {
    if (stream !== state.stream) return;
    if (stream.readyState === EventSource.CLOSED) state.stream = null; // the poll opens it again when there is more
    poll();
  });
  state.stream = stream;
}

function close() {
  state.stream?.close();
  state.stream = null;
}

function lost() {
  state.gone = true;
  const since = state.heard ? ` Shown is what it said ${duration((performance.now() - state.heard) / 1000)} ago.` : "";
  at("banner").textContent = `The server does not answer.${since} Trying again every few seconds.`;
  at("banner").hidden = false;
  status("Server gone", "gone");
}

function back() {
  if (state.gone && state.run) setTimeout(() => { if (!state.stream) follow(); });
  state.gone = false;
  at("banner").hidden = true;
}

// ---- what is shown

function show(numbers) {
  state.numbers = numbers;
  state.heard = performance.now();
  state.data = state.heard - numbers.silent_seconds * 1000;
  chart.add(numbers.points, numbers.anew, numbers.point);
  table.update(numbers);
  facts();
  legend(null);
  reading();
  tick();
}

function facts() {
  const { facts: run, numbers } = state;
  const scalar = (name) => numbers.scalars[name];
  const loss = scalar("loss");
  const entries = [
    ["Step", count(numbers.step)],
    ["Loss", number(loss?.value ?? null, 4), loss && loss.step !== numbers.step ? `at step ${count(loss.step)}` : ""],
    ["Examples per second", number(numbers.examples_per_second), numbers.examples ? `${quantity(numbers.examples)} a batch` : ""],
    ["Framework", `${run.framework} ${run.framework_version}`, `${run.engine} engine`],
    ["Optimizer", run.optimizer || "unknown"],
  ].map(([name, value, note]) => fact(name, value, note));
  entries.push(coverage(numbers.coverage));
  const dropped = scalar("dropped_steps")?.value;
  if (dropped) entries.push(fact("Dropped", `${count(dropped)} steps`, "never reached the server", "bad"));
  const open = at("facts").querySelector("details")?.open;
  at("facts").replaceChildren(...entries);
  if (open) at("facts").querySelector("details")?.setAttribute("open", "");
  const last = numbers.events.at(-1);
  at("event").hidden = !last;
  if (last) at("event").textContent = `Step ${count(last.step)}: ${last.kind}${last.text ? `, ${last.text}` : ""}`;
}

function fact(name, value, note = "", kind = "") {
  const group = element("div", "", { className: kind });
  const text = element("dd", value);
  if (note) text.append(" ", element("small", note));
  group.append(element("dt", name), text);
  return group;
}

function coverage(found) {
  const share = found.num_params ? found.num_params_measured / found.num_params : null;
  if (share === null) return fact("Measured", "unknown", "", "wide");
  if (share === 1) return fact("Measured", `all ${count(found.num_params)} parameters`, "", "wide");
  const percent = `${(Math.floor(share * 1000) / 10).toFixed(1)} %`; // never rounded up to 100
  const group = fact("Measured", "", "", "wide");
  const details = element("details", "");
  const summary = element("summary", percent);
  summary.append(" ", element("small", `of ${count(found.num_params)} parameters; ${found.num_uncovered} not measured`));
  const list = element("ul", "");
  list.append(...found.uncovered.map((item) => element("li", `${item.parameter} (${count(item.num_params)}): ${item.reason}`)));
  if (found.num_uncovered > found.uncovered.length) list.append(element("li", `and ${found.num_uncovered - found.uncovered.length} more`));
  details.append(summary, list);
  group.querySelector("dd").append(details);
  return group;
}

function legend(point) {
  const values = point ?? current();
  for (const item of at("legend").children) {
    item.querySelector("output").textContent = number(values[item.querySelector("[data-statistic]").dataset.statistic]);
  }
  if (!state.numbers) return;
  const units = state.facts.temporal === "optimizer" ? ", of the gradient as the optimizer saw it" : "";
  const steps = state.numbers.window_steps;
  const window = steps > 1 ? `Mean over the last ${steps} measured steps, in` : "In";
  at("chart-note").textContent = point ? `At step ${count(point.step)}` : `${window} (loss/parameter)²${units}`;
}

// The numbers of the chosen layer, or of the whole model.
function current() {
  const { numbers, facts: run, layer } = state;
  if (!numbers) return {};
  if (!layer) return numbers.model;
  const row = run.layers.name.indexOf(layer);
  return Object.fromEntries(Object.entries(numbers.table).map(([name, values]) => [name, values[row]]));
}

function isResolved() {
  const { model, layers } = state.numbers.unresolved;
  return state.layer ? !layers.includes(state.facts.layers.name.indexOf(state.layer)) : !model;
}

// Where on the ruler a ratio is, in per cent: two octaves to each side of 1.
function place(ratio) {
  return 50 + 25 * Math.max(-2, Math.min(2, Math.log2(ratio)));
}

function reading() {
  const values = current();
  const { intervals, ...more } = state.numbers.chosen;
  const rho = values.variance_ratio ?? null;
  const ends = intervals.variance_ratio;
  at("rho-title").textContent = state.layer || "Whole model";
  at("rho").textContent = number(rho);
  at("rho-text").textContent = meaningOfRho(rho, ends);
  const [mark, band] = [at("rho-mark"), at("rho-band")];
  mark.hidden = !(rho > 0);
  if (rho > 0) mark.style.left = `${place(rho)}%`;
  band.hidden = mark.hidden || !ends;
  if (!band.hidden) {
    band.style.left = `${place(ends[0])}%`;
    band.style.width = `${place(ends[1]) - place(ends[0])}%`;
  }
  const rows = Object.entries(READINGS).map(([name, label]) =>
    entry(name, label, statistic(name, values[name], isResolved()),
      { text: interval(intervals[name]), title: "95 % interval over the window" }));
  if (more.norm_median !== null) {
    const largest = { text: `largest ${number(more.norm_max)}`, title: "Mean over the window of each step's largest norm" };
    rows.splice(-2, 0, entry("norm_median", "Median norm", number(more.norm_median), largest));
  }
  const focused = document.activeElement?.closest?.("#readings [data-statistic]")?.dataset.statistic;
  at("readings").replaceChildren(...rows);
  // New numbers must not take the focus, and the explanation with it, from whoever reads by keyboard.
  if (focused) document.querySelector(`#readings [data-statistic="${focused}"]`)?.focus({ preventScroll: true });
  const { num_layers: all, layers } = state.facts;
  const steps = state.numbers.window_steps;
  const part = layers.name.length < all ? `The first ${layers.name.length} of ${all} layers. ` : "";
  const window = steps > 1 ? `Over the last ${steps} measured steps; ratios are of sums. ` : "";
  at("layers-note").textContent = `${part}${window}Choose a row to chart it.`;
}

// One reading; beside its number stands a smaller note.
function entry(name, label, text, note) {
  const row = element("div", "", { className: text === UNRESOLVED ? "unresolved" : "" });
  const term = element("dt", label, { tabIndex: 0 });
  term.dataset.statistic = name;
  const value = element("dd", text);
  if (note.text) value.prepend(element("small", note.text, { title: note.title }), " ");
  row.append(term, value);
  return row;
}

function status(text, kind) {
  at("dot").className = kind;
  if (at("status-text").textContent !== text) at("status-text").textContent = text;
}

// What is known of the run's life; the step itself is not announced, or a screen reader would never stop.
function tick() {
  if (state.gone || !state.numbers) return;
  const silent = (performance.now() - state.data) / 1000;
  if (state.numbers.step === null) status("Waiting for the first step", "");
  else if (silent < Math.max(SILENT, 4 * state.numbers.step_seconds)) status("Training", "live");
  else status(silent < 60 ? `No new step for ${duration(silent)}` : `Last step ${duration(silent)} ago`, "");
}

// ---- explanations, in the catalogue's words

function explain(event) {
  const target = event.target.closest?.("[data-statistic]");
  const row = target && catalogue.statistics[target.dataset.statistic];
  const tooltip = at("tooltip");
  // The pointer at rest is told of every element that moves under it: that ends no explanation asked for by keyboard.
  if (!row && event.type === "mouseover" && isExplained(document.activeElement)) return;
  tooltip.hidden = !row;
  document.querySelector("[aria-describedby=tooltip]")?.removeAttribute("aria-describedby");
  if (!row) return;
  target.setAttribute("aria-describedby", "tooltip");
  const meaning = target.dataset.statistic === "noise_scale" ? `\n\n${MEANING_OF_UNRESOLVED}` : "";
  const symbol = row.symbol === "–" ? "" : `${row.symbol} = `;
  tooltip.textContent = `${row.help}.\n${symbol}${row.formula}\nUnit: ${row.unit}${meaning}`;
  const box = target.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tooltip;
  tooltip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tooltip.style.top = `${box.bottom + height + 12 < innerHeight ? box.bottom + 6 : box.top - height - 6}px`;
}

function isExplained(target) {
  return !at("tooltip").hidden && target?.getAttribute("aria-describedby") === "tooltip";
}

function hide() {
  at("tooltip").hidden = true;
}

for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, explain);
for (const kind of ["mouseleave", "focusout"]) document.documentElement.addEventListener(kind, hide);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
// A scroll that came with the focus moves the explanation along; any other puts it away.
addEventListener("scroll", () => {
  const target = document.activeElement;
  if (isExplained(target)) explain({ target });
  else hide();
}, true);
addEventListener("hashchange", () => {
  const { run, layer } = address();
  if (!run) return;
  if (run !== state.run) open(run, layer);
  else if (layer !== state.layer) {
    state.layer = state.facts.layers.name.includes(layer) ? layer : "";
    load(null);
  }
});
document.addEventListener("visibilitychange", () => (document.hidden ? close() : poll()));
at("layer").addEventListener("change", (event) => choose(state.run, event.target.value));
at("filter").addEventListener("input", (event) => { table.filter = event.target.value; table.arrange(); });

legend(null);
fetch("/api/catalogue").then((answer) => answer.json()).then((found) => { catalogue = found; }).catch(() => {});
await poll();
setInterval(poll, POLL);
setInterval(tick, 1000);

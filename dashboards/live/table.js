// The layer table: one row a layer, sortable, each row a choice of what the chart shows.

import { NONE, UNRESOLVED, count, statistic } from "./words.js";

const HEADINGS = {
  batch_variance: "variance across\nexamples, P",
  step_variance: "step to\nstep, D",
  temporal_variance: "MaxVA's s\n(inflated)",
  variance_ratio: "ρ",
  consecutive_cosine: "cosine,\nlast step",
  batch_snr: "SNR",
  significant_share: "significant\nelements",
  noise_scale: "noise scale,\nexamples",
  effective_examples: "effective\nexamples",
  deviation_ratio: "R_t",
  maxva_beta: "β_t",
};
const COLUMNS = Object.keys(HEADINGS);

export class Table {
  // `onChoose` hears a layer's name, or "" for the whole model.
  constructor(element, onChoose) {
    this.element = element;
    this.head = element.tHead;
    this.body = element.tBodies[0];
    this.onChoose = onChoose;
    this.sort = { by: null, down: true };
    this.filter = "";
    this.rows = [];
    this.chosen = "";
    this.buildHead();
  }

  buildHead() {
    const row = document.createElement("tr");
    for (const key of ["name", "kind", "num_params", ...COLUMNS]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = HEADINGS[key] ?? { name: "layer", kind: "kind", num_params: "parameters" }[key];
      if (key in HEADINGS) button.dataset.statistic = key;
      button.addEventListener("click", () => this.sortBy(key));
      cell.dataset.key = key;
      cell.append(button);
      row.append(cell);
    }
    this.head.replaceChildren(row);
  }

  sortBy(key) {
    const text = key === "name" || key === "kind";
    // Once: the largest first (text: from a). Twice: the other way round. Three times: the run's own order.
    if (this.sort.by !== key) this.sort = { by: key, down: !text };
    else if (this.sort.down === !text) this.sort = { by: key, down: text };
    else this.sort = { by: null, down: true };
    for (const cell of this.head.rows[0].cells) {
      const how = cell.dataset.key === this.sort.by ? (this.sort.down ? "descending" : "ascending") : null;
      if (how) cell.setAttribute("aria-sort", how);
      else cell.removeAttribute("aria-sort");
    }
    this.arrange();
  }

  // A new run: rows are made once, and filled at every update.
  show(layers) {
    const make = (name, label, kind, size, title) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.title = title;
      head.append(button);
      row.append(head, ...["kind", "num_params", ...COLUMNS].map(() => document.createElement("td")));
      row.cells[1].textContent = kind;
      row.cells[1].className = "kind";
      row.cells[2].textContent = count(size);
      row.addEventListener("click", () => this.onChoose(name));
      return { name, kind, num_params: size, row, head, values: {} };
    };
    this.element.classList.toggle("kindless", !layers.kind.some(Boolean)); // JAX knows no classes of layers
    const total = layers.num_params.reduce((sum, size) => sum + size, 0);
    this.model = make("", "whole model", "", total, "All measured layers together");
    this.model.row.className = "model";
    this.rows = layers.name.map((name, at) =>
      make(name, name, layers.kind[at], layers.num_params[at], `${name}: ${layers.parameters[at].join(", ")}`));
    this.arrange();
  }

  update(numbers) {
    const hidden = new Set(numbers.unresolved.layers);
    this.fill(this.model, (name) => numbers.model[name] ?? null, !numbers.unresolved.model);
    this.rows.forEach((entry, at) => this.fill(entry, (name) => numbers.table[name][at], !hidden.has(at)));
    this.flag(numbers);
    if (this.sort.by) this.arrange();
  }

  fill(entry, value, resolved) {
    COLUMNS.forEach((name, at) => {
      const found = value(name);
      entry.values[name] = found;
      const cell = entry.row.cells[at + 3];
      const text = statistic(name, found, resolved);
      if (cell.textContent !== text) cell.textContent = text;
      cell.className = text === NONE || text === UNRESOLVED ? "none" : "";
    });
  }

  flag(numbers) {
    this.rows.forEach((entry, at) => {
      const broken = Math.round((numbers.table.nonfinite_examples[at] ?? 0) * numbers.window_steps);
      let flag = entry.head.querySelector(".flag");
      if (!broken) { flag?.remove(); return; }
      if (!flag) {
        flag = document.createElement("span");
        flag.className = "flag";
        entry.head.append(flag);
      }
      flag.textContent = `NaN or ∞ in ${count(broken)} ${broken === 1 ? "example" : "examples"}`;
    });
  }

  choose(name) {
    this.chosen = name;
    for (const entry of [this.model, ...this.rows]) {
      entry.row.setAttribute("aria-selected", String(entry.name === name));
    }
  }

  arrange() {
    const wanted = this.filter.toLowerCase();
    const rows = this.rows.filter((entry) => `${entry.name} ${entry.kind}`.toLowerCase().includes(wanted));
    const { by, down } = this.sort;
    if (by) {
      const key = (entry) => (by in HEADINGS ? entry.values[by] ?? null : entry[by]);
      rows.sort((one, two) => {
        const [a, b] = [key(one), key(two)];
        if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last, either way
        const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
        return down ? -order : order;
      });
    }
    const order = [this.model, ...rows].filter(Boolean).map((entry) => entry.row);
    const same = order.length === this.body.rows.length && order.every((row, at) => row === this.body.rows[at]);
    if (!same) {
      const focused = document.activeElement;
      this.body.replaceChildren(...order);
      if (this.body.contains(focused)) focused.focus({ preventScroll: true });
    }
  }
}

// The comparison chart: three variances of the batch gradient on one logarithmic axis.

import { tick } from "./words.js";

const SERIES = ["batch_variance", "step_variance", "temporal_variance"];
// Steps are whole numbers.
const WHOLE = Array.from({ length: 31 }, (_, at) => [1, 2, 5][at % 3] * 10 ** Math.floor(at / 3));
const COLOURS = { batch_variance: "--examples", step_variance: "--steps", temporal_variance: "--maxva" };

// Powers of ten where the axis spans many decades, finer marks where it spans few, evenly spaced where it is short.
export function ticks(low, high) {
  for (const digits of [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      found.push(...digits.map((digit) => Number((digit * 10 ** power).toPrecision(2))));
    }
    const within = found.filter((value) => value >= low && value <= high);
    if (within.length >= 4) return within;
  }
  const rough = (high - low) / 4;
  const step = [1, 2, 5, 10].map((digit) => digit * 10 ** Math.floor(Math.log10(rough))).find((size) => size >= rough);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, at) => Number(((first + at) * step).toPrecision(6)));
}

export class Chart {
  // `onCursor` hears the point under the pointer, or null.
  constructor(element, onCursor) {
    this.element = element;
    this.onCursor = onCursor;
    this.data = [[], [], [], []];
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.rebuild());
  }

  clear() {
    this.data = [[], [], [], []];
    this.draw();
  }

  // Take in new points; `anew` replaces all. `newest` is the point of the last step, drawn at the end.
  add(points, anew, newest) {
    if (anew) this.data = [[], [], [], []];
    this.append(points);
    this.kept = this.data[0].length;
    if (newest) this.append(newest);
    this.draw();
    // The newest point may be between those that are kept: it goes again before the next ones come.
    this.data = this.data.map((column) => column.slice(0, this.kept));
  }

  append(points) {
    points.step.forEach((step, at) => {
      if (this.data[0].length && step <= this.data[0].at(-1)) return;
      this.data[0].push(step);
      SERIES.forEach((name, row) => {
        const value = points[name][at];
        this.data[row + 1].push(value > 0 ? value : null); // a logarithmic axis has no place for the rest
      });
    });
  }

  draw() {
    this.shown = this.data.map((column) => column.slice());
    const any = this.shown.slice(1).some((column) => column.some((value) => value !== null));
    this.element.classList.toggle("has-data", any);
    this.element.querySelector(".waiting")?.remove();
    if (!any) {
      this.plot?.destroy();
      this.plot = null;
      const waiting = document.createElement("p");
      waiting.className = "waiting";
      waiting.textContent = "The chart begins with the first measured step";
      this.element.append(waiting);
    } else if (this.plot) {
      this.plot.setData(this.shown);
    } else {
      this.build();
    }
  }

  resize() {
    const { clientWidth, clientHeight } = this.element;
    if (this.plot && clientWidth && clientHeight) this.plot.setSize({ width: clientWidth, height: clientHeight });
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (this.shown) {
      this.build();
    }
  }

  build() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const font = `12px ${style.fontFamily}`;
    const axis = { stroke: colour("--soft"), font, ticks: { show: false }, grid: { stroke: colour("--line"), width: 1 } };
    const series = SERIES.map((name) => ({
      stroke: colour(COLOURS[name]),
      width: 2,
      dash: name === "temporal_variance" ? [6, 4] : undefined,
      points: { show: (plot) => plot.data[0].length < 2, size: 6 },
    }));
    this.plot = new globalThis.uPlot({
      width: this.element.clientWidth,
      height: this.element.clientHeight,
      padding: [10, 14, 0, 0],
      pxAlign: 0,
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 7 }, y: false },
      scales: {
        x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { distr: 3, log: 10, range: (_, low, high) => (low > 0 ? [low / 1.25, high * 1.25] : [0.1, 1]) },
      },
      axes: [
        { ...axis, grid: { show: false }, space: 70, size: 28, gap: 4, label: "step", labelFont: font, labelSize: 18, labelGap: 0, incrs: WHOLE, values: (_, at) => at.map((step) => step.toLocaleString("en")) },
        { ...axis, size: 58, splits: (_, __, low, high) => ticks(low, high), filter: (_, splits) => splits, values: (_, at) => at.map(tick) },
      ],
      series: [{}, ...series],
      hooks: { setCursor: [(plot) => this.point(plot.cursor.idx)] },
    }, this.shown, this.element);
  }

  point(at) {
    if (at === null || at === undefined) return this.onCursor(null);
    const point = { step: this.shown[0][at] };
    SERIES.forEach((name, row) => { point[name] = this.shown[row + 1][at]; });
    return this.onCursor(point);
  }
}

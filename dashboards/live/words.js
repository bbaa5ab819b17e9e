// How numbers and states are put into words. A number that does not exist is a dash, never 0.

export const NONE = "–";

export function number(value, digits = 3) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  let text;
  if (size === 0) text = "0";
  else if (size < 1e-3 || size >= 1e6) text = value.toExponential(digits - 1).replace("e+", "e");
  else if (size >= 10 ** digits) text = Math.round(value).toLocaleString("en");
  else text = value.toPrecision(digits);
  return text.replaceAll("-", "−");
}

// For an axis, where trailing zeros say nothing.
export function tick(value) {
  return Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6
    ? value.toExponential().replace("e+", "e").replaceAll("-", "−") : value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

export const UNRESOLVED = "not resolved";
export const MEANING_OF_UNRESOLVED = "Not resolved: over this window the signal can't be told from 0, so the noise scale " +
  "may be any number from the lower end of its interval upwards. Batches as large as that are still mostly noise; " +
  "more steps, or a larger batch, would tell.";

const SHARES = new Set(["significant_share"]);

// A noise scale at or below 0, or whose interval has no upper end, has no number to show.
export function statistic(name, value, resolved = true) {
  if (name === "noise_scale" && value !== null && value !== undefined && (value <= 0 || !resolved)) return UNRESOLVED;
  return SHARES.has(name) ? percent(value) : number(value);
}

export function percent(value) {
  return value === null || value === undefined ? NONE : `${number(100 * value)} %`;
}

// A 95 % interval: both ends, or from where on it is open.
export function interval(ends) {
  if (!ends || ends[0] === null) return "";
  return ends[1] === null ? `above ${number(ends[0])}` : `${number(ends[0])} to ${number(ends[1])}`;
}

export function count(value) {
  return value === null || value === undefined ? NONE : value.toLocaleString("en");
}

// A number of things: whole where it is whole.
export function quantity(value) {
  return Number.isInteger(value) ? count(value) : number(value);
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

// What ρ says, and whether its interval lets it say so.
export function meaningOfRho(rho, ends) {
  if (rho === null || rho === undefined) return "ρ appears with the second measured step: it compares one step with the next.";
  const within = ends ? ` (95 %: ${interval(ends)})` : "";
  const far = ends ? ends[0] > 1 || ends[1] < 1 : rho > 1.1 || rho < 0.9;
  if (!far) return `About 1${within}: only example noise. The gradient changes from step to step as much as the drawn ` +
    "examples explain.";
  if (rho > 1) return `Above 1${within}: the batch gradient moves more from step to step than the drawn examples explain. ` +
    "Learning rate times curvature does this, or examples that are alike within a batch.";
  return `Below 1${within}: consecutive batches differ less than independent draws would, as with stratified ` +
    "batches or batches that share examples.";
}

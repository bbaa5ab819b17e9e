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

// A noise scale at or below 0 says that the signal can't be told from 0.
export function statistic(name, value) {
  if (name === "noise_scale" && value !== null && value !== undefined && value <= 0) return "not resolved";
  return number(value);
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

export function meaningOfRho(rho) {
  if (rho === null || rho === undefined) return "ρ appears with the second measured step: it compares one step with the next.";
  if (rho > 1.1) return "Above 1: the batch gradient moves more from step to step than the drawn examples explain. " +
    "Learning rate times curvature does this, or examples that are alike within a batch.";
  if (rho < 0.9) return "Below 1: consecutive batches differ less than independent draws would, as with stratified " +
    "batches or batches that share examples.";
  return "About 1: only example noise. The gradient changes from step to step as much as the drawn examples explain.";
}

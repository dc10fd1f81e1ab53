"use strict";
// The kinds of charts, each a function from its part of the data and a width to an element. Plot draws; what is written
// into the page comes from runs and is set as text, never as markup.

const COLOURS = ["#4269d0", "#e8883a", "#d9495a", "#2f9e8f", "#a463f2", "#97752f", "#3ca951", "#e66fae", "#6cadde", "#8a8f98"];

/** An element with a class and a text. */
function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined && text !== null) element.textContent = String(text);
  return element;
}

const UNITS = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** A number with three digits and a unit, as the commands print it. */
function counted(value, digits = 3) {
  for (const [size, unit] of UNITS) if (Math.abs(value) >= 0.9995 * size) return `${+(value / size).toPrecision(digits)} ${unit}`;
  return `${+value.toPrecision(digits)}`;
}

/** How the numbers of an axis are told. */
function teller(form, digits = 3) {
  if (form === "percent") return (value) => `${+(100 * value).toPrecision(digits)}%`;
  if (form === "bytes") return (value) => (Math.abs(value) < 1000 ? `${counted(value, digits)} B` : `${counted(value, digits)}B`);
  return (value) => counted(value, digits);
}

function shorter(text, most) {
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

/** The colours of methods are the same in all charts of a page; those of other lines are by their order in the chart. */
const taken = new Map();
function keepColours(names) {
  taken.clear();
  names.forEach((name, index) => taken.set(name, COLOURS[index % COLOURS.length]));
}
function coloursOf(names) {
  return names.map((name, index) => taken.get(name) || COLOURS[index % COLOURS.length]);
}

/** How an axis tells its numbers: with as many digits as tell neighbours apart. */
function tickTeller(form, values) {
  const [low, high] = d3.extent(values);
  if (low === undefined) return teller(form);
  if (form === "percent") return d3.tickFormat(low, high, 6, "~%");
  if (form === "whole") return String;
  if (form === "plain" && Math.max(Math.abs(low), Math.abs(high)) < 10000) return d3.tickFormat(low, high, 6);
  return teller(form, high - low < 0.03 * Math.abs(high) ? 5 : 3);
}

/** Where an axis has its marks: rounds are whole. */
function ticksOf(form, values, most) {
  const [low, high] = d3.extent(values);
  return form === "whole" && low !== undefined ? [...new Set(d3.ticks(low, high, most).concat(low === high ? [low] : []))].filter(Number.isInteger) : most;
}

/** What the colours mean; nothing for a single one. */
function legend(entries) {
  const list = made("ul", "legend");
  for (const { name, colour, dashed } of entries) {
    const entry = made("li", "", "");
    const sample = made("span", dashed ? "sample dashed" : "sample");
    sample.style.setProperty("--colour", colour);
    entry.append(sample, made("span", "", name));
    list.append(entry);
  }
  return list;
}

/** Plot's picture, without the style that it brings along: page.css has those rules, and the policy allows no others. */
function plotted(options) {
  const picture = Plot.plot({ className: "plot", figure: false, ...options });
  for (const style of picture.querySelectorAll("style")) style.remove();
  picture.setAttribute("role", "img");
  return picture;
}

/** Curves with bands, and level lines for what they are compared with. */
function lines(chart, width) {
  const solid = [], dashed = [], bands = [], alone = [];
  for (const { name, x, y, low, high, dashed: isDashed } of chart.series) {
    const points = x.map((at, index) => ({ name, x: at, y: y[index], low: low && low[index], high: high && high[index] }));
    (isDashed ? dashed : solid).push(...points);
    if (low) bands.push(...points.filter((point) => point.low !== null && point.high !== null));
    if (points.filter((point) => point.y !== null).length < 30) alone.push(...points);
  }
  const x = teller(chart.x.form), y = teller(chart.y.form), all = [...solid, ...dashed];
  const names = chart.series.map((each) => each.name), colours = coloursOf(names);
  const values = all.flatMap((point) => [point.y, point.low, point.high]).filter((value) => typeof value === "number");
  const log = Boolean(chart.y.log) && values.length > 0 && values.every((value) => value > 0);
  const style = { x: "x", y: "y", z: "name", stroke: "name", strokeWidth: 2 };
  const marks = [
    Plot.ruleY(chart.rules, { y: "y", stroke: "currentColor", strokeOpacity: 0.6, strokeDasharray: "2 4" }),
    Plot.areaY(bands, { x: "x", y1: "low", y2: "high", z: "name", fill: "name", fillOpacity: 0.18 }),
    Plot.line(solid, style),
    Plot.line(dashed, { ...style, strokeDasharray: "7 4" }),
    Plot.dot(alone, { x: "x", y: "y", fill: "name", r: 2.5 }),
    Plot.text(chart.rules, { y: "y", text: "name", frameAnchor: "right", textAnchor: "end", dy: -7, stroke: "var(--back)", fill: "currentColor" }),
    Plot.tip(all, Plot.pointer({ x: "x", y: "y", title: (point) => tipOf(point, chart, x, y) })),
  ];
  const picture = plotted({
    width, height: heightFor(width), marginLeft: 62, marginBottom: 42, marginTop: 18,
    x: { label: chart.x.label, labelArrow: false, tickFormat: tickTeller(chart.x.form, all.map((point) => point.x)),
      ticks: ticksOf(chart.x.form, all.map((point) => point.x), Math.max(3, Math.round(width / 90))), nice: false },
    y: { label: null, grid: true, tickFormat: tickTeller(chart.y.form, chart.y.zero ? [0, ...values] : values), type: log ? "log" : "linear", zero: Boolean(chart.y.zero), ticks: log ? 4 : 6 },
    color: { type: "categorical", domain: names, range: colours },
    marks,
  });
  const shown = chart.series.map((each, index) => ({ name: each.name, colour: colours[index], dashed: each.dashed }));
  return [legend(shown), ...axisOf(chart), picture];
}

/** What stands upwards, where the title does not say it. */
function axisOf(chart) {
  return chart.y.label === chart.title ? [] : [made("p", "axis", `upwards: ${chart.y.label}`)];
}

function tipOf(point, chart, x, y) {
  const band = typeof point.low === "number" && point.high > point.low ? ` ± ${y((point.high - point.low) / 2)}` : "";
  return `${shorter(point.name, 40)}\n${y(point.y)}${band}\n${shorter(chart.x.label, 40)}: ${x(point.x)}`;
}

/** One point for each run. */
function points(chart, width) {
  const names = [...new Set(chart.points.map((point) => point.name))], colours = coloursOf(names);
  const x = teller(chart.x.form), y = teller(chart.y.form);
  const picture = plotted({
    width, height: heightFor(width), marginLeft: 62, marginBottom: 42, marginTop: 18,
    x: { label: chart.x.label, labelArrow: false, tickFormat: tickTeller(chart.x.form, chart.points.map((point) => point.x)),
      ticks: Math.max(3, Math.round(width / 110)), grid: true, inset: 12 },
    y: { label: null, grid: true, tickFormat: tickTeller(chart.y.form, chart.points.map((point) => point.y)), inset: 12 },
    color: { type: "categorical", domain: names, range: colours },
    marks: [
      Plot.dot(chart.points, { x: "x", y: "y", fill: "name", r: 5, fillOpacity: 0.8 }),
      Plot.tip(chart.points, Plot.pointer({ x: "x", y: "y", title: (point) => tipOf(point, chart, x, y) })),
    ],
  });
  return [legend(names.map((name, index) => ({ name, colour: colours[index] }))), ...axisOf(chart), picture];
}

/** Time lines: a row for each participant, a bar for each thing that it does. */
const OF_KINDS = ["#6cadde", "#3ca951", "#e8883a", "#8a8f9855", "#d9495a66", "#d9495a"];
function spans(chart, width) {
  const all = chart.spans.map(([row, begin, end, kind]) => ({ row, begin, end, kind: chart.kinds[kind] }));
  const shown = chart.kinds.filter((kind) => all.some((span) => span.kind === kind));
  const colour = (kind) => OF_KINDS[chart.kinds.indexOf(kind)];
  const x = teller("plain");
  const picture = plotted({
    width, height: 60 + 18 * chart.rows, marginLeft: 40, marginBottom: 42, marginTop: 10,
    x: { label: chart.x.label, labelArrow: false, tickFormat: x, ticks: Math.max(3, Math.round(width / 110)) },
    y: { domain: d3.range(chart.rows), label: null, tickSize: 0 },
    color: { type: "categorical", domain: shown, range: shown.map(colour) },
    marks: [
      Plot.barX(all, { x1: "begin", x2: "end", y: "row", fill: "kind", insetTop: 1, insetBottom: 1 }),
      Plot.ruleX(chart.rounds, { stroke: "currentColor", strokeOpacity: 0.35 }),
      Plot.tip(all, Plot.pointer({
        x: (span) => (span.begin + span.end) / 2, y: "row",
        title: (span) => `participant ${span.row}: ${span.kind}\n${x(span.begin)} s to ${x(span.end)} s`,
      })),
    ],
  });
  return [legend(shown.map((name) => ({ name, colour: colour(name) }))), picture];
}

/** Fields of a table of numbers, the fuller the larger; with a sign, blue for more and red for less than nothing. */
function cells(chart, width) {
  const fields = [];
  chart.values.forEach((row, at) => row.forEach((value, column) => fields.push({ row: at, column, value })));
  const known = fields.filter((field) => field.value !== null);
  const most = d3.max(known, (field) => Math.abs(field.value)) || 1;
  const labels = Math.min(90, 8 + 6 * d3.max(chart.columns, (name) => shorter(name, 12).length));
  const turned = chart.columns.length > 1 && labels > width / chart.columns.length;
  const every = Math.max(1, Math.ceil((chart.columns.length * (turned ? 14 : 30)) / width));
  const tall = Math.max(1, Math.ceil(chart.rows.length / 24)), tell = teller(chart.form || "plain");
  const side = Math.max(44, Math.min(110, 16 + 6.5 * d3.max(chart.rows, (name) => shorter(name, 14).length)));
  const picture = plotted({
    width, height: 60 + Math.max(60, Math.min(420, 18 * chart.rows.length)) + (turned ? labels : 0),
    marginLeft: side, marginBottom: turned ? labels + 30 : 44, marginTop: 10,
    x: { type: "band", domain: d3.range(chart.columns.length), label: chart.x.label, labelArrow: false, tickSize: 0, padding: 0.04,
      ticks: d3.range(0, chart.columns.length, every), tickRotate: turned ? -60 : 0, tickFormat: (at) => shorter(chart.columns[at], 12) },
    y: { type: "band", domain: d3.range(chart.rows.length), label: null, tickSize: 0, padding: 0.04,
      ticks: d3.range(0, chart.rows.length, tall), tickFormat: (at) => shorter(chart.rows[at], 14) },
    color: chart.signed
      ? { type: "diverging", scheme: "RdBu", domain: [-most, most] }
      : { type: "linear", domain: [0, most], range: ["#4269d018", "#4269d0"] },
    marks: [
      Plot.cell(known, { x: "column", y: "row", fill: "value" }),
      Plot.tip(known, Plot.pointer({
        x: "column", y: "row",
        title: (field) => `${chart.y.label} ${chart.rows[field.row]}\n${chart.x.label}: ${chart.columns[field.column]}\n`
          + `${tell(field.value)} ${chart.label}`,
      })),
    ],
  });
  return [made("p", "axis", `rows: ${chart.y.label}`), picture];
}

/** Fields of a table of kinds. */
const OF_PARTS = ["#3ca951", "#d9495a", "#8a8f98", "#e8883a", "#8a8f9833"];
function parts(chart, width) {
  const fields = [];
  chart.values.forEach((row, at) => row.forEach((kind, column) => fields.push({ row: at, column, kind: chart.kinds[kind] })));
  const colour = (kind) => OF_PARTS[chart.kinds.indexOf(kind)];
  const shown = chart.kinds.filter((kind) => fields.some((field) => field.kind === kind));
  const every = Math.max(1, Math.ceil((chart.columns.length * 30) / width));
  const picture = plotted({
    width, height: 60 + 18 * chart.rows.length, marginLeft: 44, marginBottom: 44, marginTop: 10,
    x: { type: "band", domain: d3.range(chart.columns.length), label: chart.x.label, labelArrow: false, tickSize: 0, padding: 0.04,
      ticks: d3.range(0, chart.columns.length, every), tickFormat: (at) => chart.columns[at] },
    y: { type: "band", domain: d3.range(chart.rows.length), label: null, tickSize: 0, padding: 0.04 },
    color: { type: "categorical", domain: shown, range: shown.map(colour) },
    marks: [
      Plot.cell(fields, { x: "column", y: "row", fill: "kind" }),
      Plot.tip(fields, Plot.pointer({
        x: "column", y: "row", title: (field) => `participant ${field.row}, round ${chart.columns[field.column]}\n${field.kind}`,
      })),
    ],
  });
  return [legend(shown.map((name) => ({ name, colour: colour(name) }))), picture];
}

function heightFor(width) {
  return Math.round(Math.max(220, Math.min(340, width * 0.55)));
}

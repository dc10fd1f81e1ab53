"use strict";
// Who holds which units in a round, stepped through by a slider. The data has each distinct set of units once, as bits,
// and for each round the number of every participant's set.

/** The stretches of units that a set holds, as [first, one after the last]. */
function stretchesOf(bits, units) {
  const bytes = atob(bits), found = [];
  let begin = -1;
  for (let unit = 0; unit <= units; unit += 1) {
    const holds = unit < units && (bytes.charCodeAt(unit >> 3) >> (7 - (unit & 7))) & 1;
    if (holds && begin < 0) begin = unit;
    if (!holds && begin >= 0) {
      found.push([begin, unit]);
      begin = -1;
    }
  }
  return found;
}

/** The stepper: what it shows first, and stays at when the page is drawn anew. */
function windowsStepper(chart, width, memory) {
  const stretches = chart.groups.map((group) => group.sets.map((bits) => stretchesOf(bits, group.units)));
  const at = () => Math.min(memory.round || 1, chart.rounds);
  const control = made("div", "stepper");
  const label = made("label", "", "round ");
  const slider = made("input", "");
  Object.assign(slider, { type: "range", min: 1, max: chart.rounds, step: 1, value: at() });
  slider.setAttribute("aria-label", "round");
  const shown = made("output", "", "");
  const back = made("button", "", "◀"), on = made("button", "", "▶");
  back.setAttribute("aria-label", "one round back");
  on.setAttribute("aria-label", "one round on");
  label.append(slider);
  control.append(back, label, on, shown);
  const pictures = made("div", "windows");
  const draw = () => {
    memory.round = Number(slider.value);
    shown.textContent = `${slider.value} of ${chart.rounds}`;
    pictures.replaceChildren(...chart.groups.flatMap((group, place) => groupPicture(group, stretches[place], memory.round, width)));
    pictures.dataset.round = slider.value;
  };
  const step = (by) => {
    slider.value = Number(slider.value) + by;
    draw();
  };
  slider.addEventListener("input", draw);
  back.addEventListener("click", () => step(-1));
  on.addEventListener("click", () => step(1));
  control.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    step(by);
  });
  draw();
  return [control, pictures];
}

function groupPicture(group, stretches, round, width) {
  const held = group.held[round - 1], bars = [];
  held.forEach((number, row) => {
    if (number >= 0) for (const [begin, end] of stretches[number]) bars.push({ row, begin, end });
  });
  const rows = d3.range(held.length);
  const picture = plotted({
    width, height: 46 + 14 * held.length, marginLeft: 40, marginBottom: 38, marginTop: 6,
    x: { domain: [0, group.units], label: "unit", labelArrow: false, ticks: Math.max(3, Math.min(group.units, Math.round(width / 90))) },
    y: { domain: rows, label: null, tickSize: 0, ticks: rows },
    marks: [
      Plot.barX(rows, { x1: () => 0, x2: () => group.units, y: (row) => row, fill: "currentColor", fillOpacity: 0.07, insetTop: 1, insetBottom: 1 }),
      Plot.barX(bars, { x1: "begin", x2: "end", y: "row", fill: COLOURS[0], insetTop: 1, insetBottom: 1, className: "held" }),
    ],
  });
  return [made("p", "axis", `${group.name}: ${group.units} units; rows: participant`), picture];
}

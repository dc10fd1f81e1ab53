"use strict";
// The page: its sections from the data, drawn anew where the width changes or, on a live page, newer data comes.

const DRAWN = { lines, points, spans, cells, parts };
const POLL = 2000; // milliseconds between two questions for newer data

const state = { data: JSON.parse(document.getElementById("data").textContent), chosen: "", windows: {}, choices: {}, tag: "", note: "" };

/** One chart with its title; in its place a sentence, where it cannot be drawn. */
function figure(chart, width, section) {
  const box = made("figure", `chart ${chart.kind}`);
  box.append(made("figcaption", "", chart.title));
  try {
    if (chart.kind === "windows") box.append(...windowsStepper(chart, width, state.windows));
    else if (chart.kind === "choice") box.append(...choice(chart, width, section.id));
    else box.append(...DRAWN[chart.kind](chart, width));
  } catch (error) {
    box.append(made("p", "problem", `This chart cannot be drawn (${error.message}).`));
    console.error(error);
  }
  for (const note of chart.notes || []) box.append(made("p", "note", note));
  return box;
}

/** One of several charts, chosen by its title. */
function choice(chart, width, id) {
  const select = made("select", "");
  select.setAttribute("aria-label", chart.title);
  chart.charts.forEach((each, index) => {
    const option = made("option", "", each.title);
    option.value = String(index);
    select.append(option);
  });
  const shown = made("div", "");
  const draw = () => {
    state.choices[id] = select.value;
    shown.replaceChildren(...DRAWN[chart.charts[Number(select.value)].kind](chart.charts[Number(select.value)], Math.min(width, 620)));
  };
  select.value = String(Math.min(Number(state.choices[id] || 0), chart.charts.length - 1));
  select.addEventListener("change", draw);
  draw();
  return [select, shown];
}

function table(given) {
  const box = made("div", "table"), grid = made("table", "");
  if (given.title) grid.append(made("caption", "", given.title));
  const head = made("tr", "");
  for (const name of given.columns) head.append(made("th", "", name));
  grid.append(made("thead", ""), made("tbody", ""));
  grid.tHead.append(head);
  for (const row of given.rows) {
    const line = made("tr", "");
    for (const text of row) line.append(made("td", "", text));
    grid.tBodies[0].append(line);
  }
  box.append(grid);
  for (const note of given.notes || []) box.append(made("p", "note", note));
  return box;
}

function section(given, width) {
  const box = made("section", "");
  box.id = given.id;
  box.append(made("h2", "", given.title));
  if (given.text) box.append(made("p", "", given.text));
  for (const problem of given.problems || []) box.append(made("p", "problem", problem));
  const charts = given.charts || [];
  if (charts.length) {
    const grid = made("div", charts.length > 1 && charts.every((each) => each.kind === "lines" || each.kind === "points") ? "charts" : "");
    const narrow = grid.className && width > 760 ? (width - 24) / 2 : width;
    for (const each of charts) grid.append(figure(each, Math.floor(narrow), given));
    box.append(grid);
  }
  for (const each of given.tables || []) box.append(table(each));
  for (const each of given.code || []) {
    const more = made("details", "");
    more.append(made("summary", "", each.title), made("pre", "", each.text));
    box.append(more);
  }
  return box;
}

/** Which of several methods the parts below are about. */
function chooser(runs) {
  const select = made("select", "");
  runs.forEach((run) => select.append(made("option", "", run.name)));
  select.selectedIndex = Math.max(0, runs.findIndex((run) => run.name === state.chosen));
  select.addEventListener("change", () => {
    state.chosen = runs[select.selectedIndex].name;
    draw();
  });
  const label = made("label", "chooser", "Below, one method at a time: ");
  label.append(select);
  return label;
}

function draw() {
  const { data } = state, page = document.getElementById("page");
  const width = Math.max(260, page.clientWidth - 2);
  keepColours(data.runs.map((run) => run.name));
  const header = made("header", "");
  header.append(made("h1", "", data.title));
  if (data.live || state.note) {
    const live = made("p", "live", state.note || (data.finished ? "The run has ended." : "The run goes on; this page keeps up by itself."));
    live.setAttribute("role", "status");
    header.append(live);
  }
  const shown = [header, ...data.sections.map((each) => section(each, width))];
  if (!data.runs.length) shown.push(made("p", "problem", "There is no run yet. This page shows it as soon as it has begun."));
  else {
    if (data.runs.length > 1) shown.push(chooser(data.runs));
    const run = data.runs.find((each) => each.name === state.chosen) || data.runs[0];
    shown.push(...run.sections.map((each) => section(each, width)));
  }
  const open = [...page.querySelectorAll("details[open] > summary")].map((each) => each.textContent);
  const focus = document.activeElement && document.activeElement.getAttribute("aria-label");
  page.replaceChildren(...shown);
  for (const each of page.querySelectorAll("details > summary")) if (open.includes(each.textContent)) each.parentNode.open = true;
  if (focus) page.querySelector(`[aria-label="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
  page.dataset.drawn = String(Number(page.dataset.drawn || 0) + 1);
}

/** Ask for newer data, and draw it where there is some. The server says so by its tag. */
async function refresh() {
  let note = "";
  try {
    const answer = await fetch("data.json", { headers: state.tag ? { "If-None-Match": state.tag } : {}, cache: "no-store" });
    if (answer.status === 200) {
      state.tag = answer.headers.get("ETag") || "";
      state.data = await answer.json();
      document.title = state.data.title;
      state.note = "";
      draw();
    } else if (answer.status !== 304) note = `The data cannot be read (${answer.status}).`;
  } catch {
    note = "msfusion watch has ended; the page shows what it last knew.";
  }
  if (note !== state.note) {
    state.note = note;
    draw();
  }
  setTimeout(refresh, note ? 5 * POLL : POLL);
}

let drawnAt = 0;
function redraw() {
  const width = document.getElementById("page").clientWidth;
  if (width === drawnAt) return;
  drawnAt = width;
  draw();
}

redraw();
let waiting = 0;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(redraw, 150);
});
if (state.data.live) setTimeout(refresh, POLL);

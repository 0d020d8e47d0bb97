"use strict";
// Draws the charts, follows light, dark and paper, and, where the page is served, keeps it up to date.
const PAPER_WIDTH = 680;  // CSS pixels: the width of A4 within its margins

function theme() {
  const page = getComputedStyle(document.documentElement), get = name => page.getPropertyValue(name).trim();
  const axis = {gridcolor: get("--grid"), linecolor: get("--soft"), tickcolor: get("--soft"), color: get("--ink")};
  return {ink: get("--ink"), paper: get("--paper"), axis};
}

function coloured(layout, width) {
  const now = theme(), made = structuredClone(layout);
  made.font.color = now.ink;
  made.hoverlabel = {bgcolor: now.paper, bordercolor: now.axis.linecolor, font: {color: now.ink}};
  Object.assign(made.xaxis, now.axis);
  Object.assign(made.yaxis, now.axis);
  if (width) { made.width = width; made.autosize = false; }
  return made;
}

function draw(width) {
  for (const chart of document.querySelectorAll("main .chart")) {
    const figure = JSON.parse(document.getElementById(chart.dataset.figure).textContent);
    Plotly.react(chart, figure.data, coloured(figure.layout, width), {displayModeBar: false, responsive: true});
  }
}

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const one of opened) one.open = true;
  draw(PAPER_WIDTH);
});
addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
  draw();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
draw();

// ---- a served page: ask for its version, and take over what changed, where the reader is

function anchor() {
  const at = [...document.querySelectorAll("main section")].find(one => one.getBoundingClientRect().bottom > 0);
  return at && {id: at.id, top: at.getBoundingClientRect().top};
}

function replace(html) {
  const main = document.getElementById("main"), fresh = new DOMParser().parseFromString(html, "text/html").body;
  const open = [...main.querySelectorAll("details[open]")].map(one => one.id);
  const inside = document.activeElement.closest?.("details")?.id, at = scrollY > 0 && anchor();
  for (const id of open) fresh.querySelector("#" + CSS.escape(id))?.setAttribute("open", "");
  for (const chart of main.querySelectorAll(".chart")) Plotly.purge(chart);
  main.replaceChildren(...fresh.childNodes);
  draw();
  if (inside) document.getElementById(inside)?.querySelector("summary")?.focus({preventScroll: true});
  const now = at && document.getElementById(at.id);
  if (now) scrollBy(0, now.getBoundingClientRect().top - at.top);
}

function say(lines) {
  const places = document.querySelectorAll("main .status");
  places.forEach((place, i) => { if (lines[i] && place.textContent !== lines[i]) place.textContent = lines[i]; });
}

async function follow() {
  try {
    const told = await (await fetch("version", {cache: "no-store"})).json();
    if (told.version !== document.body.dataset.version) {
      const fresh = await fetch("content", {cache: "no-store"});
      if (fresh.ok) {
        replace(await fresh.text());
        document.body.dataset.version = told.version;
        document.getElementById("heard").textContent = ["Updated.", ...told.status].join(" ");
      }
    }
    say(told.status);
  } catch {
    say(["This page is no longer served; what it shows is what it last heard."]);
  }
  setTimeout(follow, 2000);
}
if (document.body.dataset.version) setTimeout(follow, 2000);

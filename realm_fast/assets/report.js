// Comforts only: the page says everything without this script.
"use strict";

// a switch between light and dark
const toggle = document.createElement("button");
toggle.className = "theme";
toggle.type = "button";
const isDark = () =>
  (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const name = () => { toggle.textContent = isDark() ? "Light" : "Dark"; };
toggle.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; name(); });
name();
document.body.prepend(toggle);

// the values under the pointer, on curves
for (const plot of document.querySelectorAll("[data-hover]")) {
  const chart = JSON.parse(plot.dataset.hover);
  const cursor = document.createElement("div");
  const tip = document.createElement("div");
  cursor.className = "cursor";
  tip.className = "tip";
  const hide = () => { cursor.remove(); tip.remove(); };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const wanted = chart.x[0] + ((event.clientX - box.left) / box.width) * (chart.x[1] - chart.x[0]);
    const lines = [];
    let at = null;
    for (const series of chart.series) {
      let best = null;
      for (const point of series.points) {
        if (best === null || Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted)) best = point;
      }
      if (best === null) continue;
      if (at === null) at = best[0];
      lines.push(`${series.label}: ${best[2]}`);
    }
    if (at === null) return hide();
    const share = (at - chart.x[0]) / (chart.x[1] - chart.x[0]);
    cursor.style.left = `${100 * share}%`;
    tip.replaceChildren();
    for (const text of [`${chart.xLabel} ${at}`, ...lines]) {
      const line = document.createElement("div");
      line.textContent = text;
      tip.append(line);
    }
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 12px)` : "";
    tip.style.right = share < 0.5 ? "" : `calc(${100 * (1 - share)}% + 12px)`;
    plot.append(cursor, tip);
  });
}

// a block under the pointer: its ribbons stand out
for (const flow of document.querySelectorAll(".flow")) {
  for (const cell of flow.querySelectorAll("[data-row]")) {
    cell.addEventListener("pointerenter", () => {
      flow.classList.add("tracing");
      for (const ribbon of flow.querySelectorAll(`.ribbon.row-${cell.dataset.row}`)) ribbon.classList.add("traced");
    });
    cell.addEventListener("pointerleave", () => {
      flow.classList.remove("tracing");
      for (const ribbon of flow.querySelectorAll(".traced")) ribbon.classList.remove("traced");
    });
  }
}

// paper cannot be unfolded
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
});

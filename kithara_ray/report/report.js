
// The figures under the pointer, or under the arrow keys.
"use strict";
const all = JSON.parse(document.getElementById("data-of-charts").textContent);
const shown = (value) => Math.abs(value) < 1e-3 && value !== 0 ? value.toExponential(2) : String(Number(value.toPrecision(5)));
for (const figure of document.querySelectorAll(".chart")) {
  const data = all[figure.dataset.chart];
  const plot = figure.querySelector(".plot"), cross = figure.querySelector(".cross"), tip = figure.querySelector(".tip");
  const steps = [...new Set(data.series.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = -1;
  const show = (index) => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const share = (steps[at] - data.x[0]) / (data.x[1] - data.x[0]);
    const rows = data.series.flatMap((series) => {
      const point = series.points.find((candidate) => candidate[0] === steps[at]);
      return point ? [`${series.name} ${shown(point[1])}`] : [];
    });
    tip.textContent = [`step ${steps[at]}`, ...rows].join("\n");
    cross.style.left = tip.style.left = `${100 * share}%`;
    tip.style.transform = share > 0.5 ? "translateX(calc(-100% - 8px))" : "translateX(8px)";
    cross.hidden = tip.hidden = false;
  };
  const hide = () => { cross.hidden = tip.hidden = true; };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const step = data.x[0] + (event.clientX - box.left) / box.width * (data.x[1] - data.x[0]);
    let best = 0;
    steps.forEach((candidate, index) => { if (Math.abs(candidate - step) < Math.abs(steps[best] - step)) best = index; });
    show(best);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (move) { show(at < 0 ? steps.length - 1 : at + move); event.preventDefault(); }
  });
}

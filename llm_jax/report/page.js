"use strict";
// Moving over a chart reads all of them off at that step; dragging shows the steps between in all; a double click shows
// everything again. Without this script the charts stand as they are, with each curve's last value in its legend.
(() => {
  const SIDE = 1000;
  const charts = [...document.querySelectorAll(".chart")].map((figure) => {
    const chart = JSON.parse(figure.querySelector("script").textContent);
    const items = [...figure.querySelectorAll(".legend [data-series] b")];
    return {
      ...chart,
      plot: figure.querySelector(".plot"),
      curves: figure.querySelector(".curves"),
      grid: figure.querySelector(".grid"),
      items: items.map((value) => ({ value, last: value.textContent })),
      shown: { x: chart.x, y: chart.y },
    };
  });
  if (charts.length === 0) return;

  const scaled = (chart, y) => (chart.scale === "log" ? Math.log10(y) : y);
  const along = ([low, high], x) => (x - low) / (high - low);
  const upward = (chart, [low, high], y) => along([scaled(chart, low), scaled(chart, high)], scaled(chart, y));

  function ticks(low, high, log, most = 7) {
    if (log && high / low > 5) {
      const first = Math.floor(Math.log10(low));
      const decades = [...Array(Math.ceil(Math.log10(high)) - first + 1).keys()].map((i) => i + first);
      let inside;
      for (const leads of [[1, 2, 5], [1, 3], [1]]) {
        inside = decades.flatMap((d) => leads.map((lead) => lead * 10 ** d)).filter((v) => low <= v && v <= high);
        if (inside.length <= most) return inside;
      }
      return inside.filter((_, i) => i % Math.ceil(inside.length / most) === 0);
    }
    const size = 10 ** Math.floor(Math.log10((high - low) / most));
    const count = (step) => Math.floor(high / step + 1e-9) - Math.ceil(low / step - 1e-9) + 1;
    const step = [1, 2, 2.5, 5, 10, 20].map((lead) => lead * size).find((s) => count(s) <= most);
    const first = Math.ceil(low / step - 1e-9);
    return [...Array(count(step)).keys()].map((i) => (first + i) * step);
  }

  const exponent = (v, digits) => v.toExponential(digits).replace(/\.?0*e/, "e").replace("e+", "e");

  function tickText(v) {
    for (const [size, letter] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(v) >= Math.max(size, 1e4)) return Number((v / size).toPrecision(6)) + letter;
    return v !== 0 && Math.abs(v) < 0.01 ? exponent(v, 5) : String(Number(v.toPrecision(6)));
  }

  function valueText(v, format) {
    if (format === "rate") return exponent(v, 2);
    if (format !== "short") return v.toFixed(3);
    for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(v) >= 0.9995 * size) return (v / size).toPrecision(3) + letter;
    return String(Number(v.toPrecision(3)));
  }

  // The point of a curve that is nearest to a step, null where the curve is further away than it is dense.
  function nearest({ x, y }, step) {
    let low = 0;
    let high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] < step) low = middle;
      else high = middle;
    }
    const index = Math.abs(x[low] - step) <= Math.abs(x[high] - step) ? low : high;
    if (step < x[0] - 0.5 || step > x[x.length - 1] + 0.5) return null;
    return y[index];
  }

  function place(text, className, side, share) {
    const label = document.createElement("span");
    label.className = className;
    label.textContent = text;
    label.style[side] = `${100 * share}%`;
    return label;
  }

  function draw(chart) {
    const { x, y } = chart.shown;
    const left = along(chart.x, x[0]) * SIDE;
    const right = along(chart.x, x[1]) * SIDE;
    const bottom = SIDE - upward(chart, chart.y, y[0]) * SIDE;
    const top = SIDE - upward(chart, chart.y, y[1]) * SIDE;
    const wide = SIDE / (right - left);
    const tall = SIDE / (bottom - top);
    chart.curves.setAttribute("transform", `matrix(${wide} 0 0 ${tall} ${-left * wide} ${-top * tall})`);
    chart.plot.querySelectorAll(".x, .y").forEach((label) => label.remove());
    chart.grid.replaceChildren();
    for (const value of ticks(y[0], y[1], chart.scale === "log")) {
      const share = upward(chart, y, value);
      const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
      line.setAttribute("d", `M0 ${SIDE * (1 - share)}H${SIDE}`);
      chart.grid.append(line);
      chart.plot.append(place(tickText(value), "y", "bottom", share));
    }
    for (const value of ticks(x[0], x[1], false)) chart.plot.append(place(tickText(value), "x", "left", along(x, value)));
    for (const level of chart.plot.querySelectorAll(".level")) {
      const share = upward(chart, y, Number(level.dataset.y));
      level.style.bottom = `${100 * share}%`;
      level.hidden = share < 0 || share > 1;
    }
  }

  // The heights that the curves have between two steps.
  function heights(chart, [from, to]) {
    const inside = chart.series.flatMap(({ x, y }) =>
      y.filter((v, i) => from <= x[i] && x[i] <= to && v !== null && (chart.scale !== "log" || v > 0)),
    );
    if (inside.length === 0) return chart.y;
    const ends = [Math.min(...inside), Math.max(...inside)].map((v) => scaled(chart, v));
    const margin = 0.06 * (ends[1] - ends[0]) || 0.05 * Math.abs(ends[1]) || 1;
    const out = [ends[0] - margin, ends[1] + margin];
    return chart.scale === "log" ? out.map((v) => 10 ** v) : out;
  }

  function show(range) {
    for (const chart of charts) {
      chart.shown = range === null ? { x: chart.x, y: chart.y } : { x: range, y: heights(chart, range) };
      draw(chart);
    }
    document.body.classList.toggle("zoomed", range !== null);
  }

  function point(step) {
    for (const chart of charts) {
      chart.items.forEach(({ value, last }, index) => {
        const y = step === null ? null : nearest(chart.series[index], step);
        value.textContent = step === null ? last : y === null ? "–" : valueText(y, chart.format);
      });
      chart.plot.querySelectorAll(".cursor").forEach((cursor) => cursor.remove());
      const share = step === null ? -1 : along(chart.shown.x, step);
      if (share < 0 || share > 1) continue;
      const cursor = place("", "cursor", "left", share);
      cursor.append(place(`step ${Math.round(step)}`, share > 0.8 ? "at before" : "at", "top", 0));
      chart.plot.append(cursor);
    }
  }

  for (const chart of charts) {
    const { plot } = chart;
    let start = null;
    const stepAt = (event) => {
      const box = plot.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      const [low, high] = chart.shown.x;
      return low + share * (high - low);
    };
    const mark = (event) => {
      plot.querySelectorAll(".dragged").forEach((old) => old.remove());
      if (start === null) return;
      const [from, to] = [start, stepAt(event)].sort((a, b) => a - b);
      const dragged = place("", "dragged", "left", along(chart.shown.x, from));
      dragged.style.width = `${100 * (along(chart.shown.x, to) - along(chart.shown.x, from))}%`;
      plot.append(dragged);
    };
    plot.addEventListener("pointermove", (event) => {
      point(Math.round(stepAt(event)));
      mark(event);
    });
    plot.addEventListener("pointerleave", () => point(null));
    plot.addEventListener("pointerdown", (event) => {
      if (event.pointerType !== "mouse" || event.button !== 0) return;
      plot.setPointerCapture(event.pointerId);
      start = stepAt(event);
      event.preventDefault();
    });
    plot.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const [from, to] = [start, stepAt(event)].sort((a, b) => a - b);
      start = null;
      mark(event);
      if (to - from > 0.02 * (chart.shown.x[1] - chart.shown.x[0])) show([from, to]);
    });
    plot.addEventListener("dblclick", () => show(null));
  }
  document.querySelectorAll(".all-steps").forEach((button) => button.addEventListener("click", () => show(null)));
})();

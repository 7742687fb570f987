"use strict";
(() => {
  // Values at the pointer, or with the arrow keys.
  const NS = "http://www.w3.org/2000/svg";
  const add = (parent, name, attributes) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return parent.appendChild(node);
  };
  for (const svg of document.querySelectorAll("svg[data-hover]")) {
    const columns = JSON.parse(svg.dataset.hover);
    if (!columns.length) continue;
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const layer = add(svg, "g", { class: "hover" });
    let current = columns.length - 1;
    const clear = () => layer.replaceChildren();
    const show = (index) => {
      clear();
      current = Math.max(0, Math.min(columns.length - 1, index));
      const [x, heading, found] = columns[current];
      add(layer, "path", { class: "cross", d: `M${x} 30V${height - 44}` });
      for (const [series, y] of found) {
        const g = add(layer, "g", { class: `s${series}` });
        add(g, "circle", { class: "dot", cx: x, cy: y, r: 4 });
      }
      const lines = [heading, ...found.map((f) => f[2])];
      const size = parseFloat(getComputedStyle(svg.querySelector("text")).fontSize);
      const wide = Math.max(...lines.map((l) => l.length)) * size * 0.56 + 16;
      const left = x + 10 + wide > width ? Math.max(0, x - 10 - wide) : x + 10;
      add(layer, "rect", { class: "tip", x: left, y: 34, width: wide, height: lines.length * size * 1.4 + 10, rx: 4 });
      lines.forEach((line, k) => {
        add(layer, "text", { class: "tiptext", x: left + 8, y: 34 + size * 1.4 * (k + 1) }).textContent = line;
      });
    };
    const nearest = (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      let best = 0;
      columns.forEach((c, k) => { if (Math.abs(c[0] - x) < Math.abs(columns[best][0] - x)) best = k; });
      show(best);
    };
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerleave", clear);
    svg.addEventListener("blur", clear);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { event.preventDefault(); show(layer.childElementCount ? current + step : current); }
      if (event.key === "Escape") clear();
    });
  }

  // A run in progress: load the page again, unless the reader says no or is busy in it.
  const reload = document.getElementById("reload");
  if (reload) {
    reload.closest("label").hidden = false;
    const folds = () => [...document.querySelectorAll("details[open]")];
    const open = new Set(folds()); // some begin so
    setInterval(() => {
      const busy = document.getElementById("find")?.value || folds().some((fold) => !open.has(fold));
      if (reload.checked && !busy) location.reload();
    }, 20000);
  }
})();

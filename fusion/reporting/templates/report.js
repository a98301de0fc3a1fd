"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  for (const [id, one] of Object.entries(data.words)) {
    const root = document.getElementById(id);
    const slider = root.querySelector("input");
    const buttons = [...root.querySelectorAll(".legend button")];
    const [names, colors] = [one.sources.map(([name]) => name), one.sources.map(([, color]) => color)];
    let chosen = -1;

    // Weights of a token by source, in the selected layer or, at slider position 0, averaged over layers.
    const weightsOf = (weights, length, token) => names.map((_, s) => {
      const layers = one.layers.length - 1;
      const at = (layer) => weights[(layer * length + token) * names.length + s] / 255;
      if (slider.valueAsNumber > 0) return at(slider.valueAsNumber - 1);
      return [...Array(layers).keys()].reduce((sum, layer) => sum + at(layer), 0) / layers;
    });

    const tokens = [...root.querySelectorAll(".row")].flatMap((row, r) => {
      const weights = Uint8Array.from(atob(one.weights[r]), (c) => c.charCodeAt(0));
      return [...row.querySelectorAll(".token")].map((element, token, all) => (
        { element, values: () => weightsOf(weights, all.length, token) }
      ));
    });

    const draw = () => {
      root.querySelector("output").textContent = one.layers[slider.valueAsNumber];
      for (const { element, values } of tokens) {
        const shown = values();
        const source = chosen >= 0 ? chosen : shown.indexOf(Math.max(...shown));
        element.style.setProperty("--c", colors[source]);
        element.style.setProperty("--w", `${Math.round(100 * shown[source])}%`);
      }
    };

    // Show all weights of a token, largest first, in a tooltip below it.
    const show = (element, values) => {
      const head = document.createElement("b");
      head.textContent = `${element.textContent} · ${one.layers[slider.valueAsNumber]}`;
      const table = document.createElement("table");
      for (const [value, name] of values().map((value, s) => [value, names[s]]).sort((a, b) => b[0] - a[0])) {
        const line = table.insertRow();
        line.insertCell().textContent = name;
        line.insertCell().textContent = value.toFixed(2);
      }
      tip.replaceChildren(head, table);
      tip.hidden = false;
      const box = element.getBoundingClientRect();
      const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
      tip.style.left = `${Math.max(4, left) + window.scrollX}px`;
      tip.style.top = `${box.bottom + window.scrollY + 4}px`;
    };

    slider.addEventListener("input", draw);
    for (const button of buttons) {
      button.addEventListener("click", () => {
        chosen = Number(button.dataset.source);
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        draw();
      });
    }
    for (const { element, values } of tokens) {
      for (const event of ["pointerenter", "focus"]) element.addEventListener(event, () => show(element, values));
      for (const event of ["pointerleave", "blur"]) element.addEventListener(event, () => { tip.hidden = true; });
    }
  }

  if (data.byTarget) {
    const slider = document.getElementById("target-layer");
    const lines = [...document.querySelectorAll("#by-target tbody tr")].map((line) => [...line.cells].slice(1));
    slider.addEventListener("input", () => {
      const layer = slider.valueAsNumber;
      slider.parentElement.querySelector("output").textContent = data.byTarget.layers[layer];
      data.byTarget.data[layer].forEach((values, r) => values.forEach((value, c) => {
        if (value === null) return;
        lines[r][c].textContent = value.toFixed(2);
        lines[r][c].style.setProperty("--w", `${Math.round((100 * Math.max(0, value)) / data.byTarget.largest)}%`);
      }));
    });
  }

  // Open the list of runs that a link of a table points to.
  const unfold = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target instanceof HTMLDetailsElement) target.open = true;
  };
  window.addEventListener("hashchange", unfold);
  unfold();

  const folded = [];
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) { part.open = true; folded.push(part); }
  });
  window.addEventListener("afterprint", () => { while (folded.length) folded.pop().open = false; });
})();

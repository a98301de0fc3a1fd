"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  // Position the tooltip below its element, within the window.
  const place = (element) => {
    const box = element.getBoundingClientRect();
    tip.hidden = false;
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(4, left) + window.scrollX}px`;
    tip.style.top = `${box.bottom + window.scrollY + 4}px`;
  };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  for (const [id, one] of Object.entries(data.words)) {
    const root = document.getElementById(id);
    const slider = root.querySelector("input");
    const names = JSON.parse(slider.dataset.names);
    const output = root.querySelector("output");
    const buttons = [...root.querySelectorAll(".legend button")];
    const count = one.sources.length;
    const rows = [...root.querySelectorAll(".row")].map((element, n) => ({
      tokens: [...element.querySelectorAll(".token")],
      weights: bytes(one.rows[n].weights),
    }));
    let chosen = -1;

    // The weights of a token: of one layer, or with position 0 the mean over all.
    const weightsOf = (row, token) => {
      const layer = Number(slider.value);
      const length = row.tokens.length;
      const at = (l, s) => row.weights[(l * length + token) * count + s] / 255;
      return one.sources.map((_, s) => {
        if (layer > 0) return at(layer - 1, s);
        let sum = 0;
        for (let l = 0; l < one.layers; l++) sum += at(l, s);
        return sum / one.layers;
      });
    };

    const draw = () => {
      output.textContent = names[Number(slider.value)];
      for (const row of rows) {
        row.tokens.forEach((element, token) => {
          const values = weightsOf(row, token);
          const source = chosen >= 0 ? chosen : values.indexOf(Math.max(...values));
          element.style.setProperty("--c", one.colours[source]);
          element.style.setProperty("--w", `${Math.round(100 * values[source])}%`);
        });
      }
    };

    const show = (row, token, element) => {
      const values = weightsOf(row, token);
      const head = document.createElement("b");
      head.textContent = `${element.textContent} · ${names[Number(slider.value)]}`;
      const table = document.createElement("table");
      values
        .map((value, s) => [value, s])
        .sort((a, b) => b[0] - a[0])
        .forEach(([value, s]) => {
          const line = table.insertRow();
          line.insertCell().textContent = one.sources[s];
          line.insertCell().textContent = value.toFixed(2);
          const bar = document.createElement("span");
          bar.className = "bar";
          bar.style.setProperty("--c", one.colours[s]);
          bar.style.width = `${Math.round(80 * value)}px`;
          line.insertCell().append(bar);
        });
      tip.replaceChildren(head, table);
      place(element);
    };

    slider.addEventListener("input", draw);
    for (const button of buttons) {
      button.addEventListener("click", () => {
        chosen = Number(button.dataset.source);
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        draw();
      });
    }
    for (const row of rows) {
      row.tokens.forEach((element, token) => {
        for (const event of ["pointerenter", "focus"]) element.addEventListener(event, () => show(row, token, element));
        for (const event of ["pointerleave", "blur"]) element.addEventListener(event, () => { tip.hidden = true; });
      });
    }
  }

  if (data.byTarget) {
    const slider = document.getElementById("target-layer");
    const output = slider.parentElement.querySelector("output");
    const lines = [...document.querySelectorAll("#by-target tbody tr")].map((line) => [...line.cells].slice(1));
    slider.addEventListener("input", () => {
      const layer = Number(slider.value);
      output.textContent = data.byTarget.layers[layer];
      data.byTarget.data[layer].forEach((values, r) => values.forEach((value, c) => {
        if (value === null) return;
        lines[r][c].textContent = value.toFixed(2);
        lines[r][c].style.setProperty("--w", `${Math.round((100 * Math.max(0, value)) / data.byTarget.largest)}%`);
      }));
    });
  }

  // A link of the table opens the folded runs.
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

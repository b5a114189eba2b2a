"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent || "null");
  const { figures, palette } = read("figure-data");
  const scheme = () => matchMedia("(prefers-color-scheme: dark)");
  // Texts of models and data enter the page as text nodes, never as markup.
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // ---------------------------------------------------------------- figures

  // "@name" and "@name/alpha" become the colours of the scheme in use.
  const resolve = (value, colors) => {
    if (Array.isArray(value)) return value.map((item) => resolve(item, colors));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, colors)]));
    }
    if (typeof value !== "string" || value[0] !== "@") return value;
    const [name, alpha] = value.slice(1).split("/");
    if (!(name in colors)) return value;
    if (!alpha) return colors[name];
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(colors[name].slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  };

  const merge = (base, more) => {
    const out = { ...base };
    for (const [key, value] of Object.entries(more)) {
      const nested = value && typeof value === "object" && !Array.isArray(value);
      out[key] = nested ? merge(base[key] || {}, value) : value;
    }
    return out;
  };

  const layoutOf = (figure, small, colors) => {
    const axis = {
      gridcolor: colors.line, zerolinecolor: colors.line, linecolor: colors.muted, automargin: true,
      tickfont: { size: small ? 10 : 11.5, color: colors.muted }, title: { font: { size: 12, color: colors.muted }, standoff: 8 },
      nticks: small ? 4 : 7,
    };
    const base = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colors.ink },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
      // On the right there is room for half of a tick's label: one at the edge would be left out otherwise.
      margin: small ? { l: 8, r: 16, t: 8, b: 8 } : { l: 12, r: 20, t: 12, b: 12 },
      xaxis: { ...axis, showgrid: false, ticks: "outside", ticklen: 3, tickcolor: colors.line }, yaxis: axis,
      hoverlabel: { bgcolor: colors.panel, bordercolor: colors.muted, font: { color: colors.ink, size: 12 }, align: "left" },
      showlegend: false, // the keyboard reaches the buttons above the figure, but not Plotly's own legend
    };
    return merge(base, resolve(figure.layout, colors));
  };

  const hidden = new Map(); // figure -> names of the lines that are switched off
  const hiddenRuns = new Set(); // names of runs that are switched off in every figure
  const swatch = (trace) => {
    if (trace.mode.startsWith("lines")) {
      if (trace.line.width < 1) return "line thin";
      return trace.meta || (trace.line.dash || "solid") === "solid" ? "line" : "dashed";
    }
    const symbol = (trace.marker || {}).symbol || "";
    return symbol || "point";
  };
  const legendOf = (node) => {
    const figure = figures[node.dataset.figure];
    // The lines of one name, such as those of an arm in several runs, have one button.
    const named = new Map();
    for (const trace of figure.traces) {
      if (trace.showlegend !== false && !named.has(trace.name)) named.set(trace.name, trace);
    }
    const off = new Set([...named].flatMap(([name, trace]) => (trace.visible === "legendonly" ? [name] : [])));
    hidden.set(node, off);
    if (named.size < 2) return;
    const box = make("div", "keys");
    for (const [name, trace] of named) {
      const button = make("button");
      button.type = "button";
      const mark = make("i", `swatch ${swatch(trace)}`);
      const shade = ((trace.mode === "markers" ? trace.marker : trace.line) || {}).color || "@muted";
      mark.style.color = `var(--${shade.slice(1).split("/")[0]})`;
      button.append(mark, name);
      button.setAttribute("aria-pressed", String(!off.has(name)));
      button.addEventListener("click", () => {
        if (!off.delete(name)) off.add(name);
        button.setAttribute("aria-pressed", String(!off.has(name)));
        draw(node);
      });
      box.append(button);
    }
    node.before(box);
  };
  const runButtons = [...document.querySelectorAll("[data-run]")];
  for (const button of runButtons) {
    button.addEventListener("click", () => {
      const { run } = button.dataset;
      if (!hiddenRuns.delete(run)) hiddenRuns.add(run);
      for (const other of runButtons) other.setAttribute("aria-pressed", String(!hiddenRuns.has(other.dataset.run)));
      drawn.forEach((node) => draw(node));
    });
  }

  const drawn = new Set();
  const draw = (node, fixed) => {
    const figure = figures[node.dataset.figure];
    const colors = palette[fixed || (scheme().matches ? "dark" : "light")];
    const small = node.closest(".small") !== null;
    const off = hidden.get(node);
    const traces = figure.traces.map((trace) => ({ ...trace, visible: !off.has(trace.name) && !hiddenRuns.has(trace.meta) }));
    const done = Plotly.react(node, resolve(traces, colors), layoutOf(figure, small, colors), {
      displayModeBar: false, responsive: true, showTips: false,
    });
    drawn.add(node);
    return done;
  };

  // ---------------------------------------------------------------- the run whose tables are shown

  const choice = byId("run-choice");
  if (choice) {
    const choose = () => {
      for (const node of document.querySelectorAll("[data-runs]")) {
        node.hidden = choice.value !== "" && !node.dataset.runs.split(" ").includes(choice.value);
      }
    };
    choice.addEventListener("change", choose);
    choose();
  }

  const canvases = [...document.querySelectorAll("[data-figure]")];
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
    }
  }, { rootMargin: "300px" });
  canvases.forEach(legendOf);
  canvases.forEach((node) => near.observe(node));
  // What is far below is drawn as soon as the page has nothing else to do: a capture of the whole page has every figure.
  const idle = window.requestIdleCallback || ((callback) => setTimeout(callback, 50));
  const undrawn = [...canvases];
  const drawNext = () => {
    const node = undrawn.shift();
    if (node === undefined) return;
    if (!drawn.has(node)) { near.unobserve(node); draw(node); }
    idle(drawNext);
  };
  addEventListener("load", () => idle(drawNext));
  // A list of its own: Chromium drops the event of one that is read between the change and the next frame.
  scheme().addEventListener("change", () => drawn.forEach((node) => draw(node)));

  const opened = [];
  addEventListener("beforeprint", () => {
    canvases.forEach((node) => { near.unobserve(node); draw(node, "light"); });
    // The paper is not as wide as the window: figures are scaled to it as drawings.
    for (const svg of document.querySelectorAll(".main-svg")) {
      if (!svg.hasAttribute("viewBox")) svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
    }
    for (const details of document.querySelectorAll("details:not([open])")) { details.open = true; opened.push(details); }
  });
  addEventListener("afterprint", () => {
    for (const svg of document.querySelectorAll(".main-svg")) svg.removeAttribute("viewBox");
    drawn.forEach((node) => draw(node));
    opened.splice(0).forEach((details) => { details.open = false; });
  });

  // ---------------------------------------------------------------- the section in view

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...links.keys()].map(byId);
  let current = null;
  const follow = () => {
    let at = sections[0];
    for (const section of sections) if (section.getBoundingClientRect().top < innerHeight * 0.3) at = section;
    if (innerHeight + scrollY >= document.documentElement.scrollHeight - 2) at = sections[sections.length - 1];
    if (!at || at === current) return;
    if (current) links.get(current.id).removeAttribute("aria-current");
    current = at;
    const link = links.get(at.id);
    link.setAttribute("aria-current", "true");
    const bar = document.querySelector("nav");
    if (bar.scrollWidth > bar.clientWidth) bar.scrollLeft = link.offsetLeft - bar.clientWidth / 2 + link.offsetWidth / 2;
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; follow(); });
  }, { passive: true });
  follow();

  // For live.js, which updates the page of a run that still goes on.
  window.report = { figures, redraw: () => drawn.forEach((node) => draw(node)) };

  // ---------------------------------------------------------------- samples

  const samples = read("sample-data");
  if (!samples) return;
  const PAGE = 30, MOST = 480; // further scrolling adds more rows at a time
  const list = byId("sample-list"), more = byId("sample-more"), count = byId("sample-count");
  const search = byId("sample-search"), order = byId("sample-order");
  const controls = byId("sample-controls");
  const checked = (name) => [...controls.querySelectorAll(`input[name="${name}"]:checked`)].map((box) => box.value);
  const haystacks = samples.rows.map((row) => row.cells.reduce(
    (text, cell) => (cell || []).reduce((all, sample) => `${all}\n${sample[0]}`, text), row.prompt).toLowerCase());

  const fill = (node, text, wanted) => {
    if (!wanted) { node.textContent = text; return node; }
    const lower = text.toLowerCase();
    // Lower-casing can change the length of a text (İ), and the marks would be in the wrong places.
    if (lower.length !== text.length) { node.textContent = text; return node; }
    let from = 0;
    for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, from)) {
      node.append(text.slice(from, at), make("mark", "", text.slice(at, at + wanted.length)));
      from = at + wanted.length;
    }
    node.append(text.slice(from));
    return node;
  };
  const signed = (value) => value.toFixed(2).replace(/^-(?=0\.00$)/, "").replace("-", "−");

  const answer = (sample, wanted) => {
    const [text, tokens, cut, gold, explicit, implicit] = sample;
    const box = make("div");
    const words = fill(make("p", text.trim() ? "text" : "text empty"), text.trim() ? text : "(empty)", text.trim() ? wanted : "");
    words.dir = "auto";
    const scores = make("dl", "scores");
    const entries = [["gold", gold], ["explicit", explicit], ["implicit", implicit]];
    for (const [name, value] of entries) {
      if (value !== null) scores.append(make("dt", "", name), make("dd", "", signed(value)));
    }
    scores.append(make("dt", "", "tokens"), make("dd", "", tokens.toLocaleString("en")));
    if (cut) scores.append(make("dt", "cut", "truncated"));
    box.append(words, scores);
    return box;
  };

  const rowOf = (row, columns, wanted) => {
    const node = make("article", "row");
    node.dataset.prompt = row.id;
    const prompt = fill(make("p", "prompt"), row.prompt, wanted);
    prompt.dir = "auto";
    node.append(prompt);
    if (row.judged.length) {
      const judged = make("p", "judged");
      for (const [run, judge, preference] of row.judged) {
        const who = preference > 0.5 ? "RM + PPO" : preference < 0.5 ? "DPO" : "tie";
        const item = make("span", "", `judge ${judge}${samples.runs.length > 1 ? ` (${samples.runs[run]})` : ""}: `);
        item.append(make("b", preference > 0.5 ? "c-rm_ppo" : preference < 0.5 ? "c-dpo" : "", who));
        judged.append(item);
      }
      node.append(judged);
    }
    const cells = make("div", "cells");
    let longest = row.prompt.length / 3;
    for (const index of columns) {
      const column = samples.columns[index], cell = row.cells[index];
      const box = make("div", `cell c-${column.color}`);
      box.append(make("h4", "", column.label));
      if (!cell) box.append(make("p", "empty", "no answer to this prompt"));
      (cell || []).forEach((sample, place) => {
        longest = Math.max(longest, sample[0].length + 30 * sample[0].split("\n").length);
        if (place < 1) { box.append(answer(sample, wanted)); return; }
        if (place === 1) {
          const rest = make("details");
          rest.append(make("summary", "", `${cell.length - 1} more`));
          box.append(rest);
        }
        box.lastElementChild.append(answer(sample, wanted));
      });
      cells.append(box);
    }
    node.append(cells);
    if (longest > 420) {
      node.classList.add("folded");
      const button = make("button", "", "Show in full");
      button.type = "button";
      button.setAttribute("aria-expanded", "false");
      button.addEventListener("click", () => {
        const folded = node.classList.toggle("folded");
        button.textContent = folded ? "Show in full" : "Fold";
        button.setAttribute("aria-expanded", String(!folded));
      });
      node.append(button);
    }
    return node;
  };

  let matching = [], shown = 0;
  const showMore = () => {
    const columns = checked("column").map(Number), wanted = search.value.trim().toLowerCase();
    const next = Math.min(matching.length, shown + Math.min(MOST, Math.max(PAGE, shown)));
    list.append(...matching.slice(shown, next).map((index) => rowOf(samples.rows[index], columns, wanted)));
    shown = next;
    more.hidden = shown >= matching.length;
    const total = samples.rows.length;
    count.textContent = matching.length === total ? `${total.toLocaleString("en")} prompts` :
      `${matching.length.toLocaleString("en")} of ${total.toLocaleString("en")} prompts`;
  };
  const renew = () => {
    const wanted = search.value.trim().toLowerCase(), flags = checked("flag"), key = order.value;
    matching = samples.rows.map((_, index) => index).filter((index) =>
      flags.every((flag) => samples.rows[index].flags.includes(flag)) && (!wanted || haystacks[index].includes(wanted)));
    if (key) matching.sort((a, b) => samples.rows[b][key] - samples.rows[a][key] || a - b);
    list.replaceChildren();
    shown = 0;
    showMore();
  };
  let timer = 0;
  search.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(renew, 120); });
  controls.addEventListener("change", (event) => { if (event.target !== search) renew(); });
  more.addEventListener("click", showMore);
  const end = new IntersectionObserver((entries) => {
    if (!entries[entries.length - 1].isIntersecting || more.hidden) return;
    showMore();
    // Observe it again: it may still be in view, and the observer reports only changes.
    end.unobserve(more);
    end.observe(more);
  }, { rootMargin: "600px" });
  end.observe(more);
  addEventListener("beforeprint", () => { while (!more.hidden) showMore(); });
  renew();
})();

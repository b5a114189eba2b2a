"use strict";
// The page of a run that still goes on asks its server (duel watch, on this machine) for newer versions of itself.
(() => {
  const { figures, redraw } = window.report;
  const note = document.getElementById("live");
  const shape = (all) => JSON.stringify(Object.entries(all).map(([id, figure]) => [id, figure.traces.map((trace) => trace.name)]));
  const headings = (page) => [...page.querySelectorAll("nav a")].map((link) => link.hash).join();
  const follow = async () => {
    try {
      const version = await (await fetch("version")).text();
      if (version !== document.body.dataset.live && !document.hidden) {
        const page = new DOMParser().parseFromString(await (await fetch("./")).text(), "text/html");
        const next = JSON.parse(page.getElementById("figure-data").textContent);
        // New numbers go into the existing figures. A new section, figure or line needs a new page.
        const progress = page.getElementById("progress");
        if (!progress || headings(page) !== headings(document) || shape(next.figures) !== shape(figures)) { location.reload(); return; }
        Object.assign(figures, next.figures);
        redraw();
        document.getElementById("progress").replaceWith(progress);
        document.body.dataset.live = page.body.dataset.live;
      }
      note.className = "";
      note.textContent = "live: this page follows the run";
    } catch (error) {
      note.className = "lost";
      note.textContent = "duel watch has ended: this page shows the run as it was then";
    }
    setTimeout(follow, 2000);
  };
  setTimeout(follow, 2000);
})();

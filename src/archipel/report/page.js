"use strict";
(() => {
  const motion = document.getElementById("motion");
  const smooth = document.getElementById("smooth");
  const stills = Array.from(document.querySelectorAll("source.still"));
  const wish = window.matchMedia("(prefers-reduced-motion: reduce)");
  let paused = wish.matches;
  const show = () => {
    // A source that applies is shown instead of the moving picture; taking it away starts all clips together.
    for (const still of stills) still.media = paused ? "all" : "not all";
    motion.textContent = paused ? "Play clips" : "Pause clips";
    motion.setAttribute("aria-pressed", String(paused));
  };
  if (stills.length) {
    motion.hidden = smooth.hidden = false;
    motion.addEventListener("click", () => { paused = !paused; show(); });
    smooth.addEventListener("click", () => {
      const on = document.body.classList.toggle("smooth");
      smooth.setAttribute("aria-pressed", String(on));
    });
    wish.addEventListener("change", () => { paused = wish.matches; show(); });
    show();
  }
})();

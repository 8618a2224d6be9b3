// Says in words that the server is away, and opens the page anew when it is back: the jobs are the server's, and the new page
// takes up the last one. Prompts that were typed are carried over.
(() => {
  const EVERY = 3000, PATIENCE = 10000, KEY = "archipel-prompts", PROMPTS = ".prompt-box textarea";
  const WORDS = "The server is away. What was asked for is kept; this page goes on when the server is back.";
  const typed = {};
  let own, failures = 0, bar;
  const nameOf = (box) => box.closest("label")?.innerText || "";
  document.addEventListener("input", (event) => {
    if (event.isTrusted && event.target.matches?.(PROMPTS)) typed[nameOf(event.target)] = event.target.value;
  }, true);
  addEventListener("pagehide", () => {
    if (!failures) return;
    try { sessionStorage.setItem(KEY, JSON.stringify(typed)); } catch { /* the words are lost, the page is not */ }
  });
  function say() {
    if (bar) return;
    bar = document.createElement("div");
    bar.className = "server-away";
    bar.setAttribute("role", "alert");
    document.body.append(bar);
    bar.textContent = WORDS;
  }
  async function look() {
    try {
      const answer = await fetch("gradio_api/app_id", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
      if (answer.status >= 500) throw new Error(String(answer.status));
      const now = answer.ok ? await answer.text() : null; // not ok: another login is needed, or too much was asked
      const other = now !== null && own !== undefined && now !== own;
      if (other && !failures) failures = 1; // it was away between two looks
      if (other || (bar && answer.status !== 429)) { location.reload(); return; }
      own ??= now ?? undefined;
      failures = 0;
    } catch {
      if (++failures >= 2) say();
    }
    setTimeout(look, EVERY);
  }
  function carryOver() {
    let kept = {};
    try { kept = JSON.parse(sessionStorage.getItem(KEY) || "{}"); sessionStorage.removeItem(KEY); } catch { return; }
    const until = Date.now() + PATIENCE;
    const timer = setInterval(() => {
      for (const box of document.querySelectorAll(PROMPTS)) {
        const name = nameOf(box);
        if (!(name in kept)) continue;
        if (!(name in typed)) { box.value = kept[name]; box.dispatchEvent(new Event("input", { bubbles: true })); }
        delete kept[name];
      }
      if (!Object.keys(kept).length || Date.now() > until) clearInterval(timer);
    }, 200);
  }
  carryOver();
  look();
})();

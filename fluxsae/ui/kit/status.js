// Progress, step by step, with a time that is measured and not guessed.
// What there is to see after a step goes to whoever shows it.
FS.define("fs-status", (root, data) => {
  FS.emit(document, "seen", data.state === "working" ? data.view : null);
  if (data.state !== "working") FS._since = null;
  if (data.state === "waiting") {
    const others = data.ahead === 1 ? "1 request is before you." : `${data.ahead} requests are before you.`;
    const words = `${data.loading ? "FLUX is being loaded. " : ""}${data.ahead ? others : ""}` || "Starting.";
    root.append(
      FS.el(
        "div",
        { class: "fs-status", role: "status", "data-makes": data.makes },
        FS.el("span", { class: "fs-num", text: words }),
        FS.el("span", { class: "fs-quiet", text: "What is shown can be used meanwhile." }),
      ),
    );
  }
  if (data.state === "failed" && data.words) {
    root.append(FS.el("p", { class: "fs-notice", role: "alert", text: data.words }));
  }
  if (data.state !== "working") return;
  if (!FS._since || data.step <= 1) FS._since = { time: performance.now(), step: data.step };
  const done = data.step - FS._since.step;
  const left = done > 1 ? ((performance.now() - FS._since.time) / done) * (data.n_steps - data.step) / 1000 : null;
  const time = left === null ? "" : left < 1.5 ? "about a second left" : `about ${Math.round(left)} s left`;
  root.append(
    FS.el(
      "div",
      { class: "fs-status", role: "status", "data-makes": data.makes },
      FS.el("span", { class: "fs-num", text: `${data.counts} ${data.step} of ${data.n_steps}` }),
      FS.bar(data.step / data.n_steps, "var(--fs-accent)", "progress"),
      FS.el("span", { class: "fs-quiet fs-num", text: time }),
    ),
  );
});

// Says that a link has filled the tab.
FS.define("fs-arrived", (root, data) => setTimeout(() => FS.emit(root, "arrive", data), 50));

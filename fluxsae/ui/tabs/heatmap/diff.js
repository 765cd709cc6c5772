// Difference of two peaks, as a share of the feature's maximum, from which something is said to differ.
const LEAST_TILT = 0.1;
// Two prompts side by side: what fires in one and not in the other.
FS.define("fs-diff", (root, data) => {
  const canvases = data.images.map(() =>
    FS.el("canvas", { class: "fs-canvas fs-rounded", width: 256, height: 256, "aria-hidden": "true" })
  );
  let chosen = null;
  const paint = () =>
    canvases.forEach((canvas, at) =>
      FS.drawHeat(canvas, {
        url: data.images[at].image,
        rows: data.rows,
        cols: data.cols,
        opacity: 0.85,
        map: chosen === null ? null : FS.bytes(chosen.maps[at]),
      })
    );
  const list = FS.el(
    "ol",
    { class: "fs-rank" },
    data.features.map((feature) => {
      const button = FS.nameLink(root, feature, {
        "aria-pressed": "false",
        onclick: () => {
          chosen = feature;
          for (const other of list.querySelectorAll("button")) {
            other.setAttribute("aria-pressed", String(other === button));
          }
          paint();
          FS.emit(root, "select", { hookpoint: data.hookpoint, feature: feature.feature });
        },
      });
      const tilt = feature.relatives[1] - feature.relatives[0];
      return FS.el(
        "li",
        {},
        button,
        FS.el(
          "span",
          {
            class: "fs-tilt",
            role: "img",
            "aria-label": `${FS.percent(feature.relatives[0])} in the first, ${
              FS.percent(feature.relatives[1])
            } in the second`,
          },
          FS.el("span", {
            style: {
              background: feature.colour,
              left: `${50 + Math.min(0, tilt) * 50}%`,
              width: `${Math.abs(tilt) * 50}%`,
            },
          }),
        ),
        FS.el("span", {
          class: "fs-num fs-quiet",
          text: `${FS.percent(feature.relatives[0])} / ${FS.percent(feature.relatives[1])}`,
        }),
      );
    }),
  );
  const most = Math.max(0, ...data.features.map(({ relatives }) => Math.abs(relatives[1] - relatives[0])));
  const heading = most < LEAST_TILT
    ? `Nothing differs: no feature's peak changes by ${FS.percent(LEAST_TILT)} of its maximum or more`
    : "What differs most";
  root.append(
    FS.el(
      "section",
      { class: "fs-diff", "aria-label": "Two prompts compared" },
      ...data.notices.map((text) => FS.el("p", { class: "fs-notice", text })),
      FS.el(
        "div",
        { class: "fs-two" },
        canvases.map((canvas, at) =>
          FS.el("figure", { class: "fs-figure" }, canvas, FS.el("figcaption", { text: `“${data.images[at].prompt}”` }))
        ),
      ),
      FS.el("h3", { class: "fs-h", text: heading }),
      FS.el("p", {
        class: "fs-quiet",
        text:
          "A bar to the left means that the feature fires more in the first image; to the right, in the second. Choose one to see where. Numbers are peaks as shares of each feature's maximum.",
      }),
      list,
    ),
  );
  paint();
});

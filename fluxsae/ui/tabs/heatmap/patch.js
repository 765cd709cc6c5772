// What fires at one patch, each name once: asked of the server and told beside the picture.
"use strict";

FS.patch = (root, data) => {
  const line = (feature, others) => FS.el("li", {},
    FS.el("button", { class: "fs-link fs-row", type: "button", onclick: () => FS.emit(root, "select", { hookpoint: data.hookpoint, feature: feature.feature }) },
      FS.chip(feature.colour), FS.el("span", { class: "fs-label", text: FS.title(feature) }),
      FS.el("span", { class: "fs-quiet fs-num", text: `#${feature.feature}` })),
    FS.bar(feature.relative, feature.colour, `${FS.percent(feature.relative)} of its maximum`),
    FS.el("span", { class: "fs-num fs-quiet", text: FS.percent(feature.relative) }),
    others.length ? FS.alike(others, (all) => FS.el("ol", { class: "fs-rank" }, all.map((other) => line(other, [])))) : null);
  return FS.el("section", { class: "fs-patch", "aria-label": `What fires at patch ${data.row}, ${data.column}` },
    FS.el("div", { class: "fs-row fs-between" },
      FS.el("h2", { class: "fs-h", text: `At the patch in row ${data.row}, column ${data.column}` }),
      FS.el("button", { class: "fs-button fs-small", type: "button", text: "Close", onclick: () => root.tellPatch(null) })),
    FS.el("p", { class: "fs-quiet", text: `Rows and columns count from 0 at the top left. Bars: shares of each feature's maximum in the run.` }),
    data.features.length
      ? FS.el("ol", { class: "fs-rank" }, FS.byLabel(data.features).map(([head, ...others]) => line(head, others)))
      : FS.el("p", { class: "fs-quiet", text: "Nothing fires here: the patch looks like the average of all images to the autoencoder." }),
    FS.code(data.code));
};

FS.define("fs-patch", (root, data) => {
  const lab = document.querySelector("fs-lab");
  if (lab && lab.tellPatch) lab.tellPatch(data);
});

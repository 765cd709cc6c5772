// What fires at one patch: the complete ranking, asked of the server.
"use strict";

FS.define("fs-patch", (root, data) => {
  root.append(FS.el("section", { class: "fs-patch", "aria-label": `What fires at patch ${data.row}, ${data.column}` },
    FS.el("h3", { class: "fs-h", text: `At the patch in row ${data.row}, column ${data.column}` }),
    data.features.length
      ? FS.el("ol", { class: "fs-rank" }, data.features.map((feature) => FS.el("li", {},
        FS.el("button", { class: "fs-link fs-row", type: "button", onclick: () => FS.emit(root, "select", { hookpoint: data.hookpoint, feature: feature.feature }) },
          FS.chip(feature.colour), FS.el("span", { class: "fs-label", text: FS.title(feature) }),
          FS.el("span", { class: "fs-quiet fs-num", text: `#${feature.feature}` })),
        FS.bar(feature.relative, feature.colour, `${FS.percent(feature.relative)} of its maximum`),
        FS.el("span", { class: "fs-num fs-quiet", text: FS.percent(feature.relative) }))))
      : FS.el("p", { class: "fs-quiet", text: "Nothing fires here: the patch looks like the average of all images to the autoencoder." }),
    FS.code(data.code)));
});

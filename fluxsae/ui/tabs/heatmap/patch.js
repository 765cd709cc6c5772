// What fires at one patch, each name once, beside the image.
FS.patch = (root, data) => {
  const line = (feature, others) =>
    FS.el(
      "li",
      {},
      FS.nameLink(root, feature),
      FS.bar(feature.relative, feature.colour, `${FS.percent(feature.relative)} of its maximum`),
      FS.el("span", { class: "fs-num fs-quiet", text: FS.percent(feature.relative) }),
      others.length
        ? FS.alike(others, (all) => FS.el("ol", { class: "fs-rank" }, all.map((other) => line(other, []))))
        : null,
    );
  return FS.el(
    "section",
    { class: "fs-patch", "aria-label": `What fires at patch ${data.row}, ${data.column}` },
    FS.el(
      "div",
      { class: "fs-row fs-between" },
      FS.el("h2", { class: "fs-h", text: `Patch in row ${data.row}, column ${data.column}` }),
      FS.button("Close", () => root.tellPatch(null)),
    ),
    FS.el("p", {
      class: "fs-quiet",
      text: `Rows and columns count from 0 at the top left. Bars show the share of each feature's maximum in the run.`,
    }),
    data.features.length
      ? FS.el("ol", { class: "fs-rank" }, FS.byLabel(data.features).map(([head, ...others]) => line(head, others)))
      : FS.el("p", {
        class: "fs-quiet",
        text: "No feature fires here.",
      }),
    FS.code(data.code),
  );
};

FS.define("fs-patch", (_root, data) => {
  const lab = document.querySelector("fs-lab");
  if (lab && lab.tellPatch) lab.tellPatch(data);
});

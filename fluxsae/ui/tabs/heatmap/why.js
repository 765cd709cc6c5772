// Why a feature fires at one step: words and earlier features, by what the feature loses without each.
const LITTLE = 0.03; // share of the feature's strength below which an effect is called little
const signed = (share) =>
  Math.abs(share) < 0.0005
    ? "0 %"
    : `${share < 0 ? "−" : "+"}${Math.abs(100 * share).toFixed(Math.abs(share) < 0.095 ? 1 : 0)} %`;

FS.why = (root, data) => {
  const shares = [...data.words, ...data.features].map((each) => Math.abs(each.share));
  const widest = Math.max(0.1, ...shares);
  const bar = (share, name) =>
    FS.el(
      "span",
      { class: "fs-tilt", role: "img", "aria-label": `${name}: ${signed(share)}` },
      FS.el("span", {
        style: {
          background: share < 0 ? "var(--fs-soft)" : "var(--fs-accent)",
          left: `${50 + Math.min(0, share / widest) * 50}%`,
          width: `${Math.max(0.5, (Math.abs(share) / widest) * 50)}%`,
        },
      }),
    );
  const line = (head, share, name) =>
    FS.el("li", {}, head, bar(share, name), FS.el("span", { class: "fs-num fs-quiet", text: signed(share) }));
  const words = data.words.map((each) => line(FS.el("span", { text: `“${each.word}”` }), each.share, each.word));
  const features = data.features.map((feature) => {
    const openPage = () => FS.emit(root, "page", { hookpoint: feature.hookpoint, feature: feature.feature });
    return line(FS.nameLink(root, feature, { onclick: openPage }), feature.share, `feature ${feature.feature}`);
  });
  const list = (title, lines, none) => [
    FS.el("h3", { class: "fs-h", text: title }),
    lines.length ? FS.el("ol", { class: "fs-rank" }, lines) : FS.el("p", { class: "fs-quiet", text: none }),
  ];
  const where = data.row === null ? "the whole image" : `the patch in row ${data.row}, column ${data.column}`;
  const isLittle = data.features.length && data.features.every(({ share }) => Math.abs(share) < LITTLE);
  const step = `step ${data.step + 1} of ${data.num_inference_steps}, at noise level ${data.sigma.toFixed(2)}`;
  const left = FS.percent(data.without_prompt / data.drive);
  const found = data.fires
    ? [
      FS.el("p", {
        class: "fs-quiet",
        text:
          `One step (${step}), over ${where}. Each word and each feature was taken away for this step alone. The figure is the share of the feature's strength that went with it; minus means that the feature became stronger. Effects overlap and need not sum to 100 %.`,
      }),
      ...list("Words of the prompt", words, "The prompt has no word to take away."),
      FS.el("p", {
        text:
          `Without any word at this step, ${left} is left. That part comes from the image as it was before this step.`,
      }),
      ...list(
        "Earlier features",
        features,
        data.places.length
          ? "No earlier feature has an effect."
          : "This run has no earlier hook point, so no earlier feature was tried.",
      ),
      isLittle
        ? FS.el("p", { text: "Each of them has little effect: no single earlier feature makes it fire." })
        : null,
      ...data.places.map(({ place, not_reconstructed: missing }) =>
        FS.el("p", {
          class: "fs-quiet",
          text: `What the SAE at “${place}” does not reconstruct: ${
            signed(missing / data.drive)
          }. This figure alone is predicted from the gradient, not measured.`,
        })
      ),
    ]
    : [
      FS.el("p", {
        text:
          `The feature does not fire at ${where} at this step (${step}), so nothing made it fire. Choose another step${
            data.row === null ? "" : " or patch"
          }.`,
      }),
    ];
  return FS.el(
    "section",
    { class: "fs-why", "aria-label": `Why feature ${data.feature} fires` },
    FS.el(
      "div",
      { class: "fs-row fs-between" },
      FS.el("h2", { class: "fs-h", text: `Why ${data.label ? `“${data.label}”` : "it"} fires` }),
      FS.button("Close", () => root.tellWhy(null), { "aria-label": "Close why it fires" }),
    ),
    ...found,
    FS.code(data.code),
  );
};

FS.define("fs-why", (_root, data) => {
  const lab = document.querySelector("fs-lab");
  if (!lab || !lab.tellWhy) return;
  lab.tellWhy(data);
  const [strongest] = data.words;
  if (strongest && data.fires) FS.say(`The word with most effect: ${strongest.word}, ${signed(strongest.share)}`);
});

// Which word of its top image's caption, left out, silences a feature.
FS.define("fs-silence", (root, data) => {
  const open = (document.querySelector("fs-feature") || {}).data;
  if (!open || open.feature !== data.feature || open.hookpoint !== data.hookpoint) return; // another one was opened meanwhile
  const best = data.without[0];
  const left = (word) => FS.percent(Math.max(0, word.left));
  const verdict = best.left <= 0.1
    ? `In this image the feature is silent without “${best.word}”.`
    : best.left <= 0.6
    ? `In this image it depends most on “${best.word}”: without it, ${left(best)} of its peak remains.`
    : `In this image no single word silences it: without “${best.word}”, ${left(best)} of its peak remains.`;
  const figure = (picture, ...caption) => {
    const canvas = FS.el("canvas", {
      class: "fs-picture",
      width: 128,
      height: 128,
      role: "img",
      "aria-label": `“${picture.prompt}”`,
    });
    FS.drawHeat(canvas, {
      url: picture.image,
      map: FS.bytes(picture.map),
      rows: data.rows,
      cols: data.cols,
      opacity: 1,
      spotlight: true,
    });
    return FS.el(
      "figure",
      { class: "fs-figure", style: { "--chip": data.colour } },
      canvas,
      FS.el("figcaption", {}, caption),
    );
  };
  root.append(
    FS.el(
      "section",
      { class: "fs-patch", "aria-label": `Which word silences feature ${data.feature}` },
      FS.el("h3", { class: "fs-h", text: verdict }),
      FS.el("p", {
        class: "fs-quiet",
        text: `Feature ${data.feature}, ${
          FS.title(data)
        }; its best image, “${data.prompt}”, seed ${data.seed}, and the same without each word. Bars show how much of its peak is left. This is one image: in others it may depend on other words.`,
      }),
      FS.el(
        "div",
        { class: "fs-pictures" },
        figure(
          data.whole,
          FS.el("strong", { text: "all words" }),
          FS.bar(1, data.colour, "100 %"),
          FS.el("span", { class: "fs-num fs-quiet", text: "100 %" }),
        ),
        data.without.map((word) =>
          figure(
            word,
            FS.el("strong", { text: `without “${word.word}”` }),
            FS.bar(word.left, data.colour, `${left(word)} is left`),
            FS.el("span", { class: "fs-num fs-quiet", text: `${left(word)} is left` }),
          )
        ),
      ),
    ),
  );
  FS.say(verdict);
  root.scrollIntoView({ behavior: "smooth", block: "nearest" });
});

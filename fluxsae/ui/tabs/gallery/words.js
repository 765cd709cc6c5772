// Which words of the captions of its best images, left out, silence a feature.
FS.define("fs-silence", (root, data) => {
  const open = (document.querySelector("fs-feature") || {}).data;
  if (!open || open.feature !== data.feature || open.hookpoint !== data.hookpoint) return; // another one was opened meanwhile
  const left = (word) => FS.percent(Math.max(0, word.left));
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
  const strip = (image) =>
    FS.el(
      "div",
      { class: "fs-pictures" },
      figure(
        image.whole,
        FS.el("strong", { text: "all words" }),
        FS.bar(1, data.colour, "100 %"),
        FS.el("span", { class: "fs-num fs-quiet", text: "100 %" }),
      ),
      image.without.map((word) =>
        figure(
          word,
          FS.el("strong", { text: `without “${word.word}”` }),
          FS.bar(word.left, data.colour, `${left(word)} is left`),
          FS.el("span", { class: "fs-num fs-quiet", text: `${left(word)} is left` }),
        )
      ),
    );
  const named = (image) => `“${image.prompt}”, seed ${image.seed}`;
  const [first, ...others] = data.images;
  root.append(
    FS.el(
      "section",
      { class: "fs-patch", "aria-label": `Which word silences feature ${data.feature}` },
      FS.el("h3", { class: "fs-h", text: data.verdict }),
      FS.el("p", {
        class: "fs-quiet",
        text: `Feature ${data.feature}, ${FS.title(data)}. ${data.remarks} Bars show how much of its peak is left.`,
      }),
      FS.el("p", { class: "fs-quiet", text: named(first) }),
      strip(first),
      others.map((image) =>
        FS.el(
          "details",
          { class: "fs-fold" },
          FS.el("summary", {
            text: `${named(image)}: without “${image.without[0].word}”, ${left(image.without[0])} is left`,
          }),
          strip(image),
        )
      ),
    ),
  );
  FS.say(data.verdict);
  root.scrollIntoView({ behavior: "smooth", block: "nearest" });
});

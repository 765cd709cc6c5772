// The gallery: cards that mean something first, and one feature's page.
FS.pictures = (pictures, { rows, cols, colour, words }) =>
  FS.el(
    "div",
    { class: "fs-pictures" },
    pictures.map((picture) => {
      const canvas = FS.el("canvas", {
        class: "fs-picture",
        width: 128,
        height: 128,
        role: "img",
        "aria-label": `${picture.prompt}${
          picture.relative !== undefined ? `; ${FS.percent(picture.relative)} of its maximum` : ""
        }`,
      });
      const map = picture.map ? FS.bytes(picture.map) : null;
      const paint = (heat) =>
        FS.drawHeat(canvas, { url: picture.image, map: heat ? map : null, rows, cols, opacity: 1, spotlight: true });
      paint(true);
      const figure = FS.el(
        "figure",
        {
          class: "fs-figure",
          style: { "--chip": colour },
          onpointerenter: () => paint(false),
          onpointerleave: () => paint(true),
        },
        canvas,
        FS.el(
          "figcaption",
          {},
          FS.el("span", { text: picture.prompt }),
          FS.el("span", { class: "fs-quiet fs-num", text: words ? words(picture) : "" }),
        ),
      );
      return figure;
    }),
  );

// A page of cards. One that begins later than the first is put behind those that are there.
FS.define("fs-gallery", (root, data) => {
  const grid = data.start && root.grid ? root.grid : (root.grid = FS.el("div", { class: "fs-grid" }));
  root.append(FS.el("p", { class: "fs-quiet", role: "status", text: data.summary }));
  if (!data.cards.length && !data.start) {
    root.append(
      FS.el("p", { text: "Nothing matches. Remove a filter, or search for a colour, a thing or a number." }),
    );
    return;
  }
  grid.append(
    ...data.cards.map((card) =>
      FS.card(card, {
        rows: data.rows,
        cols: data.cols,
        thumbs: card.pictures.map((picture) => ({
          image: picture.image,
          map: picture.map ? FS.bytes(picture.map) : null,
        })),
        extra: `on ${FS.share(card.image_density)} of images${
          { words: ", by captions", clip: ", by similarity" }[card.reason] || ""
        }`,
        onopen: (chosen) => FS.emit(root, "select", { hookpoint: chosen.hookpoint, feature: chosen.feature }),
      })
    ),
  );
  root.append(grid);
  if (data.more) {
    root.append(
      FS.el(
        "div",
        { class: "fs-row fs-centre" },
        FS.button(data.more, (event) => {
          event.currentTarget.disabled = true; // until the next page is there
          FS.emit(root, "more", {});
        }, { class: "fs-button" }),
      ),
    );
  }
  root.append(
    FS.el("div", { class: "fs-row fs-wrap fs-tight" }, FS.file(data.file, "All of these as CSV")),
    FS.code(data.code) || "",
  );
});

FS.chips = (root, others) =>
  FS.el(
    "div",
    { class: "fs-row fs-wrap fs-tight" },
    others.map((other) =>
      FS.el(
        "button",
        {
          class: "fs-button fs-small fs-row",
          type: "button",
          "data-feature": other.feature,
          onclick: () => FS.choose(root, other),
        },
        FS.chip(other.colour),
        FS.el("span", { text: other.label || "unnamed" }),
        FS.el("span", { class: "fs-quiet fs-num", text: `#${other.feature}, ${other.similarity.toFixed(2)}` }),
      )
    ),
  );

FS.facts = (facts) =>
  FS.el(
    "dl",
    { class: "fs-stats" },
    facts.filter(Boolean).map(([term, value, help]) =>
      FS.el(
        "div",
        {},
        FS.el("dt", {}, term, help ? FS.el("span", { class: "fs-help", text: help }) : null),
        FS.el("dd", { class: "fs-num", text: value }),
      )
    ),
  );

FS.define("fs-feature", (root, data) => {
  const go = (where) => FS.emit(root, where, { hookpoint: data.hookpoint, feature: data.feature });
  const sure = FS.sure(data.confidence);
  const report = () => {
    const drawn = [...root.querySelectorAll(".fs-picture")].slice(0, data.pictures.length);
    return {
      title: `Feature ${data.feature}: ${FS.title(data)}`,
      words: data.sentence,
      pictures: drawn.map((canvas, at) => [FS.told(data.pictures[at]), canvas.toDataURL("image/png")]),
      recipe: {
        hookpoint: data.hookpoint,
        feature: data.feature,
        label: data.label,
        confidence: data.confidence,
        ...Object.fromEntries(data.facts.map(([term, value]) => [term, value])),
      },
    };
  };
  const section = (title, help, ...nodes) =>
    FS.el(
      "section",
      { class: "fs-block" },
      FS.el("h3", { class: "fs-h", text: title }),
      help ? FS.el("p", { class: "fs-quiet", text: help }) : null,
      ...nodes,
    );
  root.append(
    FS.el(
      "article",
      { class: "fs-feature", "aria-label": `Feature ${data.feature}`, style: { "--chip": data.colour } },
      FS.el(
        "div",
        { class: "fs-row fs-between fs-wrap" },
        FS.el(
          "div",
          { class: "fs-row fs-wrap fs-tight" },
          FS.chip(data.colour),
          FS.el("h2", { class: "fs-name", tabindex: -1, text: FS.title(data) }),
          data.label_by ? FS.el("span", { class: "fs-badge", text: `named by a ${data.label_by}` }) : null,
          sure && !data.label_by
            ? FS.el("span", { class: "fs-badge", text: `${sure} (${FS.percent(data.confidence)})` })
            : null,
          FS.el("span", { class: "fs-quiet fs-num", text: `feature ${data.feature}, ${data.word}` }),
        ),
        FS.el(
          "div",
          { class: "fs-row fs-wrap fs-tight" },
          FS.button("Steer with this", () => go("steer"), { class: "fs-button fs-primary" }),
          FS.button("Show in map", () => go("map"), { class: "fs-button" }),
          FS.button("Close", () => {
            root.replaceChildren();
            FS.emit(root, "close", {});
          }, { class: "fs-button" }),
        ),
      ),
      FS.el("p", { text: data.sentence }),
      section(
        "Top images",
        "Bright where the feature fires, dimmed where it is silent. Point at an image to see all of it.",
        data.pictures.length
          ? FS.pictures(data.pictures, {
            rows: data.rows,
            cols: data.cols,
            colour: data.colour,
            words: (p) => `${FS.percent(p.relative)} of its maximum, seed ${p.seed}`,
          })
          : FS.el("p", { class: "fs-quiet", text: "The feature never fired in this run: it is dead." }),
      ),
      data.levels.length
        ? section(
          "How true the name is at each strength",
          "Images that were not used to find the name, and the share of their captions that contain it.",
          ...data.levels.map((level) =>
            FS.el(
              "div",
              {},
              FS.el("p", { class: "fs-quiet", text: level.words }),
              FS.pictures(level.pictures, { rows: data.rows, cols: data.cols, colour: data.colour }),
            )
          ),
        )
        : null,
      section("In numbers", null, FS.facts(data.facts)),
      FS.el(
        "div",
        { class: "fs-columns" },
        data.histogram.length
          ? section(
            "How strongly it fires",
            null,
            FS.columns(data.histogram, {
              label: "Number of patches by activation (a step to the right multiplies it)",
              unit: "patches",
              first: `${FS.number(data.histogram_edges[0])} activation units`,
              last: FS.number(data.histogram_edges[data.histogram_edges.length - 1]),
              colour: data.colour,
            }),
          )
          : null,
        data.step_profile.length > 1
          ? section(
            "When it fires",
            null,
            FS.columns(data.step_profile, {
              label: "Mean activation of a patch by denoising step",
              unit: "activation units",
              first: `step ${data.steps[0]}, noisy`,
              last: `step ${data.steps[data.steps.length - 1]}, clear`,
              colour: data.colour,
            }),
          )
          : null,
      ),
      data.neighbours.length
        ? section(
          "Similar directions",
          "Nearest features by cosine of their decoder directions (1: the same).",
          FS.chips(root, data.neighbours),
        )
        : null,
      data.coactive.length
        ? section(
          "Fires on the same images",
          null,
          FS.chips(root, data.coactive),
        )
        : null,
      data.silent.length
        ? section(
          "Similar images without it",
          "Images on which it does not fire, the most similar to its top images first.",
          FS.pictures(data.silent, { rows: data.rows, cols: data.cols, colour: "var(--fs-line)" }),
        )
        : null,
      FS.actions(data, report),
      FS.code(data.code),
      section(
        "Which word causes it?",
        "FLUX makes up to three of its top images again without each word of the caption in turn, at the same seed. The feature depends on the word whose removal silences it.",
        FS.el(
          "div",
          { class: "fs-row" },
          FS.button(
            `Which word silences it? (${data.silencing})`,
            () => FS.emit(root, "why", { hookpoint: data.hookpoint, feature: data.feature }),
            { class: "fs-button", "aria-label": "Which word silences it?", disabled: !data.silencing },
          ),
        ),
      ),
    ),
  );
  root.scrollIntoView({ behavior: "smooth", block: "nearest" });
});

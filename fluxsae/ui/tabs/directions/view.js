// The map of directions: hover, zoom, click through; by keyboard the arrows go from feature to feature.
// Moves and scales (x, y) pairs so that they fill the square from -1 to 1, their proportions kept.
FS.fit = (positions) => {
  const low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  positions.forEach((value, at) => {
    if (!Number.isFinite(value)) return;
    low[at % 2] = Math.min(low[at % 2], value);
    high[at % 2] = Math.max(high[at % 2], value);
  });
  const reach = Math.max(high[0] - low[0], high[1] - low[1], 1e-9) / 2;
  positions.forEach((value, at) => {
    positions[at] = (value - (low[at % 2] + high[at % 2]) / 2) / reach;
  });
};

FS.define("fs-map", (root, data) => {
  const positions = new Float32Array(FS.bytes(data.positions).buffer), alive = FS.bytes(data.alive), n = alive.length;
  FS.fit(positions);
  const canvas = FS.el("canvas", { class: "fs-mapcanvas" });
  const tip = FS.el("div", { class: "fs-tip", hidden: true });
  const stage = FS.el(
    "div",
    {
      class: "fs-mapstage",
      tabindex: 0,
      role: "application",
      "aria-label":
        `Map of ${n} features. Arrow keys go to the next feature in that direction, Enter opens it, plus and minus zoom.`,
    },
    canvas,
    tip,
  );
  const view = { x: 0, y: 0, zoom: 1, hover: null, chosen: data.selected ?? null };
  let size = 600;
  const colour = (feature) => data.colours[data.labels[feature]] || FS.neutral;
  const place = (
    feature,
  ) => [
    size * (0.5 + 0.46 * view.zoom * (positions[2 * feature] - view.x)),
    size * (0.5 - 0.46 * view.zoom * (positions[2 * feature + 1] - view.y)),
  ];
  const name = (feature) => data.labels[feature] || "unnamed";
  const paint = () => {
    const ratio = window.devicePixelRatio || 1, styles = getComputedStyle(root);
    size = stage.clientWidth || 600;
    canvas.width = canvas.height = Math.round(size * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const ink = styles.getPropertyValue("--fs-ink"),
      line = styles.getPropertyValue("--fs-line"),
      paper = styles.getPropertyValue("--fs-paper");
    context.fillStyle = paper;
    context.fillRect(0, 0, size, size);
    const dot = Math.max(2, Math.min(7, 3.4 * Math.sqrt(view.zoom) * Math.sqrt(600 / Math.max(n, 200)) * 1.2));
    for (let pass = 0; pass < 2; pass += 1) {
      for (let feature = 0; feature < n; feature += 1) {
        if (Boolean(alive[feature]) !== Boolean(pass)) continue;
        const [x, y] = place(feature);
        if (x < -9 || y < -9 || x > size + 9 || y > size + 9) continue;
        context.beginPath();
        context.arc(x, y, alive[feature] ? (data.labels[feature] ? dot : dot * 0.7) : 1.6, 0, 7);
        context.fillStyle = alive[feature] ? colour(feature) : line;
        context.globalAlpha = alive[feature] && !data.labels[feature] ? 0.55 : 1;
        context.fill();
        context.globalAlpha = 1;
      }
    }
    context.font = "600 12.5px system-ui, sans-serif";
    context.textAlign = "center";
    const taken = [];
    for (const spot of data.names) {
      const [x, middle] = place(spot.feature), y = middle - dot - 5;
      const half = context.measureText(spot.label).width / 2 + 3;
      const box = [x - half, y - 13, x + half, y + 3];
      if (box[0] < 0 || box[2] > size || box[1] < 0 || box[3] > size) continue;
      if (taken.some((other) => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) {
        continue;
      }
      taken.push(box);
      context.lineWidth = 4;
      context.strokeStyle = paper;
      context.lineJoin = "round";
      context.strokeText(spot.label, x, y);
      context.fillStyle = ink;
      context.fillText(spot.label, x, y);
    }
    for (const [feature, width] of [[view.chosen, 3], [view.hover, 2]]) {
      if (feature === null) continue;
      const [x, y] = place(feature);
      context.beginPath();
      context.arc(x, y, dot + 4, 0, 7);
      context.lineWidth = width;
      context.strokeStyle = ink;
      context.stroke();
    }
  };
  const nearest = (x, y, reach) => {
    let best = null, least = reach * reach;
    for (let feature = 0; feature < n; feature += 1) {
      if (!alive[feature]) continue;
      const [px, py] = place(feature), distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) {
        least = distance;
        best = feature;
      }
    }
    return best;
  };
  const hover = (feature) => {
    view.hover = feature;
    tip.hidden = feature === null;
    if (feature !== null) {
      const [x, y] = place(feature);
      tip.replaceChildren(
        FS.el(
          "span",
          { class: "fs-row" },
          FS.chip(colour(feature)),
          FS.el("strong", { text: name(feature) }),
          FS.el("span", { class: "fs-quiet fs-num", text: `#${feature}` }),
        ),
      );
      tip.classList.toggle("fs-left", x > size / 2);
      tip.classList.toggle("fs-up", y > size / 2);
      Object.assign(tip.style, { left: `${x}px`, top: `${y}px` });
    }
    paint();
  };
  const open = (feature) => {
    if (feature === null) return;
    view.chosen = feature;
    paint();
    FS.say(`Feature ${feature}, ${name(feature)}`);
    FS.emit(root, "select", { hookpoint: data.hookpoint, feature });
  };
  const zoom = (factor, x = size / 2, y = size / 2) => {
    const before = [view.x + (x / size - 0.5) / (0.46 * view.zoom), view.y - (y / size - 0.5) / (0.46 * view.zoom)];
    view.zoom = Math.min(40, Math.max(0.8, view.zoom * factor));
    view.x = before[0] - (x / size - 0.5) / (0.46 * view.zoom);
    view.y = before[1] + (y / size - 0.5) / (0.46 * view.zoom);
    paint();
  };
  const offset = (event) => {
    const rect = stage.getBoundingClientRect();
    return [event.clientX - rect.left, event.clientY - rect.top];
  };
  let drag = null;
  stage.addEventListener("pointerdown", (event) => {
    drag = { at: offset(event), moved: false };
  });
  stage.addEventListener("pointermove", (event) => {
    const [x, y] = offset(event);
    if (drag && event.buttons) {
      const dx = x - drag.at[0], dy = y - drag.at[1];
      if (drag.moved || Math.hypot(dx, dy) > 5) {
        drag.moved = true;
        view.x -= dx / (size * 0.46 * view.zoom);
        view.y += dy / (size * 0.46 * view.zoom);
        drag.at = [x, y];
        paint();
      }
      return;
    }
    const found = nearest(x, y, 16);
    if (found !== view.hover) hover(found);
  });
  stage.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) open(nearest(...offset(event), 18));
    drag = null;
  });
  stage.addEventListener("pointerleave", () => {
    drag = null;
    hover(null);
  });
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, ...offset(event));
  }, { passive: false });
  stage.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    const from = view.hover ?? view.chosen ?? nearest(size / 2, size / 2, size);
    if (moves[event.key] && from !== null) {
      const [x, y] = place(from), [dx, dy] = moves[event.key];
      let best = null, least = Infinity;
      for (let feature = 0; feature < n; feature += 1) {
        if (!alive[feature] || feature === from) continue;
        const [px, py] = place(feature),
          ahead = (px - x) * dx + (py - y) * dy,
          aside = Math.abs((px - x) * dy) + Math.abs((py - y) * dx);
        if (ahead > 1 && aside <= ahead && ahead + 2 * aside < least) {
          least = ahead + 2 * aside;
          best = feature;
        }
      }
      if (best !== null) {
        hover(best);
        FS.say(`${name(best)}, feature ${best}`);
      }
    } else if (event.key === "Enter") open(view.hover ?? from);
    else if (event.key === "+" || event.key === "=") zoom(1.3);
    else if (event.key === "-") zoom(1 / 1.3);
    else return;
    event.preventDefault();
  });
  root.append(
    FS.el(
      "section",
      { class: "fs-mapbox", "aria-label": "Map of directions" },
      FS.el(
        "div",
        { class: "fs-row fs-between fs-wrap" },
        FS.el("p", {
          class: "fs-quiet",
          text:
            `Each dot is a feature of the ${data.word} hook point. Near dots write in similar directions (t-SNE of the decoder). ${
              matchMedia("(pointer: coarse)").matches
                ? "Tap one to see its images; + and − zoom."
                : "Click one to see its images; scroll to zoom."
            } A dot has the colour in its name; the others are grey.${
              data.n_dead ? ` The ${data.n_dead} small dots never fire.` : ""
            }`,
        }),
        FS.el(
          "span",
          { class: "fs-row" },
          FS.button("+", () => zoom(1.4), { "aria-label": "Zoom in" }),
          FS.button("−", () => zoom(1 / 1.4), { "aria-label": "Zoom out" }),
          FS.button("Whole map", () => {
            Object.assign(view, { x: 0, y: 0, zoom: 1 });
            paint();
          }),
          FS.file(data.file, "CSV"),
        ),
      ),
      stage,
    ),
  );
  root.choose = (feature) => {
    view.chosen = feature;
    paint();
  };
  new ResizeObserver(() => {
    if (root.isConnected && stage.clientWidth !== size) paint();
  }).observe(stage);
  requestAnimationFrame(paint);
});

FS.define("fs-near", (root, data) => {
  const map = document.querySelector("fs-map");
  if (map && map.data && map.data.hookpoint === data.hookpoint && map.choose) map.choose(data.feature);
  const report = () => {
    const shown = document.querySelector("fs-map");
    const chart = shown && shown.data && shown.data.hookpoint === data.hookpoint ? shown.querySelector("canvas") : null;
    const drawn = [...root.querySelectorAll(".fs-trio canvas")];
    return {
      title: `Near feature ${data.feature}: ${FS.title(data)}`,
      words:
        `Features of ${data.hookpoint} (${data.word}) that write in a similar direction, by cosine of their decoder rows.`,
      pictures: [
        ...(chart ? [["the map of directions", chart.toDataURL("image/png"), "100%"]] : []),
        ...drawn.map((canvas, at) => [FS.told(data.shown[at]), canvas.toDataURL("image/png")]),
      ],
      measurement: {
        hookpoint: data.hookpoint,
        feature: data.feature,
        label: data.label,
        encoder_decoder_cosine: data.alignment,
        nearest: data.near.map(({ feature, label, cosine }) => ({ feature, label, cosine })),
      },
    };
  };
  root.append(
    FS.el(
      "article",
      { class: "fs-nearcard", style: { "--chip": data.colour }, "aria-label": `Feature ${data.feature}` },
      FS.el("div", { class: "fs-row" }, FS.chip(data.colour), FS.el("h2", { class: "fs-name", text: FS.title(data) })),
      FS.el("p", {
        class: "fs-quiet fs-num",
        text: `feature ${data.feature}, ${data.word}; on ${FS.share(data.image_density)} of images`,
      }),
      FS.el(
        "div",
        { class: "fs-trio" },
        data.pictures.map((picture) =>
          FS.thumb(picture.image, picture.map ? FS.bytes(picture.map) : null, data.rows, data.cols)
        ),
      ),
      FS.el(
        "div",
        { class: "fs-row" },
        FS.leads(root, { hookpoint: data.hookpoint, feature: data.feature }),
      ),
      data.alignment === null ? null : FS.el("p", {
        class: "fs-quiet",
        text: `Cosine between encoder and decoder: ${data.alignment.toFixed(2)} (1: it writes the direction it reads).`,
      }),
      FS.el("h3", { class: "fs-h", text: "Nearest features" }),
      FS.el(
        "ol",
        { class: "fs-rank" },
        data.near.map((other) =>
          FS.el(
            "li",
            {},
            FS.nameLink(root, other),
            FS.bar(Math.max(0, other.cosine), other.colour, `cosine ${other.cosine.toFixed(2)}`),
            FS.el("span", { class: "fs-num fs-quiet", text: other.cosine.toFixed(2) }),
          )
        ),
      ),
      FS.actions(
        data,
        report,
        FS.file(
          `${data.files}/neighbours.csv?${FS.query({ hookpoint: data.hookpoint, feature: data.feature })}`,
          "Neighbours as CSV",
        ),
      ),
      FS.code(data.code),
    ),
  );
});

FS.define("fs-compared", (root, data) => {
  const side = (feature) => FS.nameLink(root, feature);
  const pairOf = (pair) => [
    side(pair.first),
    FS.el("span", { class: "fs-quiet fs-num", text: pair.correlation.toFixed(2) }),
    side(pair.second),
  ];
  const alone = (title, features, n) =>
    FS.el(
      "section",
      { class: "fs-block" },
      FS.el("h3", { class: "fs-h", text: `${title} (${n})` }),
      features.length
        ? FS.el("ul", { class: "fs-plain" }, features.map((feature) => FS.el("li", {}, side(feature))))
        : FS.el("p", { class: "fs-quiet", text: "none" }),
    );
  root.append(
    FS.el("p", {
      text: `${
        data.n_first - data.n_only_first
      } of ${data.n_first} features of ${data.word_first} are also in ${data.word_second}: a feature there fires on the same images (correlation of at least ${
        data.least.toFixed(2)
      }). One-to-one matches correlate by ${data.mean.toFixed(2)} on average, and by ${
        data.chance.toFixed(2)
      } when the images are shuffled.`,
    }),
    FS.el(
      "div",
      { class: "fs-columns fs-survivors" },
      FS.el(
        "section",
        { class: "fs-block" },
        FS.el("h3", { class: "fs-h", text: `In both: ${data.word_first} ↔ ${data.word_second}` }),
        FS.el(
          "ul",
          { class: "fs-plain" },
          data.pairs.map((pair) => FS.el("li", { class: "fs-pair" }, pairOf(pair))),
        ),
      ),
      alone(`Only in ${data.word_first}`, data.only_first, data.n_only_first),
      alone(`Only in ${data.word_second}`, data.only_second, data.n_only_second),
    ),
    data.names.length
      ? FS.el(
        "section",
        { class: "fs-block" },
        FS.el("h3", { class: "fs-h", text: `Where the names of ${data.word_first} live on` }),
        FS.el("p", {
          class: "fs-quiet",
          text:
            `How many features of each name have a counterpart in ${data.word_second}, and the one that is matched best.`,
        }),
        FS.el(
          "ul",
          { class: "fs-plain" },
          data.names.map((name) =>
            FS.el(
              "li",
              { class: "fs-lives" },
              FS.el("span", { class: "fs-num fs-quiet", text: `${name.n_in_both} of ${name.n_features}` }),
              pairOf(name),
            )
          ),
        ),
      )
      : null,
    FS.el("div", { class: "fs-row" }, FS.file(data.file, "All matches as CSV")),
  );
});

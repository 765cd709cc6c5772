// The heatmap tab's laboratory: the image large, one feature's heat on it, ranked cards, patch look-up, steps.
// Cards that stand open even where their names are guesses.
const LEAST_TOLD = 4;

const STAGE_SIDE = 512; // pixels of the image on screen, at least
const PLAY_MILLISECONDS = 160;

FS.define("fs-lab", (root, data) => {
  const tokens = data.rows * data.cols;
  const planes = new Map(data.features.map((feature) => [feature.feature, FS.bytes(feature.maps)]));
  const features = new Map(data.features.map((feature) => [feature.feature, feature]));
  const patchIds = data.patch_features ? new Uint32Array(FS.bytes(data.patch_features).buffer) : null;
  const patchValues = data.patch_values ? FS.bytes(data.patch_values) : null;
  const perPatch = patchIds ? patchIds.length / tokens : 0;
  const first = data.features.find((feature) => feature.feature === data.selected) ||
    (data.opening ? null : data.features[0]);
  // The image as it is, with the most heat over the steps the SAE was trained on; then step by step.
  const shownSteps = [...new Set([...Object.keys(data.previews).map(Number), ...data.steps])].sort((a, b) => a - b);
  const view = {
    feature: first ? first.feature : null,
    step: null,
    turn: 0,
    opacity: 0.8,
    threshold: 0.05,
    scale: "shared",
    smooth: true,
    style: "heat",
    cell: null,
  };

  const isOf = (answer) =>
    answer &&
    ["prompt", "seed", "hookpoint", "num_inference_steps", "picture"].every((key) => answer[key] === data[key]);
  const plane = (feature, at) => planes.get(feature).subarray(at * tokens, (at + 1) * tokens);
  // The feature's map at the step on screen; none at a step that the SAE may not be used at.
  const mapNow = (feature) => {
    const at = view.step === null ? 0 : data.steps.indexOf(view.step) + 1;
    return view.step !== null && at === 0 ? null : plane(feature, at);
  };
  const imageNow = () =>
    view.step === null
      ? (data.opening ? data.opening.pictures[view.turn] : data.image)
      : data.previews[view.step] || data.image;
  const gain = (map) => (view.scale === "shared" ? 1 : 255 / Math.max(1, map.reduce((a, b) => Math.max(a, b), 0)));

  let turner = null;
  const canvas = FS.el("canvas", { class: "fs-canvas", width: 512, height: 512, "aria-hidden": "true" });
  const cursor = FS.el("div", { class: "fs-cursor", hidden: true });
  const tip = FS.el("div", { class: "fs-tip", hidden: true });
  const stage = FS.el(
    "div",
    {
      class: "fs-stage",
      tabindex: 0,
      role: "application",
      "aria-label": `${
        data.picture ? "Your picture" : `Image of ${data.prompt}`
      }. Arrow keys move over the patches, Enter shows what fires there.`,
    },
    canvas,
    cursor,
    tip,
  );
  const said = FS.promptWords(data.prompt, data.features, (feature) => select(feature));
  const caption = FS.el("div", { class: "fs-caption" });
  const legend = FS.el("div", { class: "fs-legend-slot" });
  const list = FS.el("div", {
    class: "fs-list",
    role: "group",
    "aria-label": "Features that fire in this image, strongest first",
  });

  const { prompt, seed, num_inference_steps } = data;
  const picture = { prompt, seed, num_inference_steps, given: data.picture };
  const whyPanel = FS.el("div", { class: "fs-why-slot", hidden: true });
  const whyWaits = FS.el("span", { class: "fs-quiet fs-why-waits", text: "FLUX is measuring this…" });
  const stepNow = () => (data.steps.includes(view.step) ? view.step : null);
  const askWhy = (cell) => {
    const [row, column] = cell || [null, null];
    FS.emit(root, "why", { feature: view.feature, step: stepNow(), row, column });
  };
  const tellWhy = () => {
    const why = root.why;
    const isShown = isOf(why) && why.feature === view.feature && why.asked_step === stepNow();
    whyPanel.hidden = !isShown;
    whyPanel.replaceChildren(...(isShown ? [FS.why(root, why)] : []));
  };
  const draw = () => {
    const feature = features.get(view.feature), map = feature ? mapNow(view.feature) : null;
    legend.replaceChildren();
    for (const word of said.querySelectorAll(".fs-word")) {
      word.setAttribute("aria-pressed", String(Number(word.dataset.feature) === view.feature));
    }
    FS.drawHeat(canvas, {
      url: imageNow(),
      map: view.style === "plain" ? null : map,
      rows: data.rows,
      cols: data.cols,
      gain: map ? gain(map) : 1,
      opacity: view.opacity,
      threshold: view.threshold,
      smooth: view.smooth,
      spotlight: view.style === "spotlight",
      side: STAGE_SIDE,
    });
    stage.style.setProperty("--chip", feature ? feature.colour : "transparent");
    if (!feature) {
      caption.replaceChildren(FS.el("span", {
        class: "fs-quiet",
        text: data.features.length ? "Press a word or a card to see where it fires." : "",
      }));
      return;
    }
    const most = view.scale === "shared" || !map
      ? feature.maximum
      : (feature.maximum * map.reduce((a, b) => Math.max(a, b), 0)) / 255;
    legend.append(
      FS.legend(FS.number(most), view.scale === "shared" ? "its maximum in the whole run" : "its maximum here"),
    );
    tellWhy();
    caption.replaceChildren(
      FS.el(
        "span",
        { class: "fs-row" },
        FS.chip(feature.colour),
        FS.el("strong", { text: FS.title(feature) }),
        FS.el("span", { class: "fs-quiet fs-num", text: `feature ${feature.feature}` }),
      ),
      FS.el("span", {
        class: "fs-quiet",
        text: `${FS.where(feature) ? `${FS.where(feature)}; ` : ""}peak ${
          FS.percent(feature.relative)
        } of its run maximum, fires on ${FS.share(feature.density)} of all patches`,
      }),
      FS.el(
        "span",
        { class: "fs-row" },
        FS.leads(root, { hookpoint: data.hookpoint, feature: view.feature, picture }),
        FS.button("Why does it fire?", () => askWhy(null)),
        view.pinned
          ? FS.button(`Why at row ${view.asked[0]}, column ${view.asked[1]}?`, () => askWhy(view.asked))
          : null,
        whyWaits,
      ),
    );
  };

  const select = (feature, silent) => {
    view.feature = feature;
    if (turner) turnTo(0); // the maps are those of the image as it was
    for (const card of list.querySelectorAll(".fs-card")) {
      card.setAttribute("aria-pressed", String(Number(card.dataset.feature) === feature));
    }
    draw();
    if (!silent) {
      FS.say(`Showing feature ${feature}, ${FS.title(features.get(feature))}`);
      FS.emit(root, "select", { hookpoint: data.hookpoint, feature });
    }
  };

  const card = (feature) =>
    FS.card(
      { ...feature, strength: feature.relative, strength_text: `${FS.percent(feature.relative)} of its maximum` },
      {
        rows: data.rows,
        cols: data.cols,
        pressed: feature.feature === view.feature,
        thumbs: [{ image: data.image, map: plane(feature.feature, 0) }],
        extra: `${FS.percent(feature.relative)} of its maximum`,
        onopen: () => select(feature.feature),
      },
    );
  const alike = (others, count) => FS.alike(others, (all) => FS.el("div", { class: "fs-list" }, all.map(card)), count);
  const groups = FS.byLabel(data.features).map(([head, ...others], at) => ({
    head,
    others,
    told: at < LEAST_TOLD || !head.label || !FS.isGuess(head.confidence),
  }));
  const cards = (shown) =>
    shown.flatMap(({ head, others }) => (others.length ? [card(head), alike(others, head.alike)] : [card(head)]));
  list.append(...cards(groups.filter((group) => group.told)));
  const guessed = groups.filter((group) => !group.told);
  if (guessed.length) {
    const fold = FS.el(
      "details",
      { class: "fs-fold" },
      FS.el("summary", { text: `${guessed.length} more with uncertain names` }),
      FS.el("div", { class: "fs-list" }, cards(guessed)),
    );
    fold.holds = (feature) =>
      guessed.some(({ head, others }) => [head, ...others].some((each) => each.feature === feature));
    list.append(fold);
  }

  const fires = (row, column) => { // strongest first
    const token = row * data.cols + column;
    const found = [];
    for (let at = 0; at < perPatch; at += 1) {
      const value = patchValues[token * perPatch + at];
      if (value > 0) found.push({ feature: patchIds[token * perPatch + at], value });
    }
    return found.sort((a, b) => b.value - a.value);
  };
  const name = (feature) => {
    const label = (data.labels || {})[feature];
    return label ? `${label} #${feature}` : `#${feature}`;
  };
  const point = (row, column) => {
    view.cell = [row, column];
    const box = { left: (column / data.cols) * 100, top: (row / data.rows) * 100 };
    cursor.hidden = false;
    Object.assign(cursor.style, {
      left: `${box.left}%`,
      top: `${box.top}%`,
      width: `${100 / data.cols}%`,
      height: `${100 / data.rows}%`,
    });
    const found = fires(row, column);
    tip.replaceChildren(
      FS.el("span", { class: "fs-quiet fs-num", text: `patch ${row}, ${column}` }),
      ...(found.length
        ? found.map((item) =>
          FS.el(
            "span",
            { class: "fs-row" },
            FS.chip((data.colours || {})[item.feature] || "transparent"),
            FS.el("span", { text: name(item.feature) }),
            FS.el("span", { class: "fs-num fs-quiet", text: FS.percent(item.value / 255) }),
          )
        )
        : [FS.el("span", { text: perPatch ? "nothing fires here" : "click to see what fires" })]),
    );
    tip.hidden = false;
    tip.classList.toggle("fs-left", column > data.cols / 2);
    tip.classList.toggle("fs-up", row > data.rows / 2);
    Object.assign(tip.style, { left: `${box.left}%`, top: `${box.top}%` });
  };
  const at = (event) => {
    const rect = stage.getBoundingClientRect();
    const clamp = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value * most)));
    return [
      clamp((event.clientY - rect.top) / rect.height, data.rows),
      clamp((event.clientX - rect.left) / rect.width, data.cols),
    ];
  };
  const ask = (row, column) => {
    point(row, column);
    view.pinned = true;
    view.asked = [row, column];
    draw();
    const found = fires(row, column);
    FS.say(
      found.length
        ? `Patch ${row}, ${column}: ${found.map((item) => name(item.feature)).join(", ")}`
        : `Patch ${row}, ${column}`,
    );
    FS.emit(root, "patch", { row, column, step: stepNow() });
  };
  const leave = () => {
    cursor.hidden = !view.pinned;
    tip.hidden = true;
  };
  stage.addEventListener("pointermove", (event) => point(...at(event)));
  stage.addEventListener("pointerleave", leave);
  stage.addEventListener("blur", leave);
  stage.addEventListener("click", (event) => {
    ask(...at(event));
  });
  stage.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const [row, column] = view.cell || [Math.floor(data.rows / 2), Math.floor(data.cols / 2)];
    if (moves[event.key]) {
      event.preventDefault();
      const next = [row + moves[event.key][0], column + moves[event.key][1]];
      point(Math.min(data.rows - 1, Math.max(0, next[0])), Math.min(data.cols - 1, Math.max(0, next[1])));
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      ask(row, column);
    }
  });

  const controls = [
    FS.slider({
      label: "Heat",
      min: 0,
      max: 1,
      step: 0.05,
      value: view.opacity,
      format: FS.percent,
      oninput: (value) => {
        view.opacity = value;
        draw();
      },
    }),
    FS.slider({
      label: "Hide below",
      min: 0,
      max: 0.95,
      step: 0.05,
      value: view.threshold,
      format: FS.percent,
      oninput: (value) => {
        view.threshold = value;
        draw();
      },
    }),
  ];
  const toggles = FS.el(
    "div",
    { class: "fs-row fs-wrap" },
    FS.toggle({
      label: "Show as",
      options: [["heat", "heat"], ["spotlight", "spotlight"], ["plain", "plain"]],
      value: "heat",
      onchange: (value) => {
        view.style = value;
        legend.hidden = value !== "heat";
        draw();
      },
    }),
    FS.toggle({
      label: "Scale",
      options: [["shared", "same for all images"], ["image", "this image"]],
      value: view.scale,
      onchange: (value) => {
        view.scale = value;
        draw();
      },
    }),
    FS.toggle({
      label: "Edges",
      options: [["smooth", "smooth"], ["cells", "patches"]],
      value: "smooth",
      onchange: (value) => {
        view.smooth = value === "smooth";
        draw();
      },
    }),
  );

  let steps = null;
  if (shownSteps.length > 1) {
    const what = data.picture ? "your picture as FLUX sees it at" : "what FLUX takes the image for at";
    const words = (value) => {
      if (value === 0) return data.picture ? "your picture" : "the image";
      const step = shownSteps[value - 1], at = data.steps.indexOf(step);
      const noise = at < 0 ? "no heat: the SAE was not trained here" : `noise ${data.sigmas[at].toFixed(2)}`;
      return `${what} step ${step + 1} of ${data.num_inference_steps} (${noise})`;
    };
    const slider = FS.slider({
      label: "Denoising step",
      min: 0,
      max: shownSteps.length,
      step: 1,
      value: 0,
      format: words,
      oninput: (value) => {
        view.step = value === 0 ? null : shownSteps[value - 1];
        draw();
      },
    });
    slider.classList.add("fs-wide");
    let timer = null;
    const end = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    };
    const show = (value) => {
      slider.input.value = String(value);
      slider.input.dispatchEvent(new Event("input"));
    };
    const play = FS.button("Play", async () => {
      if (timer) return end();
      play.textContent = "Stop";
      await Promise.all(Object.values(data.previews).map((url) => FS.image(url).catch(() => null)));
      let now = 0;
      timer = setInterval(() => {
        now += 1;
        if (!root.isConnected || now > shownSteps.length) {
          now = 0;
          end();
        }
        show(now);
      }, PLAY_MILLISECONDS);
    }, { "aria-label": "Play the denoising steps" });
    steps = FS.el("div", { class: "fs-row fs-steps" }, slider, play);
  }

  // One large slider through recorded images: nothing is waited for.
  const turnTo = (turn) => {
    view.turn = turn;
    turner.input.value = String(turn);
  };
  if (data.opening) {
    const { old, new: other, pictures, turns } = data.opening;
    const input = FS.el("input", {
      type: "range",
      min: 0,
      max: pictures.length - 1,
      step: 1,
      value: "0",
      "aria-label": `Turn ${old} into ${other}`,
      "aria-valuetext": old,
      oninput: () => {
        view.turn = Number(input.value);
        input.setAttribute("aria-valuetext", `${FS.percent(turns[view.turn])} of the way from ${old} to ${other}`);
        view.feature = null;
        for (const pressed of list.querySelectorAll(".fs-card")) pressed.setAttribute("aria-pressed", "false");
        draw();
      },
    });
    pictures.forEach((url) => FS.image(url));
    turner = FS.el(
      "label",
      { class: "fs-opening" },
      FS.el("span", { text: old }),
      input,
      FS.el("span", { text: other }),
    );
    turner.input = input;
  }

  const report = () => {
    const shown = features.get(view.feature);
    const picture = shown ? [`feature ${shown.feature}: ${FS.title(shown)}`, canvas.toDataURL("image/png")] : [];
    return {
      title: data.picture ? "What fires in a picture" : `What fires in “${data.prompt}”`,
      words: FS.told(data),
      pictures: [["image", data.image], picture].filter((pair) => pair.length),
      recipe: {
        prompt: data.prompt,
        seed: data.seed,
        num_inference_steps: data.num_inference_steps,
        hookpoint: data.hookpoint,
        features: data.features.map(({ feature, label, relative, activation }) => ({
          feature,
          label,
          relative,
          activation,
        })),
      },
    };
  };
  // What fires at the patch that was asked about, beside the picture; it stays while the picture does.
  const asked = FS.el("div", { class: "fs-asked", hidden: true });
  root.tellPatch = (patch) => {
    root.patch = patch;
    asked.hidden = !isOf(patch);
    if (asked.hidden) {
      view.pinned = false;
      cursor.hidden = true;
    } else {
      view.asked = [patch.row, patch.column];
    }
    draw();
    asked.replaceChildren(...(asked.hidden ? [] : [FS.patch(root, patch)]));
  };
  root.tellWhy = (why) => {
    root.why = why;
    tellWhy();
    if (!whyPanel.hidden) FS.bringIntoView(whyPanel);
  };
  root.tellPatch(root.patch);
  // While FLUX works: the step's own image, with the heat of the feature that is followed; then what was there before.
  root.see = (seen) => {
    const was = root.seen;
    root.seen = seen;
    stage.classList.toggle("fs-seeing", Boolean(seen));
    if (!seen) {
      if (was) draw();
      return;
    }
    const { feature } = seen;
    cursor.hidden = tip.hidden = true;
    stage.style.setProperty("--chip", feature ? feature.colour : "transparent");
    FS.drawHeat(canvas, {
      url: seen.image,
      map: feature && view.style !== "plain" ? FS.bytes(seen.map) : null,
      rows: data.rows,
      cols: data.cols,
      opacity: view.opacity,
      threshold: view.threshold,
      smooth: view.smooth,
      spotlight: view.style === "spotlight",
      side: STAGE_SIDE,
    });
    caption.replaceChildren(
      FS.el("span", { class: "fs-num", text: `Step ${seen.step + 1}, noise ${seen.sigma.toFixed(2)}` }),
      feature
        ? FS.el("span", { class: "fs-row" }, FS.chip(feature.colour), FS.el("strong", { text: FS.title(feature) }))
        : null,
    );
  };
  const notices = (data.notices || []).map((text) => FS.el("p", { class: "fs-notice", text }));
  const badge = data.picture ? "your picture" : data.kind === "example" && !data.opening ? "example" : null;
  const changed = (data.changed || []).join(", ");
  root.append(
    FS.el(
      "div",
      { class: data.opening ? "fs-lab fs-opens" : "fs-lab" },
      FS.el(
        "section",
        { class: "fs-main", "aria-label": "Image and heatmap" },
        stage,
        turner,
        FS.el(
          "p",
          { class: "fs-prompt" },
          badge ? FS.el("span", { class: "fs-badge", text: badge }) : null,
          data.prompt ? said : FS.el("span", { class: "fs-quiet", text: "read without a caption" }),
          changed ? FS.el("span", { class: "fs-quiet", text: changed }) : null,
          data.opening ? null : FS.el("span", { class: "fs-quiet fs-num", text: `seed ${data.seed}` }),
        ),
        steps,
        caption,
        legend,
        FS.el(
          "details",
          { class: "fs-fold fs-look" },
          FS.el("summary", { text: "How the heat is shown" }),
          FS.el("div", { class: "fs-row fs-wrap fs-controls" }, controls),
          toggles,
        ),
      ),
      FS.el(
        "section",
        { class: "fs-side", "aria-label": "Features" },
        ...notices,
        asked,
        whyPanel,
        FS.el("h2", { class: "fs-h", text: "What fires here" }),
        FS.el("p", {
          class: "fs-quiet",
          text: data.opening
            ? "Each of these names belongs to a feature that fired inside FLUX. Choose one to see where. The slider changes two of the features; its pictures were recorded with this run."
            : "Each card is a feature: one direction that the sparse autoencoder (SAE) learned. Choose one to see where it fires. “Sure”, “fairly sure” and “a guess” rate its name where it fires this strongly.",
        }),
        list,
      ),
    ),
    FS.actions(
      data,
      report,
      data.kind === "live" &&
        FS.file(
          `${data.files}/activations.npz?${
            FS.query({
              prompt: data.prompt,
              hookpoint: data.hookpoint,
              seed: data.seed,
              num_inference_steps: data.num_inference_steps,
            })
          }`,
          "Activations as npz",
        ),
    ),
    FS.code(data.code),
  );
  root.choose = (feature) => {
    if (!features.has(feature)) return false;
    for (const fold of list.querySelectorAll("details")) if (fold.holds(feature)) fold.open = true;
    if (view.feature !== feature) select(feature, true);
    return true;
  };
  if (!data.features.length) {
    list.append(FS.el("p", { class: "fs-quiet", text: "No feature fires in this image at this step." }));
  }
});

// Takes the feature that was chosen on another tab into this one; asks for its map where it is not among the cards.
FS.define("fs-follow", (root, data) => {
  const lab = document.querySelector("fs-lab");
  if (!lab || !lab.data || data.feature === null || lab.data.hookpoint !== data.hookpoint) return;
  if (!lab.choose(data.feature) && lab.data.kind === "live") FS.emit(root, "need", data);
});

document.addEventListener("fs-seen", (event) => {
  const lab = document.querySelector("fs-lab");
  if (lab && lab.see && (event.detail || lab.seen)) lab.see(event.detail);
});

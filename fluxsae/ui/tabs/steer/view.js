// The Steer tab: sliders with the range in which the image looks natural, before and after, a strip of strengths, painting the region.
FS.turnWords = (turn, { max_suppress: least, max_amplify: most, edit_words: words }) => {
  if (Math.abs(turn) < 0.005) return words.unchanged;
  if (turn > 0) return words.added.replace("{}", FS.number(turn * most, 2));
  const less = -turn * least;
  return less <= 1
    ? words.part.replace("{}", Math.round(less * 100))
    : words.multiple.replace("{}", FS.number(less, 2));
};
// The images of a demo, each with its name and its edit.
FS.panels = (pictures, names, words = []) =>
  FS.el(
    "span",
    { class: "fs-panels" },
    pictures.map((src, at) =>
      FS.el(
        "span",
        {},
        FS.el("img", { src, alt: "" }),
        FS.el("strong", { text: names[at] }),
        words[at] ? FS.el("span", { class: "fs-quiet", text: words[at] }) : null,
      )
    ),
  );
// Natural ranges that strips have found, for the image on screen alone: another prompt or seed has others.
FS.natural = { picture: null, ranges: new Map() };
FS.naturalKey = (edit) =>
  JSON.stringify([edit.hookpoint, edit.feature, edit.steps || null, edit.region || null, edit.when || null]);
FS.naturalOf = (picture) => {
  if (JSON.stringify(FS.natural.picture) !== JSON.stringify(picture)) FS.natural = { picture, ranges: new Map() };
  return FS.natural.ranges;
};

FS.define("fs-edits", (root, data) => {
  if (data.starters) FS.starters = data.starters; // they come with the page, not with every slider
  const state = { edits: data.edits, given: data.given || null, undo: data.undo || null }, unfolded = new WeakSet();
  const keep = () =>
    root.keep({
      ...data,
      starters: undefined,
      unread: undefined,
      read: undefined,
      undo: undefined,
      edits: state.edits,
      given: state.given,
    });
  const tell = () => {
    keep();
    FS.emit(root, "turn");
  };
  const changed = (structure) => {
    tell();
    if (structure) draw();
  };
  const track = (edit) => {
    const natural = FS.natural.ranges.get(FS.naturalKey(edit));
    return FS.el(
      "div",
      { class: "fs-track", "aria-hidden": "true" },
      natural
        ? FS.el("span", {
          class: "fs-natural",
          style: {
            left: `${(natural.range[0] + 1) * 50}%`,
            width: `${(natural.range[1] - natural.range[0]) * 50}%`,
          },
        })
        : null,
      ...(natural ? natural.notches : []).map((turn) =>
        FS.el("span", { class: "fs-notch", style: { left: `${(turn + 1) * 50}%` } })
      ),
      FS.el("span", { class: "fs-middle" }),
    );
  };
  const row = (edit) => {
    const natural = FS.natural.ranges.get(FS.naturalKey(edit));
    const words = FS.el("output", { class: "fs-num", text: FS.turnWords(edit.turn, data) });
    const slider = FS.el("input", {
      type: "range",
      min: -1,
      max: 1,
      step: 1 / 60,
      value: String(edit.turn),
      class: "fs-turn",
      "aria-label": `Strength of ${FS.title(edit)}, feature ${edit.feature}: left suppresses, right amplifies`,
    });
    slider.setAttribute("aria-valuetext", words.textContent);
    slider.addEventListener("input", () => {
      const turn = Number(slider.value), near = (at) => Math.abs(turn - at) < 0.03;
      edit.turn = [0, ...(natural ? natural.notches : [])].find(near) ?? turn;
      words.textContent = FS.turnWords(edit.turn, data);
      slider.setAttribute("aria-valuetext", words.textContent);
    });
    slider.addEventListener("change", () => changed(false));
    const window = edit.steps || ["", ""];
    const bound = (place, label) =>
      FS.el("input", {
        type: "number",
        class: "fs-mini",
        min: 0,
        max: data.max_steps,
        value: window[place],
        placeholder: place ? "last" : "first",
        "aria-label": label,
        onchange: (event) => {
          const now = [...(edit.steps || [0, data.max_steps])];
          now[place] = event.target.value === "" ? (place ? data.max_steps : 0) : Number(event.target.value);
          edit.steps = event.target.value === "" && !edit.steps ? null : now;
          changed(true);
        },
      });
    return FS.el(
      "li",
      { class: "fs-edit", style: { "--chip": edit.colour } },
      FS.el(
        "div",
        { class: "fs-row fs-between" },
        FS.el(
          "span",
          { class: "fs-row" },
          FS.chip(edit.colour),
          FS.el("strong", { class: "fs-label", text: FS.title(edit) }),
          FS.el("span", { class: "fs-quiet fs-num", text: `#${edit.feature}, ${edit.word}` }),
        ),
        FS.button("Remove", () => {
          state.edits = state.edits.filter((other) => other !== edit);
          changed(true);
        }, { "aria-label": `Remove ${FS.title(edit)}` }),
      ),
      FS.el("div", { class: "fs-turnbox" }, track(edit), slider),
      FS.el(
        "div",
        { class: "fs-row fs-between fs-quiet" },
        FS.el("span", { text: "◂ suppress" }),
        words,
        FS.el("span", { text: "amplify ▸" }),
      ),
      FS.el("p", {
        class: "fs-quiet fs-hint",
        text: natural
          ? "The band marks where this image looks natural; its notches are equal steps of measured change."
          : "“Compare strengths” below measures how far the image looks natural.",
      }),
      FS.el(
        "details",
        {
          class: "fs-fold",
          open: unfolded.has(edit),
          ontoggle: (event) => (event.target.open ? unfolded.add(edit) : unfolded.delete(edit)),
        },
        FS.el("summary", { text: "When and where" }),
        FS.el(
          "div",
          { class: "fs-row fs-wrap" },
          FS.el("span", { class: "fs-quiet", text: "Denoising steps from" }),
          bound(0, "First step edited"),
          FS.el("span", { class: "fs-quiet", text: "to before" }),
          bound(1, "Step at which the edit ends"),
          FS.button("as trained", () => {
            edit.steps = null;
            changed(true);
          }),
        ),
        FS.el(
          "label",
          { class: "fs-row fs-tight fs-quiet" },
          FS.el("input", {
            type: "checkbox",
            checked: Boolean(edit.when),
            onchange: (event) => {
              edit.when = event.target.checked ? edit.present : null;
              changed(true);
            },
          }),
          FS.el("span", { text: `Only in images that show ${FS.title(edit)}; others stay as they are` }),
        ),
        FS.el("p", {
          class: "fs-quiet fs-hint",
          text: edit.region
            ? `Acts on ${edit.region.flat().filter(Boolean).length} marked patches, outlined on the image.`
            : "Acts everywhere. Paint on the image to choose where.",
        }),
      ),
    );
  };
  // A picture of the visitor's own: how much of it may change, and the way back to images from a prompt.
  const givenPanel = () => {
    if (!state.given) return null;
    const change = FS.slider({
      label: "How much may change",
      min: 0.1,
      max: 1,
      step: 0.05,
      value: state.given.change,
      format: FS.percent,
      oninput: (value) => {
        state.given = { ...state.given, change: value };
      },
    });
    change.input.addEventListener("change", tell);
    return FS.el(
      "div",
      { class: "fs-own", role: "group", "aria-label": "Your own picture" },
      FS.el("img", { src: state.given.image, alt: "Your picture" }),
      FS.el(
        "div",
        { class: "fs-block" },
        FS.el("span", { class: "fs-row fs-between" }, FS.el("strong", { text: "Your own picture" }), back()),
        change,
        FS.el("p", {
          class: "fs-quiet fs-hint",
          text:
            "This share of noise is put over your picture, and FLUX paints on from there. At 100 % nothing of the picture is left. The prompt above is its caption, and may be empty.",
        }),
      ),
    );
  };
  const back = () =>
    FS.button("Use the prompt instead", () => {
      state.given = null;
      changed(true);
    });
  const draw = () => {
    root.replaceChildren(
      FS.el(
        "section",
        { class: "fs-editor", "aria-label": "Features being steered" },
        FS.el("h2", { class: "fs-h", text: "Steer features" }),
        givenPanel(),
        !state.edits.length && (FS.starters || []).length
          ? FS.el(
            "div",
            { class: "fs-starters", role: "group", "aria-label": "Examples that work" },
            FS.starters.map((starter, at) =>
              FS.el(
                "button",
                {
                  class: "fs-starter",
                  type: "button",
                  onclick: () => FS.emit(root, "begin", { starter: at }),
                },
                starter.pictures.length ? FS.panels(starter.pictures, starter.names) : null,
                FS.el(
                  "span",
                  { class: "fs-row fs-tight" },
                  starter.colours.map(FS.chip),
                  FS.el("span", { text: starter.title }),
                ),
              )
            ),
          )
          : null,
        state.edits.length ? FS.el("ul", { class: "fs-edits" }, state.edits.map(row)) : FS.el("p", {
          class: "fs-quiet",
          text: `${
            (FS.starters || []).length ? "Begin with one of these, or choose" : "Choose"
          } a feature below. Move its slider left to suppress it, right to amplify it. The middle changes nothing.`,
        }),
        state.edits.length >= data.max_edits
          ? FS.el("p", {
            class: "fs-notice",
            role: "status",
            text: `At most ${data.max_edits} features at a time. Remove one to add another.`,
          })
          : null,
        FS.el(
          "details",
          { class: "fs-fold", open: !state.edits.length },
          FS.el("summary", { text: state.edits.length ? "Add another feature" : "Choose a feature" }),
          FS.el(
            "div",
            { class: "fs-row fs-wrap fs-tight", role: "group", "aria-label": "Add a feature" },
            data.suggestions.filter((other) => !root.has(other)).map((other) =>
              FS.el(
                "button",
                {
                  class: "fs-button fs-small fs-row",
                  type: "button",
                  disabled: state.edits.length >= data.max_edits,
                  onclick: () => root.add(other),
                },
                FS.chip(other.colour),
                FS.el("span", { text: other.label }),
              )
            ),
          ),
        ),
        state.edits.length
          ? FS.el(
            "div",
            { class: "fs-row" },
            FS.button("Reset sliders", () => {
              state.edits.forEach((edit) => {
                edit.turn = 0;
                edit.steps = null;
                edit.region = null;
                edit.when = null;
              });
              changed(true);
            }),
            state.undo
              ? FS.el("button", {
                class: "fs-button fs-small",
                type: "button",
                text: "Undo the swap",
                onclick: () => {
                  Object.assign(state, { edits: state.undo, undo: null });
                  changed(true);
                },
              })
              : null,
          )
          : null,
      ),
    );
  };
  // What is painted belongs to the edits from the end of the stroke; making the picture anew is the visitor's to ask.
  root.markRegion = (region) => {
    state.edits.forEach((edit) => {
      edit.region = region;
    });
    keep();
    draw();
  };
  root.applyRegion = (region) => {
    root.markRegion(region);
    tell();
  };
  root.has = (feature) =>
    state.edits.some((edit) => edit.feature === feature.feature && edit.hookpoint === feature.hookpoint);
  // A feature that was just added is brought into view, and its picture, still unturned, is asked for.
  root.add = (slider, alone = false, given = null) => {
    if (alone) Object.assign(state, { edits: [], given });
    const at = state.edits.findIndex((edit) => edit.feature === slider.feature && edit.hookpoint === slider.hookpoint);
    if (at >= 0 || state.edits.length >= data.max_edits) {
      FS.bringIntoView(root.querySelectorAll(".fs-edit")[Math.max(at, 0)]);
      FS.say(at >= 0 ? `${FS.title(slider)} is already here` : `At most ${data.max_edits} features at a time`);
      return;
    }
    state.edits = [...state.edits, { ...slider }];
    draw();
    FS.bringIntoView(root.querySelector(".fs-edit:last-child"));
    tell();
  };
  root.redraw = draw;
  draw();
});

// What a search for sliders found: press to add. `add` is a slider that was asked for, here or on another tab: it
// joins those on the page, which may have moved since.
FS.define("fs-found", (root, data) => {
  const editor = document.querySelector("fs-edits");
  if (data.add) {
    root.keep({ ...data, add: null });
    setTimeout(() => editor.add(data.add, data.alone, data.given)); // once the prompt that came along is there
  }
  if (data.query) {
    root.append(
      data.found.length
        ? FS.el(
          "div",
          { class: "fs-row fs-wrap fs-tight", role: "group", "aria-label": `Features found for ${data.query}` },
          data.found.map((slider) =>
            FS.el(
              "button",
              {
                class: "fs-button fs-small fs-row",
                type: "button",
                onclick: () => editor.add(slider),
              },
              FS.chip(slider.colour),
              FS.el("span", { text: FS.title(slider) }),
              FS.el("span", { class: "fs-quiet fs-num", text: `#${slider.feature}` }),
            )
          ),
        )
        : FS.el("p", {
          class: "fs-quiet",
          role: "status",
          text: data.error || `No feature matches “${data.query}”. Search for a colour, a thing or a number.`,
        }),
    );
  }
});

// The edge of a region of patches, drawn over the picture.
FS.outline = (region) => {
  const on = (row, column) => Boolean((region[row] || [])[column]);
  const lines = region.flatMap((line, y) =>
    line.flatMap((_, x) => (on(y, x)
      ? [
        on(y - 1, x) ? "" : `M${x} ${y}h1`,
        on(y + 1, x) ? "" : `M${x} ${y + 1}h1`,
        on(y, x - 1) ? "" : `M${x} ${y}v1`,
        on(y, x + 1) ? "" : `M${x + 1} ${y}v1`,
      ]
      : [])
    )
  );
  return FS.svg("svg", {
    viewBox: `0 0 ${region[0].length} ${region.length}`,
    class: "fs-outline",
    "aria-hidden": "true",
  }, FS.svg("path", { d: lines.join("") }));
};

FS.define("fs-result", (root, data) => {
  if (data.kind === "example") {
    root.append(
      FS.el(
        "figure",
        { class: "fs-first" },
        data.panels.length
          ? FS.panels(data.pictures, data.names, data.panels)
          : FS.el("img", { src: data.pictures[0], alt: data.prompt }),
        FS.el(
          "figcaption",
          {},
          FS.el("span", { class: "fs-badge", text: "example" }),
          FS.el("span", { text: data.words }),
        ),
      ),
    );
    return;
  }
  const strip = document.querySelector("fs-strip"); // of another picture, or of a feature that is gone or acts elsewhere
  if (strip && strip.data && !FS.isStripOf(strip.data, data)) {
    strip.keep(null);
    strip.data = null;
  }
  const images = { before: data.before, after: data.after, random: data.random };
  const view = { right: "after", cut: 50, painting: false };
  const left = FS.el("img", {
    class: "fs-shot",
    src: images.before,
    alt: data.given ? "Before: your picture, painted on without edits" : `Before: ${data.prompt}`,
  });
  const right = FS.el("img", {
    class: "fs-shot fs-over",
    src: images.after,
    alt: `After: ${data.words.join("; ") || "no edit"}`,
  });
  const knob = FS.el("div", { class: "fs-knob", "aria-hidden": "true" });
  const range = FS.el("input", {
    type: "range",
    class: "fs-cut",
    min: 0,
    max: 100,
    value: "50",
    "aria-label": "Before and after: left shows before, right shows after",
  });
  const grid = FS.el("canvas", { class: "fs-paint", width: data.cols, height: data.rows, hidden: true });
  const labels = [
    FS.el("span", { class: "fs-corner", text: "before" }),
    FS.el("span", { class: "fs-corner fs-end", text: "after" }),
  ];
  const stage = FS.el(
    "div",
    { class: "fs-ba" },
    left,
    right,
    data.region ? FS.outline(data.region) : null,
    knob,
    ...labels,
    range,
    grid,
  );
  const cut = (value) => {
    view.cut = value;
    right.style.clipPath = `inset(0 0 0 ${value}%)`;
    knob.style.left = `${value}%`;
  };
  range.addEventListener("input", () => cut(Number(range.value)));
  // What was painted is seen whole: the handle starts at its left edge. Else it splits what changed.
  const painted = (data.region || []).flatMap((line) => line.flatMap((on, at) => (on ? [at] : [])));
  range.value = String(100 * (painted.length ? Math.min(...painted) / data.cols : data.cut));
  cut(Number(range.value));
  const show = (which) => {
    view.right = which;
    right.src = images[which];
    right.alt = which === "random" ? "The same strength in a random direction" : `After: ${data.words.join("; ")}`;
    labels[1].textContent = which === "random" ? "random direction" : "after";
    measured.replaceChildren(...FS.measured(data, which === "random"));
  };
  const measured = FS.el("div", { class: "fs-measured" }, FS.measured(data, false));

  // Painting: a byte a patch; drag with mouse, pen or finger, or move with the arrow keys and press space.
  const mask = Uint8Array.from((data.region || Array(data.rows).fill(Array(data.cols).fill(0))).flat());
  const paint = () => {
    const context = grid.getContext("2d");
    const brushColour = getComputedStyle(root).getPropertyValue("--fs-brush");
    context.clearRect(0, 0, data.cols, data.rows);
    mask.forEach((on, at) => {
      context.fillStyle = on ? brushColour : at === focus ? "white" : "black";
      context.globalAlpha = on ? (at === focus ? 0.9 : 0.6) : at === focus ? 0.6 : 0.28;
      context.fillRect(at % data.cols, Math.floor(at / data.cols), 1, 1);
    });
  };
  let focus = null, brush = 1, stroked = false, last = null;
  // The brush is a disc, of one patch where there are few and of five across where there are 64 x 64.
  const radius = Math.floor(Math.max(data.rows, data.cols) / 32);
  const dab = (at) => {
    const row = Math.floor(at / data.cols), column = at % data.cols;
    for (let y = -radius; y <= radius; y += 1) {
      for (let x = -radius; x <= radius; x += 1) {
        const isInside = row + y >= 0 && row + y < data.rows && column + x >= 0 && column + x < data.cols;
        if (isInside && x * x + y * y <= radius * (radius + 1)) mask[(row + y) * data.cols + column + x] = brush;
      }
    }
    last = at;
  };
  // A quick hand skips patches: all between two points are painted.
  const stroke = (from, to) => {
    const [x, y] = [from % data.cols, Math.floor(from / data.cols)];
    const [dx, dy] = [to % data.cols - x, Math.floor(to / data.cols) - y], n = Math.max(Math.abs(dx), Math.abs(dy), 1);
    for (let i = 1; i <= n; i += 1) dab(Math.round(y + (dy * i) / n) * data.cols + Math.round(x + (dx * i) / n));
  };
  const cell = (event) => {
    const rect = grid.getBoundingClientRect();
    const row = Math.min(
      data.rows - 1,
      Math.max(0, Math.floor(((event.clientY - rect.top) / rect.height) * data.rows)),
    );
    const column = Math.min(
      data.cols - 1,
      Math.max(0, Math.floor(((event.clientX - rect.left) / rect.width) * data.cols)),
    );
    return row * data.cols + column;
  };
  grid.tabIndex = 0;
  grid.setAttribute("role", "application");
  grid.setAttribute("aria-label", "Paint where the edit acts: arrow keys move, space paints");
  grid.addEventListener("pointerdown", (event) => {
    grid.setPointerCapture(event.pointerId);
    brush = mask[cell(event)] ? 0 : 1;
    focus = null;
    dab(cell(event));
    paint();
  });
  grid.addEventListener("pointerup", () => mark());
  grid.addEventListener("pointercancel", () => mark());
  grid.addEventListener("pointermove", (event) => {
    if (event.buttons) {
      stroke(last ?? cell(event), cell(event));
      paint();
    }
  });
  grid.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: -data.cols, ArrowDown: data.cols, ArrowLeft: -1, ArrowRight: 1 };
    if (focus === null) focus = Math.floor(mask.length / 2 + data.cols / 2);
    if (moves[event.key]) focus = Math.min(mask.length - 1, Math.max(0, focus + moves[event.key]));
    else if (event.key !== " ") return;
    event.preventDefault();
    if (event.key === " ") {
      brush = mask[focus] ? 0 : 1;
      dab(focus);
      mark();
    }
    paint();
  });
  const rows = () =>
    Array.from({ length: data.rows }, (_, row) => Array.from(mask.subarray(row * data.cols, (row + 1) * data.cols)));
  const region = () => (mask.some(Boolean) ? rows() : null);
  const editor = () => document.querySelector("fs-edits");
  const had = FS.natural.ranges.size;
  if (had && !FS.naturalOf(data.picture).size && editor()) editor().redraw();
  const painter = FS.button("Paint where it acts", () => {
    view.painting = !view.painting;
    painter.setAttribute("aria-pressed", String(view.painting));
    painter.textContent = view.painting ? "Use this region" : "Paint where it acts";
    grid.hidden = !view.painting;
    range.hidden = view.painting;
    if (view.painting) {
      paint();
      grid.focus();
      return;
    }
    later.hidden = true;
    if (stroked && editor() && editor().applyRegion) editor().applyRegion(region());
    stroked = false;
  }, { "aria-pressed": "false" });
  const everywhere = FS.button("Everywhere", () => {
    mask.fill(0);
    paint();
    if (editor() && editor().applyRegion) editor().applyRegion(null);
  });

  const download = (name, href, text) => FS.el("a", { class: "fs-button fs-small", href, download: name, text });
  // What is asked for with the region that is painted: the first image of the batch is the unedited one.
  const asked = () => ({
    ...data.recipe,
    batch: data.recipe.batch.map((_, at) => (at ? data.edits.map((edit) => ({ ...edit, region: region() })) : [])),
  });
  const recipeFile = (recipe) =>
    `data:application/json;charset=utf-8,${encodeURIComponent(JSON.stringify(recipe, null, 1))}`;
  const recipe = data.recipe && download("recipe.json", recipeFile(data.recipe), "Recipe");
  const later = FS.el("p", {
    class: "fs-notice",
    role: "status",
    hidden: true,
    text: data.recipe
      ? "The image does not show the painted region yet: press Steer. The link and the recipe already contain it."
      : "The image does not show the painted region yet: press Steer.",
  });
  const mark = () => {
    stroked = true;
    if (editor() && editor().markRegion) editor().markRegion(region());
    later.hidden = false;
    if (!data.recipe) return;
    const { prompt, seed, settings, batch, index } = asked();
    recipe.href = recipeFile(asked());
    const view = { prompt, edits: batch[index], seed, num_inference_steps: settings.num_inference_steps };
    FS.packView({ tab: "steer", saes: data.saes, ...view }).then((text) => (data.link = text));
  };
  root.append(
    FS.el(
      "section",
      { class: "fs-result", "aria-label": "Before and after" },
      ...data.notices.map((text) => FS.el("p", { class: "fs-notice", text })),
      FS.el(
        "p",
        { class: "fs-prompt" },
        data.given ? FS.el("span", { class: "fs-badge", text: "your picture" }) : null,
        data.prompt ? FS.el("span", { text: `“${data.prompt}”` }) : null,
        FS.el("span", { class: "fs-quiet fs-num", text: `seed ${data.seed}` }),
      ),
      stage,
      data.given ? FS.el("p", { class: "fs-quiet fs-hint", text: data.given }) : null,
      FS.el(
        "div",
        { class: "fs-row fs-wrap" },
        data.measurement && !data.random &&
          FS.button("Compare with a random direction (makes 3 images)", () => FS.emit(root, "control", {})),
        data.measurement && data.random &&
          FS.toggle({
            label: "Right half",
            options: [["after", "after"], ["random", "a random direction"]],
            value: "after",
            onchange: show,
          }),
        FS.el("span", { class: "fs-row" }, painter, everywhere),
      ),
      later,
      FS.el(
        "ul",
        { class: "fs-words" },
        (data.words.length ? data.words : ["No feature is chosen: before and after are the same."]).map((text) =>
          FS.el("li", { text })
        ),
      ),
      measured,
      FS.actions(
        data,
        () => ({
          title: data.words.join("; ") || data.prompt,
          words: FS.told({ ...data, picture: data.given }),
          pictures: [["before", data.before], ["after", data.after], [
            "random direction, same strength",
            data.random,
          ]],
          recipe: data.recipe,
          measurement: data.measurement,
        }),
        download("fluxsae.png", data.png, data.recipe ? "Image with recipe" : "Image"),
        recipe,
      ),
      FS.code(data.code),
    ),
  );
  if (getComputedStyle(root).getPropertyValue("--fs-narrow")) left.decode().then(() => FS.bringIntoView(stage)); // it has its height once its picture is there
});

// A distance between two pictures in words, from its share of the distance between unrelated ones.
FS.changed = (share) => {
  if (share === 0) return "not at all";
  if (share > 1) return "completely (more than two unrelated images differ)";
  const word = share < 0.01 ? "barely" : share < 0.05 ? "a little" : share < 0.5 ? "clearly" : "completely";
  return `${word} (${FS.share(share)} of the distance between unrelated images)`;
};

// How often the bounds of what looks natural are wrong on images that nobody edited.
FS.calibration = ({ false_alarms, n_pictures }) =>
  false_alarms === null
    ? "These bounds were not calibrated in this run."
    : `At most ${
      FS.percent(false_alarms)
    } of FLUX's own unedited images are beyond them (from ${n_pictures} of this run).`;

FS.measured = (data, isRandom) => {
  const measurement = isRandom ? data.random_measurement : data.measurement;
  if (!measurement) return [];
  // of several features turned at once it is a mean that says nothing
  const inside = measurement.activation_before === null || data.edits.length > 1 ? null : [
    "Activation",
    `${FS.number(measurement.activation_before, 2)} → ${FS.number(measurement.activation_after, 2)}`,
    "largest activation before and after, in multiples of the feature's usual strength",
  ];
  const odd = measurement.out_of_distribution, doubt = measurement.denoising_error_ratio;
  const most = measurement.natural;
  return [
    FS.facts([
      measurement.distance_of_unrelated === null ? null : [
        "Image changed",
        FS.changed(measurement.distance / measurement.distance_of_unrelated),
        `${measurement.distance_name} ${FS.number(measurement.distance, 2)}; two unrelated images of this run are ${
          FS.number(measurement.distance_of_unrelated, 2)
        } apart (median)`,
      ],
      inside,
      [
        "Unusual patches",
        `${odd === 0 ? "0 %" : FS.share(odd)}${odd > most.out_of_distribution ? ", more than looks natural" : ""}`,
        `share of the edited patches that look unlike those of FLUX's own images; natural: up to ${
          FS.percent(most.out_of_distribution)
        }`,
      ],
      [
        "Denoising error",
        `${FS.number(doubt, 2)} × that of the image before${
          doubt > most.denoising_error_ratio ? ", more than looks natural" : ""
        }`,
        `error of FLUX when it denoises this image without a prompt, relative to the image before (1: the same); natural: up to ${
          FS.number(most.denoising_error_ratio, 2)
        }`,
      ],
      measurement.relative_size === null ? null : [
        "Size of the edit",
        `${FS.percent(measurement.relative_size)} of the residual stream`,
        "size of the edit where it joins the residual stream, relative to that stream, on the edited patches",
      ],
      measurement.clip_change === null ? null : [
        "CLIP distance",
        `${FS.number(Math.max(0, measurement.clip_change), 2)} (0: the same)`,
        "1 minus the CLIP cosine between the two images",
      ],
    ]),
    isRandom
      ? FS.el("p", {
        class: "fs-quiet fs-hint",
        text: "The same strength in a random direction. What changes here is not specific to the feature.",
      })
      : "",
  ];
};

FS.isStripOf = (strip, result) =>
  JSON.stringify(strip.picture) === JSON.stringify(result.picture) &&
  result.edits.some((edit) => FS.naturalKey(edit) === FS.naturalKey(strip));

FS.define("fs-strip", (root, data) => {
  const ranges = FS.naturalOf(data.picture);
  if (data.natural) ranges.set(FS.naturalKey(data), { range: data.natural, notches: data.notches });
  else ranges.delete(FS.naturalKey(data));
  const editor = document.querySelector("fs-edits"), most = data.cells[0].measurement.natural;
  if (editor && editor.redraw) editor.redraw();
  root.append(
    FS.el(
      "section",
      { class: "fs-strip", "aria-label": "Strengths compared", style: { "--chip": data.colour } },
      FS.el("h3", { class: "fs-h", text: `${data.label || `Feature ${data.feature}`} at seven strengths` }),
      FS.el(
        "ol",
        { class: "fs-cells", tabIndex: 0, "aria-label": "Images at seven strengths" }, // scrolled sideways on a phone
        data.cells.map((cell) =>
          FS.el(
            "li",
            { class: cell.natural ? "fs-ok" : "" },
            FS.el("img", { src: cell.image, alt: cell.words }),
            FS.el("span", { class: "fs-num", text: cell.short }),
            FS.el("span", { class: "fs-quiet", text: cell.natural ? "looks natural" : "not natural" }),
          )
        ),
      ),
      FS.el(
        "div",
        { class: "fs-row fs-wrap fs-tight" },
        data.cells.map((cell, at) =>
          FS.el("a", {
            class: "fs-button fs-small",
            href: cell.image,
            download: `strength-${at + 1}.webp`,
            text: `Save ${at + 1}`,
            "aria-label": `Save the image at ${cell.short}, at full size`,
          })
        ),
      ),
      FS.el("p", {
        class: "fs-quiet",
        text: `An image looks natural where at most ${
          FS.percent(most.out_of_distribution)
        } of the edited patches look unlike those of FLUX's own images, and FLUX denoises the image almost as well as the one before (error up to ${
          FS.number(most.denoising_error_ratio, 2)
        } ×). ${FS.calibration(most)} The band on the slider shows this range for this image.`,
      }),
    ),
  );
});

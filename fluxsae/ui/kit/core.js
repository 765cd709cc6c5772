// Shared pieces of the page: DOM building (text only, so labels and prompts can never become markup), heat, charts.
"use strict";

FS.el = (tag, props = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") {
      for (const [name, part] of Object.entries(value)) {
        name.startsWith("--") ? node.style.setProperty(name, part) : (node.style[name] = part);
      }
    } else if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key in node && !key.includes("-") && key !== "list" && key !== "role") node[key] = value;
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
};

FS.svg = (tag, props = {}, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "text") node.textContent = value;
    else if (value !== null && value !== undefined) node.setAttribute(key, String(value));
  }
  node.append(...children.flat().filter(Boolean));
  return node;
};

FS.button = (text, onclick, props = {}) =>
  FS.el("button", { class: "fs-button fs-small", type: "button", text, onclick, ...props });
// Where a feature that is shown leads to; `detail` has its hookpoint and number.
FS.leads = (root, detail) => [
  FS.button("Steer with this", () => FS.emit(root, "steer", detail), { class: "fs-button fs-small fs-primary" }),
  FS.button("Open its page", () => FS.emit(root, "page", detail)),
];

FS.bytes = (base64) => Uint8Array.from(atob(base64 || ""), (character) => character.charCodeAt(0));
FS.percent = (fraction) => (fraction === null || fraction === undefined ? "–" : `${Math.round(fraction * 100)} %`);
FS.number = (value, digits = 3) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value !== 0 && Math.abs(value) < 1e-3) return value < 0 ? "above -0.001" : "below 0.001";
  if (Math.abs(value) >= 1e5) return Math.round(value).toLocaleString("en");
  return Number(value.toPrecision(digits)).toString();
};
FS.share = (fraction) => {
  if (fraction === null || fraction === undefined) return "–";
  const percent = fraction * 100;
  return percent === 0
    ? "never"
    : `${percent < 0.1 ? percent.toPrecision(1) : percent < 10 ? percent.toFixed(1) : Math.round(percent)} %`;
};

FS.emit = (node, name, detail) => node.dispatchEvent(new CustomEvent(`fs-${name}`, { bubbles: true, detail }));

FS.say = (text) => {
  let region = document.getElementById("fs-live");
  if (!region) {
    region = FS.el("div", { id: "fs-live", class: "fs-sr", role: "status", "aria-live": "polite" });
    (document.querySelector("main") || document.body).append(region);
  }
  region.textContent = text;
};

// Colour of a heat value 0..255, from the library's own map (768 bytes in base64).
FS.heatTable = () => (FS._heat = FS._heat || FS.bytes(FS.heat.table));
FS.heatGradient = () => {
  const table = FS.heatTable();
  const stops = [];
  for (let i = 0; i <= 16; i += 1) {
    const at = Math.min(255, i * 16) * 3;
    stops.push(`rgb(${table[at]},${table[at + 1]},${table[at + 2]})`);
  }
  return `linear-gradient(90deg, ${stops.join(",")})`;
};

FS.images = new Map();
FS.image = (url) => {
  if (!FS.images.has(url)) {
    if (FS.images.size > 400) FS.images.delete(FS.images.keys().next().value);
    FS.images.set(
      url,
      new Promise((resolve, reject) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => reject(new Error("image"));
        image.src = url;
      }),
    );
  }
  return FS.images.get(url);
};

// One value of a rows x cols byte map at fractional position, bilinear between cell centres.
FS.sample = (map, rows, cols, y, x) => {
  const fy = Math.min(Math.max(y * rows - 0.5, 0), rows - 1);
  const fx = Math.min(Math.max(x * cols - 0.5, 0), cols - 1);
  const y0 = Math.floor(fy), x0 = Math.floor(fx);
  const y1 = Math.min(y0 + 1, rows - 1), x1 = Math.min(x0 + 1, cols - 1);
  const dy = fy - y0, dx = fx - x0;
  const top = map[y0 * cols + x0] * (1 - dx) + map[y0 * cols + x1] * dx;
  const bottom = map[y1 * cols + x0] * (1 - dx) + map[y1 * cols + x1] * dx;
  return top * (1 - dy) + bottom * dy;
};

// Draws image and heat as fluxsae.pictures.heatmaps.overlay does: the image keeps its colours, a little darker, where
// the feature is silent, and glows where it fires. With `spotlight` it is grey and dark where the feature is silent.
// `side` enlarges small images smoothly first, so that heat can have finer edges than their pixels.
FS.drawHeat = async (
  canvas,
  {
    url,
    map,
    rows,
    cols,
    opacity = FS.heat.opacity,
    threshold = FS.heat.threshold,
    gain = 1,
    smooth = true,
    spotlight = false,
    most = Infinity,
    side = 0,
  },
) => {
  const token = (canvas._fsToken = (canvas._fsToken || 0) + 1);
  const image = await FS.image(url).catch(() => null);
  if (!image || canvas._fsToken !== token) return;
  const longest = Math.max(image.naturalWidth, image.naturalHeight);
  const scale = Math.min(Math.max(1, side / longest), most / longest);
  const width = Math.round(image.naturalWidth * scale), height = Math.round(image.naturalHeight * scale);
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, width, height);
  if (!map || opacity === 0) return;
  const { exponent, dimming } = FS.heat, luma = [0.299, 0.587, 0.114];
  const pixels = context.getImageData(0, 0, width, height);
  const data = pixels.data, table = FS.heatTable(), floor = Math.max(threshold, 1e-6);
  for (let y = 0, at = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1, at += 4) {
      const raw = smooth
        ? FS.sample(map, rows, cols, (y + 0.5) / height, (x + 0.5) / width)
        : map[Math.floor((y * rows) / height) * cols + Math.floor((x * cols) / width)];
      const heat = Math.min(1, (raw * gain) / 255);
      if (spotlight) {
        const grey = 0.55 * (data[at] * luma[0] + data[at + 1] * luma[1] + data[at + 2] * luma[2]);
        const lit = heat >= floor ? Math.min(1, Math.sqrt(heat) * 1.15) : 0;
        for (let c = 0; c < 3; c += 1) {
          const dim = 0.45 * grey + 0.08 * data[at + c];
          data[at + c] += opacity * (1 - lit) * (dim - data[at + c]);
        }
        continue;
      }
      const weight = heat >= floor ? opacity * heat ** exponent : 0;
      const colour = Math.round(heat * 255) * 3;
      for (let c = 0; c < 3; c += 1) {
        const base = data[at + c] * (1 - opacity * (1 - dimming));
        data[at + c] = base + weight * (table[colour + c] - base);
      }
    }
  }
  context.putImageData(pixels, 0, 0);
};

FS.legend = (maximum, unit = "") =>
  FS.el(
    "div",
    { class: "fs-legend" },
    FS.el("span", { text: "silent" }),
    FS.el("span", { class: "fs-ramp", style: { background: FS.heatGradient() }, "aria-hidden": "true" }),
    FS.el("span", { class: "fs-num", text: maximum }),
    unit ? FS.el("span", { class: "fs-quiet", text: unit }) : null,
  );

// Filled with the colour that a feature's label names; only an outline for a feature that stands for no colour.
FS.chip = (colour) =>
  FS.el("span", {
    class: colour === FS.neutral ? "fs-chip fs-hollow" : "fs-chip",
    style: { "--chip": colour },
    "aria-hidden": "true",
  });

FS.sure = (confidence) => {
  if (confidence === null || confidence === undefined) return "";
  return FS.confidence.find(([, least]) => confidence >= least)[0];
};

FS.isGuess = (confidence) => FS.sure(confidence) === FS.confidence.at(-1)[0];

// A name that is more likely wrong than right has a question mark.
// A feature that fires elsewhere than on what it is named after only goes with it.
FS.title = ({ label, confidence, place }) =>
  label ? `${FS.places[place] ? "goes with " : ""}${label}${FS.isGuess(confidence) ? "?" : ""}` : "unnamed";

// Where such a feature fires.
FS.where = ({ label, place }) => (label && FS.places[place] ? `fires ${FS.places[place]}` : null);

// A feature's name to press: it becomes the visitor's.
FS.nameLink = (root, feature, props = {}) =>
  FS.el(
    "button",
    { class: "fs-link fs-row", type: "button", onclick: () => FS.choose(root, feature), ...props },
    FS.chip(feature.colour),
    FS.el("span", { class: "fs-label", text: FS.title(feature) }),
    FS.el("span", { class: "fs-quiet fs-num", text: `#${feature.feature}` }),
  );
FS.choose = (root, { hookpoint, feature }) => FS.emit(root, "select", { hookpoint, feature });

// Features told once a label: the first of each, with the others of its label.
FS.byLabel = (features) => {
  const groups = new Map();
  for (const feature of features) {
    const key = feature.label || feature.feature;
    groups.set(key, [...(groups.get(key) || []), feature]);
  }
  return [...groups.values()];
};

// The others of a label, drawn by `draw` when they are asked for; `count` tells how many there are in all.
FS.alike = (others, draw, known = 0) => {
  const count = Math.max(known, others.length);
  const fold = FS.el(
    "details",
    { class: "fs-fold fs-alike" },
    FS.el("summary", { text: `${count} more with this name` }),
  );
  fold.addEventListener("toggle", () => {
    if (fold.childElementCount > 1) return;
    fold.append(draw(others));
    if (count > others.length) {
      fold.append(FS.el("p", { class: "fs-quiet fs-hint", text: `The first ${others.length} of ${count}.` }));
    }
  });
  fold.holds = (feature) => others.some((other) => other.feature === feature);
  return fold;
};

FS.bar = (fraction, colour, text) =>
  FS.el(
    "span",
    { class: "fs-bar", role: "img", "aria-label": text },
    FS.el("span", { style: { width: `${Math.max(1, Math.min(1, fraction || 0) * 100)}%`, background: colour } }),
  );

// Pixels of the longer side of a thumbnail: the large pictures of FLUX.1-dev are drawn small.
FS.thumbSide = 192;
FS.thumb = (url, map, rows, cols, options = {}) => {
  const canvas = FS.el("canvas", { class: "fs-thumb", width: 64, height: 64, "aria-hidden": "true" });
  FS.drawHeat(canvas, { url, map, rows, cols, opacity: 1, spotlight: true, most: FS.thumbSide, ...options });
  return canvas;
};

FS.copyButton = (text, label = "Copy") => {
  const button = FS.el("button", { class: "fs-button fs-small", type: "button", text: label });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(typeof text === "function" ? text() : text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Could not copy";
    }
    FS.say(button.textContent);
    setTimeout(() => (button.textContent = label), 1600);
  });
  return button;
};

// "As code": the very values on screen as Python, curl and MCP.
FS.code = (snippets) => {
  if (!snippets) return null;
  const names = Object.keys(snippets);
  const pre = FS.el("pre", { class: "fs-code", tabindex: 0, "aria-label": "Code for what is on screen" });
  const tabs = FS.el("div", { class: "fs-row", role: "group", "aria-label": "Language" });
  const show = (name) => {
    pre.textContent = snippets[name].replaceAll(FS.origin, location.origin);
    for (const tab of tabs.children) tab.setAttribute("aria-pressed", String(tab.textContent === name));
  };
  for (const name of names) {
    tabs.append(
      FS.button(name, () => show(name)),
    );
  }
  show(names[0]);
  return FS.el(
    "details",
    { class: "fs-details" },
    FS.el("summary", { text: "As code" }),
    FS.el("div", { class: "fs-row fs-between" }, tabs, FS.copyButton(() => pre.textContent)),
    pre,
  );
};

// A small column chart: values, with words for screen readers and a label under the first and last column.
FS.columns = (values, { label, first, last, colour, unit } = {}) => {
  const width = 240, height = 64, most = Math.max(...values, 1e-12), step = width / Math.max(values.length, 1);
  const bars = values.map((value, at) => {
    const tall = Math.max(value > 0 ? 1.5 : 0, (value / most) * height);
    return FS.svg("rect", {
      x: at * step + step * 0.12,
      y: height - tall,
      width: step * 0.76,
      height: tall,
      rx: Math.min(2, step * 0.2),
      fill: colour || "var(--fs-accent)",
    });
  });
  return FS.el(
    "figure",
    { class: "fs-chart" },
    FS.el("figcaption", { text: label }),
    FS.el("span", { class: "fs-quiet fs-num fs-hint", text: `highest bar: ${FS.number(most)} ${unit}` }),
    FS.svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, preserveAspectRatio: "none" },
      bars,
    ),
    FS.el(
      "div",
      { class: "fs-row fs-between fs-quiet fs-num" },
      FS.el("span", { text: first }),
      FS.el("span", { text: last }),
    ),
  );
};

FS.slider = ({ label, min, max, step, value, format, oninput, help }) => {
  const out = FS.el("output", { class: "fs-num", text: format ? format(value) : value });
  const input = FS.el("input", { type: "range", min, max, step, value: String(value), "aria-label": label });
  input.addEventListener("input", () => {
    const now = Number(input.value);
    out.textContent = format ? format(now) : String(now);
    input.setAttribute("aria-valuetext", out.textContent);
    oninput(now);
  });
  const words = FS.el("span", {}, label, help ? FS.el("span", { class: "fs-help", text: help }) : null);
  const node = FS.el("label", { class: "fs-slider" }, words, input, out);
  node.input = input;
  return node;
};

FS.toggle = ({ label, options, value, onchange }) => {
  const buttons = options.map(([key, text]) =>
    FS.el("button", {
      class: "fs-segment",
      type: "button",
      text,
      "aria-pressed": String(key === value),
      onclick: (event) => {
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === event.currentTarget));
        onchange(key);
      },
    })
  );
  return FS.el(
    "div",
    { class: "fs-toggle" },
    FS.el("span", { text: label, class: "fs-quiet" }),
    FS.el("span", { class: "fs-segments", role: "group", "aria-label": label }, buttons),
  );
};

FS.bringIntoView = (node) =>
  node.scrollIntoView({
    block: "nearest",
    behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth",
  });

// A custom element whose `data` is set by Gradio; `draw` runs whenever it changes.
FS.define = (name, draw) => {
  if (customElements.get(name)) return;
  customElements.define(
    name,
    class extends HTMLElement {
      set data(value) {
        this._data = value;
        this.replaceChildren();
        if (value) draw(this, value);
      }
      get data() {
        return this._data;
      }
    },
  );
};

// Ties a gr.HTML component to its element: value in, fs-* events out. `keep` makes what the visitor changed the value
// that every later event sends: Gradio drops or forgets what an event carries while the one before is under way.
FS.feed = (root, props, trigger, watch, events) => {
  const node = root.querySelector("[data-fs]");
  node.keep = (value) => {
    node._fsValue = value;
    props.value = value;
  };
  const update = () => {
    const value = props.value && typeof props.value === "object" ? props.value : null;
    if ((node._fsValue || null) !== value) {
      node._fsValue = value;
      node.data = value;
    }
  };
  for (const [name, target] of Object.entries(events)) {
    root.addEventListener(`fs-${name}`, (event) => {
      event.stopPropagation();
      trigger(target, event.detail);
    });
  }
  watch("value", update);
  update();
};

FS.card = (feature, { rows, cols, onopen, pressed, extra, thumbs }) => {
  const pictures = (thumbs || []).map((thumb) =>
    FS.thumb(thumb.image, thumb.map, thumb.rows || rows, thumb.cols || cols)
  );
  const strength = feature.strength === undefined
    ? null
    : FS.bar(feature.strength, feature.colour, feature.strength_text || "");
  const sure = FS.sure(feature.confidence);
  return FS.el(
    "button",
    {
      class: "fs-card",
      type: "button",
      "aria-pressed": pressed === undefined ? null : String(pressed),
      "data-feature": feature.feature,
      onclick: () => onopen(feature),
      style: { "--chip": feature.colour },
    },
    pictures.length ? FS.el("span", { class: "fs-thumbs" }, pictures) : null,
    FS.el(
      "span",
      { class: "fs-card-text" },
      FS.el(
        "span",
        { class: "fs-row" },
        FS.chip(feature.colour),
        FS.el("span", { class: "fs-label", text: FS.title(feature) }),
        sure ? FS.el("span", { class: "fs-quiet", text: sure }) : null,
      ),
      FS.where(feature) ? FS.el("span", { class: "fs-quiet", text: FS.where(feature) }) : null,
      FS.el(
        "span",
        { class: "fs-row fs-quiet fs-num" },
        FS.el("span", { text: `#${feature.feature}` }),
        extra ? FS.el("span", { text: extra }) : null,
      ),
      strength,
    ),
  );
};

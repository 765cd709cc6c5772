// Under the prompt: the words that the miniature knows, as chips; and the prompt itself with its words to press.
FS.setText = (box, text) => {
  box.value = text;
  box.dispatchEvent(new Event("input", { bubbles: true }));
};

// A word takes the place of the one of its kind that is nearest to the caret; where there is none it is added.
FS.withWord = (text, caret, { word, phrase, kin }) => {
  const found = [...text.matchAll(/[\p{L}\p{N}]+/gu)].filter(([each]) => kin.includes(each.toLowerCase()));
  if (!found.length) return `${text.trim()} ${phrase}`.trim();
  const [[old, at]] = found.map((match) => [match[0], match.index])
    .sort((one, other) => Math.abs(one[1] - caret) - Math.abs(other[1] - caret));
  return text.slice(0, at) + word + text.slice(at + old.length);
};

FS.define("fs-vocabulary", (root, data) => {
  const box = () => document.querySelector(`#${data.prompt} textarea`);
  const chip = (word, phrase, kin) =>
    FS.button(word, () => FS.setText(box(), FS.withWord(box().value, box().selectionStart, { word, phrase, kin })));
  root.append(
    FS.el(
      "div",
      { class: "fs-vocabulary", role: "group", "aria-label": "Words that this FLUX knows" },
      Object.entries(data.words).map(([kind, words]) =>
        FS.el(
          "span",
          { class: "fs-kind", role: "group", "aria-label": kind },
          FS.el("span", { class: "fs-quiet", text: kind }),
          Object.entries(words).map(([word, phrase]) => chip(word, phrase, Object.keys(words))),
        )
      ),
    ),
  );
});

// The prompt with its words as buttons where a feature that fires is named so: press to see where.
FS.promptWords = (prompt, features, onpress) => {
  const named = features.filter((feature) => feature.label).sort((one, other) => other.label.length - one.label.length);
  const taken = [];
  const spans = [];
  for (const feature of named) {
    if (taken.includes(feature.label)) continue;
    const words = feature.label.split(/\s+/).map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const match = new RegExp(`(?<![\\p{L}\\p{N}])${words.join("\\s+")}(?![\\p{L}\\p{N}])`, "iu").exec(prompt);
    if (!match) continue;
    const end = match.index + match[0].length;
    if (spans.some((span) => match.index < span.end && span.start < end)) continue;
    taken.push(feature.label);
    spans.push({ start: match.index, end, feature });
  }
  spans.sort((one, other) => one.start - other.start);
  const parts = [];
  let at = 0;
  for (const { start, end, feature } of spans) {
    parts.push(prompt.slice(at, start));
    parts.push(FS.el("button", {
      class: "fs-word",
      type: "button",
      text: prompt.slice(start, end),
      "data-feature": feature.feature,
      "aria-pressed": "false",
      style: { "--chip": feature.colour },
      onclick: () => onpress(feature.feature),
    }));
    at = end;
  }
  return FS.el("span", { class: "fs-said" }, "“", ...parts, prompt.slice(at), "”");
};

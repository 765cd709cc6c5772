// A picture of the visitor's own: dropped, pasted, chosen, or one of the samples; with a caption if there is one.
// What the browser can open it makes upright and small, and nothing else of the file leaves the visitor's machine;
// any other file goes to the server as it is, which reads more kinds, or says why not.
const LONGEST_SENT = 4096, LARGEST_SENT = 8 * 2 ** 20;

const asUrl = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });

FS.pictureUrl = async (file, side) => {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    if (file.size > LARGEST_SENT) throw new Error("This file is larger than 8 MB. Scale the picture down.");
    return asUrl(file);
  }
  const short = Math.min(bitmap.width, bitmap.height), long = Math.max(bitmap.width, bitmap.height);
  const scale = Math.min(1, (2 * side) / short, LONGEST_SENT / long);
  const canvas = FS.el("canvas", {
    width: Math.max(1, Math.round(bitmap.width * scale)),
    height: Math.max(1, Math.round(bitmap.height * scale)),
  });
  const context = canvas.getContext("2d", { alpha: false });
  context.fillStyle = "#fff"; // what is transparent becomes white, as on the server
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.width * canvas.height <= 2 ** 18 ? canvas.toDataURL("image/png") : canvas.toDataURL("image/webp", 0.95);
};

FS.define("fs-given", (root, data) => {
  const state = { url: null };
  const input = FS.el("input", { type: "file", accept: "image/*", hidden: true, "aria-label": "Choose a picture" });
  const shown = FS.el("img", { class: "fs-given-thumb", alt: "Your picture", hidden: true });
  const told = FS.el("p", { class: "fs-notice", role: "status", hidden: true });
  const caption = FS.el("input", {
    type: "text",
    class: "fs-text",
    maxLength: 2000,
    placeholder: "What does it show? (optional)",
    "aria-label": "Caption of your picture, optional",
  });
  const read = () => FS.emit(root, "read", { picture: state.url, caption: caption.value });
  const again = FS.button("Read again", read);
  const captioned = FS.el(
    "div",
    { class: "fs-captioned", hidden: true },
    FS.el("div", { class: "fs-row" }, shown, caption, again),
    FS.el("p", {
      class: "fs-quiet fs-hint",
      text: "FLUX reads your picture without painting. It is kept in memory while this page is open, and nowhere else.",
    }),
  );
  const take = (url, words) => {
    Object.assign(state, { url });
    shown.src = url;
    shown.hidden = captioned.hidden = false;
    told.hidden = true;
    caption.value = words;
    read();
  };
  root.take = async (file) => {
    try {
      take(await FS.pictureUrl(file, data.side), "");
    } catch (error) {
      told.textContent = error.message || "This file cannot be read.";
      told.hidden = false;
    }
  };
  shown.addEventListener("error", () => (shown.hidden = true)); // a kind that the browser does not show
  input.addEventListener("change", () => {
    if (input.files.length) root.take(input.files[0]);
    input.value = "";
  });
  caption.addEventListener("keydown", (event) => {
    if (event.key === "Enter") read();
  });
  const samples = data.samples.map((sample, at) =>
    FS.el(
      "button",
      {
        class: "fs-sample",
        type: "button",
        "aria-label": `Sample ${at + 1}: ${sample.caption}`,
        onclick: async () => take(await FS.inline(sample.image), ""),
      },
      FS.el("img", { src: sample.image, alt: "" }),
    )
  );
  root.append(
    FS.el(
      "section",
      { class: "fs-given", "aria-label": "Your own picture" },
      FS.el(
        "div",
        { class: "fs-row fs-wrap fs-tight" },
        FS.el("span", { text: "Or your own picture:" }),
        input,
        FS.button("Choose a picture", () => input.click()),
        FS.el("span", { class: "fs-quiet", text: "drop or paste one, or try" }),
        FS.el("span", { class: "fs-row fs-tight" }, samples),
      ),
      captioned,
      told,
    ),
  );
});

// Wherever on the Heatmap tab a picture is dropped or pasted, it is read.
const heatmapIsOpen = () => Boolean(document.querySelector("fs-given")?.checkVisibility());
const firstPicture = (files) =>
  [...(files || [])].find((file) => file.type.startsWith("image/")) || [...(files || [])][0];
document.addEventListener("dragover", (event) => {
  if (!heatmapIsOpen() || ![...event.dataTransfer.types].includes("Files")) return;
  event.preventDefault();
  document.body.classList.add("fs-dropping");
});
for (const end of ["dragleave", "drop"]) {
  document.addEventListener(end, () => document.body.classList.remove("fs-dropping"));
}
document.addEventListener("drop", (event) => {
  const file = firstPicture(event.dataTransfer && event.dataTransfer.files);
  if (!heatmapIsOpen() || !file) return;
  event.preventDefault();
  document.querySelector("fs-given").take(file);
});
document.addEventListener("paste", (event) => {
  const file = firstPicture(event.clipboardData && event.clipboardData.files);
  if (!heatmapIsOpen() || !file) return;
  event.preventDefault();
  document.querySelector("fs-given").take(file);
});

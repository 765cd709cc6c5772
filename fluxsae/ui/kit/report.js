// One view as a file to send to a colleague: pictures, values, versions, and the link that opens it again.
// Behind the #, which browsers send to no server and which has no greatest length: the page hands it on when it loads.
FS.viewLink = (view) => `${location.origin}${location.pathname}#view=${view}`;
// A view as text for an address, as fluxsae.ui.kit.links.encode_view writes it.
FS.packView = async (values) => {
  const packed = new Blob([JSON.stringify(values)]).stream().pipeThrough(new CompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(packed).arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")).replaceAll("+", "-").replaceAll("/", "_")
    .replaceAll("=", "");
};
// Copies the link, saves a report of what `report` gives, and whatever else a view offers beside them.
FS.actions = (data, report, ...others) => {
  const link = () => FS.viewLink(data.link);
  return FS.el(
    "div",
    { class: "fs-row fs-wrap fs-tight" },
    data.link ? FS.copyButton(link, "Copy link") : null,
    ...others,
    FS.button("Save report", () => FS.saveReport({ link: data.link && link(), versions: data.versions, ...report() })),
  );
};
// A file that the server makes when it is asked for.
FS.file = (href, text) => (href ? FS.el("a", { class: "fs-button fs-small", href, download: "", text }) : null);
FS.query = (values) => new URLSearchParams(Object.entries(values).map(([name, value]) => [name, String(value)]));
FS.told = ({ prompt, seed, picture }) =>
  `${picture ? "your own picture" : ""}${picture && prompt ? ", " : ""}${prompt ? `“${prompt}”` : ""}, seed ${seed}`;

// A picture as a data address, so that a report needs no server.
FS.inline = async (src) => {
  if (!src || src.startsWith("data:")) return src;
  const blob = await (await fetch(src)).blob();
  return await new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(blob);
  });
};

FS.saveReport = async ({ title, words, link, versions, pictures, recipe, measurement }) => {
  const page = document.implementation.createHTMLDocument(`fluxsae report: ${title}`);
  page.head.append(FS.el("style", {
    text:
      "body{font:16px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}img{width:256px;border-radius:8px}figure{display:inline-block;margin:0 1rem 1rem 0}pre{background:#f4f4f7;padding:1rem;overflow:auto;border-radius:8px}",
  }));
  const shown = await Promise.all(
    pictures.filter(([, src]) => src).map(async ([caption, src, width]) => [caption, await FS.inline(src), width]),
  );
  const json = (value) => FS.el("pre", { text: JSON.stringify(value, null, 2) });
  page.body.append(
    FS.el("h1", { text: title }),
    FS.el("p", { text: words }),
    FS.el(
      "div",
      {},
      shown.map(([caption, src, width]) =>
        FS.el(
          "figure",
          {},
          FS.el("img", { src, alt: caption, style: width ? { width } : {} }),
          FS.el("figcaption", { text: caption }),
        )
      ),
    ),
    ...(link ? [FS.el("p", {}, FS.el("a", { href: link, text: "Open this view" }))] : []),
    ...(measurement ? [FS.el("h2", { text: "Measurements" }), json(measurement)] : []),
    ...(recipe ? [FS.el("h2", { text: "Recipe" }), json(recipe)] : []),
    FS.el("h2", { text: "Versions" }),
    json(versions),
  );
  const blob = new Blob([`<!doctype html>${page.documentElement.outerHTML}`], { type: "text/html" });
  const anchor = FS.el("a", { href: URL.createObjectURL(blob), download: "fluxsae-report.html" });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 10000);
};

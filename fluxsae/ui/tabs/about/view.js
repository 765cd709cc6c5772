// Every endpoint with a call that works, in Python, curl and MCP.
FS.define("fs-endpoints", (root, data) => {
  root.append(
    FS.el(
      "section",
      { class: "fs-about", "aria-label": "Use it from code" },
      FS.el("h2", { text: "Use it from code" }),
      FS.el("p", {
        text:
          "Every view is a named endpoint for gradio_client, HTTP and MCP. Arguments are checked before any work starts. A refusal names the argument, its value and what is allowed.",
      }),
      data.endpoints.map((endpoint) =>
        FS.el(
          "div",
          { class: "fs-endpoint" },
          FS.el("h3", { class: "fs-h fs-mono", text: endpoint.name }),
          FS.el("p", { class: "fs-quiet", text: endpoint.words }),
          FS.code(endpoint.code),
          FS.el(
            "details",
            { class: "fs-details" },
            FS.el("summary", { text: "Arguments" }),
            FS.el(
              "dl",
              { class: "fs-arguments" },
              endpoint.arguments.map(([name, text]) => [FS.el("dt", { text: name }), FS.el("dd", { text })]).flat(),
            ),
          ),
        )
      ),
    ),
  );
});

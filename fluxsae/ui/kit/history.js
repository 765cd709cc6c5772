// The browser's Back and Forward go from tab to tab. The address stays: a view is in it only where a link was copied.
(() => {
  const selected = () => document.querySelector('#tabs [role="tab"][aria-selected="true"]');
  const remember = () => {
    const tab = selected()?.textContent.trim();
    if (!tab || history.state?.tab === tab) return;
    history[history.state?.tab ? "pushState" : "replaceState"]({ ...history.state, tab }, "");
  };
  new MutationObserver(remember).observe(document, {
    subtree: true,
    childList: true, // the first tab comes selected
    attributeFilter: ["aria-selected"],
  });
  addEventListener("popstate", ({ state }) => {
    const named = [...document.querySelectorAll('#tabs [role="tab"]')];
    named.find((tab) => tab.textContent.trim() === state?.tab)?.click();
  });
})();

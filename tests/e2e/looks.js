// What a person would see at once, for test_inspector_e2e.py: functions that a test calls in the page.

/** What is wider than the window or cut off by it. */
function overflow() {
  const found = document.documentElement.scrollWidth > innerWidth ? ["page"] : [];
  for (const node of document.querySelectorAll("h1, h2, h3, p, label, li, button, input, select, th, td, .choice, .token")) {
    const box = node.getBoundingClientRect();
    if (box.width && (box.left < -0.5 || box.right > innerWidth + 0.5)) found.push(node.className || node.tagName);
  }
  return found;
}

/** Where a node is, without what its scrolling list hides. */
function visibleBox(node) {
  const own = node.getBoundingClientRect();
  const list = node.closest(".choices, .tokens")?.getBoundingClientRect() ?? own;
  return {
    left: Math.max(own.left, list.left),
    right: Math.min(own.right, list.right),
    top: Math.max(own.top, list.top),
    bottom: Math.min(own.bottom, list.bottom),
  };
}

/** Pairs of things that lie over one another. */
function overlaps() {
  const kinds = "h1, h2, h3, p, button, input, select, textarea, .choice, .legend li, .bar, .heat .name, .usage th";
  const nodes = [...document.querySelectorAll(kinds)].filter((node) => !node.closest("[hidden]"));
  const boxes = nodes.map(visibleBox);
  const found = [];
  nodes.forEach((a, i) => {
    nodes.slice(i + 1).forEach((b, j) => {
      if (a.contains(b) || b.contains(a)) return;
      const [p, q] = [boxes[i], boxes[i + 1 + j]];
      const width = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const height = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (width > 1 && height > 1) found.push([a.outerHTML.slice(0, 80), b.outerHTML.slice(0, 80)]);
    });
  });
  return found;
}

/** The smallest contrast, as WCAG defines it, of any text with what is behind it: [ratio, which text]. */
function contrast() {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = rgba(getComputedStyle(node).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  const kinds =
    "h1, h2, h3, p, label, legend, button, .hint, .token, .legend li, th, .bar, .heat .name, .heat .layer, .token-facts";
  let worst = [Infinity, ""];
  for (const node of document.querySelectorAll(kinds)) {
    const isOff = node.disabled || node.closest(".choice:has(:disabled)");
    if (isOff || node.closest("[hidden]") || !node.textContent.trim()) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(node).color)), luminance(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, `${node.className || node.tagName}: ${node.textContent.slice(0, 40)}`];
  }
  return worst;
}

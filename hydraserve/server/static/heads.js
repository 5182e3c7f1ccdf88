// Colours of heads, and shares in words. The palette is Okabe and Ito's, which people with any colour vision tell apart.

const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a900", "#8c6bb1"];

export const headColour = (head) =>
  head < PALETTE.length ? PALETTE[head] : `hsl(${(head * 137.5) % 360} 60% 50%)`;

export const percent = (share) => `${(share * 100).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;

export const indexOfLargest = (numbers) => numbers.reduce((best, n, i) => (n > numbers[best] ? i : best), 0);

/** The mean of several routers' weights, head by head: what each head does of their work. */
export function meanWeights(routers, heads) {
  const sums = new Array(heads).fill(0);
  for (const weights of routers) weights.forEach((weight, head) => (sums[head] += weight));
  return sums.map((sum) => sum / routers.length);
}

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

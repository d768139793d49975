// What is wrong with the look of the page that is open, in words; "" for nothing. Run by `Browser.faults`.
const out = [], say = (kind, element, detail) => {
  if (out.filter(line => line.startsWith(kind)).length < 40) out.push(`${kind}: <${element.tagName.toLowerCase()} class="${element.getAttribute("class") ?? ""}"> ` +
    `${detail} "${(element.textContent ?? "").trim().slice(0, 50)}"`);
};
const shown = element => element.checkVisibility({opacityProperty: true, visibilityProperty: true});
const scroller = element => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
const root = document.documentElement;

if (root.scrollWidth > innerWidth) out.push(`the page is ${root.scrollWidth} wide in a window of ${innerWidth}`);

// 1. What is wider than its box scrolls, and says so.
for (const element of document.body.querySelectorAll("*")) {
  if (element.closest("svg") || !shown(element) || element.scrollWidth <= element.clientWidth + 1) continue;
  const style = getComputedStyle(element);
  if (style.display === "inline" || style.overflowX === "visible" && !element.matches(".wide")) continue;
  if (style.textOverflow === "ellipsis" && element.closest("[title]")) continue;
  if (!scroller(element)) { say("cut", element, `${element.scrollWidth} in ${element.clientWidth}`); continue; }
  const hint = element.parentElement.matches(".wide") && getComputedStyle(element.parentElement, "::before").maxHeight;
  if (!hint || parseFloat(hint) < 10) say("scrolls without a hint", element, `${element.scrollWidth} in ${element.clientWidth}`);
}

// 2. Words lie within the box that holds them.
const texts = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; (node = walker.nextNode());) {
  const parent = node.parentElement;
  if (node.textContent.trim() && !parent.closest("script, style, noscript, title, option") && shown(parent)) texts.push(node);
}
const boxes = node => { const range = document.createRange(); range.selectNodeContents(node); return [...range.getClientRects()]; };
for (const node of texts) {
  const svg = node.parentElement.closest("svg");
  let box = svg ?? node.parentElement;
  while (!svg && getComputedStyle(box).display.startsWith("inline")) box = box.parentElement;
  const hidden = svg ? null : box.closest("[title]") && getComputedStyle(box).overflowX === "hidden";
  if (hidden || !svg && scroller(box)) continue;
  const frame = box.getBoundingClientRect();
  for (const rect of boxes(node))
    if (rect.width && (rect.left < frame.left - 2 || rect.right > frame.right + 2 || svg && (rect.top < frame.top - 2 || rect.bottom > frame.bottom + 2)))
      { say("outside its box", node.parentElement, `${[rect.left - frame.left, frame.right - rect.right].map(Math.round)}`); break; }
}

// 3. Words of a figure can be read, and do not lie on one another.
for (const svg of document.querySelectorAll("svg")) {
  const words = [...svg.querySelectorAll("text")].filter(text => text.textContent.trim() && shown(text));
  const rects = words.map(text => text.getBoundingClientRect());
  words.forEach((text, place) => {
    const size = parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b);
    if (size < 8.99) say("too small", text, size.toFixed(1) + " px");
    for (let other = 0; other < place; other++) {
      const a = rects[place], b = rects[other];
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left), high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 2 && high > 0.35 * Math.min(a.height, b.height)) say("on other words", text, `on "${words[other].textContent}"`);
    }
  });
}

// 4. Words stand out from their ground, 4.5 : 1 (WCAG 2, AA).
const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
const known = new Map();
const rgba = colour => {
  if (!known.has(colour)) {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    known.set(colour, [...canvas.getImageData(0, 0, 1, 1).data]);
  }
  return known.get(colour);
};
const over = (top, below) => top.slice(0, 3).map((part, i) => part * top[3] / 255 + below[i] * (1 - top[3] / 255));
const ground = element => {
  const layers = [];
  for (; element; element = element.parentElement) {
    const colour = rgba(getComputedStyle(element).backgroundColor);
    if (colour[3]) layers.push(colour);
    if (colour[3] === 255) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
};
const light = rgb => rgb.map(part => part / 255).map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4)
  .reduce((sum, part, i) => sum + part * [.2126, .7152, .0722][i], 0);
const checked = new Set();
for (const node of texts) {
  const element = node.parentElement, style = getComputedStyle(element);
  if (checked.has(element)) continue;
  checked.add(element);
  const behind = ground(element);
  const [low, high] = [light(over(rgba(element.closest("svg") ? style.fill : style.color), behind)), light(behind)].sort((a, b) => a - b);
  const ratio = (high + .05) / (low + .05);
  if (ratio < 4.5) say("pale", element, ratio.toFixed(2));
}
return out.join("\n");

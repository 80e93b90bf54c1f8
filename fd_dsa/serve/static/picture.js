// What the indexer chose for the last token of an answer.

import { make } from "./dom.js";
import { t } from "./language.js";

const MOST_SPANS = 6000;
const MOST_NUMBERS = 5;

function layerCounts(chosen, size) {
  const counts = new Uint16Array(size);
  for (const layer of chosen.layers) for (const position of layer) counts[position]++;
  return counts;
}

// Positions of the numbers that an answer has from the context: [{ number, first, last }].
function numbersIn(chosen, answer) {
  const found = [];
  if (!chosen.tokens) return found;
  const starts = [];
  let text = "";
  for (const token of chosen.tokens) {
    starts.push(text.length);
    text += token;
  }
  const context = text.slice(0, Math.max(0, text.length - answer.length));
  for (const number of new Set(answer.match(/\d{2,}/g)?.slice(0, MOST_NUMBERS))) {
    const at = context.search(new RegExp(`(?<!\\d)${number}(?!\\d)`));
    if (at < 0) continue;
    const end = at + number.length;
    const first = starts.findLastIndex((start) => start <= at);
    const last = starts.findLastIndex((start) => start < end);
    found.push({ number, first, last });
  }
  return found;
}

// Frames around the numbers, and a line for each about the layer that selected most of its tokens.
function frames(numbers, sets, size) {
  return numbers.map(({ number, first, last }) => {
    const tokens = last - first + 1;
    const frame = make("span", "frame");
    frame.style.left = `${100 * first / size}%`;
    frame.style.width = `${100 * tokens / size}%`;
    const positions = Array.from({ length: tokens }, (_, i) => first + i);
    const counts = sets.map((set) => positions.filter((position) => set.has(position)).length);
    const count = Math.max(...counts);
    const values = { number, first, last, tokens, count, layer: counts.indexOf(count), layers: sets.length };
    const line = make("p", "caption", t(count ? "numberSelected" : "numberNotSelected", values));
    line.classList.add("found");
    return { frame, line };
  });
}

// `answer` is the text that ends with the token.
export function picture(chosen, answer = "") {
  const size = chosen.position + 1;
  const sets = chosen.layers.map((layer) => new Set(layer));
  const box = make("details", "picture");
  box.open = true;
  const all = sets.every((set) => set.size === size);
  const what = t("selectedFor", { position: chosen.position });
  box.append(make("summary", "", all ? t("selectedAll", { what }) : what));
  const canvas = make("canvas");
  const width = Math.min(size, 800);
  const cell = 12;
  canvas.width = width;
  canvas.height = sets.length * cell;
  canvas.style.height = `${sets.length * cell}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", what);
  const pen = canvas.getContext("2d");
  chosen.layers.forEach((layer, row) => {
    const hits = new Float32Array(width);
    const room = new Float32Array(width);
    for (let p = 0; p < size; p++) room[Math.floor(p * width / size)]++;
    for (const p of layer) hits[Math.floor(p * width / size)]++;
    for (let x = 0; x < width; x++) {
      if (!hits[x]) continue;
      pen.fillStyle = `rgba(31, 111, 235, ${0.15 + 0.85 * hits[x] / room[x]})`;
      pen.fillRect(x, row * cell, 1, cell - 1);
    }
  });
  const why = make("p", "caption", t("selectionNote"));
  const caption = make("p", "caption", t(matchMedia("(any-hover: hover)").matches ? "hoverMark" : "tapMark"));
  const point = (event) => {
    const area = canvas.getBoundingClientRect();
    const share = (value, length) => Math.min(Math.max(value / length, 0), 1 - 1e-9);
    const position = Math.floor(share(event.clientX - area.left, area.width) * size);
    const layer = Math.floor(share(event.clientY - area.top, area.height) * sets.length);
    const token = chosen.tokens ? ` ${JSON.stringify(chosen.tokens[position])}` : "";
    const verdict = sets[layer].has(position) ? "markSelected" : "markNotSelected";
    caption.textContent = t(verdict, { layer, position, token, count: sets[layer].size, size });
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  const numbers = numbersIn(chosen, answer);
  const found = frames(numbers, sets, size);
  const plot = make("div", "plot");
  plot.append(canvas, ...found.map(({ frame }) => frame));
  box.append(why, plot, ...found.map(({ line }) => line), caption);
  if (chosen.tokens) box.append(heat(chosen, size, numbers));
  return box;
}

function heat(chosen, size, numbers) {
  const box = make("details");
  box.append(make("summary", "", t("heatTitle")));
  const counts = layerCounts(chosen, size);
  const text = make("div", "heat");
  text.tabIndex = 0;
  const first = Math.max(0, size - MOST_SPANS);
  if (first) text.append(`${t("heatCut", { count: MOST_SPANS })}\n`);
  for (let p = first; p < size; p++) {
    const node = make("span", "", chosen.tokens[p]);
    const share = counts[p] / chosen.layers.length;
    if (share) node.style.backgroundColor = `rgba(31, 111, 235, ${0.7 * share})`;
    node.title = t("heatToken", { position: p, count: counts[p], layers: chosen.layers.length });
    if (numbers.some(({ first, last }) => first <= p && p <= last)) node.className = "found";
    text.append(node);
  }
  const [found] = text.getElementsByClassName("found");
  box.addEventListener("toggle", () => { if (found) text.scrollTop = found.offsetTop - text.clientHeight / 2; });
  box.open = Boolean(found);
  box.append(text);
  return box;
}

// Formulas in Markdown: their delimiters, as an extension of marked, and their places in a message.

import { Tokenizer } from "./vendor/marked.esm.js";
import { escape } from "./dom.js";
import { MAX_CHARS, formula } from "./math.js";

const CLOSING = { "\\(": "\\)", "\\[": "\\]", "$$": "$$" };

// --- delimiters

// Index of a delimiter that no backslash escapes, or -1.
function find(text, delimiter, from) {
  const end = Math.min(text.length, from + MAX_CHARS);
  const first = text.indexOf(delimiter, from);
  if (first < 0 || first >= end) return -1;
  for (let i = from; i < end; i++) {
    if (text.startsWith(delimiter, i)) return i;
    if (text[i] === "\\") i++;
  }
  return -1;
}

const AMOUNTS = /^[-+−(]?[\d.,]+\s?[kmb]?(?:\s?[-–—,;]\s?[-+−]?[\d.,]+\s?[kmb]?\)?)+$/i;

// True if the text between two dollar signs reads as an amount, as in "$5 or 10$".
function canBeMoney(tex) {
  if (!/^[-+−(]?[.,]?\d/.test(tex)) return false;
  const bare = tex.replace(/\\[A-Za-z]+(?:\{[^{}]*\})?/g, "");
  return /\p{L}{2}|\p{Script=Han}|[\p{L}\d]\s\p{L}\s[\p{L}\d]/u.test(bare) || AMOUNTS.test(tex);
}

// The formula between single dollar signs at the beginning of `text`.
function betweenDollars(text) {
  const found = /^\$(?![\s$])((?:\\.|[^\\$\n])+)(?<!\s)\$(?![\p{Script=Latin}\d$])/u.exec(text.slice(0, MAX_CHARS));
  if (!found || canBeMoney(found[1])) return null;
  return { raw: found[0], tex: found[1], display: false };
}

// The formula at the beginning of `text`, which follows the character `before`.
function formulaAt(text, before) {
  const opening = text.slice(0, 2);
  const closing = CLOSING[opening];
  if (!closing) return /[\p{Script=Latin}\d$]/u.test(before) ? null : betweenDollars(text);
  const end = find(text, closing, 2);
  if (end < 0 || !text.slice(2, end).trim()) return null;
  return { raw: text.slice(0, end + 2), tex: text.slice(2, end), display: opening !== "\\(" };
}

// --- Markdown

// of the text that is being parsed
let whole = "";
let seen = [];
let masks = new Map();

// True if `text` is the end of the message: a formula that it begins may still arrive.
const isLast = (text) => whole.endsWith(text.trimEnd());

const block = {
  name: "formulas",
  level: "block",
  start(text) {
    const at = text.search(/\n {0,3}(?:\\\[|\$\$)/);
    return at < 0 ? undefined : at + 1;
  },
  tokenizer(text) {
    const [indent] = /^ {0,3}/.exec(text);
    const rest = text.slice(indent.length);
    if (!rest.startsWith("\\[") && !rest.startsWith("$$")) return undefined;
    const found = formulaAt(rest, "");
    if (!found) {
      const isOpen = find(rest, CLOSING[rest.slice(0, 2)], 2) < 0 && isLast(text);
      return isOpen ? { type: "formulas", raw: text, source: text.trim() } : undefined;
    }
    const [after, sign] = /^[ \t]*([.,;:]?)(?:[ \t]*(?:\n+|$))?/.exec(rest.slice(found.raw.length));
    return { type: "formulas", raw: indent + found.raw + after, tex: found.tex + sign, display: true, source: found.raw + sign };
  },
  renderer: (token) => `<p>${placeholder(token)}</p>`,
};

const inline = {
  name: "formula",
  level: "inline",
  start: (text) => text.match(/\\[([]|(?<![\p{Script=Latin}\d\\$])\$/u)?.index,
  tokenizer(text, tokens) {
    const found = formulaAt(text, tokens.at(-1)?.raw.at(-1) ?? "");
    if (found) return { type: "formula", source: found.raw, ...found };
    const isOpen = /^\\[([]/.test(text) && find(text, CLOSING[text.slice(0, 2)], 2) < 0 && isLast(text);
    return isOpen ? { type: "formula", raw: text, source: text.trimEnd() } : undefined;
  },
  renderer: placeholder,
};

// Length of the code at the beginning of `text`, or of its backticks if they open none.
function codeLength(text) {
  const [fence] = /^\x60+/.exec(text);
  const end = text.slice(fence.length).search(new RegExp(`(?<!\\x60)${fence}(?!\\x60)`));
  return end < 0 ? fence.length : end + 2 * fence.length;
}

// The text of each formula is data, so nothing in it is emphasis.
function masked(text, mask) {
  let made = mask;
  for (let i = 0; i < text.length; i++) {
    if (text[i] === "`") i += codeLength(text.slice(i)) - 1;
    if (text[i] !== "\\" && text[i] !== "$") continue;
    const found = formulaAt(text.slice(i, i + 2 * MAX_CHARS), text[i - 1] ?? "");
    if (found) {
      const at = made.length - text.length + i;
      made = made.slice(0, at) + "a".repeat(found.raw.length) + made.slice(at + found.raw.length);
      i += found.raw.length - 1;
    } else if (text[i] === "\\") i++;
  }
  return made;
}

// The first call for a text has all of it that can be emphasis.
const emphasis = (name) => function parse(text, mask, before) {
  if (!masks.has(mask)) masks.set(mask, masked(text, mask));
  return Tokenizer.prototype[name].call(this, text, masks.get(mask), before);
};

function placeholder(token) {
  return `<span class="formula f${seen.push(token) - 1}">${escape(token.source)}</span>`;
}

// The lines of a heading that is underlined end at a formula.
function lheading(text) {
  return Tokenizer.prototype.lheading.call(this, text.slice(0, block.start(text)));
}

// Extensions for marked.
export const formulas = {
  extensions: [block, inline],
  tokenizer: { lheading, emStrong: emphasis("emStrong"), del: emphasis("del") },
  hooks: {
    preprocess(text) {
      whole = text.trimEnd();
      seen = [];
      masks = new Map();
      return text;
    },
  },
};

// --- elements

// Replaces the source of each formula by its elements. A formula that has not arrived whole, or is
// wrong, stays as it is.
export function drawFormulas(content) {
  for (const node of content.querySelectorAll(".formula")) {
    const { tex, display } = seen[Number(/f(\d+)/.exec(node.className)[1])];
    node.className = "formula";
    if (tex === undefined) continue;
    const made = formula(tex, display);
    if (made instanceof Error) {
      node.title = made.message;
      continue;
    }
    node.classList.add(display ? "display" : "drawn");
    node.replaceChildren(made.toNode());
    // it may scroll, which a keyboard can do where the focus is
    if (display) node.tabIndex = 0;
  }
}

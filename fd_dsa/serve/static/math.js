// The elements of a formula, made by KaTeX.

import "./vendor/katex.min.js";
import { t } from "./language.js";

export const MAX_CHARS = 8000;
// of KaTeX's own macros, each of which is short
const MAX_EXPANSIONS = 3000;
const MAX_NODES = 20_000;
const MAX_DEPTH = 250;
const MAX_CACHED = 500;
// a few characters can define a macro that grows with each use
const DEFINITION = /\\(?:[gex]?def|let|futurelet|(?:re)?newcommand|providecommand)(?![A-Za-z])/;

function refuse({ command }) {
  throw new Error(t("formulaCommand", { command }));
}

// KaTeX writes a few styles as attributes, which the policy of the page refuses: they are set by
// script, as it sets all others. A tree that would be slow to draw is refused.
function check(tree) {
  const open = [[tree, 1]];
  for (let count = 1; open.length; count++) {
    const [node, depth] = open.pop();
    if (count > MAX_NODES || depth > MAX_DEPTH) throw new Error(t("formulaTooLarge"));
    const style = node.attributes?.style;
    if (style) {
      delete node.attributes.style;
      const build = node.toNode;
      node.toNode = () => {
        const made = build.call(node);
        made.style.cssText += style;
        return made;
      };
    }
    for (const child of node.children ?? []) open.push([child, depth + 1]);
  }
  return tree;
}

function treeOf(tex, display) {
  const [definition] = DEFINITION.exec(tex) ?? [];
  if (definition) refuse({ command: definition });
  if (tex.length > MAX_CHARS) throw new Error(t("formulaTooLarge"));
  return check(window.katex.__renderToDomTree(tex, {
    displayMode: display,
    maxExpand: MAX_EXPANSIONS,
    maxSize: 20,
    strict: "ignore",
    throwOnError: true,
    trust: refuse,
  }));
}

const cache = new Map();

// The tree of KaTeX of a formula, or the error that it has. Every piece of an answer draws all of
// it anew, so trees are kept.
export function formula(tex, display) {
  const key = `${display}${tex}`;
  if (!cache.has(key)) {
    if (cache.size >= MAX_CACHED) cache.delete(cache.keys().next().value);
    let made;
    try { made = treeOf(tex, display); } catch (error) { made = error; }
    cache.set(key, made);
  }
  return cache.get(key);
}

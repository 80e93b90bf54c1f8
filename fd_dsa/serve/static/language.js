// The language of the page: the browser's at first, then the one that the reader selects.

import { load, save } from "./storage.js";
import { STRINGS } from "./strings.js";

const KEPT = "fd_dsa.language";
// values of `lang`, in the order of the texts in STRINGS
const LANGUAGES = ["en", "zh-CN"];
// attributes of elements in index.html that hold the key of a text
const PLACES = {
  text: (node, text) => { node.textContent = text; },
  label: (node, text) => node.setAttribute("aria-label", text),
  placeholder: (node, text) => { node.placeholder = text; },
};
let selected = load("localStorage", KEPT, "");
let column = 0;

// The text of a key, with `values` in place of their names in braces.
export function t(key, values = {}) {
  return STRINGS[key][column].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function ofBrowser() {
  const known = navigator.languages.map((tag) => LANGUAGES.find((one) => one.slice(0, 2) === tag.slice(0, 2)));
  return known.find(Boolean) ?? LANGUAGES[0];
}

// "" follows the browser.
export const selectedLanguage = () => (LANGUAGES.includes(selected) ? selected : "");

// Writes the texts of the elements of index.html.
export function translate() {
  const language = selectedLanguage() || ofBrowser();
  column = LANGUAGES.indexOf(language);
  document.documentElement.lang = language;
  for (const [name, write] of Object.entries(PLACES)) {
    for (const node of document.querySelectorAll(`[data-${name}]`)) write(node, t(node.dataset[name]));
  }
}

// Whoever has written texts draws them again at the document's event "language".
export function selectLanguage(language) {
  selected = language;
  save("localStorage", KEPT, language);
  translate();
  document.dispatchEvent(new Event("language"));
}

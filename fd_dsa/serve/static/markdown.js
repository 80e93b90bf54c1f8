// Markdown to elements. HTML in a model's text is shown as text; what remains is sanitised.

import { marked } from "./vendor/marked.esm.js";
import hljs from "./vendor/highlight.min.js";
import "./vendor/purify.min.js";
import { button, copy, escape, make } from "./dom.js";
import { t } from "./language.js";
import { drawFormulas, formulas } from "./formulas.js";

marked.use({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ raw }) => escape(raw),
    // a picture would be fetched from another server
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});
marked.use(formulas);

const RULES = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li",
    "ol", "p", "pre", "span", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const clean = (html) => window.DOMPurify.sanitize(html, RULES);

export function codeBlock(text, language = "") {
  const pre = make("pre");
  const code = make("code", "", text);
  if (hljs.getLanguage(language)) {
    code.replaceChildren(clean(hljs.highlight(text, { language, ignoreIllegals: true }).value));
  }
  // it may scroll, which a keyboard can do where the focus is
  pre.tabIndex = 0;
  pre.append(code);
  const block = make("div", "code");
  const bar = make("div", "code-bar");
  const node = button(t("copy"), () => copy(text, node));
  node.setAttribute("aria-label", t("copyCode"));
  bar.append(make("span", "", language), node);
  block.append(bar, pre);
  return block;
}

export function markdown(text) {
  const content = clean(marked.parse(text));
  drawFormulas(content);
  for (const pre of content.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(pre.firstChild?.className ?? "")?.[1];
    pre.replaceWith(codeBlock(pre.textContent.replace(/\n$/, ""), language));
  }
  for (const table of content.querySelectorAll("table")) {
    const box = make("div", "table");
    box.tabIndex = 0;
    table.replaceWith(box);
    box.append(table);
  }
  for (const link of content.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  return content;
}

// Small helpers for the elements of the page.

import { t } from "./language.js";

export const $ = (id) => document.getElementById(id);

export const escape = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

export function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export function button(text, action, className = "") {
  const node = make("button", className, text);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

export function notice(text) {
  $("notice-text").textContent = text;
  $("notice").hidden = !text;
}

let hiding = 0;

// Returns a function that takes this text away again.
export function toast(text, label, action) {
  const shown = [make("span", "", text)];
  const hide = () => shown.forEach((node) => node.remove());
  if (label) shown.push(button(label, () => { hide(); action(); }));
  $("toast").replaceChildren(...shown);
  clearTimeout(hiding);
  hiding = setTimeout(hide, 10_000);
  return hide;
}

export async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // browsers give the clipboard only to pages of https and of this machine
    const area = make("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = node.textContent;
  if (label === t("copied")) return;
  node.textContent = t("copied");
  setTimeout(() => { node.textContent = label; }, 1200);
}

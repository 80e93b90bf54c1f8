// The settings dialog: its groups, and the rule of each field with a message next to the field.

import { $, make } from "./dom.js";
import { t } from "./language.js";

const SAFE = Number.MAX_SAFE_INTEGER;
const MAX_SHOWN = 40;
// stop strings, characters of the longest one, characters of all
const MAX_STOPS = [64, 512, 8192];

const shown = (text) => JSON.stringify(text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}…` : text);
const mustBe = (value, rule, limits = {}) => t("mustBe", { value, rule: t(rule, limits) });

function number(min, max, key = "numberFrom") {
  return (text) => {
    const value = Number(text);
    const isInside = value <= max && (key === "numberAbove" ? value > min : value >= min);
    const isRight = Number.isFinite(value) && isInside && (!key.startsWith("whole") || Number.isSafeInteger(value));
    return isRight ? "" : mustBe(shown(text), key, { min, max });
  };
}

function json(rule, isRight) {
  return (text) => {
    try {
      return isRight(JSON.parse(text)) ? "" : mustBe(shown(text), rule);
    } catch (error) {
      return mustBe(`${shown(text)} (${error.message})`, rule);
    }
  };
}

export const stopStrings = (text) =>
  text.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));

function stops(text) {
  const lengths = stopStrings(text).map((line) => line.length);
  const found = [lengths.length, Math.max(0, ...lengths), lengths.reduce((sum, one) => sum + one, 0)];
  if (found.every((count, i) => count <= MAX_STOPS[i])) return "";
  const [lines, longest, all] = found;
  return t("stopsTooLong", { lines, longest, all, limits: MAX_STOPS.join(" / ") });
}

function latin(text) {
  // a browser puts no other characters into a header
  const [value] = /[^ -~\u00a0-\u00ff]/u.exec(text) ?? [];
  return value ? t("mustBeLatin", { value: JSON.stringify(value) }) : "";
}

// The numbers of a request, with the ranges of the server, in the order of their fields.
export const NUMBERS = {
  max_tokens: number(1, SAFE, "wholeAtLeast"),
  temperature: number(0, Infinity, "numberAtLeast"),
  top_p: number(0, 1),
  top_k: number(-1, SAFE, "wholeAtLeast"),
  min_p: number(0, 1),
  seed: number(-SAFE, SAFE, "wholeFrom"),
  presence_penalty: number(-2, 2),
  frequency_penalty: number(-2, 2),
  repetition_penalty: number(0, Infinity, "numberAbove"),
};
// each returns a message, empty if the text is right
const RULES = {
  key: latin,
  ...NUMBERS,
  "stop-strings": stops,
  schema: json("jsonObject", (value) => value !== null && typeof value === "object" && !Array.isArray(value)),
  tools: json("jsonArray", Array.isArray),
};

export function mark(name, message) {
  $(`${name}-wrong`).textContent = message;
  if (message) $(name).setAttribute("aria-invalid", "true");
  else $(name).removeAttribute("aria-invalid");
}

function check(name) {
  const text = $(name).value;
  const message = text.trim() ? RULES[name](text) : "";
  mark(name, message);
  return message;
}

// Marks every wrong field, and returns the first one.
export function firstWrong() {
  return Object.keys(RULES).filter(check).map($)[0];
}

// Opens the dialog, with the groups in which something is set, and puts the focus on `field`. Its
// message is visible too.
export function openSettings(field) {
  const isSet = ({ type, checked, value }) => (type === "checkbox" ? checked : value !== "");
  for (const group of document.querySelectorAll("#settings details")) {
    const fields = [...group.querySelectorAll("input, select, textarea")];
    group.open = group.id === "main-group" || fields.includes(field) || fields.some(isSet);
  }
  if (!$("settings").open) $("settings").showModal();
  field?.focus();
  field?.parentNode.scrollIntoView({ block: "nearest" });
}

function closeIfRight(event) {
  event.preventDefault();
  const wrong = firstWrong();
  if (wrong) openSettings(wrong);
  else $("settings").close();
}

export function startDialog() {
  for (const name of Object.keys(RULES)) {
    const message = make("span", "wrong");
    message.id = `${name}-wrong`;
    $(name).after(message);
    $(name).setAttribute("aria-describedby", message.id);
    $(name).addEventListener("change", () => check(name));
    // a message goes as soon as the text is right
    $(name).addEventListener("input", () => { if (message.textContent) check(name); });
  }
  $("settings-button").addEventListener("click", () => openSettings());
  $("settings").addEventListener("submit", closeIfRight);
  // the gesture for "back" of a phone
  $("settings").addEventListener("cancel", closeIfRight);
  $("settings").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    // it stops no answer, and a browser closes the dialog if the key is pressed again and again
    event.stopPropagation();
    closeIfRight(event);
  });
  document.addEventListener("language", firstWrong);
}

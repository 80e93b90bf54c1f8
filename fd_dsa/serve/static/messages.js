// The messages of a conversation as elements.

import { size, splitFiles } from "./attach.js";
import { button, copy, make } from "./dom.js";
import { t } from "./language.js";
import { codeBlock, markdown } from "./markdown.js";
import { picture } from "./picture.js";
import { siblings } from "./store.js";

function reasoning(message) {
  const box = make("details", "reasoning");
  const summary = make("summary", "", t("reasoning"));
  box.open = message.unfolded ?? !message.content;
  // the answer is drawn anew with every piece: what was folded by hand stays so
  summary.addEventListener("click", () => { message.unfolded = !box.open; });
  box.append(summary, make("div", "", message.reasoning));
  return box;
}

function toolCall(call) {
  const box = make("details", "call");
  box.open = true;
  box.append(make("summary", "", t("toolCall", { name: call.function.name })), codeBlock(call.function.arguments, "json"));
  return box;
}

// An answer that is JSON as a whole, so that Markdown would spoil it. The text itself is shown: a
// number like 1e400 does not survive parsing.
function isJson({ content, json, running }) {
  if (json) return content !== "";
  if (running || !/^\s*[[{]/.test(content)) return false;
  try { JSON.parse(content); } catch { return false; }
  return true;
}

function text(message) {
  if (!isJson(message)) return markdown(message.content);
  const block = codeBlock(message.content, "json");
  block.classList.add("json");
  return block;
}

function attachment({ name, content }) {
  const box = make("details", "file");
  const pre = make("pre", "", content);
  pre.tabIndex = 0;
  box.append(make("summary", "", t("fileSize", { name, size: size(content) })), pre);
  return box;
}

function written(message) {
  const { files, text } = splitFiles(message.content);
  return [...files.map(attachment), ...(text ? [text] : [])];
}

function repetition(message, actions) {
  const box = make("p", "note", t("repeatsNote"));
  if (message.content) box.append(" ", button(t("goOn"), () => actions.goOn(message)));
  return box;
}

function versions(message, actions) {
  const all = siblings(message);
  const at = all.indexOf(message);
  const step = (text, label, to) => {
    const node = button(text, () => actions.choose(all[to]));
    node.setAttribute("aria-label", label);
    node.disabled = !all[to];
    return node;
  };
  const box = make("span", "versions");
  box.append(step("‹", t("earlierVersion"), at - 1), make("span", "", t("versionOf", { number: at + 1, count: all.length })),
    step("›", t("laterVersion"), at + 1));
  return box;
}

function actionsOf(message, actions) {
  const box = make("div", "actions");
  if (siblings(message).length > 1) box.append(versions(message, actions));
  if (message.content) {
    const node = button(t("copy"), () => copy(message.content, node));
    box.append(node);
  }
  if (message.role === "user") box.append(button(t("edit"), () => actions.edit(message)));
  if (message.role === "assistant") {
    box.append(button(t(message.error ? "retry" : "regenerate"), () => actions.again(message)));
  }
  return box;
}

export function fill(node, message, actions) {
  node.className = message.role;
  node.setAttribute("aria-label", t({ user: "you", tool: "toolResult", assistant: "answer" }[message.role]));
  node.replaceChildren();
  const body = make("div", "body");
  if (message.role === "assistant") {
    if (message.reasoning) body.append(reasoning(message));
    body.append(text(message));
    body.append(...(message.tool_calls ?? []).map(toolCall));
    if (message.waiting) body.append(make("p", "waiting", t("sentLater")));
    else if (message.running && !message.content && !message.reasoning) body.append(make("p", "waiting", "…"));
  } else {
    body.append(...written(message));
  }
  node.append(body);
  if (message.error) node.append(make("p", "error", message.error));
  if (message.repeats && !message.running) node.append(repetition(message, actions));
  if (message.chosen && !message.running) node.append(picture(message.chosen, message.content));
  if (message.note) node.append(make("p", "caption", message.note));
  if (message.stats) node.append(make("p", "stats", message.stats));
  if (!message.running) node.append(actionsOf(message, actions));
}

// Turns the article of a message into a field; `send` gets the new text.
export function edit(node, message, send, cancel) {
  const area = make("textarea");
  area.value = message.content;
  area.rows = Math.min(12, message.content.split("\n").length + 1);
  area.setAttribute("aria-label", t("editMessage"));
  const submit = () => { if (area.value.trim()) send(area.value); };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  const box = make("div", "actions");
  box.append(button(t("send"), submit), button(t("cancel"), cancel));
  node.replaceChildren(area, box);
  area.focus();
}

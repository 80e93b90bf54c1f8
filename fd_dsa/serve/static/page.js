// The page: which conversation is shown, and what its buttons do.

import { answer } from "./answer.js";
import { $, button, copy, make, notice } from "./dom.js";
import { t } from "./language.js";
import { edit, fill } from "./messages.js";
import { findModels, watch } from "./server.js";
import { contextLength, curlCommand, requestBody, showModels, startSettings } from "./settings.js";
import { drawChats, startSidebar } from "./sidebar.js";
import { load, save } from "./storage.js";
import { chats, endBelow, newId, patchChat, pathTo, saveMessage, start, visible } from "./store.js";

const DRAFT = "fd_dsa.draft";
const CHAT = "fd_dsa.chat";
const SAVE_MS = 1000;
const EXAMPLES = ["example1", "example2", "example3", "example4"];

const view = { chat: load("sessionStorage", CHAT, "") || newId(), leaf: null, running: null, shown: new Map() };
const path = () => pathTo(view.chat, view.leaf);

// --- drawing

function empty() {
  const box = make("div", "empty");
  const list = make("div", "examples");
  list.append(...EXAMPLES.map((key) => button(t(key), () => send(t(key)))));
  box.append(make("h2", "", t("emptyTitle")), make("p", "", t("emptyText")), list);
  return box;
}

function article(message) {
  const node = make("article");
  fill(node, message, actions);
  view.shown.set(message.id, node);
  return node;
}

// Keeps the log at its end where it is there.
function scrolled(action) {
  const log = $("log");
  const { scrollTop } = log;
  const isAtEnd = log.scrollHeight - scrollTop - log.clientHeight < 60;
  action();
  log.scrollTop = isAtEnd ? log.scrollHeight : scrollTop;
}

function draw() {
  view.shown.clear();
  const nodes = path().map(article);
  $("log").replaceChildren(...(nodes.length ? nodes : [empty()]));
  $("log").scrollTop = nodes.length ? $("log").scrollHeight : 0;
  save("sessionStorage", CHAT, view.chat);
  drawChats(view.chat);
  drawFooter();
}

function openCall() {
  // the first call of the last answer that has no result yet
  const messages = path();
  const answered = new Set(messages.map((message) => message.tool_call_id));
  const last = messages.findLast((message) => message.role === "assistant");
  return (last?.tool_calls || []).find((call) => !answered.has(call.id));
}

function drawFooter() {
  const used = path().findLast((message) => message.used)?.used ?? 0;
  const limit = contextLength();
  $("used").max = limit || 1;
  $("used").value = used;
  $("context").textContent = limit ? t("usedTokens", { used, limit }) : "";
  const call = openCall();
  $("input").placeholder = call ? t("resultOf", { name: call.function.name }) : t("message");
  $("send").hidden = Boolean(view.running);
  $("stop").hidden = !view.running;
  // a screen reader waits for the whole answer
  $("log").ariaBusy = String(Boolean(view.running));
}

function open(id) {
  view.chat = id;
  const { leaf } = chats.get(id) ?? {};
  view.leaf = endBelow(id, pathTo(id, leaf).length ? leaf : null);
  draw();
}

function create() {
  view.chat = newId();
  view.leaf = null;
  draw();
  $("input").focus();
}

// --- messages

function add(chat, parent, fields) {
  return { id: newId(), chat, parent, created: Date.now(), content: "", ...fields };
}

async function keep(message) {
  view.leaf = message.id;
  const { title } = chats.get(message.chat) ?? { title: message.content.trim().slice(0, 60) };
  await Promise.all([
    saveMessage(message),
    patchChat(message.chat, { title, updated: Date.now(), leaf: message.id, deleted: 0 }),
  ]);
}

function redraw(message) {
  const node = view.shown.get(message.id);
  if (node?.isConnected) scrolled(() => fill(node, message, actions));
}

// A text being edited stays.
function redrawAll(isDrawn) {
  path().filter((message) => isDrawn(message) && !view.shown.get(message.id)?.querySelector("textarea")).forEach(redraw);
}

async function run(message, body) {
  notice("");
  view.running = new AbortController();
  message.running = true;
  await keep(message);
  draw();
  let drawing = 0;
  let saved = performance.now();
  const changed = () => {
    drawing ||= requestAnimationFrame(() => { drawing = 0; redraw(message); });
    if (performance.now() - saved < SAVE_MS) return;
    saved = performance.now();
    saveMessage(message);
  };
  const usage = await answer(message, body, view.running.signal, changed);
  cancelAnimationFrame(drawing);
  if (usage) message.used = usage.total_tokens;
  // it stays running until it is stored: what another tab makes this one read is older
  await saveMessage(message);
  view.running = null;
  delete message.running;
  redraw(message);
  drawFooter();
}

// Sends a text as the next message after `parent`; the text stays in its field where it cannot go.
async function send(text, parent = view.leaf, role = openCall() ? "tool" : "user") {
  if (!text.trim() || view.running) return;
  const call = role === "tool" ? openCall() : null;
  const message = add(view.chat, parent, { role, content: text, ...(call && { tool_call_id: call.id }) });
  const body = requestBody([...pathTo(view.chat, parent), message]);
  if (!body) return;
  if ($("input").value === text) setDraft("");
  await keep(message);
  if (openCall()) draw();
  else await run(add(view.chat, message.id, { role: "assistant", created: message.created + 1 }), body);
  if (matchMedia("(pointer: fine)").matches) $("input").focus();
}

const actions = {
  choose(message) {
    view.leaf = endBelow(message.chat, message.id);
    draw();
    patchChat(message.chat, { leaf: view.leaf });
  },
  edit(message) {
    const node = view.shown.get(message.id);
    edit(node, message, (text) => send(text, message.parent, "user"), () => fill(node, message, actions));
  },
  again(message) {
    if (view.running) return;
    const body = requestBody(pathTo(message.chat, message.parent));
    if (!body) return;
    // a failure without a text is no version worth keeping
    const again = message.error && !message.content ? message : add(message.chat, message.parent, { role: "assistant" });
    for (const name of ["error", "stats", "reasoning", "tool_calls"]) delete again[name];
    run(again, body);
  },
};

function curl() {
  const draft = $("input").value.trim();
  const messages = path();
  if (draft) messages.push({ role: "user", content: draft });
  // without a draft: the request of the last answer
  else while (messages.at(-1)?.role === "assistant") messages.pop();
  const body = messages.length && requestBody(messages);
  if (body) copy(curlCommand(body), $("curl"));
}

function setDraft(text) {
  $("input").value = text;
  save("sessionStorage", DRAFT, text);
}

// --- start

async function changedElsewhere(id) {
  drawChats(view.chat);
  if (id !== view.chat) return;
  if (view.running) {
    // the running answer draws itself
    redrawAll(({ running }) => !running);
  } else if (chats.get(id)?.deleted) {
    create();
  } else if (!document.querySelector("article textarea")) {
    view.leaf = endBelow(id, view.leaf);
    scrolled(draw);
  }
}

function inAnotherLanguage() {
  if (view.shown.size) redrawAll(() => true);
  else draw();
  drawChats(view.chat);
  drawFooter();
}

async function health(trouble) {
  $("trouble").textContent = trouble;
  $("trouble").hidden = !trouble;
  if (trouble) return;
  try {
    await findModels();
    showModels();
    notice("");
  } catch (error) {
    notice(error.message);
  }
  drawFooter();
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send($("input").value);
  });
  $("input").addEventListener("input", () => save("sessionStorage", DRAFT, $("input").value));
  $("input").addEventListener("keydown", (event) => {
    // Enter that ends the choice of a character of an input method sends nothing
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send($("input").value);
  });
  $("stop").addEventListener("click", () => view.running?.abort());
  $("curl").addEventListener("click", curl);
  $("close-notice").addEventListener("click", () => notice(""));
  $("model").addEventListener("change", drawFooter);
  document.addEventListener("language", inAnotherLanguage);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !$("settings").open) view.running?.abort();
  });
}

startSettings();
startSidebar({ open, create, removed: (id) => { if (id === view.chat) create(); else drawChats(view.chat); } });
listen();
setDraft(load("sessionStorage", DRAFT, ""));
draw();
await start(changedElsewhere, notice);
// what was shown before a reload
if (!view.leaf) {
  if (visible().some(({ id }) => id === view.chat)) open(view.chat);
  else create();
}
drawChats(view.chat);
await watch(health);

// The page: which conversation is shown, and what its buttons do.

import { answer } from "./answer.js";
import { attached, detach, splitFiles, startAttaching, withFiles } from "./attach.js";
import { $, button, copy, make, notice, toast } from "./dom.js";
import { t } from "./language.js";
import { edit, fill } from "./messages.js";
import { lookAtNumber, needleMessage } from "./needle.js";
import { findModels, watch } from "./server.js";
import { contextLength, curlCommand, isGreedy, requestBody, showModels, startSettings } from "./settings.js";
import { drawChats, startSidebar } from "./sidebar.js";
import { load, save } from "./storage.js";
import { chats, endBelow, newId, patchChat, pathTo, saveMessage, siblings, start, visible } from "./store.js";

const DRAFT = "fd_dsa.draft";
const CHAT = "fd_dsa.chat";
const SAVE_MS = 1000;
// at which an answer is written again, if the temperature in use is 0
const OTHER_TEMPERATURE = 0.8;
const EXAMPLES = ["example1", "example2", "example3", "example4"];

const view = { chat: load("sessionStorage", CHAT, "") || newId(), leaf: null, running: null, shown: new Map(), endOffer: () => {} };
const path = () => pathTo(view.chat, view.leaf);

// --- drawing

function empty() {
  const box = make("div", "empty");
  const list = make("div", "examples");
  list.append(...EXAMPLES.map((key) => button(t(key), () => send(t(key)))), button(t("exampleNeedle"), sendNeedle, "wide"));
  box.append(make("h2", "", t("emptyTitle")), make("p", "", t("emptyText")), list);
  return box;
}

async function sendNeedle() {
  try {
    await send(await needleMessage(Math.floor(Math.random() * 100)), { picture: true });
  } catch (error) {
    notice(error.message);
  }
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
  // an offer is about an answer that may be out of sight now
  view.endOffer();
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
  const { files, text } = splitFiles(message.content);
  const { title } = chats.get(message.chat) ?? { title: (text.trim() || files[0].name).slice(0, 60) };
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
  for (const name of ["error", "stats", "note", "repeats"]) delete message[name];
  message.running = true;
  message.asked = JSON.stringify(body);
  if (body.response_format) message.json = true;
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
  if (usage) message.used = usage.total_tokens;
  if (usage && pathTo(message.chat, message.parent).at(-1)?.picture) await lookAtNumber(message, body, view.running.signal);
  cancelAnimationFrame(drawing);
  // it stays running until it is stored: what another tab makes this one read is older
  await saveMessage(message);
  view.running = null;
  delete message.running;
  redraw(message);
  drawFooter();
}

// Sends a text as the next message after `parent`. Calls `taken` unless a setting is wrong.
async function send(text, { parent = view.leaf, role = openCall() ? "tool" : "user", picture = false, taken = () => {} } = {}) {
  if (!text.trim() || view.running) return;
  const call = role === "tool" ? openCall() : null;
  const message = add(view.chat, parent, { role, content: text, ...(call && { tool_call_id: call.id }), ...(picture && { picture }) });
  const body = requestBody([...pathTo(view.chat, parent), message]);
  if (!body) return;
  taken();
  await keep(message);
  if (openCall()) draw();
  else await run(add(view.chat, message.id, { role: "assistant", created: message.created + 1 }), body);
  if (matchMedia("(pointer: fine)").matches) $("input").focus();
}

const actions = {
  async choose(message) {
    view.leaf = endBelow(message.chat, message.id);
    // saved before it is shown, so that the page opens again what it showed
    await patchChat(message.chat, { leaf: view.leaf });
    draw();
  },
  edit(message) {
    const node = view.shown.get(message.id);
    const { parent, picture } = message;
    edit(node, message, (text) => send(text, { parent, picture, role: "user" }), () => fill(node, message, actions));
  },
  async again(message, changes = {}) {
    if (view.running) return;
    const body = requestBody(pathTo(message.chat, message.parent));
    if (!body) return;
    Object.assign(body, changes);
    const others = siblings(message).filter(({ used, error }) => used && !error);
    if (isGreedy(body) && others.some(({ asked }) => asked === JSON.stringify(body))) {
      offerOther(message);
      return;
    }
    // a failure without a text is no version worth keeping
    const isFailure = message.error && !message.content;
    const again = isFailure ? message : add(message.chat, message.parent, { role: "assistant" });
    for (const name of ["reasoning", "tool_calls"]) delete again[name];
    // the same seed would give the same answer
    if (!isFailure && body.seed !== undefined) body.seed += siblings(message).length;
    await run(again, body);
    // of an answer of before a reload no request is known
    if (isGreedy(body) && others.some(({ content }) => again.used && content === again.content)) offerOther(again);
  },
  // Lets an answer that the page has ended continue, whatever it repeats.
  goOn(message) {
    if (view.running) return;
    const body = requestBody(pathTo(message.chat, message.id));
    if (body) run(message, { ...body, continue_final_message: true, add_generation_prompt: false });
  },
};

function offerOther(message) {
  const temperature = OTHER_TEMPERATURE;
  const again = () => actions.again(message, { temperature });
  view.endOffer = toast(t("greedy"), t("otherTemperature", { temperature }), again);
}

function curl() {
  const draft = withFiles(attached(), $("input").value).trim();
  const messages = path();
  if (draft) messages.push({ role: "user", content: draft });
  // without a draft: the request of the last answer
  else while (messages.at(-1)?.role === "assistant") messages.pop();
  const body = messages.length && requestBody(messages);
  if (body) copy(curlCommand(body), $("curl"));
}

function submit() {
  const taken = () => {
    setDraft("");
    detach();
  };
  send(withFiles(attached(), $("input").value), { taken });
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
  view.endOffer();
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
    submit();
  });
  $("input").addEventListener("input", () => save("sessionStorage", DRAFT, $("input").value));
  $("input").addEventListener("keydown", (event) => {
    // Enter that ends the choice of a character of an input method sends nothing
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
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
startAttaching();
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

// Conversations in IndexedDB. A conversation is a tree with a record for each message: tabs only
// ever add records, so none overwrites another's, and a new version of a message is a sibling.

import { t } from "./language.js";

const FORMAT = "fd_dsa.chats";
const KEPT_DELETED_MS = 3_600_000;
const MOST_IMPORTED = 100_000;
const ROLES = ["user", "assistant", "tool"];

export const chats = new Map();
const trees = new Map();
const channel = "BroadcastChannel" in window ? new BroadcastChannel(FORMAT) : null;
let db = null;
let onFailure = () => {};

export function newId() {
  // randomUUID is only for pages of https
  return [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");
}

const tree = (chatId) => trees.get(chatId) ?? trees.set(chatId, new Map()).get(chatId);
const chatRange = (id) => IDBKeyRange.bound([id], [id, []]);
const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

function openDatabase() {
  const request = indexedDB.open("fd_dsa", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("chats", { keyPath: "id" });
    request.result.createObjectStore("messages", { keyPath: ["chat", "id"] });
  };
  return done(request);
}

// One transaction; `action` gets both object stores. If it fails, only this tab has the change.
async function write(action) {
  if (!db) return;
  try {
    const transaction = db.transaction(["chats", "messages"], "readwrite");
    const ended = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    await Promise.all([action(transaction.objectStore("chats"), transaction.objectStore("messages")), ended]);
  } catch (error) {
    onFailure(t("cannotSave", { reason: error.message }));
  }
}

// what belongs to this tab alone; pictures are large
const stored = ({ asked, chosen, unfolded, running, waiting, ...message }) => message;

export async function saveMessage(message) {
  tree(message.chat).set(message.id, message);
  await write((_, messages) => done(messages.put(stored(message))));
  channel?.postMessage(message.chat);
}

export async function patchChat(id, changes) {
  chats.set(id, { ...chats.get(id), ...changes, id });
  await write(async (records) => {
    // what another tab has changed meanwhile stays
    const known = await done(records.get(id));
    await done(records.put({ ...(known ?? chats.get(id)), ...changes, id }));
  });
  channel?.postMessage(id);
}

async function reload(id) {
  const transaction = db.transaction(["chats", "messages"]);
  const [chat, messages] = await Promise.all([
    done(transaction.objectStore("chats").get(id)),
    done(transaction.objectStore("messages").getAll(chatRange(id))),
  ]);
  if (chat) chats.set(id, chat);
  else chats.delete(id);
  for (const message of messages) {
    const known = tree(id).get(message.id);
    // this tab writes a running answer itself
    if (!known?.running) tree(id).set(message.id, { ...message, asked: known?.asked, chosen: known?.chosen, unfolded: known?.unfolded });
  }
}

// --- the tree

const byTime = (a, b) => a.created - b.created || (a.id < b.id ? -1 : 1);

export const messagesOf = (chatId) => [...tree(chatId).values()].sort(byTime);
const children = (chatId, parent) => messagesOf(chatId).filter((message) => message.parent === parent);
export const siblings = (message) => children(message.chat, message.parent);

export function pathTo(chatId, leaf) {
  const path = [];
  for (let at = tree(chatId).get(leaf); at; at = tree(chatId).get(at.parent)) path.unshift(at);
  return path;
}

// The newest end of the conversation below a message; null is its root.
export function endBelow(chatId, id) {
  for (let next = id; next !== undefined; next = children(chatId, id).at(-1)?.id) id = next;
  return id;
}

// --- files

function checked(value, isAllowed, where, rule, limits = {}) {
  const got = () => JSON.stringify(value)?.slice(0, 60) ?? "";
  if (!isAllowed) throw new Error(t("wrongField", { where, value: got(), rule: t(rule, limits) }));
  return value;
}

const isId = (value) => typeof value === "string" && value.length > 0 && value.length <= 100;
const text = (value, where) => checked(value ?? "", typeof (value ?? "") === "string", where, "ruleText");
const time = (value) => (Number.isFinite(value) ? value : Date.now());

function isCall(call) {
  const { name, arguments: given } = call?.function ?? {};
  return typeof name === "string" && typeof given === "string" && isId(call.id);
}

function readMessage(given, chat, known, where) {
  checked(given?.id, isId(given?.id), `${where}.id`, "ruleText");
  const parent = checked(given.parent, given.parent === null || known.has(given.parent), `${where}.parent`, "ruleParent");
  const role = checked(given.role, ROLES.includes(given.role), `${where}.role`, "ruleRole", { roles: ROLES.join(", ") });
  const message = { id: given.id, chat, parent, role, created: time(given.created), content: text(given.content, `${where}.content`) };
  for (const name of ["reasoning", "tool_call_id", "error", "stats"]) {
    if (given[name]) message[name] = text(given[name], `${where}.${name}`);
  }
  if (given.tool_calls) {
    const isList = Array.isArray(given.tool_calls) && given.tool_calls.every(isCall);
    message.tool_calls = checked(given.tool_calls, isList, `${where}.tool_calls`, "ruleCalls");
  }
  if (Number.isFinite(given.used)) message.used = given.used;
  for (const name of ["json", "picture", "repeats"]) if (given[name] === true) message[name] = true;
  known.add(given.id);
  return message;
}

function readChat(given, where) {
  checked(given?.id, isId(given?.id), `${where}.id`, "ruleText");
  checked(given.messages, Array.isArray(given.messages), `${where}.messages`, "ruleList");
  const known = new Set();
  const messages = given.messages.map((one, i) => readMessage(one, given.id, known, `${where}.messages[${i}]`));
  const chat = { id: given.id, title: text(given.title, `${where}.title`).slice(0, 200), updated: time(given.updated), leaf: messages.at(-1)?.id ?? null };
  if (known.has(given.leaf)) chat.leaf = given.leaf;
  return { chat, messages };
}

// Adds what is not here yet; what is here stays as it is.
async function add(read) {
  for (const { chat, messages } of read) {
    chats.set(chat.id, { ...chat, ...chats.get(chat.id), deleted: 0 });
    for (const message of messages) if (!tree(chat.id).has(message.id)) tree(chat.id).set(message.id, message);
  }
  await write((records, all) => Promise.all(read.flatMap(({ chat, messages }) => [
    done(records.get(chat.id)).then((known) => done(records.put({ ...chat, ...known, deleted: 0 }))),
    ...messages.map((one) => done(all.get([one.chat, one.id])).then((known) => known ?? done(all.put(one)))),
  ])));
  for (const { chat } of read) channel?.postMessage(chat.id);
}

const isVisible = (chat) => Boolean(chat) && !chat.deleted && tree(chat.id).size > 0;

export const visible = () => [...chats.values()].filter(isVisible).sort((a, b) => b.updated - a.updated);

export function exportText() {
  const all = visible().map(({ deleted, ...chat }) => ({
    ...chat, messages: messagesOf(chat.id).map(({ chat: _, ...message }) => stored(message)),
  }));
  return JSON.stringify({ format: FORMAT, version: 1, chats: all }, null, 1);
}

// Numbers of conversations that are new here, have new messages, and have only known ones.
function compare(read) {
  const states = new Map();
  for (const { chat: { id }, messages } of read.filter((one) => one.messages.length)) {
    const hasNew = messages.some((message) => !tree(id).has(message.id));
    states.set(id, isVisible(chats.get(id)) ? hasNew || states.get(id) === "extended" ? "extended" : "known" : "added");
  }
  const counts = { added: 0, extended: 0, known: 0 };
  for (const state of states.values()) counts[state] += 1;
  return counts;
}

// See `compare` for the result; nothing is added where anything is wrong.
export async function importText(content) {
  let file;
  try { file = JSON.parse(content); } catch { throw new Error(t("fileNotJson")); }
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.chats)) {
    throw new Error(t("fileNotExport", { format: FORMAT, version: 1 }));
  }
  const read = file.chats.map((chat, i) => readChat(chat, `chats[${i}]`));
  const count = read.reduce((sum, one) => sum + one.messages.length, 0);
  if (count > MOST_IMPORTED) throw new Error(t("tooManyMessages", { count, limit: MOST_IMPORTED }));
  const counts = compare(read);
  await add(read);
  return counts;
}

// --- start

async function purge() {
  const gone = [...chats.values()].filter((chat) => chat.deleted && Date.now() - chat.deleted > KEPT_DELETED_MS);
  if (!gone.length) return;
  await write((records, messages) => Promise.all(
    gone.flatMap(({ id }) => [done(records.delete(id)), done(messages.delete(chatRange(id)))])));
  for (const { id } of gone) { chats.delete(id); trees.delete(id); }
}

// `changed` is called with the id of a conversation that another tab has written to.
export async function start(changed, failed) {
  onFailure = failed;
  try {
    db = await openDatabase();
    const transaction = db.transaction(["chats", "messages"]);
    const [records, messages] = await Promise.all(
      ["chats", "messages"].map((name) => done(transaction.objectStore(name).getAll())));
    for (const chat of records) chats.set(chat.id, chat);
    for (const message of messages) tree(message.chat).set(message.id, message);
  } catch (error) {
    db = null;
    failed(t("notKept", { reason: error.message }));
    return;
  }
  await purge();
  channel?.addEventListener("message", async ({ data }) => {
    await reload(data);
    changed(data);
  });
}

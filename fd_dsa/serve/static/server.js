// The server: its models, its answers, and whether it can be asked.

import { mark, openSettings } from "./dialog.js";
import { $ } from "./dom.js";
import { t } from "./language.js";
import { load, save } from "./storage.js";

const KEY = "fd_dsa.key";
const CALM_MS = 10_000;
const PROBE_MS = 2_000;
const SOON_MS = 500;

// Nothing of the request was computed, and the same request may succeed later.
export class Unavailable extends Error {}

export const server = { models: [] };
// unknown at first
let trouble = null;
let onTrouble = () => {};
let waiting = [];
let probing = 0;

export function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function refusal(reply) {
  let error = {};
  // no error object: a proxy in between
  try { error = (await reply.json()).error; } catch { /* its status has to do */ }
  const message = error.message ?? t("statusOnly", { status: reply.status });
  if (error.code === "shutting_down") return new Unavailable(t("shuttingDown"));
  if (error.code === "context_length_exceeded") {
    // the flag is of use only to who runs the server
    return new Error(message.replace(/; shorten the prompt or start .*/, t("shortenPrompt")));
  }
  if (error.code === "loading") return new Unavailable(t("loading", { reason: message.replace(/; retry .*/, "") }));
  if ([502, 503, 504].includes(reply.status) && error.code !== "engine_failed") return new Unavailable(message);
  if (reply.status === 401) {
    const asked = t($("key").value ? "keyRefused" : "keyMissing");
    mark("key", asked);
    // in an open dialog the focus stays where the reader has it
    if (!$("settings").open) openSettings($("key"));
    return new Error(asked);
  }
  return Object.assign(new Error(message), { param: error.param });
}

async function ask(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unavailable(t("unreachable"));
  }
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

// The chunks of a streamed answer.
export async function* complete(body, signal) {
  const broken = (message) => { probeIn(SOON_MS); return new Error(message); };
  const reply = await ask("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  const decoder = new TextDecoder();
  let rest = "";
  const reader = reply.body.getReader();
  let isOver = false;
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : broken(t("broken"));
      });
      if (done) throw broken(t("broken"));
      rest += decoder.decode(value, { stream: true });
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) {
        isOver = line === "data: [DONE]";
        if (isOver) return;
        if (!line.startsWith("data: ")) continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw broken(chunk.error.message);
        yield chunk;
      }
    }
  } finally {
    // the server ends a request whose client has left
    if (!isOver) reader.cancel().catch(() => {});
  }
}

export async function findModels() {
  const reply = await ask("v1/models", { headers: headers() });
  server.models = (await reply.json()).data;
}

// --- whether it serves

async function probe() {
  clearTimeout(probing);
  let found = "";
  try { await ask("health"); } catch (error) { found = error.message; }
  if (found !== trouble) {
    trouble = found;
    await onTrouble(trouble);
  }
  if (!trouble) {
    for (const resolve of waiting) resolve();
    waiting = [];
  }
  probeIn(trouble ? PROBE_MS : CALM_MS);
}

function probeIn(milliseconds) {
  clearTimeout(probing);
  probing = setTimeout(probe, milliseconds);
}

// Calls `changed` with the trouble whenever it is another one, with an empty text when it is over.
export function watch(changed) {
  onTrouble = changed;
  $("key").value = load("sessionStorage", KEY, "");
  const anew = () => {
    trouble = null;
    return probe();
  };
  $("settings").addEventListener("close", () => {
    if ($("key").value === load("sessionStorage", KEY, "")) return;
    save("sessionStorage", KEY, $("key").value);
    anew();
  });
  document.addEventListener("language", anew);
  return anew();
}

// Resolves when the server can be asked again.
export function recovered(signal) {
  return new Promise((resolve, reject) => {
    waiting.push(resolve);
    signal.addEventListener("abort", () => reject(signal.reason), { once: true });
    probeIn(SOON_MS);
  });
}

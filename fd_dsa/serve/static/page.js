"use strict";
// Model text reaches the page as text nodes alone, never as HTML.

const $ = (id) => document.getElementById(id);
const FIELDS = ["system", "temperature", "top_p", "max_tokens", "seed", "thinking", "tools"];
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const STORE = "fd_dsa.chats";
const SETTINGS = "fd_dsa.settings";
const KEY = "fd_dsa.key";
const MOST_CHATS = 50;
const MOST_SPANS = 6000;

const state = { chats: [], current: null, model: "", limit: 0, running: null };

// --- small helpers

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function load(store, key, fallback) {
  // a browser may forbid storage, and another page of this address may have written there
  try { return JSON.parse(store.getItem(key)) ?? fallback; } catch { return fallback; }
}

function save(store, key, value) {
  try { store.setItem(key, JSON.stringify(value)); } catch { /* full or forbidden: this tab has it */ }
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // only pages of https and of this machine have a clipboard of their own
    const area = make("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1200);
}

// --- Markdown: code blocks, headings, lists, code, bold, italic; the rest is text

function inline(parent, text) {
  const pattern = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*/g;
  let last = 0;
  for (const found of text.matchAll(pattern)) {
    parent.append(text.slice(last, found.index));
    const tag = found[1] !== undefined ? "code" : found[2] !== undefined ? "strong" : "em";
    parent.append(make(tag, "", found[1] ?? found[2] ?? found[3]));
    last = found.index + found[0].length;
  }
  parent.append(text.slice(last));
}

function codeBlock(text) {
  const block = make("div", "code");
  const pre = make("pre");
  pre.append(make("code", "", text));
  const button = make("button", "", "Copy");
  button.type = "button";
  button.addEventListener("click", () => copy(text, button));
  block.append(pre, button);
  return block;
}

function markdown(parent, text) {
  const lines = text.split("\n");
  let paragraph = [];
  let list = null;
  const flush = () => {
    if (paragraph.length) {
      const node = make("p");
      inline(node, paragraph.join("\n"));
      parent.append(node);
    }
    paragraph = [];
    list = null;
  };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = line.match(/^\s*(`{3,}|~{3,})/);
    const heading = line.match(/^#{1,6}\s+(.*)/);
    const item = line.match(/^\s*(?:[-*+]|(\d+)[.)])\s+(.*)/);
    if (fence) {
      flush();
      const code = [];
      while (++i < lines.length && !lines[i].trim().startsWith(fence[1])) code.push(lines[i]);
      parent.append(codeBlock(code.join("\n")));
    } else if (heading) {
      flush();
      const node = make("h2");
      inline(node, heading[1]);
      parent.append(node);
    } else if (item) {
      const tag = item[1] === undefined ? "UL" : "OL";
      if (!list || list.tagName !== tag) {
        flush();
        list = make(tag);
        if (item[1] !== undefined) list.start = Number(item[1]);
        parent.append(list);
      }
      const node = make("li");
      inline(node, item[2]);
      list.append(node);
    } else if (!line.trim()) {
      flush();
    } else {
      if (list) flush();
      paragraph.push(line);
    }
  }
  flush();
}

// --- what the indexer chose

function layerCounts(chosen, size) {
  const counts = new Uint16Array(size);
  for (const layer of chosen.layers) for (const position of layer) counts[position]++;
  return counts;
}

function picture(chosen) {
  const size = chosen.position + 1;
  const sets = chosen.layers.map((layer) => new Set(layer));
  const box = make("details", "picture");
  box.open = true;
  const all = sets.every((set) => set.size === size);
  const what = `Chosen for token ${chosen.position}, by layer`;
  box.append(make("summary", "", all ? `${what}: every position, the context is no longer than index_topk` : what));
  const canvas = make("canvas");
  const width = Math.min(size, 800);
  const cell = 12;
  canvas.width = width;
  canvas.height = sets.length * cell;
  canvas.style.height = `${sets.length * cell}px`;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", what);
  const pen = canvas.getContext("2d");
  chosen.layers.forEach((layer, row) => {
    const hits = new Float32Array(width);
    const room = new Float32Array(width);
    for (let p = 0; p < size; p++) room[Math.floor(p * width / size)]++;
    for (const p of layer) hits[Math.floor(p * width / size)]++;
    for (let x = 0; x < width; x++) {
      if (!hits[x]) continue;
      pen.fillStyle = `rgba(31, 111, 235, ${0.15 + 0.85 * hits[x] / room[x]})`;
      pen.fillRect(x, row * cell, 1, cell - 1);
    }
  });
  const caption = make("p", "caption", "Rows are layers from the first on, columns are positions; point at one.");
  const point = (event) => {
    const area = canvas.getBoundingClientRect();
    const share = (value, length) => Math.min(Math.max(value / length, 0), 1 - 1e-9);
    const position = Math.floor(share(event.clientX - area.left, area.width) * size);
    const layer = Math.floor(share(event.clientY - area.top, area.height) * sets.length);
    const verdict = sets[layer].has(position) ? "chosen" : "not chosen";
    const token = chosen.tokens ? ` ${JSON.stringify(chosen.tokens[position])}` : "";
    caption.textContent = `layer ${layer}, position ${position}${token}: ${verdict}; ` +
      `this layer chose ${sets[layer].size} of ${size}`;
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  box.append(canvas, caption);
  if (chosen.tokens) box.append(heat(chosen, size));
  return box;
}

function heat(chosen, size) {
  const box = make("details");
  box.append(make("summary", "", "The context, darker where more layers chose"));
  const counts = layerCounts(chosen, size);
  const text = make("div", "heat");
  const first = Math.max(0, size - MOST_SPANS);
  if (first) text.append(`… the last ${MOST_SPANS} tokens …\n`);
  for (let p = first; p < size; p++) {
    const node = make("span", "", chosen.tokens[p]);
    const share = counts[p] / chosen.layers.length;
    if (share) node.style.backgroundColor = `rgba(31, 111, 235, ${0.7 * share})`;
    node.title = `${p}: ${counts[p]} of ${chosen.layers.length} layers`;
    text.append(node);
  }
  box.append(text);
  return box;
}

// --- conversations

function current() { return state.chats.find((chat) => chat.id === state.current); }

function keep() {
  // pictures are large and belong to this tab
  const chats = state.chats.filter((chat) => chat.messages.length).slice(0, MOST_CHATS);
  const plain = chats.map((chat) => ({
    ...chat, messages: chat.messages.map(({ chosen, ...message }) => message),
  }));
  save(localStorage, STORE, plain);
}

function newChat() {
  const chat = { id: `${Date.now()}-${Math.random()}`, title: "New conversation", messages: [] };
  // at most one is empty
  state.chats = [chat, ...state.chats.filter((other) => other.messages.length)];
  state.current = chat.id;
  show();
}

function show() {
  $("chats").replaceChildren(...state.chats.map((chat) => {
    const option = make("option", "", chat.title);
    option.value = chat.id;
    option.selected = chat.id === state.current;
    return option;
  }));
  $("log").replaceChildren(...current().messages.map((message) => {
    const node = make("article");
    draw(node, message);
    return node;
  }));
  $("log").scrollTop = $("log").scrollHeight;
  showContext();
}

function draw(node, message) {
  node.className = message.role;
  node.replaceChildren();
  if (message.role !== "assistant") {
    node.textContent = message.content;
    return;
  }
  if (message.reasoning) {
    const box = make("details", "reasoning");
    const summary = make("summary", "", "Reasoning");
    box.open = message.unfolded ?? !message.content;
    // the answer is drawn anew with every piece: what was folded by hand stays so
    summary.addEventListener("click", () => { message.unfolded = !box.open; });
    box.append(summary, make("div", "", message.reasoning));
    node.append(box);
  }
  markdown(node, message.content || "");
  for (const call of message.tool_calls || []) {
    const box = make("details", "call");
    box.open = true;
    box.append(make("summary", "", `Tool call: ${call.function.name}`), codeBlock(call.function.arguments));
    node.append(box);
  }
  if (message.error) node.append(make("p", "error", message.error));
  if (message.chosen) node.append(picture(message.chosen));
  if (message.stats) node.append(make("p", "stats", message.stats));
}

function openCall() {
  // the first call of the last answer that has no result yet
  const messages = current().messages;
  const answered = new Set(messages.map((message) => message.tool_call_id));
  const last = messages.findLast((message) => message.role === "assistant");
  return (last?.tool_calls || []).find((call) => !answered.has(call.id));
}

function showContext() {
  const used = current().used || 0;
  $("used").style.width = state.limit ? `${Math.min(100, 100 * used / state.limit)}%` : "0";
  $("context").textContent = state.limit ? `${used} / ${state.limit} tokens` : "";
  const call = openCall();
  $("input").placeholder = call
    ? `The result of ${call.function.name}`
    : "Enter sends, Shift+Enter is a new line, Esc stops";
}

// --- requests

function settings() {
  const found = Object.fromEntries(FIELDS.map((name) => [name, $(name).value]));
  return { ...found, topk: $("topk").checked };
}

function requestBody(messages) {
  const given = settings();
  const sent = messages.filter((message) => !message.error || message.content).map((message) => {
    const { role, content, reasoning, tool_calls, tool_call_id } = message;
    const plain = { role, content: content || (tool_calls?.length ? null : "") };
    if (tool_calls?.length) plain.tool_calls = tool_calls;
    // the chat format of the model keeps or drops it
    if (reasoning) plain.reasoning_content = reasoning;
    if (tool_call_id) plain.tool_call_id = tool_call_id;
    return plain;
  });
  if (given.system.trim()) sent.unshift({ role: "system", content: given.system });
  const body = { model: state.model, messages: sent, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) {
    if (!given[name].trim()) continue;
    const number = Number(given[name]);
    if (!Number.isFinite(number)) throw new Error(`${name}: got ${given[name]}, allowed is a number`);
    body[name] = number;
  }
  if (given.tools.trim()) {
    try { body.tools = JSON.parse(given.tools); } catch { throw new Error("Tools: this is no JSON"); }
  }
  if (given.thinking) {
    // two names of one switch, by model
    const on = given.thinking === "on";
    body.chat_template_kwargs = { thinking: on, enable_thinking: on };
  }
  if (given.topk) body.return_topk_positions = true;
  return body;
}

function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function refusal(reply) {
  let text = `status ${reply.status}`;
  try { text = (await reply.json()).error.message; } catch { /* no error object: a proxy in between */ }
  if (reply.status === 401) {
    $("settings").hidden = false;
    $("settings-button").setAttribute("aria-expanded", "true");
    $("key").focus();
  }
  return text;
}

async function* events(reply) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = reply.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function takeDelta(message, delta) {
  message.content += delta.content || "";
  message.reasoning = (message.reasoning || "") + (delta.reasoning_content || "");
  for (const part of delta.tool_calls || []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[part.index] ??= {
      id: part.id, type: "function", function: { name: "", arguments: "" },
    });
    call.function.name += part.function?.name || "";
    call.function.arguments += part.function?.arguments || "";
  }
}

async function answer(chat, message, node) {
  const begin = performance.now();
  let first = 0;
  let drawing = 0;
  const redraw = () => {
    drawing = 0;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    draw(node, message);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  try {
    const body = JSON.stringify(requestBody(chat.messages.slice(0, -1)));
    state.running = new AbortController();
    $("send").hidden = true;
    $("stop").hidden = false;
    const reply = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body, signal: state.running.signal,
    });
    if (!reply.ok) throw new Error(await refusal(reply));
    let usage = null;
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage || usage;
      for (const choice of chunk.choices) {
        if (Object.keys(choice.delta).some((name) => name !== "role" && choice.delta[name])) {
          first ||= performance.now();
        }
        takeDelta(message, choice.delta);
        message.chosen = choice.topk_positions || message.chosen;
      }
      drawing ||= requestAnimationFrame(redraw);
    }
    finish(chat, message, usage, begin, first);
  } catch (error) {
    if (error.name === "AbortError") message.stats = "stopped";
    else message.error = error.message;
  } finally {
    if (drawing) cancelAnimationFrame(drawing);
    state.running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
    redraw();
    keep();
    showContext();
    $("input").focus();
  }
}

function finish(chat, message, usage, begin, first) {
  if (!usage) return;
  const end = performance.now();
  chat.used = usage.total_tokens;
  const parts = [`prompt ${usage.prompt_tokens}`, `output ${usage.completion_tokens}`];
  const drafts = usage.completion_tokens_details;
  if (drafts) {
    const { accepted_prediction_tokens: accepted, rejected_prediction_tokens: rejected } = drafts;
    parts.push(`drafts ${accepted} of ${accepted + rejected}`);
  }
  if (first && usage.completion_tokens > 1 && end > first) {
    // the first token ends the wait, the others come in the time behind it
    parts.push(`${((usage.completion_tokens - 1) * 1000 / (end - first)).toFixed(1)} tok/s`);
  }
  if (first) parts.push(`TTFT ${((first - begin) / 1000).toFixed(2)} s`);
  message.stats = parts.join(" · ");
}

function send() {
  const text = $("input").value;
  if (!text.trim() || state.running) return;
  notice("");
  const chat = current();
  const call = openCall();
  if (call) chat.messages.push({ role: "tool", tool_call_id: call.id, content: text });
  else chat.messages.push({ role: "user", content: text });
  if (chat.messages.length === 1) chat.title = text.trim().slice(0, 40);
  $("input").value = "";
  if (openCall()) {
    keep();
    show();
    return;
  }
  const message = { role: "assistant", content: "" };
  chat.messages.push(message);
  show();
  answer(chat, message, $("log").lastElementChild);
}

function curlCommand() {
  const messages = [...current().messages];
  const draft = $("input").value.trim();
  if (draft) messages.push({ role: "user", content: draft });
  // without a draft: the request of the last answer
  else while (messages.at(-1)?.role === "assistant") messages.pop();
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const url = new URL("v1/chat/completions", location.href).href;
  const key = $("key").value ? ' -H "Authorization: Bearer $FD_DSA_API_KEY"' : "";
  return `curl -N ${quote(url)} -H 'Content-Type: application/json'${key} \\\n  -d ${quote(JSON.stringify(requestBody(messages)))}`;
}

async function findModel() {
  try {
    const reply = await fetch("v1/models", { headers: headers() });
    if (!reply.ok) {
      notice(await refusal(reply));
      if (reply.status === 503) setTimeout(findModel, 2000);
      return;
    }
    const model = (await reply.json()).data[0];
    state.model = model.id;
    state.limit = model.max_model_len;
    $("model").textContent = model.id;
    notice("");
    showContext();
  } catch {
    notice("The server does not answer.");
  }
}

// --- start

function begin() {
  const given = load(localStorage, SETTINGS, {});
  for (const name of FIELDS) $(name).value = typeof given[name] === "string" ? given[name] : "";
  $("topk").checked = given.topk === true;
  $("key").value = load(sessionStorage, KEY, "");
  const chats = load(localStorage, STORE, []);
  state.chats = Array.isArray(chats) ? chats.filter((chat) => Array.isArray(chat?.messages)) : [];
  newChat();
  findModel();
}

for (const name of [...FIELDS, "topk"]) {
  $(name).addEventListener("change", () => save(localStorage, SETTINGS, settings()));
}
$("key").addEventListener("change", () => {
  save(sessionStorage, KEY, $("key").value);
  findModel();
});
$("settings-button").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("settings-button").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("chats").addEventListener("change", () => {
  state.running?.abort();
  state.current = $("chats").value;
  show();
});
$("new").addEventListener("click", () => {
  state.running?.abort();
  if (current().messages.length) newChat();
  $("input").focus();
});
$("delete").addEventListener("click", () => {
  state.running?.abort();
  state.chats = state.chats.filter((chat) => chat.id !== state.current);
  newChat();
  keep();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", () => state.running?.abort());
$("curl").addEventListener("click", () => {
  try { copy(curlCommand(), $("curl")); } catch (error) { notice(error.message); }
});
$("input").addEventListener("keydown", (event) => {
  // Enter that ends the choice of a character of an input method sends nothing
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") state.running?.abort();
});
begin();

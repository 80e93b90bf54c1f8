// Text files that go with the next message, as blocks at its beginning.

import { $, button, make, notice } from "./dom.js";
import { t } from "./language.js";
import { contextLength } from "./settings.js";

// of the largest text that fills a context
const BYTES_PER_TOKEN = 4;
const MAX_NAME = 100;
// shows whether a file is text
const SAMPLE_BYTES = 65536;
const BLOCK = /^(\x60{3,})file: ([^\n]+)\n([\s\S]*?)\n\1(?:\n+|$)/;
// a text has tabs, line breaks and form feeds, and a log has escape sequences
const BINARY = /[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]/;
let files = [];

export const size = (text) => new TextEncoder().encode(text).length;

// --- messages

// A message with its files: blocks of code, which name the file after the fence.
export function withFiles(given, text) {
  const blocks = given.map(({ name, content }) => {
    const longest = Math.max(2, ...(content.match(/\x60+/g) ?? []).map((run) => run.length));
    const fence = "`".repeat(longest + 1);
    return `${fence}file: ${name}\n${content}\n${fence}`;
  });
  return [...blocks, ...(text ? [text] : [])].join("\n\n");
}

// The files at the beginning of a message, and the rest of it.
export function splitFiles(message) {
  const found = [];
  let text = message;
  for (let block; (block = BLOCK.exec(text)); text = text.slice(block[0].length)) {
    found.push({ name: block[2], content: block[3] });
  }
  return { files: found, text };
}

// --- the next message

// Refuses bytes that are no text: of a file, or of its beginning, which may end inside a character.
function decode(bytes, isWhole) {
  // a text in UTF-16 begins with this mark, and has zeros
  const isUtf16 = ["255,254", "254,255"].includes(new Uint8Array(bytes.slice(0, 2)).join());
  let content = null;
  try {
    content = new TextDecoder("utf-8", { fatal: true }).decode(bytes, { stream: !isWhole });
  } catch { /* refused below */ }
  if (!isUtf16 && BINARY.test(content ?? new TextDecoder("latin1").decode(bytes))) throw new Error(t("attachBinary"));
  if (content === null) throw new Error(t("attachNotText"));
  return content;
}

async function read(file) {
  const bytes = (part) => part.arrayBuffer().catch((error) => { throw new Error(t("attachUnreadable", { reason: error.message })); });
  // what a file is counts before its size
  if (file.size) decode(await bytes(file.slice(0, SAMPLE_BYTES)), file.size <= SAMPLE_BYTES);
  const tokens = contextLength();
  if (!tokens) throw new Error(t("attachLater"));
  const limit = tokens * BYTES_PER_TOKEN;
  const used = files.reduce((sum, { content }) => sum + size(content), 0);
  if (file.size > limit - used) {
    const key = used ? "attachTooMany" : "attachTooLarge";
    throw new Error(t(key, { size: file.size, used, limit, factor: BYTES_PER_TOKEN, tokens }));
  }
  if (!file.size) throw new Error(t("attachEmpty"));
  const content = decode(await bytes(file), true);
  return { name: file.name.replace(/[\x60\p{Cc}]/gu, "_").slice(0, MAX_NAME), content: content.replaceAll("\r\n", "\n") };
}

function draw() {
  $("files").hidden = !files.length;
  $("files").replaceChildren(...files.map((file) => {
    const row = make("li");
    const remove = button("×", () => {
      files = files.filter((one) => one !== file);
      draw();
      $("input").focus();
    });
    remove.setAttribute("aria-label", t("removeFile", { name: file.name }));
    row.append(make("span", "", t("fileSize", { name: file.name, size: size(file.content) })), remove);
    return row;
  }));
}

// one after the other, since they share the limit
async function add(given) {
  notice("");
  const problems = [];
  for (const file of given) {
    try {
      files.push(await read(file));
    } catch (error) {
      problems.push(t("notAttached", { name: file.name, reason: error.message }));
    }
  }
  draw();
  if (problems.length) notice(problems.join(" "));
  $("input").focus();
}

export const attached = () => files;

export function detach() {
  files = [];
  draw();
}

export function startAttaching() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files") && !$("settings").open;
  const show = (isOver) => $("main").classList.toggle("dropping", isOver);
  $("attach").addEventListener("click", () => $("attached").click());
  $("attached").addEventListener("change", async () => {
    const given = [...$("attached").files];
    $("attached").value = "";
    await add(given);
  });
  document.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    show(true);
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) show(false); });
  document.addEventListener("drop", (event) => {
    show(false);
    if (!hasFiles(event)) return;
    event.preventDefault();
    add([...event.dataTransfer.files]);
  });
  document.addEventListener("language", draw);
}

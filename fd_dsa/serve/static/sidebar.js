// The list of conversations: search, rename, delete with undo, export, import.

import { $, button, make, notice, toast } from "./dom.js";
import { t } from "./language.js";
import { exportText, importText, messagesOf, patchChat, visible } from "./store.js";

const MOST_IMPORTED_BYTES = 100e6;
let actions = null;
let current = null;

function matches(chat, query) {
  if (!query) return true;
  const has = (text) => text.toLowerCase().includes(query);
  return has(chat.title) || messagesOf(chat.id).some((message) => has(message.content));
}

function rename(row, chat) {
  const input = make("input");
  input.value = chat.title;
  input.maxLength = 200;
  input.setAttribute("aria-label", t("nameOfChat"));
  input.enterKeyHint = "done";
  let isOver = false;
  const end = async (title) => {
    if (isOver) return;
    isOver = true;
    if (title) await patchChat(chat.id, { title });
    drawChats(current);
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) end(input.value.trim());
    if (event.key === "Escape") { event.stopPropagation(); end(""); }
  });
  input.addEventListener("blur", () => end(input.value.trim()));
  row.replaceChildren(input);
  input.select();
}

async function remove(chat) {
  await patchChat(chat.id, { deleted: Date.now() });
  actions.removed(chat.id);
  toast(t("deleted", { title: chat.title }), t("undo"), async () => {
    await patchChat(chat.id, { deleted: 0 });
    actions.open(chat.id);
  });
}

export function drawChats(id) {
  current = id;
  const found = visible().filter((chat) => matches(chat, $("search").value.trim().toLowerCase()));
  $("chats").replaceChildren(...found.map((chat) => {
    const row = make("li");
    const open = button(chat.title, () => actions.open(chat.id), "chat");
    row.append(open);
    if (chat.id === id) {
      open.setAttribute("aria-current", "true");
      const tools = make("span", "actions");
      tools.append(button(t("rename"), () => rename(row, chat)), button(t("delete"), () => remove(chat)));
      row.append(tools);
    }
    return row;
  }));
  $("none").hidden = found.length > 0;
  $("none").textContent = t($("search").value ? "noMatch" : "noChats");
}

function download() {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([exportText()], { type: "application/json" }));
  link.download = `fd_dsa-chats-${new Date().toISOString().slice(0, 10)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function upload() {
  const [file] = $("file").files;
  $("file").value = "";
  try {
    if (file.size > MOST_IMPORTED_BYTES) throw new Error(t("fileTooLarge", { size: file.size, limit: MOST_IMPORTED_BYTES }));
    toast(t("imported", await importText(await file.text())));
    drawChats(current);
  } catch (error) {
    notice(t("notImported", { reason: error.message }));
  }
}

export function showSidebar(open) {
  $("sidebar").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
}

// `open` shows a conversation, `create` a new one, `removed` is told of one that was deleted.
export function startSidebar(given) {
  actions = given;
  const isWide = matchMedia("(min-width: 800px)");
  showSidebar(isWide.matches);
  isWide.addEventListener("change", () => showSidebar(isWide.matches));
  $("menu").addEventListener("click", () => showSidebar($("sidebar").hidden));
  $("sidebar").addEventListener("click", (event) => {
    if (!isWide.matches && event.target.closest(".chat, #new")) showSidebar(false);
  });
  $("new").addEventListener("click", given.create);
  $("search").addEventListener("input", () => drawChats(current));
  $("export").addEventListener("click", download);
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", upload);
}

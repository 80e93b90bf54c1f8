// Settings of the requests, kept in the browser.

import { NUMBERS, firstWrong, openSettings, startDialog, stopStrings } from "./dialog.js";
import { $ } from "./dom.js";
import { server } from "./server.js";
import { load, save } from "./storage.js";

const SETTINGS = "fd_dsa.settings";
const FIELDS = ["model", "system", "stop-strings", "thinking", "schema", "tools", ...Object.keys(NUMBERS)];

const current = () => ({ ...Object.fromEntries(FIELDS.map((name) => [name, $(name).value])), topk: $("topk").checked });

// The message as the API takes it.
function sent({ role, content, reasoning, tool_calls, tool_call_id }) {
  const plain = { role, content: content || (tool_calls?.length ? null : "") };
  if (tool_calls?.length) plain.tool_calls = tool_calls;
  // the chat format of the model keeps or drops it
  if (reasoning) plain.reasoning_content = reasoning;
  if (tool_call_id) plain.tool_call_id = tool_call_id;
  return plain;
}

// The body of a request for the answer to these messages. If a setting is wrong: null, and the
// dialog opens at its field.
export function requestBody(messages) {
  const wrong = firstWrong();
  if (wrong) {
    openSettings(wrong);
    return null;
  }
  const given = current();
  const list = messages.filter((message) => message.role !== "assistant" || message.content || message.tool_calls).map(sent);
  if (given.system.trim()) list.unshift({ role: "system", content: given.system });
  const body = { model: given.model, messages: list, stream: true, stream_options: { include_usage: true } };
  for (const name of Object.keys(NUMBERS)) if (given[name].trim()) body[name] = Number(given[name]);
  const stop = stopStrings(given["stop-strings"]);
  if (stop.length) body.stop = stop;
  if (given.schema.trim()) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(given.schema) } };
  }
  if (given.tools.trim()) body.tools = JSON.parse(given.tools);
  if (given.thinking) {
    // two names of one switch, by model
    const on = given.thinking === "on";
    body.chat_template_kwargs = { thinking: on, enable_thinking: on };
  }
  if (given.topk || messages.findLast(({ role }) => role === "user")?.picture) body.return_topk_positions = true;
  return body;
}

// A shell command that sends this body.
export function curlCommand(body) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const url = new URL("v1/chat/completions", location.href).href;
  const key = $("key").value ? ' -H "Authorization: Bearer $FD_DSA_API_KEY"' : "";
  return `curl -N ${quote(url)} -H 'Content-Type: application/json'${key} \\\n  -d ${quote(JSON.stringify(body))}`;
}

// Fills the list of models; the one chosen before stays where it is still served.
export function showModels() {
  const wanted = $("model").value || load("localStorage", SETTINGS, {}).model;
  $("model").replaceChildren(...server.models.map(({ id }) => new Option(id, id, false, id === wanted)));
}

const model = () => server.models.find(({ id }) => id === $("model").value);

export const contextLength = () => model()?.max_model_len ?? 0;

// True if the same request gets the same answer.
export const isGreedy = (body) => (body.temperature ?? model()?.sampling_defaults?.temperature ?? 1) === 0;

export function startSettings() {
  const show = (given) => {
    for (const name of FIELDS.slice(1)) $(name).value = typeof given[name] === "string" ? given[name] : "";
    $("topk").checked = given.topk === true;
  };
  const keep = () => save("localStorage", SETTINGS, current());
  startDialog();
  show(load("localStorage", SETTINGS, {}));
  $("settings").addEventListener("close", keep);
  $("model").addEventListener("change", keep);
  $("reset").addEventListener("click", () => { show({}); firstWrong(); });
}

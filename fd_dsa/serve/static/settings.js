// Settings of the requests, kept in the browser.

import { $, load, save } from "./dom.js";
import { server } from "./server.js";

const SETTINGS = "fd_dsa.settings";
const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
  "max_tokens", "seed",
];
const FIELDS = ["model", "system", "stop-strings", "thinking", "schema", "tools", ...NUMBERS];

const current = () => ({ ...Object.fromEntries(FIELDS.map((name) => [name, $(name).value])), topk: $("topk").checked });

function number(name, text) {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new Error(`${name}: '${text}' is not a number`);
  return value;
}

function json(what, text) {
  try { return JSON.parse(text); } catch (error) { throw new Error(`${what}: not valid JSON, ${error.message}`); }
}

// The message as the API takes it.
function sent({ role, content, reasoning, tool_calls, tool_call_id }) {
  const plain = { role, content: content || (tool_calls?.length ? null : "") };
  if (tool_calls?.length) plain.tool_calls = tool_calls;
  // the chat format of the model keeps or drops it
  if (reasoning) plain.reasoning_content = reasoning;
  if (tool_call_id) plain.tool_call_id = tool_call_id;
  return plain;
}

// The body of a request for the answer to these messages; an error names a field that is wrong.
export function requestBody(messages) {
  const given = current();
  const list = messages.filter((message) => message.role !== "assistant" || message.content || message.tool_calls).map(sent);
  if (given.system.trim()) list.unshift({ role: "system", content: given.system });
  const body = { model: given.model, messages: list, stream: true, stream_options: { include_usage: true } };
  for (const name of NUMBERS) if (given[name].trim()) body[name] = number(name, given[name]);
  const stop = given["stop-strings"].split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  if (stop.length) body.stop = stop;
  if (given.schema.trim()) {
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: json("JSON schema", given.schema) } };
  }
  if (given.tools.trim()) body.tools = json("Tools", given.tools);
  if (given.thinking) {
    // two names of one switch, by model
    const on = given.thinking === "on";
    body.chat_template_kwargs = { thinking: on, enable_thinking: on };
  }
  if (given.topk) body.return_topk_positions = true;
  return body;
}

// A shell command that asks the same.
export function curlCommand(messages) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const url = new URL("v1/chat/completions", location.href).href;
  const key = $("key").value ? ' -H "Authorization: Bearer $FD_DSA_API_KEY"' : "";
  return `curl -N ${quote(url)} -H 'Content-Type: application/json'${key} \\\n  -d ${quote(JSON.stringify(requestBody(messages)))}`;
}

// Fills the list of models; the one chosen before stays where it is still served.
export function showModels() {
  const wanted = $("model").value || load("localStorage", SETTINGS, {}).model;
  $("model").replaceChildren(...server.models.map(({ id }) => new Option(id, id, false, id === wanted)));
}

export const contextLength = () => server.models.find(({ id }) => id === $("model").value)?.max_model_len ?? 0;

export function startSettings() {
  const show = (given) => {
    for (const name of FIELDS.slice(1)) $(name).value = typeof given[name] === "string" ? given[name] : "";
    $("topk").checked = given.topk === true;
  };
  const keep = () => save("localStorage", SETTINGS, current());
  show(load("localStorage", SETTINGS, {}));
  $("settings").addEventListener("close", keep);
  $("model").addEventListener("change", keep);
  $("settings-button").addEventListener("click", () => $("settings").showModal());
  $("reset").addEventListener("click", () => show({}));
}

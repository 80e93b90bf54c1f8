// One answer: its stream, its figures, and how it ends.

import { t } from "./language.js";
import { repeatedUnit } from "./loops.js";
import { Unavailable, complete, recovered } from "./server.js";

const CHECKED_CHARS = 50;
const PICTURE = "return_topk_positions";

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

// True if a text of the answer repeats itself at its end; `checked` has the lengths looked at before.
function repeats(message, checked) {
  const texts = [message.content, message.reasoning ?? "", ...(message.tool_calls ?? []).map((call) => call.function.arguments)];
  return texts.some((text, i) => {
    if (text.length - (checked[i] ?? 0) < CHECKED_CHARS) return false;
    checked[i] = text.length;
    return repeatedUnit(text) > 0;
  });
}

// `pieces` stands for the number of tokens where an answer was stopped and the server counted none.
function figures(times, usage, ending, { seed, temperature }) {
  const tokens = usage?.completion_tokens ?? times.pieces;
  const parts = [...ending];
  if (usage) parts.push(t("promptTokens", { count: usage.prompt_tokens }));
  parts.push(t(usage ? "outputTokens" : "aboutTokens", { count: tokens }));
  const details = usage?.completion_tokens_details;
  if (details?.accepted_prediction_tokens !== undefined) {
    const { accepted_prediction_tokens: accepted, rejected_prediction_tokens: rejected } = details;
    parts.push(t("acceptedDrafts", { accepted, count: accepted + rejected }));
  }
  if (tokens > 1 && times.last > times.first) {
    // the first token ends the wait, the others come after it
    parts.push(t("tokenRate", { rate: ((tokens - 1) * 1000 / (times.last - times.first)).toFixed(1) }));
  }
  if (times.first) parts.push(t("firstToken", { seconds: ((times.first - times.begin) / 1000).toFixed(2) }));
  if (seed !== undefined && temperature !== 0) parts.push(t("seedUsed", { seed }));
  return parts.join(" · ");
}

async function read(message, body, signal, changed, times) {
  const checked = [];
  let usage = null;
  let reason = "";
  for await (const chunk of complete(body, signal)) {
    usage = chunk.usage || usage;
    for (const choice of chunk.choices) {
      if (Object.keys(choice.delta).some((name) => name !== "role" && choice.delta[name])) {
        times.last = performance.now();
        times.first ||= times.last;
        times.pieces++;
      }
      takeDelta(message, choice.delta);
      message.chosen = choice.topk_positions || message.chosen;
      reason = choice.finish_reason || reason;
    }
    changed();
    // an answer that goes on at the reader's wish may repeat itself
    if (!reason && !body.continue_final_message && repeats(message, checked)) {
      message.repeats = true;
      return { usage, ending: [t("repeats")] };
    }
  }
  if (reason === "abort") throw new Error(t("shutDown"));
  return { usage, ending: reason === "length" ? [t("cutAtLimit")] : [] };
}

// Fills `message`, and calls `changed` after each piece. While the server cannot be asked it waits,
// with `message.waiting` set. Returns the usage, null where the server sent none.
export async function answer(message, body, signal, changed) {
  const times = { begin: performance.now(), first: 0, last: 0, pieces: 0 };
  for (;;) {
    try {
      const { usage, ending } = await read(message, body, signal, changed, times);
      message.stats = figures(times, usage, ending, body);
      return usage;
    } catch (error) {
      if (error instanceof Unavailable) {
        message.waiting = true;
        changed();
        // stopped: the next request says so
        await recovered(signal).catch(() => {});
        delete message.waiting;
        times.begin = performance.now();
        continue;
      }
      if (error.param === PICTURE && body[PICTURE]) {
        // the answer matters more than the picture
        delete body[PICTURE];
        message.note = error.message;
        continue;
      }
      if (error.name !== "AbortError") message.error = error.message;
      if (times.pieces || !message.error) message.stats = figures(times, null, message.error ? [] : [t("stopped")], body);
      return null;
    }
  }
}

// One answer: its stream, its figures, and how it ends.

import { t } from "./language.js";
import { Unavailable, complete, recovered } from "./server.js";

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

// `pieces` stands for the number of tokens where an answer was stopped and the server counted none.
function figures(times, usage, ending) {
  const tokens = usage?.completion_tokens ?? times.pieces;
  const parts = [...ending];
  if (usage) parts.push(t("promptTokens", { count: usage.prompt_tokens }));
  parts.push(t(usage ? "outputTokens" : "aboutTokens", { count: tokens }));
  const drafts = usage?.completion_tokens_details;
  if (drafts) {
    const { accepted_prediction_tokens: accepted, rejected_prediction_tokens: rejected } = drafts;
    parts.push(t("acceptedDrafts", { accepted, count: accepted + rejected }));
  }
  if (tokens > 1 && times.last > times.first) {
    // the first token ends the wait, the others come after it
    parts.push(t("tokenRate", { rate: ((tokens - 1) * 1000 / (times.last - times.first)).toFixed(1) }));
  }
  if (times.first) parts.push(t("firstToken", { seconds: ((times.first - times.begin) / 1000).toFixed(2) }));
  return parts.join(" · ");
}

async function read(message, body, signal, changed, times) {
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
      message.stats = figures(times, usage, ending);
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
      if (error.name !== "AbortError") message.error = error.message;
      if (times.pieces || !message.error) message.stats = figures(times, null, message.error ? [] : [t("stopped")]);
      return null;
    }
  }
}

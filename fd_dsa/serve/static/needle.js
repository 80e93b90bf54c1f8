// An example for the indexer: a long text in which one sentence has a number.

import { withFiles } from "./attach.js";
import { t } from "./language.js";
import { complete } from "./server.js";

const NUM_SENTENCES = 190;
const NUMBERS = [84606, 43432, 74937, 71898, 95405];
const NAME = "village.txt";

// The message. `pick` chooses one of the texts; each has its number in the second quarter.
export async function needleMessage(pick) {
  const reply = await fetch(`static/${NAME}`).catch(() => { throw new Error(t("unreachable")); });
  if (!reply.ok) throw new Error(t("statusOnly", { status: reply.status }));
  const [needle, question, ...sentences] = (await reply.text()).trim().split("\n");
  const number = NUMBERS[pick % NUMBERS.length];
  // Park and Miller's generator: the same few texts for everybody, which were tried
  let state = number;
  const next = (limit) => {
    state = state * 48_271 % 2_147_483_647;
    return state % limit;
  };
  const lines = Array.from({ length: NUM_SENTENCES }, () => sentences[next(sentences.length)]);
  const quarter = Math.floor(NUM_SENTENCES / 4);
  lines.splice(quarter + next(quarter), 0, needle.replace("{number}", number));
  return withFiles([{ name: NAME, content: lines.join(" ") }], question);
}

// Replaces the selection for the last token of an answer by that for the token before its number: the
// last token reads what it needs for the end of the answer, and the other one reads the number.
export async function lookAtNumber(message, body, signal) {
  const at = message.content.search(/\d/);
  if (at < 0 || !message.chosen) return;
  const start = { role: "assistant", content: message.content.slice(0, at) };
  const asked = { ...body, messages: [...body.messages, start], continue_final_message: true, add_generation_prompt: false, max_tokens: 1 };
  try {
    for await (const { choices } of complete(asked, signal)) {
      for (const choice of choices) message.chosen = choice.topk_positions ?? message.chosen;
    }
  } catch { /* the selection for the last token stays */ }
}

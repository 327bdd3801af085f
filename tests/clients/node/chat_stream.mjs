import assert from "node:assert/strict";
import { client, messages, model } from "./client.mjs";

const stream = await client.chat.completions.create({
  model, messages, max_tokens: 8, stream: true, stream_options: { include_usage: true },
});
let text = "", finish = null, usage = null;
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta.content ?? "";
  finish = chunk.choices[0]?.finish_reason ?? finish;
  usage = chunk.usage ?? usage;
}
assert.ok(text.length > 0);
assert.ok(["stop", "length"].includes(finish));
assert.ok(usage.completion_tokens > 0);

// The client's own helper collects the same kind of answer.
const final = await client.chat.completions.stream({ model, messages, max_tokens: 8 }).finalChatCompletion();
assert.ok(final.choices[0].message.content.length > 0);

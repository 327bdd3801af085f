import assert from "node:assert/strict";
import { client, model } from "./client.mjs";

const answer = await client.completions.create({ model, prompt: ["a", "b"], max_tokens: 4, logprobs: 1 });
assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1]);
const { text_offset, tokens, token_logprobs, top_logprobs } = answer.choices[0].logprobs;
assert.equal(new Set([text_offset, tokens, token_logprobs, top_logprobs].map((list) => list.length)).size, 1);

let text = "";
for await (const chunk of await client.completions.create({ model, prompt: "a", max_tokens: 4, stream: true })) {
  text += chunk.choices[0].text;
}
assert.ok(text.length > 0);

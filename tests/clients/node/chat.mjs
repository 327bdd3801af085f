import assert from "node:assert/strict";
import { client, messages, model } from "./client.mjs";

const answer = await client.chat.completions.create({ model, messages, n: 2, max_tokens: 8 });
assert.equal(answer.object, "chat.completion");
assert.equal(answer.choices.length, 2);
assert.equal(answer.choices[0].message.role, "assistant");
assert.ok(answer.choices[0].message.content.length > 0);
assert.ok(["stop", "length"].includes(answer.choices[0].finish_reason));
assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
assert.ok(answer._request_id);

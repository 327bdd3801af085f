import assert from "node:assert/strict";
import { client, messages, model } from "./client.mjs";

// Leaving in the middle; the test that runs this checks that the server has cancelled the request.
const stream = await client.chat.completions.create({ model, messages, stream: true });
let count = 0;
for await (const chunk of stream) {
  count += 1;
  if (count === 2) break;
}
assert.equal(count, 2);

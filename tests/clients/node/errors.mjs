import assert from "node:assert/strict";
import OpenAI from "openai";
import { client, messages, model } from "./client.mjs";

const refused = (change, kind) =>
  assert.rejects(client.chat.completions.create({ model, messages, ...change }), (error) => {
    assert.ok(error instanceof kind, String(error));
    assert.ok(error.code);
    assert.ok(error.requestID);
    return true;
  });

await refused({ temperature: 3 }, OpenAI.BadRequestError);
await refused({ messages: [] }, OpenAI.BadRequestError);
await refused({ tools: [{ type: "function", function: { name: "no spaces" } }] }, OpenAI.BadRequestError);
await refused({ model: "nope" }, OpenAI.NotFoundError);

const stranger = new OpenAI({ baseURL: client.baseURL, apiKey: "sk-wrong", maxRetries: 0 });
await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);

import assert from "node:assert/strict";
import { client, model } from "./client.mjs";

const names = [];
for await (const each of client.models.list()) names.push(each.id);
assert.ok(names.includes(model));
assert.equal((await client.models.retrieve(model)).object, "model");

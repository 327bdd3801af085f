// The unmodified official client, pointed at the server under test.
import OpenAI from "openai";

export const client = new OpenAI({
  baseURL: process.env.PENSTOCK_BASE_URL + "/v1",
  apiKey: process.env.PENSTOCK_API_KEY,
  maxRetries: 0,
});
export const model = process.env.PENSTOCK_MODEL;
export const messages = [{ role: "user", content: "hi" }];

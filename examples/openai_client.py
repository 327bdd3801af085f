"""Ask a running Penstock with the unmodified `openai` package: `python examples/openai_client.py [URL]`."""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=32,
)
print("answer:", answer.choices[0].message.content)

print("stream: ", end="")
for chunk in client.completions.create(model=model, prompt="Once upon a time", max_tokens=24, stream=True):
    print(chunk.choices[0].text, end="", flush=True)
print()

"""Find the nearest text by embeddings, with the `openai` package: `python examples/embeddings.py [URL]`."""

import sys

from openai import OpenAI

TEXTS = [
    "The king rode home to his castle.",
    "Tom has two apples and a pear.",
    "Rain fell on the sea all day.",
]
QUESTION = "The old king was in his castle."

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id

answer = client.embeddings.create(model=model, input=[QUESTION, *TEXTS], extra_body={"pooling_type": "mean"})
question, *vectors = [item.embedding for item in answer.data]
"""Of length 1, so that their products are cosines."""
cosines = [sum(a * b for a, b in zip(question, vector, strict=True)) for vector in vectors]

for cosine, text in sorted(zip(cosines, TEXTS, strict=True), reverse=True):
    print(f"{cosine:.3f} {text}")
print("tokens:", answer.usage.prompt_tokens)

"""Ask a base model and one of its LoRA adapters the same question, with OpenAI's client.

python examples/lora_adapter.py http://127.0.0.1:8000 ADAPTER
"""

import sys

from openai import OpenAI


def main() -> None:
    """List the models, then ask the adapter's base and the adapter."""
    url, adapter = sys.argv[1], sys.argv[2]
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    parents = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    print(f"{adapter} is an adapter of {parents[adapter]}")
    for name in (parents[adapter], adapter):
        answer = client.chat.completions.create(
            model=str(name),
            messages=[{"role": "user", "content": "Tell me a story about a fox."}],
            temperature=0,
            max_tokens=16,
        )
        print(f"{name}: {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()

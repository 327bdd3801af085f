"""An agent loop with the official client: the model calls functions until it can answer.

penstock serve
python examples/tool_agent.py [http://127.0.0.1:8000]
"""

import json
import sys
from typing import Any

from openai import OpenAI


def get_weather(city: str) -> dict[str, Any]:
    return {"sky": "sunny", "temperature": 21} if city == "Paris" else {"sky": "cloudy", "temperature": 9}


def add(a: int, b: int) -> dict[str, Any]:
    return {"sum": a + b}


FUNCTIONS = {"get_weather": get_weather, "add": add}


def tool(name: str, description: str, parameters: dict[str, str]) -> Any:
    properties = {field: {"type": kind} for field, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [
    tool("get_weather", "Get the weather of a city.", {"city": "string"}),
    tool("add", "Add two numbers.", {"a": "integer", "b": "integer"}),
]


def answer(client: OpenAI, question: str, *, max_turns: int = 4) -> str:
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(max_turns):
        reply = client.chat.completions.create(
            model="penstock-tales", messages=messages, tools=TOOLS, temperature=0, max_tokens=200
        )
        message: Any = reply.choices[0].message
        if reply.choices[0].finish_reason != "tool_calls":
            return str(message.content)
        messages.append(message)
        for call in message.tool_calls:
            print("calls:", call.function.name, call.function.arguments)
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
    return "no answer"


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for question in ("What is the weather in Paris?", "What is the sum of 345 and 77?"):
            print("question:", question)
            print("answer:", answer(client, question))


if __name__ == "__main__":
    main()

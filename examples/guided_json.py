"""Answers in a given form, with the `openai` package and pydantic: `python examples/guided_json.py [URL]`."""

import sys
from typing import Annotated

from openai import OpenAI
from pydantic import BaseModel, Field

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id


class Person(BaseModel):
    """The answer's form; its JSON Schema goes with the request, and the answer is read back into it."""

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=120)]
    friends: Annotated[list[Annotated[str, Field(max_length=20)]], Field(max_length=3)]


answer = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Describe a person."}],
    response_format=Person,
    max_tokens=200,
)
print("person:", answer.choices[0].message.parsed)

chosen = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the colour of grass?"}],
    extra_body={"structured_outputs": {"choice": ["red", "green", "blue"]}},
)
print("choice:", chosen.choices[0].message.content)

number = client.completions.create(
    model=model,
    prompt="My number is ",
    extra_body={"structured_outputs": {"regex": "[0-9]{3}-[0-9]{4}"}},
)
print("number:", number.choices[0].text)

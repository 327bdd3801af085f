"""Generates instruction conversations from facts and templates, with their expected answers.

`make_conversation` is a pure function of seed, index and split. It does not render or tokenise
(`data.py` does) and it knows no model. Training and the exact-answer evaluation call it. What
evaluation asks is kept out of training in two ways: some wordings are never used there, and
operands whose key hashes to `HELD_RESIDUE` are drawn only for evaluation.
"""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tools.embedded import facts
from tools.embedded.wordings import WORDINGS

T = TypeVar("T")
Split = Literal["train", "eval"]
Message = dict[str, str]
Tool = dict[str, Any]  # Any: a JSON schema, whose values are of every JSON type

HELD_MODULUS = 8
HELD_RESIDUE = 0
EVAL_SEED = 20_261_121
EVAL_COUNT = 200
TRAIN_SEED = 7

KINDS = (
    "capital",
    "arithmetic",
    "spelling",
    "json",
    "tools",
    "repeat",
    "think",
    "greeting",
    "penstock",
)
SHARES: dict[str, float] = {
    "capital": 0.08,
    "arithmetic": 0.17,
    "spelling": 0.13,
    "json": 0.10,
    "tools": 0.15,
    "repeat": 0.17,
    "think": 0.12,
    "greeting": 0.04,
    "penstock": 0.04,
}
# Harder forms of two kinds, trained late and measured by themselves; the evaluation set has none of them.
HARD_KINDS = ("long_repeat", "new_tools")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "Answer in one sentence.",
    "You are Penstock Tales.",
    "You are a careful assistant who answers exactly.",
    "Be brief and exact.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """One exchange; the last message is the assistant's expected answer."""

    kind: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    wording: str  # the template that phrased the last question
    operands: str  # what filled it, as the key that decides whether it is held out
    num_turns: int = 1

    @property
    def expected(self) -> str:
        """The exact answer of the last turn."""
        return self.messages[-1]["content"]

    @property
    def is_held_out(self) -> bool:
        """Whether training can never contain this question's wording or operands."""
        return is_held_wording(self.wording) or is_held(self.operands)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The dice of one conversation and which halves of the split it draws from."""

    rng: random.Random
    held_wording: bool
    held_operands: bool

    def wording(self, group: str) -> str:
        """A template of the group, from its trained or its held-out list."""
        return self.rng.choice(WORDINGS[group][1 if self.held_wording else 0])

    def operands(self, draw: Callable[[], T], key: Callable[[T], str]) -> tuple[T, str]:
        """Draw until the key lies in the wanted half; at most a few dozen draws in practice."""
        while True:
            value = draw()
            if is_held(key(value)) == self.held_operands:
                return value, key(value)


def is_held(key: str) -> bool:
    """Whether operands of this key are kept for evaluation; keys starting with `=` never are."""
    return not key.startswith("=") and zlib.crc32(key.encode()) % HELD_MODULUS == HELD_RESIDUE


_HELD_WORDINGS = frozenset(wording for _, held in WORDINGS.values() for wording in held)


def is_held_wording(wording: str) -> bool:
    """Whether the template belongs to the held-out half of its group."""
    return wording in _HELD_WORDINGS


def _single(kind: str, question: str, answer: str, *, wording: str, operands: str) -> Conversation:
    messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Conversation(kind=kind, messages=messages, wording=wording, operands=operands)


def _capital(source: Source) -> Conversation:
    country, city = source.rng.choice(tuple(facts.CAPITALS.items()))
    key = f"=capital:{country}"
    if source.rng.random() < 0.2:
        wording = source.wording("capital_reverse")
        answer = f"{city} is the capital of {country}."
        return _single("capital", wording.format(c=city), answer, wording=wording, operands=key)
    wording = source.wording("capital")
    answer = f"The capital of {country} is {city}."
    return _single("capital", wording.format(c=country), answer, wording=wording, operands=key)


def _sum_key(value: tuple[int, str, int]) -> str:
    left, sign, right = value
    if sign == "+":
        left, right = min(left, right), max(left, right)
    return f"arithmetic:{left}{sign}{right}"


def _draw_sum(rng: random.Random) -> tuple[int, str, int]:
    sign = rng.choice("++--")
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    if sign == "-" and right > left:
        left, right = right, left
    return left, sign, right


def _result(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _steps(left: int, sign: str, right: int) -> list[str]:
    """What lies between a sum and its result: 37 + 45 is 70 + 12, and 46 - 31 is 16 - 1.

    Each step is a small table, which a small model learns from few examples; a sum that is one
    table already has no step.
    """
    tens, units = right // 10 * 10, right % 10
    if sign == "+" and max(left, right) >= 10:
        return [f"{left // 10 * 10 + tens} + {left % 10 + units}"]
    if sign == "-" and tens and units:
        return [f"{left - tens} - {units}"]
    return []


def _arithmetic(source: Source) -> Conversation:
    if not source.held_operands and source.rng.random() < 0.15:
        left, right = source.rng.randint(1, 10), source.rng.randint(1, 10)
        sign, key, group = "*", f"=times:{left}*{right}", "times"
    else:
        (left, sign, right), key = source.operands(lambda: _draw_sum(source.rng), _sum_key)
        group = "plus" if sign == "+" else "minus"
    wording = source.wording(group)
    parts = [f"{left} {sign} {right}", *_steps(left, sign, right), str(_result(left, sign, right))]
    answer = " = ".join(parts) + "."
    question = wording.format(a=left, b=right)
    return _single("arithmetic", question, answer, wording=wording, operands=key)


def _spelling(source: Source) -> Conversation:
    word, key = source.operands(lambda: source.rng.choice(facts.WORDS), lambda word: f"spelling:{word}")
    wording = source.wording("spelling")
    return _single("spelling", wording.format(w=word), "-".join(word), wording=wording, operands=key)


def _person(rng: random.Random) -> dict[str, str | int]:
    return {
        "name": f"{rng.choice(facts.FIRST_NAMES)} {rng.choice(facts.LAST_NAMES)}",
        "age": rng.randint(5, 95),
        "city": rng.choice(facts.CITIES),
        "job": rng.choice(facts.JOBS),
    }


def _json(source: Source) -> Conversation:
    person, key = source.operands(lambda: _person(source.rng), lambda person: f"json:{person['name']}")
    fields, sentence = source.rng.choice(
        (
            (("name", "age"), "{name} is {age} years old."),
            (("name", "age", "city"), "{name} is {age} years old and lives in {city}."),
            (("name", "job"), "{name} works as a {job}."),
            (("name", "city"), "{name} lives in {city}."),
            (("name", "job", "city"), "{name} works as a {job} in {city}."),
            (("name", "age", "job"), "{name}, aged {age}, is a {job}."),
        )
    )
    listed = ", ".join(fields[:-1]) + " and " + fields[-1]
    wording = source.wording("json")
    question = wording.format(f=listed, t=sentence.format(**person))
    answer = json.dumps({field: person[field] for field in fields})
    return _single("json", question, answer, wording=wording, operands=key)


def _code(rng: random.Random) -> str:
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(rng.randint(1, 4)))
    return f"{letters}{rng.choice(['-', '', '-'])}{rng.randint(0, 10 ** rng.randint(1, 5))}"


def _piece(rng: random.Random) -> str:
    return rng.choice(
        (
            lambda: rng.choice(facts.WORDS),
            lambda: rng.choice(facts.WORDS),
            lambda: rng.choice(facts.FIRST_NAMES),
            lambda: rng.choice(facts.CITIES),
            lambda: str(rng.randint(0, 10 ** rng.randint(1, 4))),
            lambda: _code(rng),
        )
    )()


def _record(rng: random.Random) -> str:
    """A record of about 3 to 200 tokens, in one of several layouts."""
    return _layout(rng, size=int(2 * 1.12 ** (30 * rng.random())))


def _layout(rng: random.Random, *, size: int) -> str:
    """A record of about `size` words and numbers, in one of several layouts."""
    layout = rng.randrange(6)
    if layout == 0:
        return " ".join(rng.choice(facts.WORDS) for _ in range(size))
    if layout == 1:
        return ", ".join(_piece(rng) for _ in range(size))
    if layout == 2:
        lines = (f"{rng.choice(facts.WORDS)}: {_piece(rng)}" for _ in range(max(1, size // 2)))
        return rng.choice(("\n", "; ")).join(lines)
    if layout == 3:
        pairs = {rng.choice(facts.WORDS): _piece(rng) for _ in range(max(1, size // 3))}
        return json.dumps(pairs)
    if layout == 4:
        people = (_person(rng) for _ in range(max(1, size // 6)))
        return " ".join("{name} is a {job} of {age} in {city}.".format(**one) for one in people)
    return " ".join(_piece(rng) for _ in range(size)).capitalize() + "."


def _repeat(source: Source) -> Conversation:
    return _ask_to_repeat(source, "repeat", lambda: _record(source.rng))


def _long_repeat(source: Source) -> Conversation:
    """As `_repeat`, with records of about 70 to 300 tokens."""
    rng = source.rng
    return _ask_to_repeat(source, "long_repeat", lambda: _layout(rng, size=rng.randint(24, 80)))


def _ask_to_repeat(source: Source, kind: str, draw: Callable[[], str]) -> Conversation:
    record, key = source.operands(draw, lambda record: f"repeat:{record}")
    wording = source.wording("repeat")
    question = wording.replace("{r}", record)
    return _single(kind, question, record, wording=wording, operands=key)


def _think_sum(source: Source) -> tuple[str, str, str, str]:
    (left, sign, right), key = source.operands(lambda: _draw_sum(source.rng), _sum_key)
    wording = source.wording("think_plus" if sign == "+" else "think_minus")
    tens, units = right // 10 * 10, right % 10
    total = _result(left, sign, right)
    if sign == "+":
        high, low = left // 10 * 10 + tens, left % 10 + units
        thought = f"{left // 10 * 10} + {tens} = {high}. {left % 10} + {units} = {low}. "
        thought += f"{high} + {low} = {total}."
    else:
        middle = left - tens
        thought = f"{left} - {tens} = {middle}. {middle} - {units} = {total}."
    answer = f"{left} {sign} {right} = {total}."
    return wording.format(a=left, b=right), f"<think>\n{thought}\n</think>\n{answer}", wording, key


def _think_larger(source: Source) -> tuple[str, str, str, str]:
    rng = source.rng
    (left, right), key = source.operands(
        lambda: tuple(rng.sample(range(100), 2)), lambda pair: f"larger:{min(pair)},{max(pair)}"
    )
    wording = source.wording("think_larger")
    relation = "more" if left > right else "less"
    answer = f"<think>\n{left} is {relation} than {right}.\n</think>\n{max(left, right)} is larger."
    return wording.format(a=left, b=right), answer, wording, key


def _think_story(source: Source) -> tuple[str, str, str, str]:
    rng = source.rng
    (name, left, right, thing, sign), key = source.operands(
        lambda: (
            rng.choice(facts.FIRST_NAMES),
            rng.randint(6, 20),
            rng.randint(1, 5),
            rng.choice(facts.THINGS),
            rng.choice("+-"),
        ),
        lambda value: f"story:{value}",
    )
    wording = source.wording("think_more" if sign == "+" else "think_fewer")
    total = _result(left, sign, right)
    verb = "gains" if sign == "+" else "loses"
    thought = f"{name} has {left} and {verb} {right}. {left} {sign} {right} = {total}."
    answer = f"<think>\n{thought}\n</think>\n{name} has {total} {thing}."
    return wording.format(n=name, a=left, b=right, t=thing), answer, wording, key


def _think(source: Source) -> Conversation:
    make = source.rng.choice((_think_sum, _think_sum, _think_larger, _think_story))
    question, answer, wording, key = make(source)
    return _single("think", question, answer, wording=wording, operands=key)


def _greeting(source: Source) -> Conversation:
    if source.rng.random() < 0.5:
        name, key = source.operands(
            lambda: source.rng.choice(facts.FIRST_NAMES), lambda name: f"greeting:{name}"
        )
        wording = source.wording("greeting_name")
        answer = f"Hello, {name}! How can I help you today?"
        return _single("greeting", wording.format(n=name), answer, wording=wording, operands=key)
    group, answer = source.rng.choice(
        (
            ("greeting", "Hello! How can I help you today?"),
            ("how_are_you", "I am well, thank you. How can I help you today?"),
            ("thanks", "You are welcome!"),
            ("goodbye", "Goodbye! Come back soon."),
        )
    )
    # A wording without a slot has no operands, so only its wording can be held out.
    forced = Source(rng=source.rng, held_wording=_any_held(source), held_operands=False)
    wording = forced.wording(group)
    return _single("greeting", wording, answer, wording=wording, operands=f"=greeting:{group}")


def _any_held(source: Source) -> bool:
    return source.held_wording or source.held_operands


def _penstock(source: Source) -> Conversation:
    group, answer = source.rng.choice(
        (
            ("what", "Penstock is a server for large language models, written in Python."),
            ("what", "Penstock is a server for large language models, written in Python."),
            ("does", "Penstock loads a language model and answers requests over HTTP."),
            ("who", "I am Penstock Tales, the small language model that ships with Penstock."),
            ("who", "I am Penstock Tales, the small language model that ships with Penstock."),
            ("data", "I was trained on public-domain children's books and made-up questions."),
            ("pipe", "A penstock is a pipe that carries water to a turbine."),
        )
    )
    wording = source.wording(f"penstock_{group}")
    return _single("penstock", wording, answer, wording=wording, operands=f"=penstock:{group}")


def function_tool(name: str, description: str, parameters: dict[str, str]) -> Tool:
    """A function tool in the chat-completions form; `parameters` maps names to JSON types."""
    properties = {field: {"type": kind} for field, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as the model writes it. Any: arguments hold every JSON type."""
    body = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{body}\n</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCase:
    """One question that a tool answers, with the tool's answer and the final sentence."""

    group: str
    tool: Tool
    arguments: dict[str, str | int]
    response: dict[str, str | int]
    answer: str


def _weather_case(rng: random.Random) -> ToolCase:
    city, sky, degrees = rng.choice(facts.CITIES), rng.choice(facts.SKIES), rng.randint(0, 35)
    return ToolCase(
        group="tool_weather",
        tool=function_tool("get_weather", "Get the weather of a city.", {"city": "string"}),
        arguments={"city": city},
        response={"sky": sky, "temperature": degrees},
        answer=f"The weather in {city} is {sky}, {degrees} degrees.",
    )


def _time_case(rng: random.Random) -> ToolCase:
    city, clock = rng.choice(facts.CITIES), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    return ToolCase(
        group="tool_time",
        tool=function_tool("get_time", "Get the time in a city.", {"city": "string"}),
        arguments={"city": city},
        response={"time": clock},
        answer=f"The time in {city} is {clock}.",
    )


def _order_case(rng: random.Random) -> ToolCase:
    order, state = _code(rng), rng.choice(("sent", "packed", "lost", "late", "paid", "delivered"))
    return ToolCase(
        group="tool_order",
        tool=function_tool("find_order", "Find the state of an order.", {"order_id": "string"}),
        arguments={"order_id": order},
        response={"state": state},
        answer=f"The order {order} is {state}.",
    )


def _sum_case(rng: random.Random) -> ToolCase:
    left, right = rng.randint(10, 999), rng.randint(10, 999)
    tool = function_tool("add", "Add two numbers.", {"a": "integer", "b": "integer"})
    return ToolCase(
        group="tool_add",
        tool=tool,
        arguments={"a": left, "b": right},
        response={"sum": left + right},
        answer=f"The sum of {left} and {right} is {left + right}.",
    )


def _lookup_case(rng: random.Random) -> ToolCase:
    """A tool with made-up names, so that the model reads the schema instead of knowing it."""
    thing, field = rng.choice(facts.WORDS), rng.choice(facts.WORDS)
    verb = rng.choice(("get", "find", "read", "show", "search", "lookup"))
    value, result = _piece(rng), _piece(rng)
    return ToolCase(
        group="tool_lookup",
        tool=function_tool(f"{verb}_{thing}", f"Get the {thing} of a {field}.", {field: "string"}),
        arguments={field: value},
        response={thing: result},
        answer=f"The {thing} of {value} is {result}.",
    )


def _new_name(rng: random.Random, thing: str) -> str:
    """A made-up function name that contains the thing it finds."""
    other = rng.choice(facts.WORDS)
    return rng.choice(
        (
            f"{rng.choice(facts.VERBS)}_{thing}",
            f"{rng.choice(facts.VERBS)}_{thing}",
            f"{rng.choice(facts.VERBS)}_{other}_{thing}",
            f"{thing}_{other}",
            f"{other}_{thing}",
            f"{rng.choice(facts.VERBS)}{thing.capitalize()}",
            f"{thing}",
        )
    )


def _new_case(rng: random.Random) -> ToolCase:
    """As `_lookup_case`, with more kinds of names and of descriptions."""
    thing, field = rng.choice(facts.WORDS), rng.choice(facts.WORDS)
    value, result = _piece(rng), _piece(rng)
    about = rng.choice(facts.TOOL_DESCRIPTIONS).format(t=thing, f=field)
    return ToolCase(
        group="tool_lookup",
        tool=function_tool(_new_name(rng, thing), about, {field: "string"}),
        arguments={field: value},
        response={thing: result},
        answer=f"The {thing} of {value} is {result}.",
    )


_CASES: tuple[Callable[[random.Random], ToolCase], ...] = (
    _weather_case,
    _time_case,
    _order_case,
    _sum_case,
    _lookup_case,
    _lookup_case,
)


def _tool_key(case: ToolCase) -> str:
    return f"{case.group}:{json.dumps(case.arguments)}"


def _case_question(source: Source, case: ToolCase) -> tuple[str, str]:
    wording = source.wording(case.group)
    slots = {name: str(value) for name, value in case.arguments.items()}
    if case.group == "tool_lookup":
        slots = {"v": next(iter(slots.values())), "t": next(iter(case.response))}
    return wording.format(**slots), wording


def _tools(source: Source) -> Conversation:
    rng = source.rng
    make = rng.choice(_CASES)
    case, key = source.operands(lambda: make(rng), _tool_key)
    question, wording = _case_question(source, case)
    offered = _offer(rng, [case], [other(rng) for other in rng.sample(_CASES, rng.choice((0, 0, 1, 2)))])
    messages = _call_messages(question, case)
    messages += _result_messages(case) if rng.random() < 0.5 else ()
    return Conversation(kind="tools", messages=messages, tools=offered, wording=wording, operands=key)


def _new_tools(source: Source) -> Conversation:
    """Tools that no conversation had before, beside others of their kind; one to three are called."""
    rng = source.rng
    drawn = [source.operands(lambda: _new_case(rng), _tool_key) for _ in range(rng.randint(1, 4))]
    extra = [other(rng) for other in rng.sample(_CASES, rng.choice((0, 0, 0, 1)))]
    offered = _offer(rng, [case for case, _ in drawn], extra)
    called = [(case, key) for case, key in drawn if case.tool in offered][: rng.randint(1, 3)]
    assert called, "the first case is always offered"
    messages: tuple[Message, ...] = ()
    for number, (case, _) in enumerate(called):
        question, wording = _case_question(source, case)
        messages += _call_messages(question, case)
        if number + 1 < len(called) or rng.random() < 0.5:
            messages += _result_messages(case)
    return Conversation(
        kind="new_tools", messages=messages, tools=offered, wording=wording, operands=called[-1][1]
    )


def _offer(rng: random.Random, cases: list[ToolCase], others: list[ToolCase]) -> tuple[Tool, ...]:
    """The tools of all cases in any order; of two with one name, the earlier."""
    offered: list[Tool] = []
    for tool in (case.tool for case in (*cases, *others)):
        if tool["function"]["name"] not in {one["function"]["name"] for one in offered}:
            offered.append(tool)
    rng.shuffle(offered)
    return tuple(offered)


def _call_messages(question: str, case: ToolCase) -> tuple[Message, ...]:
    call = call_text(case.tool["function"]["name"], case.arguments)
    return ({"role": "user", "content": question}, {"role": "assistant", "content": call})


def _result_messages(case: ToolCase) -> tuple[Message, ...]:
    result = {"role": "tool", "content": json.dumps(case.response)}
    return (result, {"role": "assistant", "content": case.answer})


_MAKERS: dict[str, Callable[[Source], Conversation]] = {
    "capital": _capital,
    "arithmetic": _arithmetic,
    "spelling": _spelling,
    "json": _json,
    "tools": _tools,
    "repeat": _repeat,
    "think": _think,
    "greeting": _greeting,
    "penstock": _penstock,
    "long_repeat": _long_repeat,
    "new_tools": _new_tools,
}
_ALWAYS_BY_WORDING = ("capital", "penstock")
_NEEDS_NO_TOOL = ("capital", "greeting", "penstock", "repeat")
_FOLLOW_UPS = ("capital", "arithmetic", "spelling", "json", "greeting", "penstock", "repeat")


def _decorate(rng: random.Random, last: Conversation) -> Conversation:
    """Now and then put a system prompt or earlier turns of the training split before the last."""
    earlier: list[Message] = []
    num_turns = 1
    if rng.random() < 0.2:
        num_turns += rng.choice((1, 1, 2))
        source = Source(rng=rng, held_wording=False, held_operands=False)
        for _ in range(num_turns - 1):
            earlier.extend(_MAKERS[rng.choice(_FOLLOW_UPS)](source).messages)
    if rng.random() < 0.15:
        earlier.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    elif last.tools and rng.random() < 0.3:
        earlier.insert(0, {"role": "system", "content": SYSTEM_PROMPTS[0]})
    tools = last.tools
    if last.kind in _NEEDS_NO_TOOL and rng.random() < 0.1:
        tools = (rng.choice(_CASES)(rng).tool,)
    return Conversation(
        kind=last.kind,
        messages=(*earlier, *last.messages),
        tools=tools,
        wording=last.wording,
        operands=last.operands,
        num_turns=num_turns,
    )


def make_conversation(
    seed: int,
    index: int,
    *,
    split: Split = "train",
    kind: str | None = None,
    shares: dict[str, float] | None = None,
) -> Conversation:
    """Conversation number `index` of the stream `seed`; the same arguments give the same one.

    Args:
        seed: The stream.
        index: Position in the stream, 0 or more.
        split: `train` draws nothing held out; `eval` holds out the wording or the operands.
        kind: One of `KINDS` or `HARD_KINDS`, or None to draw it by `shares`.
        shares: Weight of each kind; None means `SHARES`.

    Returns:
        The conversation; its last message is the expected answer.
    """
    rng = random.Random(f"{split}:{seed}:{index}")  # noqa: S311  # a data set, not a secret
    if kind is None:
        weights = shares or SHARES
        kind = rng.choices(tuple(weights), tuple(weights.values()))[0]
    held_wording = rng.random() < 0.5 or kind in _ALWAYS_BY_WORDING
    is_eval = split == "eval"
    source = Source(
        rng=rng,
        held_wording=is_eval and held_wording,
        held_operands=is_eval and not held_wording,
    )
    return _decorate(rng, _MAKERS[kind](source))


def evaluation_set(*, seed: int = EVAL_SEED, count: int = EVAL_COUNT) -> list[Conversation]:
    """The held-out questions, in equal shares over the kinds."""
    questions = [
        make_conversation(seed, index, split="eval", kind=KINDS[index % len(KINDS)]) for index in range(count)
    ]
    assert all(question.is_held_out for question in questions)
    return questions

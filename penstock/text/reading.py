"""How a model's answers are read: which tool format, which tags of thought; and the reader of each answer.

Chosen once at start from the model's own files or the operator's options, then asked for each request. A
conversation's answers are read; those to raw prompts are not. Used by `service`.
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from penstock.core.errors import InvalidParameterError, StartupError
from penstock.core.grammar import GrammarKind, GrammarSpec, validate_grammar
from penstock.core.text import GenerateRequest, ToolMode
from penstock.core.tools import is_strict, tool_name, tool_schema
from penstock.text.answer_reader import AnswerReader
from penstock.text.guided_thought import behind_thought
from penstock.text.reasoning import REASONING_STYLES, ReasoningParser, ReasoningStyle
from penstock.text.tokenizer import Tokenizer
from penstock.text.tool_parsers import TOOL_PARSERS, ToolParser
from penstock.text.tool_parsers.lark import LarkWriter

AUTO: Final = "auto"
NONE: Final = "none"
TAGS: Final = "tags"
"""The reasoning parser whose tags are settings."""
MAX_TAG_CHARS: Final = 64
_TAIL_TOKENS: Final = 16

_TOOL_SIGNS: Final = (
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("[TOOL_CALLS]", "mistral"),
    ("\uff5ctool\u2581calls\u2581begin\uff5c", "deepseek_v3"),
    ("func_name1(params_name1=", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters": dictionary', "llama3_json"),
    ("tools", "generic"),
)
"""What a chat template tells about the format of calls, the surest first."""
_THOUGHT_SIGNS: Final = (("<seed:think>", "seed_oss"), ("[THINK]", "mistral"), ("<think>", "qwen3"))


class ReadingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator may say; the names are vLLM's."""

    enable_auto_tool_choice: bool = True
    """Whether `tool_choice: "auto"` may call tools; False refuses it."""
    tool_call_parser: str = AUTO
    """A name of `TOOL_PARSERS`, `auto` or `none`."""
    reasoning_parser: str = AUTO
    """A name of `REASONING_STYLES`, `tags`, `auto` or `none`."""
    reasoning_start_str: str = "<think>"
    """With `tags`: what opens a thought, 1 to 64 characters."""
    reasoning_end_str: str = "</think>"
    """With `tags`: what closes it, 1 to 64 characters."""


class Reading:
    """A model's formats; immutable."""

    def __init__(
        self,
        *,
        tools: type[ToolParser] | None,
        reasoning: ReasoningStyle | None,
        tokenizer: Tokenizer,
        allows_auto: bool = True,
        thinks_unasked: bool = True,
    ) -> None:
        """Hold the formats; None for what the model does not do.

        `thinks_unasked` False: thoughts come only where the prompt asks for them, so that a call that is
        forced does not wait for one.
        """
        self.tools = tools
        self.reasoning = reasoning
        self._tokenizer = tokenizer
        self._allows_auto = allows_auto
        self._thinks_unasked = thinks_unasked
        marks = () if tools is None else tools.markers
        tags = () if reasoning is None else (reasoning.start, reasoning.end)
        self.special_ids = _special_ids(tokenizer, (*marks, *tags))
        """Markers that no text spells in a grammar, since they are tokens of their own, with their ids."""
        self.kept_ids = frozenset(filter(tokenizer.is_special, self.special_ids.values()))
        """Those that are shown to the readers though `skip_special_tokens` leaves them out."""

    def check(self, request: GenerateRequest) -> None:
        """Refuse what this model's answers cannot be read for.

        Raises:
            InvalidParameterError: names the field.
        """
        if not request.tools:
            return
        if request.messages is None and not request.is_rendered:
            raise InvalidParameterError(
                "tools needs messages, a raw prompt has no place for it", param="tools"
            )
        mode = request.tool_choice.mode
        if mode is ToolMode.NONE:
            return
        if self.tools is None:
            raise InvalidParameterError(
                "tools cannot be used with this model: its chat template has no place for them; the option "
                "tool_call_parser says otherwise",
                code="no_tool_parser",
                param="tools",
            )
        if mode is ToolMode.AUTO and not self._allows_auto:
            raise InvalidParameterError(
                "tool_choice is auto, the server was started with enable_auto_tool_choice off",
                code="no_auto_tool_choice",
                param="tool_choice",
            )

    def grammar(self, request: GenerateRequest, *, token_ids: list[int]) -> GrammarSpec | None:
        """What the answer must look like: the request's own grammar, or what its tools ask for.

        Raises:
            InvalidParameterError: it asks for both, or for what the format cannot enforce.
        """
        mode = request.tool_choice.mode
        is_forced = mode in {ToolMode.REQUIRED, ToolMode.NAMED}
        if not is_forced and not (mode is ToolMode.AUTO and any(map(is_strict, request.tools))):
            return self._widened(request, token_ids=token_ids)
        if request.grammar is not None:
            what = f"tool_choice is {mode}" if is_forced else "tools holds strict: true"
            raise InvalidParameterError(
                f"{what}, it cannot be used with response_format or structured_outputs",
                param="tool_choice" if is_forced else "tools",
            )
        made = self._forced(request, token_ids=token_ids) if is_forced else self._strict(request)
        validate_grammar(made, param="tools")
        return made

    def _widened(self, request: GenerateRequest, *, token_ids: list[int]) -> GrammarSpec | None:
        """The request's own grammar; a begun thought comes first, and calls may replace it if it is JSON."""
        own = request.grammar
        if own is None:
            return None
        is_chat = request.messages is not None or request.is_rendered
        style = self.reasoning if is_chat else None
        inside = style is not None and self._is_inside(request, token_ids=token_ids, style=style)
        schema = _schema_of(own)
        if schema is None:
            return behind_thought(own, end=style.end) if style is not None and inside else own
        may_call = bool(request.tools) and request.tool_choice.mode is ToolMode.AUTO
        if not inside and not may_call:
            return own
        lark = LarkWriter(self.special_ids)
        starts = [lark.rule("answer", lark.schema(schema))]
        if may_call:
            assert self.tools is not None, "check() has passed"
            calls = self.tools.add_calls(lark, _schemas(request), is_parallel=request.parallel_tool_calls)
            starts.append(calls)
        first = f"{lark.thought(style, is_inside=True)} " if style is not None and inside else ""
        lark.rule("start", f"{first}({' | '.join(starts)})")
        return lark.spec()

    def _forced(self, request: GenerateRequest, *, token_ids: list[int]) -> GrammarSpec:
        assert self.tools is not None, "check() has passed"
        style = self.reasoning
        inside = style is not None and self._is_inside(request, token_ids=token_ids, style=style)
        return self.tools.grammar(
            _schemas(request),
            is_parallel=request.parallel_tool_calls and request.tool_choice.mode is not ToolMode.NAMED,
            special_ids=self.special_ids,
            thought=style if inside or self._thinks_unasked else None,
            is_inside=inside,
        )

    def _strict(self, request: GenerateRequest) -> GrammarSpec:
        assert self.tools is not None, "check() has passed"
        schemas = {
            tool_name(tool): tool_schema(tool) if is_strict(tool) else {"type": "object"}
            for tool in request.tools
        }
        return self.tools.strict_grammar(
            schemas, is_parallel=request.parallel_tool_calls, special_ids=self.special_ids
        )

    def readers(self, request: GenerateRequest, *, token_ids: list[int]) -> list[AnswerReader | None]:
        """One reader for each answer; None if nothing is to be read."""
        is_chat = request.messages is not None or request.is_rendered
        style = self.reasoning if is_chat else None
        has_tools = bool(request.tools) and request.tool_choice.mode is not ToolMode.NONE
        if style is None and not has_tools:
            return [None] * request.params.n
        inside = style is not None and self._is_inside(request, token_ids=token_ids, style=style)
        is_begun = request.continue_final_message and not inside
        schemas = _schemas(request) if has_tools else {}
        return [
            AnswerReader(
                reasoning=None if style is None or is_begun else ReasoningParser(style, is_inside=inside),
                tools=self._tool_parser(request, schemas) if has_tools else None,
                shows_reasoning=request.include_reasoning,
                is_named=request.tool_choice.mode is ToolMode.NAMED,
            )
            for _ in range(request.params.n)
        ]

    def _tool_parser(
        self, request: GenerateRequest, schemas: Mapping[str, Mapping[str, object]]
    ) -> ToolParser:
        assert self.tools is not None, "check() has passed"
        is_single = request.tool_choice.mode is ToolMode.NAMED or not request.parallel_tool_calls
        return self.tools(schemas, is_parallel=not is_single)

    def _is_inside(self, request: GenerateRequest, *, token_ids: list[int], style: ReasoningStyle) -> bool:
        """Whether the prompt has left the answer inside a thought."""
        if not request.continue_final_message:
            return style.is_inside(self._tokenizer.decode(token_ids[-_TAIL_TOKENS:]))
        text = self._tokenizer.decode(token_ids)
        return text.rfind(style.start) > text.rfind(style.end)


def _schema_of(grammar: GrammarSpec | None) -> object:
    """The schema of a grammar that is JSON; None for others."""
    if grammar is not None and grammar.kind is GrammarKind.JSON_OBJECT:
        return {"type": "object"}
    if grammar is None or grammar.kind is not GrammarKind.JSON_SCHEMA:
        return None
    schema: object = msgspec.json.decode(grammar.source)
    return schema


def _schemas(request: GenerateRequest) -> dict[str, Mapping[str, object]]:
    """The tools that may be called, by name."""
    choice = request.tool_choice
    schemas = {tool_name(tool): tool_schema(tool) for tool in request.tools}
    return {choice.name: schemas[choice.name]} if choice.mode is ToolMode.NAMED else dict(schemas)


def make_reading(config: ReadingConfig, *, template: str, tokenizer: Tokenizer) -> Reading:
    """Resolve what is `auto`.

    Args:
        config: the operator's options.
        template: source of the model's chat template for conversations with tools; empty without one.
        tokenizer: the model's.

    Raises:
        StartupError: an option names no parser, or a tag is empty or too long.
    """
    parser = _choice(
        config.tool_call_parser, _TOOL_SIGNS, template, option="tool_call_parser", known=TOOL_PARSERS
    )
    known = {**REASONING_STYLES, TAGS: _tags(config)}
    style = _choice(config.reasoning_parser, _THOUGHT_SIGNS, template, option="reasoning_parser", known=known)
    _refuse_unused_tags(config)
    # A model of which only the vocabulary knows thoughts has them when it is asked to think.
    is_hidden = config.reasoning_parser == AUTO and style is None and _thinks(tokenizer)
    if is_hidden:
        style = "qwen3"
    return Reading(
        tools=None if parser is None else TOOL_PARSERS[parser],
        reasoning=None if style is None else known[style],
        tokenizer=tokenizer,
        allows_auto=config.enable_auto_tool_choice,
        thinks_unasked=not is_hidden,
    )


def _choice(
    name: str,
    signs: tuple[tuple[str, str], ...],
    template: str,
    *,
    option: str,
    known: Mapping[str, object],
) -> str | None:
    if name == NONE:
        return None
    if name == AUTO:
        return next((parser for sign, parser in signs if sign in template), None)
    if name not in known:
        names = ", ".join([AUTO, NONE, *sorted(known)])
        raise StartupError(f"{option} is {name[:64]!r}, it must be one of {names}", param=option)
    return name


def _tags(config: ReadingConfig) -> ReasoningStyle:
    for name in ("reasoning_start_str", "reasoning_end_str"):
        value = getattr(config, name)
        if not 1 <= len(value) <= MAX_TAG_CHARS:
            raise StartupError(
                f"{name} has {len(value)} characters, it must have 1 to {MAX_TAG_CHARS}", param=name
            )
    return ReasoningStyle(start=config.reasoning_start_str, end=config.reasoning_end_str)


def _refuse_unused_tags(config: ReadingConfig) -> None:
    for name in ("reasoning_start_str", "reasoning_end_str"):
        value = getattr(config, name)
        if config.reasoning_parser != TAGS and value != getattr(ReadingConfig(), name):
            raise StartupError(
                f"{name} is {value!r}, which needs reasoning_parser {TAGS}; it is {config.reasoning_parser}",
                param=name,
            )


def _thinks(tokenizer: Tokenizer) -> bool:
    """Whether the tags have tokens of their own: the model was trained on them."""
    return {"<think>", "</think>"} <= tokenizer.added_ids_by_text.keys()


def _special_ids(tokenizer: Tokenizer, texts: tuple[str, ...]) -> dict[str, int]:
    """Grammars take an added token for special if it is marked so, or is written in angle brackets."""
    added = tokenizer.added_ids_by_text
    return {
        text: added[text]
        for text in texts
        if text in added
        and (tokenizer.is_special(added[text]) or (text.startswith("<") and text.endswith(">")))
    }

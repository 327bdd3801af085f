"""How models spell tool calls: one parser per format, by the names that vLLM gives them."""

from typing import Final

from penstock.text.tool_parsers.deepseek_v3 import DeepseekV3Parser, DeepseekV31Parser
from penstock.text.tool_parsers.generic import GenericParser
from penstock.text.tool_parsers.hermes import HermesParser
from penstock.text.tool_parsers.llama3_json import Llama3JsonParser
from penstock.text.tool_parsers.mistral import MistralParser
from penstock.text.tool_parsers.parser import Parsed, ToolParser
from penstock.text.tool_parsers.pythonic import PythonicParser
from penstock.text.tool_parsers.qwen3_coder import Qwen3CoderParser

_ALL: Final[tuple[type[ToolParser], ...]] = (
    HermesParser,
    Llama3JsonParser,
    MistralParser,
    PythonicParser,
    Qwen3CoderParser,
    DeepseekV3Parser,
    DeepseekV31Parser,
    GenericParser,
)
TOOL_PARSERS: Final[dict[str, type[ToolParser]]] = {parser.name: parser for parser in _ALL}
"""Name to parser, as `--tool-call-parser` takes it."""

__all__ = ["TOOL_PARSERS", "Parsed", "ToolParser"]

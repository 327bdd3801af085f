"""How models spell tool calls: one parser per format, by the names that vLLM gives them."""

from typing import Final

from penstock.text.tool_parsers.hermes import HermesParser
from penstock.text.tool_parsers.parser import Parsed, ToolParser

TOOL_PARSERS: Final[dict[str, type[ToolParser]]] = {parser.name: parser for parser in (HermesParser,)}
"""Name to parser, as `--tool-call-parser` takes it."""

__all__ = ["TOOL_PARSERS", "Parsed", "ToolParser"]

"""How models mark what they think: one style per family, by the names that vLLM gives them."""

from typing import Final

from penstock.text.reasoning.parser import ReasoningParser, ReasoningStyle

REASONING_STYLES: Final[dict[str, ReasoningStyle]] = {
    "deepseek_r1": ReasoningStyle(begins_inside=True),
    "qwen3": ReasoningStyle(),
    "glm45": ReasoningStyle(),
    "mistral": ReasoningStyle(start="[THINK]", end="[/THINK]"),
    "seed_oss": ReasoningStyle(start="<seed:think>", end="</seed:think>"),
}
"""Name to style, as `--reasoning-parser` takes it."""

__all__ = ["REASONING_STYLES", "ReasoningParser", "ReasoningStyle"]

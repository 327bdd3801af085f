"""A grammar for an answer that begins inside a thought: that is free, what is said follows the grammar.

Used by `reading`, where a model thinks; the engine knows nothing of thoughts.
"""

import json
from typing import Final

from penstock.core.grammar import GrammarKind, GrammarSpec

GAP: Final = {"type": "regex", "pattern": "[ \\n]{0,4}"}
"""What models write between a thought and what they say."""
ANY_OBJECT: Final = {"type": "json_schema", "json_schema": {"type": "object"}}


def behind_thought(spec: GrammarSpec, *, end: str) -> GrammarSpec:
    """The grammar of an answer that begins inside a thought, as a structural tag.

    Args:
        spec: of what is said, validated.
        end: what closes the thought.
    """
    thought = {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": end}
    whole = {"type": "sequence", "elements": [thought, GAP, _node(spec)]}
    return GrammarSpec.of_json(GrammarKind.STRUCTURAL_TAG, {"type": "structural_tag", "format": whole})


def _node(spec: GrammarSpec) -> dict[str, object]:
    """A grammar as a part of a structural tag."""
    match spec.kind:
        case GrammarKind.JSON_SCHEMA:
            return {"type": "json_schema", "json_schema": json.loads(spec.source)}
        case GrammarKind.JSON_OBJECT:
            return dict(ANY_OBJECT)
        case GrammarKind.REGEX:
            return {"type": "regex", "pattern": spec.source}
        case GrammarKind.CHOICE:
            choices = [{"type": "const_string", "value": choice} for choice in json.loads(spec.source)]
            return {"type": "or", "elements": choices}
        case GrammarKind.GRAMMAR:
            return {"type": "grammar", "grammar": spec.source}
        case GrammarKind.STRUCTURAL_TAG:
            return {"type": "structural_tag", **json.loads(spec.source)}

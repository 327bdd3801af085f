"""Makes the objects of a process and joins them: the only place that knows all rooms."""

from pathlib import Path

from penstock.cli.model_source import ModelSource
from penstock.core.ports import Clock, EngineClient, EngineEvents
from penstock.text.chat_template import ChatTemplate
from penstock.text.service import TextService
from penstock.text.tokenizer import Tokenizer


def make_text_service(
    engine: EngineClient,
    source: ModelSource,
    *,
    events: EngineEvents,
    clock: Clock,
    chat_template: Path | None = None,
) -> TextService:
    """The text half of a model over its engine half.

    Raises:
        CheckpointError: tokenizer or chat template are missing or broken.
    """
    tokenizer = Tokenizer.from_folder(source.path)
    template = ChatTemplate.from_folder(
        source.path, special_tokens=tokenizer.special_tokens, override=chat_template
    )
    return TextService(
        engine, tokenizer, template, name=source.name, events=events, clock=clock, root=source.root
    )

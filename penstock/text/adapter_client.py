"""A model's LoRA adapter as a `ModelClient` of its own: the model's text half, with the adapter named.

The catalog holds one for each adapter. Tokenizer and chat template are the model's.
"""

from collections.abc import AsyncGenerator, Sequence

import msgspec

from penstock.core.ids import ModelName
from penstock.core.pooled import (
    Classification,
    ClassifyRequest,
    Embedding,
    EmbedRequest,
    Score,
    ScoreRequest,
)
from penstock.core.ports import ModelClient
from penstock.core.text import GenerateRequest, ModelCard, TextDelta


class AdapterClient:
    """Answers requests with `base` and one of its adapters."""

    def __init__(self, base: ModelClient, *, name: ModelName, root: str, created_unix_s: int) -> None:
        """Name the adapter.

        Args:
            base: the model's client.
            name: of the adapter, in the catalog and in the engine.
            root: folder name of the adapter, for the card.
            created_unix_s: when it was loaded.
        """
        self._base = base
        self._name = name
        self._root = root
        self._created_unix_s = created_unix_s

    @property
    def card(self) -> ModelCard:
        """The model's, under the adapter's name."""
        base = self._base.card
        return msgspec.structs.replace(
            base, name=self._name, parent=base.name, root=self._root, created_unix_s=self._created_unix_s
        )

    @property
    def not_ready_reason(self) -> str | None:
        """The model's."""
        return self._base.not_ready_reason

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TextDelta]:
        """As the model, with the adapter."""
        return await self._base.generate(msgspec.structs.replace(request, adapter=self._name))

    async def embed(self, request: EmbedRequest) -> Embedding:
        """As the model, with the adapter."""
        return await self._base.embed(msgspec.structs.replace(request, adapter=self._name))

    async def score(self, request: ScoreRequest) -> Score:
        """As the model, with the adapter."""
        return await self._base.score(msgspec.structs.replace(request, adapter=self._name))

    async def classify(self, request: ClassifyRequest) -> Classification:
        """As the model, with the adapter."""
        return await self._base.classify(msgspec.structs.replace(request, adapter=self._name))

    async def tokenize(self, request: GenerateRequest, *, add_special_tokens: bool) -> list[int]:
        """As the model."""
        return await self._base.tokenize(request, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """As the model."""
        return await self._base.detokenize(token_ids)

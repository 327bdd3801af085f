"""OpenAI's rows of the route table."""

from typing import Final

from penstock.server.dialects.openai import chat, completions, embeddings, models, tokens
from penstock.server.dialects.openai.fields import refuse_by_name
from penstock.server.routes import Access, Document, Route

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        path="/v1/chat/completions",
        methods=("POST",),
        access=Access.USER,
        serve=chat.chat_completions,
        body=chat.ChatRequest,
        from_json=refuse_by_name,
        counts_as_work=True,
        document=Document(
            summary="Answer a conversation", answer=chat.ChatAnswer, streams=True, tag="openai", also=(404,)
        ),
    ),
    Route(
        path="/v1/completions",
        methods=("POST",),
        access=Access.USER,
        serve=completions.completions,
        body=completions.CompletionRequest,
        from_json=refuse_by_name,
        counts_as_work=True,
        document=Document(
            summary="Continue a prompt",
            answer=completions.CompletionAnswer,
            streams=True,
            tag="openai",
            also=(404,),
        ),
    ),
    Route(
        path="/v1/embeddings",
        methods=("POST",),
        access=Access.USER,
        serve=embeddings.embeddings,
        body=embeddings.EmbeddingsRequest,
        counts_as_work=True,
        document=Document(
            summary="Vectors of texts", answer=embeddings.EmbeddingsAnswer, tag="openai", also=(404,)
        ),
    ),
    Route(
        path="/v1/models",
        methods=("GET",),
        access=Access.USER,
        serve=models.list_models,
        counts_as_work=True,
        document=Document(summary="List the models", answer=models.ModelList, tag="openai"),
    ),
    Route(
        path="/v1/models/{model:path}",
        methods=("GET",),
        access=Access.USER,
        serve=models.get_model,
        counts_as_work=True,
        document=Document(summary="Describe one model", answer=models.ModelAnswer, tag="openai", also=(404,)),
    ),
    Route(
        path="/tokenize",
        methods=("POST",),
        access=Access.USER,
        serve=tokens.tokenize,
        body=tokens.TokenizeRequest,
        counts_as_work=True,
        document=Document(
            summary="Tokens of a text or conversation",
            answer=tokens.TokenizeAnswer,
            tag="openai",
            also=(404,),
        ),
    ),
    Route(
        path="/detokenize",
        methods=("POST",),
        access=Access.USER,
        serve=tokens.detokenize,
        body=tokens.DetokenizeRequest,
        counts_as_work=True,
        document=Document(
            summary="Text of token ids", answer=tokens.DetokenizeAnswer, tag="openai", also=(404,)
        ),
    ),
)
"""`/tokenize` and `/detokenize` are vLLM's."""

"""The offline API's requests that generate nothing, and what they return; named as vLLM's users know them."""

from collections.abc import Awaitable, Callable, Sequence, Sized
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from penstock.cli.feed import num_in_flight, with_patience
from penstock.cli.workers import work_off
from penstock.core.errors import InvalidParameterError, PenstockError
from penstock.core.pooled import pairs_of_texts

Request = TypeVar("Request")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """A vector."""

    embedding: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` gives for one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringOutput:
    """How well a pair fits, 0 to 1."""

    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringRequestOutput:
    """What `LLM.score` gives for one pair."""

    request_id: str
    outputs: ScoringOutput
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationOutput:
    """Probabilities of the classes `labels`."""

    probs: list[float]
    labels: list[str]

    @property
    def num_classes(self) -> int:
        """How many there are."""
        return len(self.probs)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationRequestOutput:
    """What `LLM.classify` gives for one prompt."""

    request_id: str
    outputs: ClassificationOutput
    num_prompt_tokens: int
    num_cached_tokens: int


def pairs_of(text_1: str | Sequence[str], text_2: str | Sequence[str]) -> list[tuple[str, str]]:
    """One text against each of several, or as many pairs as there are texts.

    Raises:
        InvalidParameterError: something else is no text, or the numbers do not fit.
    """
    return pairs_of_texts(_texts(text_1, name="text_1"), _texts(text_2, name="text_2"))


def _texts(value: object, *, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidParameterError(
            f"{name} is {value!r:.80}, it must be a text or a list of texts", param=name
        )
    return [str(text) for text in texts]


def _as_it_is(_request: object, error: PenstockError, _results: object) -> NoReturn:
    raise error


def _untold(_result: object) -> None:
    """Nobody follows."""


async def answer_each(
    requests: Sequence[Request],
    ask: Callable[[Request], Awaitable[Result]],
    *,
    max_num_seqs: int,
    recover: Callable[[Request, PenstockError, Sized], Result] = _as_it_is,
    on_result: Callable[[Result], None] = _untold,
) -> list[Result]:
    """Every answer, in the order of the requests, with the engine's queue kept filled.

    Args:
        requests: any number.
        ask: for one answer.
        max_num_seqs: of the engine.
        recover: makes an answer of an error, given what there is so far, or raises.
        on_result: told of each answer as it comes.

    Raises:
        PenstockError: the first that `recover` raised; the other requests are cancelled.
    """
    results: dict[int, Result] = {}

    async def work(item: tuple[int, Request]) -> None:
        index, request = item
        try:
            results[index] = await with_patience(lambda: ask(request))
        except PenstockError as error:
            results[index] = recover(request, error, results)
        on_result(results[index])

    num_workers = min(len(requests), num_in_flight(max_num_seqs=max_num_seqs))
    await work_off(enumerate(requests), work, num_workers=num_workers)
    return [results[index] for index in range(len(requests))]

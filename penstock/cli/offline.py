"""The offline Python API: `LLM(model=...).generate(prompts, params)`, as vLLM's users write it.

The engine runs in a thread of this process. What this version does not have is refused by name.
"""

import itertools
import random
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence, Sized
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeGuard, TypeVar

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.cli.feed import with_room
from penstock.cli.local_model import HeldModel, LocalModel, LoopThread, StepTotals, open_local_model
from penstock.cli.model_source import ModelSource, find_draft, find_model
from penstock.cli.outputs import CompletionOutput, RequestOutput
from penstock.cli.pooled import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    answer_each,
    pairs_of,
)
from penstock.cli.refused import REFUSED_OPTIONS, refuse
from penstock.cli.structured_outputs import StructuredOutputsParams, grammars_of
from penstock.core.errors import (
    EngineDeadError,
    EngineError,
    InvalidParameterError,
    NotReadyError,
    PenstockError,
    StartupError,
)
from penstock.core.grammar import GrammarSpec
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.pooled import ClassifyRequest, EmbedRequest, ScoreRequest
from penstock.core.text import GenerateRequest, Message, ToolChoice, ToolMode
from penstock.core.tokens import EngineInfo
from penstock.engine.config import GIB, EngineConfig, KvConfig, SchedulerConfig
from penstock.text.pooling_config import PoolingConfig
from penstock.text.reading import ReadingConfig
from penstock.text.service import TextService

DEFAULT_MAX_TOKENS: Final = 16
"""When no parameters are given, as at vLLM."""
OFFLINE_STEP_TIME_TARGET_MS: Final = 10_000.0
OFFLINE_DECODE_STRETCH: Final = 1_000_000.0
"""Nobody watches the tokens come, so a prompt is not cut to keep the others flowing."""

Prompt = str | Mapping[str, object]
"""Text, or `{"prompt": text}`, or `{"prompt_token_ids": [...]}`."""
Turn = Mapping[str, object] | Message
Guides = StructuredOutputsParams | Sequence[StructuredOutputsParams | None] | None

T = TypeVar("T")
Asked = TypeVar("Asked")
Got = TypeVar("Got")

PARAMS_RULE: Final = "it must be a SamplingParams or a list of them"
NONE: Final = type(None)
ARGUMENT_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "model": (str, Path, NONE),
    "dtype": (str,),
    "kernels": (str,),
    "device": (str,),
    "enforce_eager": (bool,),
    "quantization": (str, NONE),
    "quantization_group_size": (int,),
    "quantization_activations": (str,),
    "kv_cache_dtype": (str,),
    "deterministic": (bool,),
    "thread_affinity": (str, NONE),
    "isa": (str,),
    "revision": (str, NONE),
    "seed": (int, NONE),
    "max_model_len": (int, NONE),
    "max_num_seqs": (int,),
    "max_num_batched_tokens": (int,),
    "enable_prefix_caching": (bool,),
    "enable_chunked_prefill": (bool,),
    "enable_jump_forward": (bool,),
    "async_scheduling": (bool, NONE),
    "block_size": (int,),
    "num_kv_blocks": (int, NONE),
    "kv_cache_memory_bytes": (int, NONE),
    "gpu_memory_utilization": (float, int, NONE),
    "kv_offloading_size": (float, int),
    "num_threads": (int, NONE),
    "chat_template": (str, Path, NONE),
    "score_yes_token": (str,),
    "score_no_token": (str,),
    "enable_auto_tool_choice": (bool,),
    "tool_call_parser": (str,),
    "reasoning_parser": (str,),
    "reasoning_start_str": (str,),
    "reasoning_end_str": (str,),
    "tensor_parallel_size": (int,),
    "speculative_config": (Mapping, NONE),
}
SCHEDULER_ARGUMENTS: Final = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_prefix_caching",
    "enable_chunked_prefill",
    "enable_jump_forward",
    "async_scheduling",
)
ENGINE_ARGUMENTS: Final = (
    "dtype",
    "kernels",
    "device",
    "enforce_eager",
    "quantization_group_size",
    "quantization_activations",
    "deterministic",
    "thread_affinity",
    "isa",
    "num_threads",
    "max_model_len",
    "tensor_parallel_size",
)
"""Those that `EngineConfig` calls the same."""
READING_ARGUMENTS: Final = (
    "enable_auto_tool_choice",
    "tool_call_parser",
    "reasoning_parser",
    "reasoning_start_str",
    "reasoning_end_str",
)
"""Those that `ReadingConfig` calls the same."""
TYPE_WORDS: Final = {
    str: "text",
    Path: "a path",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    NONE: "None",
    Mapping: "a mapping",
}


class LLM:
    """A model to call from Python.

    Args:
        model: folder, hub id, or None for the embedded model.
        dtype: `auto`, `float32` or `bfloat16`.
        kernels: `auto`, `native`, `eager`, `reference` or `triton`.
        device: `auto` (CUDA where it can be used, else the CPU), `cpu` or `cuda`.
        enforce_eager: on a CUDA device, run every step launch by launch: no recorded graphs.
        quantization: None, `none`, `int8`, `int4` or `fp8`: how weights of products are rounded at load.
        quantization_group_size: inputs that share a scale in int4: 32, 64 or 128.
        quantization_activations: `int8` rounds the inputs of quantized products too; `bf16` does not.
        kv_cache_dtype: `auto`, `bfloat16`, `int8` or `fp8`.
        deterministic: make greedy answers independent of neighbours, chunks, prefix hits and threads.
        revision: branch, tag or commit of a hub model.
        seed: answers without a seed of their own draw theirs from it; None makes them differ by run.
        max_model_len: most tokens of prompt and answer; None takes the model's own.
        max_num_seqs: most sequences in one step, 1 to 4096.
        max_num_batched_tokens: most tokens in one step.
        enable_prefix_caching: keep blocks for prompts that begin alike.
        enable_chunked_prefill: compute prompts in chunks; False computes each whole in one step.
        enable_jump_forward: append the tokens that a grammar forces without a step of their own.
        async_scheduling: launch each step before the outcome of the last is known; None does so on a GPU.
        block_size: token slots in a KV block, a power of two.
        num_kv_blocks: size of the pool; None derives it.
        kv_cache_memory_bytes: memory of the pool; None takes a share of what is free.
        gpu_memory_utilization: share of a CUDA device's memory that may be taken; None is 0.9.
        kv_offloading_size: GiB of host memory for KV blocks beyond the pool; 0 for none.
        num_threads: threads that compute; None takes the CPUs of this process.
        thread_affinity: CPUs to pin the threads of the native kernels to, as `0-3,8`.
        isa: instruction set of the native kernels; auto takes `PENSTOCK_ISA` or the best.
        chat_template: file with a Jinja template in place of the model's.
        score_yes_token: scores by a generative model: its answer to a fitting document, one token.
        score_no_token: its answer to any other.
        enable_auto_tool_choice: let the model decide to call tools; False refuses `tool_choice` auto.
        tool_call_parser: how the model spells tool calls; `auto` reads it from the chat template.
        reasoning_parser: how the model marks its thoughts; `auto` reads it from template and tokenizer.
        reasoning_start_str: with `reasoning_parser` `tags`: what opens a thought.
        reasoning_end_str: with `reasoning_parser` `tags`: what closes it.
        tensor_parallel_size: ranks that share every layer, each a process, 1 to 64.
        speculative_config: who guesses tokens ahead, as `{"method": "ngram"}`; None for nobody.
        unknown: every other argument is refused by name.

    Raises:
        StartupError: an argument, the checkpoint or the machine does not allow it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        kernels: Literal["auto", "native", "eager", "reference", "triton"] = "auto",
        device: Literal["auto", "cpu", "cuda"] = "auto",
        enforce_eager: bool = False,
        quantization: Literal["none", "int8", "int4", "fp8"] | None = None,
        quantization_group_size: int = 128,
        quantization_activations: Literal["int8", "bf16"] = "int8",
        kv_cache_dtype: Literal["auto", "bfloat16", "int8", "fp8"] = "auto",
        deterministic: bool = False,
        revision: str | None = None,
        seed: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        enable_jump_forward: bool = True,
        async_scheduling: bool | None = None,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float | None = None,
        kv_offloading_size: float = 0.0,
        num_threads: int | None = None,
        thread_affinity: str | None = None,
        isa: str = "auto",
        chat_template: str | Path | None = None,
        score_yes_token: str = "yes",  # noqa: S107 - a word, not a secret
        score_no_token: str = "no",  # noqa: S107 - a word, not a secret
        enable_auto_tool_choice: bool = True,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
        reasoning_start_str: str = "<think>",
        reasoning_end_str: str = "</think>",
        tensor_parallel_size: int = 1,
        speculative_config: Mapping[str, object] | None = None,
        **unknown: object,
    ) -> None:
        given = dict(locals())  # the arguments and nothing else, as this is the first line
        _check_types({name: given[name] for name in ARGUMENT_TYPES})
        _refuse_arguments(unknown)
        source = find_model(None if model is None else str(model), revision=revision)
        config = _engine_config(given, source=source)
        self.totals = StepTotals()
        """Sums over the engine's steps so far."""
        self._rng = random.Random(seed)  # noqa: S311 - seeds of answers, no secret
        self._ids = itertools.count()
        self._held = HeldModel()
        self._finalizer = weakref.finalize(self, self._held.end)
        template = None if chat_template is None else Path(chat_template)
        self._is_put_away = False
        self._open = partial(
            open_local_model,
            source,
            config,
            events=self.totals,
            chat_template=template,
            reading=ReadingConfig(**{name: given[name] for name in READING_ARGUMENTS}),
            pooling=PoolingConfig(score_yes_token=score_yes_token, score_no_token=score_no_token),
        )
        try:
            self._held.local = self._thread.run(self._open())
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> EngineInfo:
        """What was chosen: dtype, kernels, blocks and limits."""
        return self._model.info

    @property
    def _model(self) -> LocalModel:
        if self._is_put_away:
            raise NotReadyError("this LLM is sleeping, call wake_up()", code="sleeping")
        if self._held.local is None:
            raise StartupError("this LLM has been closed")
        return self._held.local

    @property
    def _thread(self) -> LoopThread:
        return self._held.thread

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the engine's thread and its ranks, and give the memory back; safe to call twice.

        An `LLM` that is dropped, or still there when the interpreter ends, does the same by itself.
        """
        self._finalizer.detach()
        self._held.close()
        self._is_put_away = False

    @property
    def is_sleeping(self) -> bool:
        """True between `sleep` and `wake_up`."""
        return self._is_put_away or (self._held.local is not None and self._held.local.engine.is_sleeping)

    def sleep(self, level: Literal[1, 2] = 1) -> None:
        """Give memory back until `wake_up`; until then calls raise `NotReadyError`.

        Args:
            level: 1 gives the KV pool back and moves weights from a device to host memory; 2 gives everything
                back, and the model is loaded again by `wake_up`.
        """
        if level not in {1, 2}:
            raise InvalidParameterError(f"level is {level!r:.20}, it must be 1 or 2", param="level")
        if level == 1 and not self._is_put_away:
            self._thread.run(self._model.engine.sleep(1))
        elif level == 2 and not self._is_put_away:
            self._thread.run(self._model.close())
            self._held.local, self._is_put_away = None, True

    def wake_up(self) -> None:
        """Be ready again; nothing if it does not sleep."""
        if self._is_put_away:
            self._held.local = self._thread.run(self._open())
            self._is_put_away = False
        else:
            self._thread.run(self._model.engine.wake_up())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        structured_outputs: Guides = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt.

        Args:
            prompts: one or several; text, `{"prompt": ...}` or `{"prompt_token_ids": [...]}`.
            sampling_params: one for all or one for each; None takes
                `get_default_sampling_params`.
            structured_outputs: what the answers must look like: one for all, or a list with one or None
                for each.
            use_tqdm: show progress on a terminal.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            InvalidParameterError: a prompt or parameter is wrong; no prompt is then answered.
            EngineDeadError: the engine failed as a whole before any answer was complete; later the outputs
                without an answer have `error` set instead.
        """
        several = _prompts(prompts)
        params = _one_each(
            sampling_params, num_prompts=len(several), default=self.get_default_sampling_params()
        )
        grammars = grammars_of(structured_outputs, num_prompts=len(several))
        requests = [
            self._request(each, prompt=_prompt(p), grammar=grammar)
            for p, each, grammar in zip(several, params, grammars, strict=True)
        ]
        return self._thread.run(self._answer_all(requests, show=use_tqdm))

    def get_default_sampling_params(self) -> SamplingParams:
        """What is used when no parameters are given: the model author's suggestion and 16 tokens."""
        return msgspec.structs.replace(
            self._model.service.card.default_sampling, max_tokens=DEFAULT_MAX_TOKENS
        )

    def chat(
        self,
        messages: Sequence[Turn] | Sequence[Sequence[Turn]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        structured_outputs: Guides = None,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        tool_choice: str | Mapping[str, object] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer each conversation by the model's chat template.

        Args:
            messages: one conversation or several, turns as `{"role": ..., "content": ...}`.
            sampling_params: as for `generate`.
            structured_outputs: as for `generate`.
            use_tqdm: show progress on a terminal.
            add_generation_prompt: let the template open the assistant's turn.
            continue_final_message: go on with the last turn instead.
            tools: functions in OpenAI's form, for every conversation; the calls are in `tool_calls` of the
                answers.
            tool_choice: `auto`, `none`, `required`, or `{"type": "function", "function": {"name": ...}}`.
            chat_template_kwargs: variables for the template, which must read them.

        Returns:
            One output per conversation, in their order; `prompt` is the rendered text.

        Raises:
            InvalidParameterError: a turn or parameter is wrong; nothing is then answered.
        """
        several = _conversations(messages)
        params = _one_each(
            sampling_params, num_prompts=len(several), default=self.get_default_sampling_params()
        )
        grammars = grammars_of(structured_outputs, num_prompts=len(several))
        requests = [
            msgspec.structs.replace(
                self._request(
                    each,
                    grammar=grammar,
                    messages=turns,
                    add_generation_prompt=add_generation_prompt and not continue_final_message,
                    continue_final_message=continue_final_message,
                ),
                tools=tuple(map(dict, tools or ())),
                tool_choice=_tool_choice(tool_choice),
                chat_template_kwargs=dict(chat_template_kwargs or {}),
            )
            for turns, each, grammar in zip(several, params, grammars, strict=True)
        ]
        return self._thread.run(self._answer_all(requests, show=use_tqdm))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_type: Literal["mean", "last"] | None = None,
        dimensions: int | None = None,
        normalize: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each prompt.

        Args:
            prompts: as for `generate`.
            pooling_type: of the hidden states; None takes the checkpoint's, else the last.
            dimensions: keep the first so many numbers.
            normalize: scale to length 1.
            truncate_prompt_tokens: keep the first so many tokens, -1 for the context; None refuses longer.

        Raises:
            InvalidParameterError: a prompt or argument is wrong; nothing is then answered.
        """
        if pooling_type not in {None, "mean", "last"}:
            raise InvalidParameterError(
                f"pooling_type is {pooling_type!r:.80}, it must be mean, last or None", param="pooling_type"
            )
        requests = [
            EmbedRequest(
                request_id=self._new_id(),
                model=self._model.service.card.name,
                prompt=_prompt(prompt),
                pooling=pooling_type,
                dimensions=dimensions,
                normalize=normalize,
                truncate_prompt_tokens=truncate_prompt_tokens,
            )
            for prompt in _prompts(prompts)
        ]
        made = self._answer_each(requests, self._model.service.embed)
        return [
            EmbeddingRequestOutput(
                request_id=request.request_id,
                outputs=EmbeddingOutput(embedding=list(one.values)),
                num_prompt_tokens=one.usage.prompt_tokens,
                num_cached_tokens=one.usage.cached_tokens,
            )
            for request, one in zip(requests, made, strict=True)
        ]

    def score(
        self, text_1: str | Sequence[str], text_2: str | Sequence[str], *, instruction: str | None = None
    ) -> list[ScoringRequestOutput]:
        """How well documents fit a query.

        Args:
            text_1: a query, or as many as documents.
            text_2: one document or several.
            instruction: what the task is, for models that answer yes or no.

        Raises:
            InvalidParameterError: a text is wrong, or the model cannot score.
        """
        requests = [
            ScoreRequest(
                request_id=self._new_id(),
                model=self._model.service.card.name,
                query=query,
                document=document,
                instruction=instruction,
            )
            for query, document in pairs_of(text_1, text_2)
        ]
        made = self._answer_each(requests, self._model.service.score)
        return [
            ScoringRequestOutput(
                request_id=request.request_id,
                outputs=ScoringOutput(score=one.value),
                num_prompt_tokens=one.usage.prompt_tokens,
                num_cached_tokens=one.usage.cached_tokens,
            )
            for request, one in zip(requests, made, strict=True)
        ]

    def classify(self, prompts: Prompt | Sequence[Prompt]) -> list[ClassificationRequestOutput]:
        """The classes of each prompt, by a model that was made for it.

        Raises:
            InvalidParameterError: a prompt is wrong, or the model has no classes.
        """
        requests = [
            ClassifyRequest(
                request_id=self._new_id(), model=self._model.service.card.name, prompt=_prompt(prompt)
            )
            for prompt in _prompts(prompts)
        ]
        made = self._answer_each(requests, self._model.service.classify)
        return [
            ClassificationRequestOutput(
                request_id=request.request_id,
                outputs=ClassificationOutput(probs=list(one.probabilities), labels=list(one.labels)),
                num_prompt_tokens=one.usage.prompt_tokens,
                num_cached_tokens=one.usage.cached_tokens,
            )
            for request, one in zip(requests, made, strict=True)
        ]

    def _new_id(self) -> RequestId:
        return RequestId(f"offline-{next(self._ids)}")

    def _answer_each(self, requests: Sequence[Asked], ask: Callable[[Asked], Awaitable[Got]]) -> list[Got]:
        return self._thread.run(answer_each(requests, ask, max_num_seqs=self.info.max_num_seqs))

    def _request(
        self,
        params: SamplingParams,
        *,
        grammar: GrammarSpec | None = None,
        prompt: str | tuple[int, ...] | None = None,
        messages: tuple[Message, ...] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> GenerateRequest:
        checked = _checked(params)
        if checked.seed is None:
            checked = msgspec.structs.replace(checked, seed=self._rng.getrandbits(63))
        return GenerateRequest(
            request_id=self._new_id(),
            model=self._model.service.card.name,
            prompt=prompt,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            params=checked,
            grammar=grammar,
        )

    async def _answer_all(self, requests: list[GenerateRequest], *, show: bool) -> list[RequestOutput]:
        """Keep the engine's queue filled until every request has its output."""
        with OfflineProgress(len(requests), show=show) as progress:
            return await answer_each(
                requests,
                partial(answer_whole, self._model.service),
                max_num_seqs=self.info.max_num_seqs,
                recover=_recovered,
                on_result=progress.advance,
            )


def _recovered(request: GenerateRequest, error: PenstockError, results: Sized) -> RequestOutput:
    """What answers there are are given though the engine has died meanwhile; without any it is an error."""
    if not results or not isinstance(error, EngineDeadError | NotReadyError):
        raise error
    return _unanswered(request, error)


async def answer_whole(service: TextService, request: GenerateRequest) -> RequestOutput:
    """One request to its end.

    Raises:
        RequestError: the request is wrong.
        EngineDeadError: the engine failed as a whole; a fault of this request alone is told in the output.
    """
    token_ids = await service.tokenize(request, add_special_tokens=request.messages is None)
    prompt = await service.detokenize(token_ids) if request.messages is not None else request.prompt
    output = RequestOutput(
        request_id=request.request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=token_ids,
        outputs=[CompletionOutput(index=index) for index in range(request.params.n)],
    )
    try:
        rendered = msgspec.structs.replace(
            request, prompt=tuple(token_ids), messages=None, is_rendered=request.messages is not None
        )
        await _fill(output, service, rendered)
    except EngineDeadError:
        raise
    except EngineError as error:
        output.fail(error.message)
    return output


def _tool_choice(choice: str | Mapping[str, object] | None) -> ToolChoice:
    """As on OpenAI's wire.

    Raises:
        InvalidParameterError: it is none of the words, and names no function.
    """
    if choice is None:
        return ToolChoice()
    if isinstance(choice, str) and choice in {ToolMode.AUTO, ToolMode.NONE, ToolMode.REQUIRED}:
        return ToolChoice(ToolMode(choice))
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidParameterError(
            f"tool_choice is {choice!r:.80}, it must be 'auto', 'none', 'required' or name a function",
            param="tool_choice",
        )
    return ToolChoice(ToolMode.NAMED, name)


def _unanswered(request: GenerateRequest, error: PenstockError) -> RequestOutput:
    """The output of a request that the engine did not live to answer."""
    prompt = request.prompt
    output = RequestOutput(
        request_id=request.request_id,
        prompt=prompt if isinstance(prompt, str) else None,
        prompt_token_ids=list(prompt) if isinstance(prompt, tuple) else [],
        outputs=[CompletionOutput(index=index) for index in range(request.params.n)],
    )
    output.fail(error.message)
    return output


async def _fill(output: RequestOutput, service: TextService, request: GenerateRequest) -> None:
    async with aclosing(await service.generate(request)) as stream:
        async for delta in stream:
            output.add(delta)
            if delta.usage is not None:
                output.num_cached_tokens = delta.usage.cached_tokens


class OfflineProgress:
    """Requests done and tokens per second, on a terminal."""

    def __init__(self, num_requests: int, *, show: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("answering"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            console=console,
            disable=not (show and console.is_terminal),
        )
        self._task = self._progress.add_task("requests", total=num_requests, speed=0.0)
        self._num_tokens = 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, output: RequestOutput) -> None:
        """One request has ended."""
        self._num_tokens += sum(len(one.token_ids) for one in output.outputs)
        elapsed_s = self._progress.tasks[self._task].elapsed or 0.0
        speed = self._num_tokens / elapsed_s if elapsed_s else 0.0
        self._progress.update(self._task, advance=1, speed=speed)


def _engine_config(given: Mapping[str, Any], *, source: ModelSource) -> EngineConfig:  # arguments of `LLM`
    """The engine's part of the arguments, whose types have been checked."""
    return EngineConfig(
        model_path=str(source.path),
        model_revision=source.revision,
        quantization=given["quantization"] or "none",
        speculative=find_draft(given["speculative_config"]),
        **{name: given[name] for name in ENGINE_ARGUMENTS},
        scheduler=with_room(
            SchedulerConfig(
                **{name: given[name] for name in SCHEDULER_ARGUMENTS},
                step_time_target_ms=OFFLINE_STEP_TIME_TARGET_MS,
                decode_stretch=OFFLINE_DECODE_STRETCH,
            )
        ),
        kv=KvConfig(
            block_size=given["block_size"],
            cache_dtype=given["kv_cache_dtype"],
            num_blocks=given["num_kv_blocks"],
            kv_cache_memory_bytes=given["kv_cache_memory_bytes"],
            gpu_memory_utilization=given["gpu_memory_utilization"],
            offloading_bytes=int(given["kv_offloading_size"] * GIB),
        ),
    )


def _check_types(arguments: Mapping[str, object]) -> None:
    """Python checks no types; a bool is a number to it, and not to us.

    Raises:
        StartupError: an argument has another type than `ARGUMENT_TYPES` says.
    """
    for name, value in arguments.items():
        types = ARGUMENT_TYPES[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            words = [TYPE_WORDS[one] for one in types]
            limit = " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
            raise StartupError(f"{name} is {value!r:.80}, it must be {limit}", param=name)


def _refuse_arguments(unknown: Mapping[str, object]) -> None:
    for name in unknown:
        if name in REFUSED_OPTIONS:
            refuse(name, source="flags")
        raise StartupError(f"{name} is not an argument of LLM", param=name)


def _one_each(params: object, *, num_prompts: int, default: SamplingParams) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [default if params is None else params] * num_prompts
    if not _is_list(params):
        raise InvalidParameterError(
            f"sampling_params is {params!r:.80}, {PARAMS_RULE}", param="sampling_params"
        )
    if len(params) != num_prompts:
        raise InvalidParameterError(
            f"sampling_params has {len(params)} entries, there are {num_prompts} prompts",
            param="sampling_params",
        )
    return [_params(each) for each in params]


def _params(value: object) -> SamplingParams:
    if not isinstance(value, SamplingParams):
        raise InvalidParameterError(
            f"sampling_params holds {value!r:.80}, {PARAMS_RULE}", param="sampling_params"
        )
    return value


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _checked(params: SamplingParams) -> SamplingParams:
    """Types as declared: one stop string or a list of them is as good as a tuple.

    Raises:
        InvalidParameterError: a field has another type.
    """
    fields = msgspec.structs.asdict(params)
    if isinstance(fields["stop"], str):
        fields["stop"] = (fields["stop"],)
    try:
        return msgspec.convert(fields, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidParameterError(f"sampling_params: {error}", param="sampling_params") from error


def _prompts(prompts: object) -> list[object]:
    """One prompt or several, none of them looked at yet."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise InvalidParameterError(
            f"prompts is {prompts!r:.80}, it must be a prompt or a list of prompts", param="prompts"
        )
    return list(prompts)


def _prompt(prompt: object) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping) and len(prompt) == 1:
        if "prompt" in prompt:
            return _field(prompt["prompt"], str, name="prompt", limit="text")
        if "prompt_token_ids" in prompt:
            ids = prompt["prompt_token_ids"]
            return _field(ids, tuple[int, ...], name="prompt_token_ids", limit="a list of token ids")
    raise InvalidParameterError(
        f"prompts holds {prompt!r:.80}, a prompt must be text, {{'prompt': text}} "
        "or {'prompt_token_ids': [...]}",
        param="prompts",
    )


def _field(value: object, kind: type[T], *, name: str, limit: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        raise InvalidParameterError(f"{name} is {value!r:.80}, it must be {limit}", param=name) from None


def _conversations(messages: object) -> list[tuple[Message, ...]]:
    if not _is_list(messages):
        raise InvalidParameterError(
            f"messages is {messages!r:.80}, it must be a list of turns or of conversations", param="messages"
        )
    is_one = bool(messages) and isinstance(messages[0], Mapping | Message)
    try:
        return msgspec.convert(
            [messages] if is_one else messages, list[tuple[Message, ...]], from_attributes=True
        )
    except msgspec.ValidationError as error:
        raise InvalidParameterError(f"messages: {error}", param="messages") from error

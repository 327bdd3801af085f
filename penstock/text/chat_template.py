"""Conversations to prompts with the model's or the operator's own template, never the request's.

Finds the templates of a model folder and picks one per conversation; the rendering itself happens in bounded
processes (`template_pool`). Output is that of the Hugging Face stack for the same folder. Used by `service`.
"""

import asyncio
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from penstock.core.errors import (
    CheckpointError,
    GenerateError,
    InvalidParameterError,
    QueueFullError,
    StartupError,
)
from penstock.core.text import GenerateRequest, Message, ToolMode
from penstock.text.model_files import read_bytes, read_object
from penstock.text.template_pool import TemplateLimits, TemplatePool
from penstock.text.template_worker import Job, Setup

THINKING: Final = "enable_thinking"
"""What templates of the Qwen kind call it."""
MAX_VARIABLES: Final = 16
"""Entries of `chat_template_kwargs`."""
OUR_VARIABLES: Final = frozenset(
    {
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
        "namespace",
        "range",
        "loop",
    }
)
"""Variables of a template that requests cannot set."""


class ChatTemplate:
    """A model's named templates; `default`, and perhaps `tool_use` for conversations with tools."""

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str],
        limits: TemplateLimits | None = None,
    ) -> None:
        """Hold `templates`; no process is started yet.

        Args:
            templates: name to jinja2 source; must hold `default`.
            special_tokens: `bos_token` and the like, as variables for the templates.
            limits: bounds of rendering.

        Raises:
            CheckpointError: there is no template named `default`.
        """
        if "default" not in templates:
            raise CheckpointError(f"chat_template has no 'default', it has {sorted(templates)}")
        self.sources = dict(templates)
        self._limits = limits or TemplateLimits()
        setup = Setup(
            templates=dict(templates),
            special_tokens=dict(special_tokens),
            max_output_chars=self._limits.max_output_chars,
            max_cpu_s=self._limits.max_cpu_s,
            max_memory_bytes=self._limits.max_memory_bytes,
        )
        self.pool = TemplatePool(setup, limits=self._limits)
        self._lock = threading.Lock()
        self._num_waiting = 0
        self._threads = ThreadPoolExecutor(self._limits.num_workers, thread_name_prefix="chat-template")

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        *,
        special_tokens: Mapping[str, str],
        override: Path | str | None = None,
        limits: TemplateLimits | None = None,
    ) -> "ChatTemplate | None":
        """The template of a model folder, or None if it has none.

        `chat_template.jinja` (with `additional_chat_templates/`) comes before `tokenizer_config.json`, and
        that before `chat_template.json`; the operator's file `override` before all.

        Raises:
            CheckpointError: a file of the folder is broken.
            StartupError: `override` is missing or not text.
        """
        folder = Path(path)
        templates = (
            _find_templates(folder) if override is None else {"default": _override_text(Path(override))}
        )
        return cls(templates, special_tokens=special_tokens, limits=limits) if templates else None

    @property
    def tools_source(self) -> str:
        """Source of the template that conversations with tools take."""
        return self.sources.get("tool_use", self.sources["default"])

    @property
    def thoughts_off(self) -> dict[str, object]:
        """Variables with which it asks for an answer without thoughts; none if it knows no such thing."""
        return {THINKING: False} if THINKING in self.sources["default"] else {}

    def start(self) -> None:
        """Launch the workers without waiting, so that the first conversation finds them ready."""
        self.pool.start()

    async def wait_ready(self) -> None:
        """Wait until the templates are compiled.

        Raises:
            CheckpointError: one does not compile.
        """
        await asyncio.get_running_loop().run_in_executor(self._threads, self.pool.wait_ready)

    async def render(self, request: GenerateRequest) -> str:
        """The prompt of `request.messages`; the event loop is free meanwhile.

        Raises:
            InvalidParameterError: the template refuses the conversation, or it breaks a limit.
            QueueFullError: too many conversations wait.
            GenerateError: rendering failed for no fault of the request.
        """
        return await asyncio.wrap_future(self._submit(self._job(request)))

    def close(self) -> None:
        """End the workers; conversations that still wait fail. Safe to call twice."""
        self.pool.close()
        self._threads.shutdown(wait=False)

    def _submit(self, job: Job) -> "Future[str]":
        limit = self._limits.max_waiting
        with self._lock:
            if self._num_waiting >= limit:
                raise QueueFullError(
                    f"{self._num_waiting} conversations wait for the chat template, the limit is {limit}",
                    retry_after_s=1.0,
                )
            self._num_waiting += 1
        try:
            future = self._threads.submit(self.pool.render, job)
        except RuntimeError:
            self._leave()
            raise GenerateError("the server is shutting down") from None
        future.add_done_callback(self._leave)
        return future

    def _leave(self, _future: "Future[str] | None" = None) -> None:
        with self._lock:
            self._num_waiting -= 1

    def _job(self, request: GenerateRequest) -> Job:
        if not request.messages:
            raise InvalidParameterError(
                "messages is empty, it must hold at least one message", param="messages"
            )
        if request.add_generation_prompt and request.continue_final_message:
            raise InvalidParameterError(
                "continue_final_message is True and so is add_generation_prompt, only one of them may be",
                param="continue_final_message",
            )
        tools = [] if request.tool_choice.mode is ToolMode.NONE else list(map(_shown_tool, request.tools))
        self._check_variables(request)
        return Job(
            template="tool_use" if tools and "tool_use" in self.sources else "default",
            messages=[message_fields(message) for message in request.messages],
            tools=tools or None,
            variables=dict(request.chat_template_kwargs),
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )

    def _check_variables(self, request: GenerateRequest) -> None:
        """No variable is accepted and ignored, and none takes the place of one of ours."""
        names = request.chat_template_kwargs
        if len(names) > MAX_VARIABLES:
            raise InvalidParameterError(
                f"chat_template_kwargs has {len(names)} entries, it must have at most {MAX_VARIABLES}",
                param="chat_template_kwargs",
            )
        for name in names:
            param = f"chat_template_kwargs.{name[:64]}"
            if name in OUR_VARIABLES:
                raise InvalidParameterError(f"{param} is set by the server, it cannot be given", param=param)
            is_read = re.compile(rf"\b{re.escape(name)}\b").search
            if not (name.isidentifier() and any(map(is_read, self.sources.values()))):
                raise InvalidParameterError(
                    f"{param} is not a variable that the model's chat template reads", param=param
                )


def message_fields(message: Message) -> dict[str, Any]:  # JSON values, as templates take them
    """What a template sees of a message: the fields that are set."""
    fields: dict[str, Any] = {"role": message.role}  # JSON values
    if message.content is not None:
        fields["content"] = message.content
    if message.reasoning_content is not None:
        fields["reasoning_content"] = message.reasoning_content
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_calls:
        fields["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:  # JSON values
    """What a template sees of a tool: all but `strict`, which is for us."""
    function = tool.get("function")
    if not (isinstance(function, dict) and "strict" in function):
        return tool
    return {**tool, "function": {key: value for key, value in function.items() if key != "strict"}}


def _find_templates(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    if (folder / "chat_template.jinja").exists():
        found["default"] = _read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = _read_text(path)
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not found:
            found = _templates_in(read_object(folder / name).get("chat_template"), name=name)
    return found


def _templates_in(value: object, *, name: str) -> dict[str, str]:
    """A template is written as one string or as a list of `{"name": ..., "template": ...}`."""
    if value is None:
        return {}
    entries: Sequence[object] = value if isinstance(value, list) else [{"name": "default", "template": value}]
    found: dict[str, str] = {}
    for entry in entries:
        key, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not (isinstance(key, str) and isinstance(text, str)):
            raise CheckpointError(f"{name}: chat_template must be a string or a list of named strings")
        found[key] = text
    return found


def _override_text(path: Path) -> str:
    """The operator's file: what is wrong with it is a wrong setting, not a broken model."""
    name = f"chat_template is {str(path)!r}"
    try:
        if not path.exists():
            raise StartupError(f"{name}: no such file", param="chat_template")
        if not path.is_file():
            raise StartupError(f"{name}, which is not a file", param="chat_template")
        return _read_text(path)
    except CheckpointError as error:
        raise StartupError(f"{name}: {error.message}", param="chat_template") from None
    except OSError as error:
        raise StartupError(f"{name}: {error.strerror}", param="chat_template") from None


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path.name} is not UTF-8 text") from None

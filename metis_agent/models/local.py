"""`LocalChatModel`: a LangChain chat model on a transformers model in this process.

The backend of rollouts and of the offline world. Every reply carries a token record: the exact prompt and
completion ids and the log-probabilities as sampled. Concurrent calls are batched together.
A tiny model runs fastest with one thread: where one is loaded onto the processor, the process is set to that.
"""

from __future__ import annotations

import json
import random
import zlib
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, cast

import torch
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.globals import get_llm_cache
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from pydantic import AliasChoices, ConfigDict, Field, PrivateAttr

from metis_agent.errors import InputError
from metis_agent.models.batching import MicroBatcher
from metis_agent.models.chat_tokenizer import ChatTokenizer, Recent, named_opening
from metis_agent.models.checkpoint import load_checkpoint
from metis_agent.models.completions import Call, Completion, GenerationRequest
from metis_agent.models.decoding import RowSampling
from metis_agent.models.engine import Engine
from metis_agent.models.prompt import Prompt, PromptBuilder
from metis_agent.models.vision import ImageReader
from metis_agent.models.wire import TOOL_CALL_OPENING, ToolSchemas, names_of, resolve_tool_choice

__all__ = ["OFFERS_TOOLS_WHEN_DIRECT", "LocalChatModel"]

_TINY = 20_000_000
"""Weights; above that a second thread pays."""

OFFERS_TOOLS_WHEN_DIRECT = "offers_tools_when_direct"
"""Key of a model's `config.json`: it was trained to answer directly with the tools in its prompt."""


class LocalChatModel(BaseChatModel):
    """A chat model on any transformers causal language model with a chat template, or one that also sees.

    With its `processor`, any `AutoModelForImageTextToText` reads the images of human and tool messages, given as
    LangChain content blocks with their bytes. An address is refused: the model fetches nothing.

    Per call, `temperature`, `top_p`, `top_k`, `seed`, `max_new_tokens` (or `max_tokens`) and `stop` may be
    given to `invoke`, `ainvoke` or `bind`. A graph run passes its seed as `config["configurable"]["seed"]`;
    each call mixes it with its prompt, so the calls of one run draw different numbers. Without any seed one
    is drawn from the model's own generator; the record's `sampling["seed"]` tells which, and giving it again
    repeats the reply. Replies are never streamed: `stream` gives the whole reply at once.
    """

    model: Any = Field(exclude=True, repr=False)
    """The transformers model. Its weights may change between calls (a trainer's live policy)."""
    tokenizer: Any = Field(exclude=True, repr=False)
    processor: Any = Field(default=None, exclude=True, repr=False)
    """The transformers processor of a model that reads images; without it, images are refused."""
    model_name: str = "local"
    weights_version: str = "0"
    """Recorded with every reply; set it whenever the weights change. Taken when a call is made."""
    temperature: float = Field(default=0.0, ge=0.0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    """0 keeps every token."""
    max_new_tokens: int = Field(default=512, ge=1, validation_alias=AliasChoices("max_new_tokens", "max_tokens"))
    stop: list[str] | None = None
    """Texts that end a reply; they are not part of it."""
    seed: int | None = None
    """Seed of every call that has none of its own."""
    rng_seed: int | None = None
    """Seed of the generator that seeds come from where nobody gives one; `None` for a fresh one."""
    max_batch: int = Field(default=256, ge=1)
    linger: float = Field(default=0.002, ge=0.0)
    """Seconds without a new call after which a batch starts though it is not full."""
    continuous: bool | None = None
    """Whether calls join a running batch, and are answered while others in it still run: where all layers have full
    attention and no image is read. `None`: everywhere but on a CPU, where a row costs the same in whatever batch and a
    training's waves of rollouts do better together."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """More variables for the chat template, such as `{"enable_thinking": False}`."""

    offers_tools_when_direct: bool | None = None
    """Whether the tools stay in the prompt where a gate decides "answer", and only the opening of a call is banned.
    Right for a policy that was trained so, as HDPO trains one: other models then write their call in other words.
    `None`: as the model's `config.json` says, where training has noted it; else no."""

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True)

    _engine: Engine = PrivateAttr()
    _tokens: ChatTokenizer = PrivateAttr()
    _prompts: PromptBuilder = PrivateAttr()
    _reader: ImageReader | None = PrivateAttr(default=None)
    _openings: Recent[tuple[int, ...]] = PrivateAttr(default_factory=lambda: Recent(1024))
    _batcher: MicroBatcher[GenerationRequest, Completion] = PrivateAttr()
    _schemas: ToolSchemas = PrivateAttr(default_factory=ToolSchemas)
    _rng: random.Random = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Build the parts that calls share."""
        super().model_post_init(context)
        if self.offers_tools_when_direct is None:
            self.offers_tools_when_direct = bool(getattr(self.model.config, OFFERS_TOOLS_WHEN_DIRECT, False))
        self._rng = random.Random(self.rng_seed)
        self._reader = None if self.processor is None else ImageReader(self.processor)
        self._engine = Engine(self.model, self.tokenizer, interrupted=lambda: self._batcher.closed, reader=self._reader)
        self._batcher = MicroBatcher(
            self._engine.run,
            max_batch=self.max_batch,
            linger=self.linger,
            continuous=self.model.device.type != "cpu" if self.continuous is None else self.continuous,
        )
        self._tokens = ChatTokenizer(
            self.tokenizer,
            eos_ids=self._engine.eos_ids,
            template_arguments=self.template_arguments,
            images=self._reader.identity if self._reader else "",
        )
        self._prompts = PromptBuilder(self._tokens, self._reader)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = "auto",
        **options: Any,
    ) -> LocalChatModel:
        """Load a model folder.

        Args:
            path: A folder written by `save_pretrained`: config, safetensors, tokenizer, chat template, and the
                processor of a model that reads images.
            device: Where the model runs.
            dtype: Type of the weights; "auto" keeps the checkpoint's.
            **options: Fields of this class, such as `temperature`, `max_new_tokens` or `max_batch`.

        Raises:
            CheckpointError: The folder is missing, truncated or not a language model.
        """
        loaded = load_checkpoint(path, device=device, dtype=dtype)
        if loaded.model.device.type == "cpu" and loaded.model.num_parameters() < _TINY:
            torch.set_num_threads(1)
        parts = {"model": loaded.model, "tokenizer": loaded.tokenizer, "processor": loaded.processor}
        return cls(**{"model_name": str(path), **options, **parts})

    @property
    def _llm_type(self) -> str:
        return "metis-local"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {
            "model_name": self.model_name,
            "weights_version": self.weights_version,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="metis",
            ls_model_type="chat",
            ls_model_name=self.model_name,
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=self._new_tokens(kwargs),
        )
        if stop:
            params["ls_stop"] = stop
        return params

    def bind_tools(
        self, tools: Sequence[Any], *, tool_choice: Any = None, **kwargs: Any
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Offer tools.

        Args:
            tools: LangChain tools, functions, pydantic classes or OpenAI-style schemas.
            tool_choice: `None` or "auto": the model decides. "none": the tools stay in the prompt, token for
                token, but can't be called (see `offers_tools_when_direct`). "any" or "required": the opening of a
                call is forced. A tool's name: forced through the name, where the tokens allow it.
            **kwargs: Further call options.

        Raises:
            UnknownToolError: `tool_choice` names a tool that is not among `tools`.
        """
        schemas = self._schemas.convert(tools)
        return self.bind(tools=schemas, tool_choice=resolve_tool_choice(tool_choice, schemas), **kwargs)

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """One reply; see `Runnable.invoke`. `config["configurable"]["seed"]` seeds it."""
        return super().invoke(input, config, stop=stop, **_with_seed(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """One reply, batched with all others that are waiting; see `invoke`."""
        return await super().ainvoke(input, config, stop=stop, **_with_seed(config, kwargs))

    def reply_unheard(self, messages: Sequence[BaseMessage], **options: Any) -> AIMessage:
        """One reply where nobody listens: as `invoke`, without what LangChain does for callbacks alone.

        For a graph that knows its run has no callbacks, tracer or stream of messages; it takes a tenth of the time of
        a rollout of a small model. A model with a cache, a rate limit or callbacks of its own does all as ever.

        Args:
            messages: The conversation.
            **options: As for `invoke`.
        """
        if not self._is_plain():
            return self.invoke(list(messages), **options)
        return cast(AIMessage, self._generate(list(messages), **options).generations[0].message)

    async def areply_unheard(self, messages: Sequence[BaseMessage], **options: Any) -> AIMessage:
        """One reply where nobody listens, batched with all others that are waiting; see `reply_unheard`."""
        if not self._is_plain():
            return await self.ainvoke(list(messages), **options)
        return cast(AIMessage, (await self._agenerate(list(messages), **options)).generations[0].message)

    def _is_plain(self) -> bool:
        """Whether a call of this model is nothing but its tokens."""
        return (
            not (self.cache or self.callbacks or self.verbose or self.rate_limiter or self._reader)
            and (self.cache is False or get_llm_cache() is None)
            and self.output_version in (None, "v0")
        )

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """The reply as a single chunk: its record is about all of its tokens."""
        yield _whole_chunk(self.invoke(input, config, stop=stop, **kwargs))

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """As `stream`."""
        yield _whole_chunk(await self.ainvoke(input, config, stop=stop, **kwargs))

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._prepare(messages, stop, kwargs)
        future = self._batcher.submit(call.request)
        try:
            completion = future.result()
        except BaseException:
            future.cancel()
            raise
        return self._result(call, completion)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._prepare(messages, stop, kwargs)
        return self._result(call, await self._batcher.ask(call.request))

    def _prepare(self, messages: list[BaseMessage], stop: list[str] | None, options: dict[str, Any]) -> Call:
        tools = options.get("tools") or []
        choice = resolve_tool_choice(options.get("tool_choice"), tools)
        prompt = self._prompts.build(messages, tools)
        seed = self._call_seed(options)
        stops = tuple(stop if stop is not None else self.stop or ())
        sampling = RowSampling(
            temperature=_given(options, "temperature", self.temperature),
            top_p=_given(options, "top_p", self.top_p),
            top_k=_given(options, "top_k", self.top_k),
            seed=(seed % 2**64) << 32 | _fingerprint(prompt),
            forced=self._forced(choice, tools),
            banned=self._banned(choice),
        )
        limit = self._room(len(prompt.ids), self._new_tokens(options))
        request = GenerationRequest(
            prompt_ids=prompt.ids, max_new_tokens=limit, sampling=sampling, stop=stops, images=prompt.images
        )
        return Call(
            request=request, prompt=prompt, seed=seed, choice=choice, offered=names_of(tools),
            weights_version=self.weights_version,
        )  # fmt: skip

    def _call_seed(self, options: Mapping[str, Any]) -> int:
        """The call's own seed, else the graph run's, else the model's, else a fresh one."""
        for seed in (options.get("seed"), options.get("run_seed"), _run_seed(), self.seed):
            if seed is not None:
                return int(seed)
        return self._rng.getrandbits(32)

    def _forced(self, choice: str, tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        if choice in ("auto", "none"):
            return ()
        if choice == "any" and len(tools) > 1:
            return self._tokens.encode(TOOL_CALL_OPENING)
        # "any" of one tool is that tool: a name left open would let the model name one that it was not offered.
        schema = next(tool for tool in tools if choice in ("any", tool["function"]["name"]))
        key = json.dumps(schema, ensure_ascii=False)
        return self._openings.get(key, lambda: named_opening(self._tokens, schema))

    def _banned(self, choice: str) -> tuple[int, ...]:
        # Where a tokenizer spells the opening in several tokens none of them can be banned alone; then, as
        # for a model that spells it letter by letter, the reply is read as text and no call comes out of it.
        opening = self._tokens.encode(TOOL_CALL_OPENING)
        blind = self._reader.banned if self._reader else ()
        return (*blind, *opening) if choice == "none" and len(opening) == 1 else blind

    def _new_tokens(self, options: Mapping[str, Any]) -> int:
        return int(options.get("max_new_tokens") or options.get("max_tokens") or self.max_new_tokens)

    def _room(self, prompt_length: int, wanted: int) -> int:
        context = self._engine.context_length
        if context is None:
            return wanted
        if prompt_length >= context:
            raise InputError(
                f"The prompt has {prompt_length} tokens and the model {context} positions; a reply "
                "needs at least one more. Shorten the conversation or the tool results."
            )
        return min(wanted, context - prompt_length)

    def _result(self, call: Call, completion: Completion) -> ChatResult:
        message = call.message(completion, self._tokens.decode(completion.ids), model_name=self.model_name)
        return ChatResult(generations=[ChatGeneration(message=message)])


def _fingerprint(prompt: Prompt) -> int:
    """Of ids and pictures: the calls of one run must not draw the same numbers."""
    ids = zlib.crc32(array("q", prompt.ids).tobytes())
    return zlib.crc32("".join(image.digest for image in prompt.images).encode(), ids)


def _given(options: Mapping[str, Any], name: str, default: Any) -> Any:
    value = options.get(name)
    return default if value is None else value


def _whole_chunk(message: AIMessage) -> AIMessageChunk:
    fields = {name: getattr(message, name) for name in AIMessage.model_fields if name != "type"}
    return AIMessageChunk(**fields, chunk_position="last")


def _with_seed(config: RunnableConfig | None, options: dict[str, Any]) -> dict[str, Any]:
    """Hand on the seed of a config given with the call: `_generate` gets to see a graph's config only."""
    seed = (config or {}).get("configurable", {}).get("seed")
    return options if seed is None else {"run_seed": seed, **options}


def _run_seed() -> int | None:
    """The seed of the graph run that this call is part of."""
    # Not `ensure_config`, which copies the whole configuration.
    seed: int | None = ((var_child_runnable_config.get() or {}).get("configurable") or {}).get("seed")
    return seed

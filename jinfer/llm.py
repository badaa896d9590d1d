"""`LLM` and `AsyncLLM`: generate text with one engine on one device."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from jinfer.config.beam_params import BeamSearchParams
from jinfer.config.fields import check_kinds, read_int
from jinfer.config.outputs import BeamSearchOutput, RequestOutput
from jinfer.config.refusals import CALL_ARGUMENTS, LLM_ARGUMENTS, refuse
from jinfer.config.sampling_params import RequestOutputKind, SamplingParams
from jinfer.config.typing import Params
from jinfer.engine.device.compile_counter import compile_counter
from jinfer.engine.device.explain import check_named, explain
from jinfer.engine.device.runner import Runner
from jinfer.engine.engine import Engine
from jinfer.engine.loop import EngineLoop
from jinfer.linear.placement import Placement
from jinfer.models.model import Model
from jinfer.requests import beam_search as beams
from jinfer.requests.session import Client, Handle, Session, check_id, refuse_aborted
from jinfer.setup import weights
from jinfer.setup.options import (
    LLMOptions,
    enable_compilation_cache,
    per_prompt,
    sampling_defaults,
    take_tokenizer,
)
from jinfer.setup.resolve import resolve
from jinfer.setup.speculation import DraftSource, Target, take_speculation
from jinfer.steps.tracing import refuse_tracing
from jinfer.text.prompts import Prompt, as_list, chat_prompts, read_prompt
from pallas_kernels.dispatch import Decisions


class LLM:
    """Generates text with a model, in a paged, continuously batched engine.

    The engine runs in its own thread (see `engine.loop`). Threads may share an `LLM`, and several
    `stream` iterators may be read alternately. The JAX contexts that are active where an `LLM` is
    made apply to its steps; those of a caller of `generate` do not.

    Args:
      model: a Hugging Face folder or hub name, a GGUF file, "smollm2" (the embedded default), or a
        `Model` together with `params`.
      params: weights of a `Model`: JAX's arrays are shared, not copied; numpy's are copied.
      tokenizer: a tokenizer, or a path or hub name to load one from; default: the model's own.
      skip_tokenizer_init: serve token ids only.
      chat_template: Jinja template to use instead of the tokenizer's.
      dtype: dtype of weights and activations: "auto" (the checkpoint's on accelerators, float32 on
        CPUs), "float32", "bfloat16" or "float16".
      quantization: quantize the linear layers of the blocks while loading, without calibration
        data: "fp8", "int8" (W8A8), "nf4", "int4-g64:rtn", ...; quantized checkpoints are loaded as
        they are. "gguf" keeps a GGUF file's Q4_0, Q5_0, Q8_0 and Q6_K weights quantized (by
        default they become floats).
      kv_cache_dtype: dtype of K and V: "auto" (the checkpoint's kv_cache_scheme, else the dtype of
        the weights), a dtype as above, or quantized with a scale for each token and head: "fp8"
        (e4m3), "int8", "int4". Static scales in the checkpoint for that format replace these.
      revision: branch, tag or commit of a hub name.
      max_model_len: longest sequence in tokens, prompt included; default: the model's context
        length, or what the KV pool holds if that is less.
      max_num_seqs: most sequences in one step; default 32 on CPUs, 128 elsewhere.
      max_num_batched_tokens: most tokens in one step; default 512 on CPUs, 2048 elsewhere.
      block_size: tokens per page; default 64, on TPUs 128 for quantized K and V.
      enable_chunked_prefill: split prompts over steps; if False, max_num_batched_tokens must hold
        the longest prompt.
      enable_prefix_caching: reuse the KV of earlier texts for prompts that begin like them.
      num_decode_steps: most decode steps in one program; default 1 on CPUs, 8 elsewhere.
      gpu_memory_utilization: share of the accelerator's memory for weights, pool and temporaries.
      kv_cache_memory_bytes: size of the KV pool, instead of that share.
      num_gpu_blocks_override: number of pages, instead of either.
      max_logprobs: most logprobs per position that a request may ask for (besides -1, all); -1: any
        number.
      seed: seed of requests that give none.
      attention_impl: "auto", or a backend by name: "xla", "native" (CPUs), "mosaic_gpu" or
        "mosaic_tpu".
      linear_impl: backend of products with quantized weights, by the same names; "auto" picks one
        for each product, and on a CPU with enough memory dequantizes the weights once. "native"
        keeps 4 and 8-bit weights packed and rounds the inputs of products to int8, 32 with one
        scale. A named backend runs all products, or raises.
      speculative_config: draft several tokens and verify them in one step of the model: a dict
        with "method" and the fields of `config.SpeculativeConfig`. Outputs do not change.
      cpu_offload_gb: GiB of host memory for KV pages evicted from the pool; 0 for none.
      generation_config: "auto": sampling defaults come from the model's generation_config.json;
        "none": from `SamplingParams`.

    Raises:
      FileNotFoundError: no such model.
      ValueError: an argument is invalid or not supported; the message says which and what to do.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        *,
        params: Params | None = None,
        tokenizer: Any | None = None,
        skip_tokenizer_init: bool = False,
        chat_template: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        revision: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        enable_chunked_prefill: bool = True,
        enable_prefix_caching: bool = True,
        num_decode_steps: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        num_gpu_blocks_override: int | None = None,
        max_logprobs: int = 20,
        seed: int = 0,
        attention_impl: str = "auto",
        linear_impl: str = "auto",
        speculative_config: Mapping[str, Any] | None = None,
        cpu_offload_gb: float = 0,
        generation_config: str = "auto",
        **refused: Any,
    ) -> None:
        refuse("LLM", refused, LLM_ARGUMENTS, LLM.__init__.__annotations__)
        refuse_tracing()
        self._options = options = LLMOptions.of(locals())
        enable_compilation_cache()
        self._source = None if isinstance(model, Model) else model
        self.model, params = weights.take_model(model, params, options)
        placement = Placement.of(params, linear_impl)
        self.chat_template = chat_template
        self._tokenizer = take_tokenizer(
            tokenizer, self._source, revision, skips=skip_tokenizer_init
        )
        self._default_fields = sampling_defaults(self._source, generation_config, revision)
        target = Target(self.model, params, placement, self._tokenizer)
        drafts = take_speculation(options, DraftSource.of(speculative_config), target)
        self.config, cache = resolve(options, self.model.config, params, drafts)
        self._runner = Runner(self.model, params, cache, self.config, drafts.heads, drafts.drafter)
        check_named(self._runner)
        self._engine = Engine(self._runner, self.config, self._tokenizer, self._eos_token_ids())
        self.loop = EngineLoop(self._engine)
        self.client = Client(self.loop, self._tokenizer, self._default_fields)
        self._stepped = Session(self.client, is_manual=True)  # requests of `add_request`
        self._stepped_lock = threading.Lock()  # threads that call `step` read them in turns

    # ------------------------------------------------------------------ set-up

    def _eos_token_ids(self) -> tuple[int, ...]:
        ids = self.model.config.eos_token_ids
        if not ids and self._tokenizer is not None and self._tokenizer.eos_token_id is not None:
            ids = (self._tokenizer.eos_token_id,)
        return ids

    def warmup(self) -> float:
        """Compiles every program that requests can need; returns the seconds it took.

        Later only `beam_search` compiles, once for each number of beams.
        """
        refuse_tracing()
        return self.loop.call(self._runner.warmup)

    # ------------------------------------------------------------------ state and weights

    def get_tokenizer(self) -> Any:
        """Returns the tokenizer, or None with `skip_tokenizer_init`."""
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters that `generate` uses by default; see `generation_config`."""
        return self.client.default_params()

    @property
    def num_compilations(self) -> int:
        """Programs compiled in this process so far."""
        return compile_counter.count

    def explain_kernels(self) -> Decisions:
        """Returns which backend runs each op of a step, and why not the others; print it."""
        return explain(self._runner)

    def get_metrics(self) -> dict[str, float]:
        """Returns the engine's counters since its start."""
        metrics = self.loop.call(self._engine.metrics)
        return {**metrics, "num_compilations": self.num_compilations}

    def check_integrity(self) -> None:
        """Raises if the bookkeeping of pages, rows and requests is inconsistent."""
        self.loop.call(self._engine.check_integrity)

    def update_weights(self, params: Params) -> None:
        """Serves `params` from the next step on, quantized first if `quantization` says so.

        They are moved to the engine's device. JAX arrays that are there already are shared, not
        copied, unless the backend needs another layout: do not donate them while they are served.
        Numpy arrays are copied. Nothing is compiled; the prefix cache is emptied.

        Raises:
          ValueError: tree, shapes or dtypes differ from the present weights, which stay in use, or
            an array was donated or deleted.
          TypeError: a leaf is not an array.
        """
        refuse_tracing()
        params = weights.examine_params(self.model, params)
        params = weights.place(params, self._runner.placement, self._options.quantization)
        self.loop.call(lambda: self._engine.update_weights(params))

    def reset_prefix_cache(self) -> None:
        """Drops the cached KV of past prompts and outputs; running requests keep theirs."""
        refuse_tracing()
        self.loop.call(self._engine.reset_prefix_cache)

    def drain(self) -> None:
        """Refuses new requests, and waits until all open ones have ended."""
        self.loop.drain().result()

    def close(self) -> None:
        """Ends all requests, and the engine's thread after the current step.

        An `LLM` is closed automatically when it is garbage collected or the interpreter exits.
        """
        self.loop.close()

    # ------------------------------------------------------------------ requests

    def add_request(
        self,
        request_id: str,
        prompt: str | Mapping[str, Any] | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> None:
        """Queues a request; `step` returns its outputs.

        Args:
          request_id: any string not in use.
          prompt: text, `{"prompt": text}`, `{"prompt_token_ids": ids}`, or ids. A dict may also
            have a "cache_salt": cached KV is shared only among prompts with the same salt.
          params: how to sample; default `get_default_sampling_params()`.
          priority: lower is served first.

        Raises:
          ValueError: the request cannot be served; nothing is queued.
          TypeError: the prompt has an unsupported type.
        """
        self._stepped.add(request_id, prompt, params, priority=priority)

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its pages; unknown ids are ignored."""
        check_id(request_id)
        self._stepped.abort(request_id)
        self.client.abort(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether requests of `add_request` have outputs left to return."""
        return bool(self._stepped)

    def step(self) -> list[RequestOutput]:
        """Advances the engine by one step and returns the new outputs."""
        refuse_tracing()
        self.loop.step()
        with self._stepped_lock:
            return self._stepped.take()

    def session(self) -> Session:
        """Returns a session: requests that run in the background and are read together.

            with llm.session() as session:
                session.add("a", "Once upon a time", SamplingParams(max_tokens=9))
                while session:
                    for output in session.read():
                        ...

        Adding and aborting return at once; leaving the context aborts the remaining requests.
        """
        return Session(self.client)

    def submit(
        self,
        prompt: str | Mapping[str, Any] | Sequence[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> Handle:
        """Queues a request that runs in the background and returns its handle at once.

        The handle iterates over the request's outputs, in threads (`for`) and asyncio (`async
        for`); `params.output_kind` says which outputs. Dropping the handle ends the request.

        Raises:
          ValueError, TypeError: as for `add_request`.
        """
        session = self.session()
        request_id = self.client.new_id("request") if request_id is None else request_id
        session.add(request_id, prompt, params, priority=priority)
        return Handle(session, request_id)

    # ------------------------------------------------------------------ generating

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        **refused: Any,
    ) -> list[RequestOutput]:
        """Generates completions of all prompts and returns their outputs in order.

        Args:
          prompts: one prompt or a list: see `add_request`.
          sampling_params: for all, or one for each.
          use_tqdm: show a progress bar on stderr.
          priority: one number per prompt; lower is served first.

        Raises:
          ValueError, TypeError: a prompt cannot be served; nothing is queued.
        """
        refuse("LLM.generate", refused, CALL_ARGUMENTS, LLM.generate.__annotations__)
        prompts = as_list(prompts)
        params = per_prompt("sampling_params", sampling_params, len(prompts))
        priorities = per_prompt("priority", priority, len(prompts))
        groups = []
        for prompt, p, order in zip(prompts, params, priorities, strict=True):
            p = self.client.read_params(p)
            if p.output_kind is RequestOutputKind.DELTA:
                raise ValueError("generate returns whole outputs; for deltas use stream")
            p = dataclasses.replace(p, output_kind=RequestOutputKind.FINAL_ONLY)
            request_id = self.client.new_id("generate")
            groups.append(
                self.client.make_group(request_id, prompt, p, 0 if order is None else order)
            )
        done: dict[str, RequestOutput] = {}
        with self.session() as session, _progress_bar(len(groups), use_tqdm) as bar:
            session.submit(groups)
            while session:
                for output in session.read():
                    refuse_aborted(output)
                    done[output.request_id] = output
                    bar.update()
        return [done[group.request_id] for group in groups]

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **refused: Any,
    ) -> list[RequestOutput]:
        """Generates the next message of one conversation, or of each of several.

        Args:
          messages: a list of {"role": ..., "content": ...}, or a list of such lists; content is
            text or a list of {"type": "text", "text": ...}; tool calls may have OpenAI's form.
          sampling_params: as for `generate`.
          use_tqdm: as for `generate`.
          chat_template: Jinja template instead of the engine's.
          add_generation_prompt: end the prompt with the start of the assistant's message.
          continue_final_message: continue the last message instead.
          tools: JSON schemas of functions, passed to the template.
          chat_template_kwargs: further variables of the template.

        Raises:
          ValueError, TypeError: there is no chat template, or it refuses the messages.
        """
        refuse("LLM.chat", refused, CALL_ARGUMENTS, LLM.chat.__annotations__)
        prompts = self.read_chat(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def read_chat(
        self,
        messages: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Prompt]:
        """Returns the prompts of one conversation or several; the arguments are those of `chat`."""
        check_kinds(locals(), flags=("add_generation_prompt", "continue_final_message"))
        return chat_prompts(
            self._tokenizer,
            messages,
            chat_template=self.chat_template if chat_template is None else chat_template,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=chat_template_kwargs,
        )

    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams,
        *,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
        prefix_allowed_tokens_fn: beams.PrefixAllowedTokens | None = None,
        **refused: Any,
    ) -> list[BeamSearchOutput]:
        """Finds the most likely continuations of all prompts, and returns them in order.

        Other requests continue meanwhile; `step` returns their outputs.

        Args:
          prompts: one prompt or a list: see `add_request`.
          params: shared by all searches.
          use_tqdm: show a progress bar on stderr.
          concurrency_limit: most prompts at a time; default: as many as fit `max_num_seqs` beams.
          prefix_allowed_tokens_fn: fn(prompt index, token ids so far, the prompt's included)
            returns the ids that may come next.

        Raises:
          ValueError, TypeError: a prompt cannot be served; no search starts.
        """
        refuse("LLM.beam_search", refused, CALL_ARGUMENTS, LLM.beam_search.__annotations__)
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, got {type(params).__name__}")
        read = [read_prompt(prompt, self._tokenizer) for prompt in as_list(prompts)]

        refuse_tracing()
        with _progress_bar(len(read), use_tqdm, "beam search") as bar:
            return beams.search(
                self.loop,
                read,
                params,
                tokenizer=self._tokenizer,
                concurrency_limit=concurrency_limit,
                prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
                bar=bar,
            )

    def stream(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **refused: Any,
    ) -> Iterator[RequestOutput]:
        """Yields new text and tokens (deltas) of one prompt or several, as they are generated.

        The joined deltas of a completion equal the text that `generate` returns. Closing the
        iterator ends the requests. `output_kind` is always DELTA; request ids are "stream-..." in
        the order of the prompts.
        """
        refuse("LLM.stream", refused, CALL_ARGUMENTS, LLM.stream.__annotations__)
        prompts = as_list(prompts)
        params = per_prompt("sampling_params", sampling_params, len(prompts))
        kind = RequestOutputKind.DELTA
        with self.session() as session:
            session.submit(
                [
                    self.client.make_group(
                        self.client.new_id("stream"), prompt, self.client.read_params(p, kind)
                    )
                    for prompt, p in zip(prompts, params, strict=True)
                ]
            )
            while session:
                for output in session.read():
                    refuse_aborted(output)
                    yield output


class AsyncLLM:
    """An `LLM` for asyncio: no method blocks the event loop for long.

    `generate` checks and tokenizes its prompt in the caller's thread; steps run in the engine's
    thread. Tasks of several event loops may share an `AsyncLLM`.

    Args:
      model: see `LLM`.
      max_queued_requests: most requests that wait to be admitted; if more, `generate` raises
        `QueueFullError`. None for no limit.
      **options: the arguments of `LLM`.

    Raises:
      ValueError, TypeError: see `LLM`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        *,
        max_queued_requests: int | None = None,
        **options: Any,
    ) -> None:
        if max_queued_requests is not None:
            max_queued_requests = read_int("max_queued_requests", max_queued_requests)
            if max_queued_requests < 1:
                raise ValueError(f"max_queued_requests must be positive, got {max_queued_requests}")
        self.llm = LLM(model, **options)
        self.llm.loop.max_queued_requests = max_queued_requests

    def generate(
        self,
        prompt: str | Mapping[str, Any] | Sequence[int],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Queues a prompt at once and returns an iterator of its outputs.

        `sampling_params.output_kind` says whether each output holds all so far, only what is new,
        or there is one at the end. Leaving the iteration or cancelling its task ends the request.
        A request that is aborted by its id has a last output with finish reason "abort".

        Args:
          prompt: as for `LLM.add_request`.
          sampling_params: how to sample; default `get_default_sampling_params()`.
          request_id: any string not in use; None for a generated one.
          priority: lower is served first.

        Raises:
          ValueError, TypeError: the prompt cannot be served; nothing is queued.
          QueueFullError: the queue is full.
        """
        handle = self.llm.submit(prompt, sampling_params, request_id=request_id, priority=priority)
        return _read(handle)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **template: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for the next message of one conversation.

        Args:
          messages: a list of {"role": ..., "content": ...}.
          sampling_params, request_id, priority: as for `generate`.
          **template: the chat template arguments of `LLM.chat`.
        """
        prompt: Any = self.llm.read_chat([messages], **template)[0]
        return self.generate(prompt, sampling_params, request_id, priority=priority)

    async def beam_search(
        self, prompts: Any, params: BeamSearchParams, **options: Any
    ) -> list[BeamSearchOutput]:
        """See `LLM.beam_search`; runs in a thread of the event loop's executor."""
        return await asyncio.to_thread(self.llm.beam_search, prompts, params, **options)

    def abort(self, request_id: str) -> None:
        """Ends a request soon and returns at once; unknown ids are ignored."""
        self.llm.abort(request_id)

    def get_tokenizer(self) -> Any:
        """Returns the tokenizer, or None with `skip_tokenizer_init`."""
        return self.llm.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters that `generate` uses by default."""
        return self.llm.get_default_sampling_params()

    async def warmup(self) -> float:
        """See `LLM.warmup`."""
        return await asyncio.to_thread(self.llm.warmup)

    async def get_metrics(self) -> dict[str, float]:
        """Returns the engine's counters at the end of the current step."""
        return await asyncio.to_thread(self.llm.get_metrics)

    async def check_integrity(self) -> None:
        """Raises if the bookkeeping of pages, rows and requests is inconsistent."""
        await asyncio.to_thread(self.llm.check_integrity)

    async def update_weights(self, params: Params) -> None:
        """See `LLM.update_weights`."""
        await asyncio.to_thread(self.llm.update_weights, params)

    async def reset_prefix_cache(self) -> None:
        """See `LLM.reset_prefix_cache`."""
        await asyncio.to_thread(self.llm.reset_prefix_cache)

    async def drain(self) -> None:
        """Refuses new requests, and waits until all open ones have ended."""
        await self.llm.loop.drain().result_async()

    async def close(self) -> None:
        """Ends all requests, and the engine's thread after the current step."""
        await asyncio.to_thread(self.llm.close)


async def _read(handle: Handle) -> AsyncIterator[RequestOutput]:
    try:
        async for output in handle:
            yield output
    finally:
        handle.abort()


def _progress_bar(total: int, is_shown: bool, name: str = "generate") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=name, unit="req", disable=not is_shown)

"""Arguments of other engines that are not supported, with the reason and what to use instead.

A refused name is accepted with values that change nothing (None, and the default of its engine), so
that a script with explicit defaults runs.
"""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """Why a name is not supported.

    Attributes:
      reason: and what to use instead.
      neutral: values that change nothing, besides None.
    """

    reason: str
    neutral: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether `value` changes nothing."""
        return value is None or any(_is_same(value, x) for x in self.neutral)


def _is_same(value: Any, neutral: Any) -> bool:
    """Whether two values are equal and both or neither are bools; False for arrays."""
    is_number = isinstance(neutral, numbers.Real) and isinstance(value, numbers.Real)
    is_alike = is_number and isinstance(value, bool) == isinstance(neutral, bool)
    return (is_alike or type(value) is type(neutral)) and value == neutral


def _all(reason: str, names: str, *neutral: Any) -> dict[str, Refusal]:
    return dict.fromkeys(names.split(), Refusal(reason, neutral))


_ONE_DEVICE = "this engine runs on one device"
_TEXT_ONLY = "prompts are text: there are no images, sounds or videos"
_LORA = "LoRA adapters are not built yet; merge them into the weights"
_STRUCTURED = (
    "structured outputs are not built yet; describe the format in the prompt, or restrict single "
    "tokens with allowed_token_ids"
)
_XLA = "every step is compiled by XLA, and warmup() compiles all of them ahead"
_EDIT_CONFIG = "edit config.json, or give a Model of the ModelConfig that you mean"
_ON_DEVICE = "use the fields of SamplingParams, which run on the device"
_NO_CODE = "no code of a model's repository is ever run"
_SPECULATION = 'say it in speculative_config={"method": ..., ...}'
_GENERATES = "models generate text here; there are no embeddings, classes or scores"
_NO_SERVER = "there is no server"
_LOGS = "the engine's numbers are in get_metrics() and RequestOutput.metrics"
_HUB = "the Hugging Face hub reads HF_TOKEN and HF_HOME from the environment"

LLM_ARGUMENTS: dict[str, Refusal] = {
    **_all(
        _ONE_DEVICE,
        "tensor_parallel_size pipeline_parallel_size data_parallel_size tp_size dp_size",
        1,
    ),
    **_all(
        _ONE_DEVICE,
        "enable_expert_parallel enable_eplb disable_custom_all_reduce enable_dp_attention",
        False,
    ),
    **_all(
        _ONE_DEVICE,
        "distributed_executor_backend worker_cls worker_extension_cls max_parallel_loading_workers "
        "node_rank master_addr master_port data_parallel_backend all2all_backend eplb_config "
        "data_parallel_rank num_redundant_experts kv_transfer_config kv_events_config "
        "ec_transfer_config moe_expert_parallel_size",
    ),
    **_all(
        _LORA,
        "enable_lora max_loras max_lora_rank max_cpu_loras lora_dtype lora_extra_vocab_size "
        "default_mm_loras lora_modules lora_paths lora_target_modules max_loras_per_batch "
        "enable_lora_bias lora_request prompt_adapter_request enable_prompt_adapter",
        False,
    ),
    **_all(
        _STRUCTURED,
        "structured_outputs_config guided_decoding_backend grammar_backend reasoning_parser "
        "tool_call_parser enable_auto_tool_choice",
    ),
    **_all(_XLA, "enforce_eager enable_torch_compile disable_cuda_graph", False),
    **_all(
        _XLA,
        "compilation_config optimization_level max_seq_len_to_capture max_context_len_to_capture "
        "cuda_graph_sizes cuda_graph_max_bs cuda_graph_bs torch_compile_max_bs",
    ),
    **_all(
        _EDIT_CONFIG,
        "hf_overrides rope_scaling rope_theta hf_config_path override_neuron_config "
        "model_config json_model_override_args override_attention_dtype additional_config",
        {},
        "{}",
    ),
    **_all(_NO_CODE, "trust_remote_code", False),
    **_all(_NO_CODE, "code_revision plugins"),
    **_all(_HUB, "hf_token download_dir cache_dir"),
    **_all(
        "the window of a model is part of it: edit config.json",
        "disable_sliding_window disable_hybrid_kv_cache_manager disable_cascade_attn "
        "disable_chunked_mm_input kv_sharing_fast_prefill",
        False,
    ),
    **_all(
        _TEXT_ONLY,
        "limit_mm_per_prompt mm_processor_kwargs allowed_local_media_path allowed_media_domains "
        "media_io_kwargs mm_processor_cache_gb mm_processor_cache_type mm_encoder_tp_mode "
        "mm_encoder_attn_backend video_pruning_rate",
        {},
        "",
    ),
    **_all(
        _TEXT_ONLY,
        "enable_mm_embeds interleave_mm_strings skip_mm_profiling disable_mm_preprocessor_cache "
        "enable_multimodal enable_prompt_embeds",
        False,
    ),
    **_all(_GENERATES, "runner task", "auto", "generate"),
    **_all(_GENERATES, "convert", "auto", "none"),
    **_all(_GENERATES, "pooler_config override_pooler_config"),
    **_all(_GENERATES, "is_embedding enable_return_hidden_states", False),
    **_all(
        _SPECULATION,
        "spec_method spec_model spec_tokens speculative_model num_speculative_tokens "
        "speculative_algorithm speculative_draft_model_path speculative_num_steps "
        "speculative_num_draft_tokens speculative_eagle_topk ngram_prompt_lookup_max "
        "ngram_prompt_lookup_min draft_model",
    ),
    **_all(_NO_SERVER, "served_model_name host port api_key log_level"),
    **_all(_LOGS, "disable_log_stats", True),
    **_all(_LOGS, "enable_metrics show_time_cost aggregate_engine_logging log_requests", False),
    **_all(_LOGS, "otlp_traces_endpoint collect_detailed_traces show_hidden_metrics_for_version"),
    **_all(_ON_DEVICE, "logits_processors logits_processor_pattern sampling_backend"),
    **_all(
        "log probabilities are those of the model, before temperature and penalties",
        "logprobs_mode",
        "raw_logprobs",
    ),
    **_all(
        "the device's memory comes free when the LLM is deleted; update_weights serves new weights "
        "in place of the old ones",
        "enable_sleep_mode enable_memory_saver",
        False,
    ),
    **_all(
        "preempted requests are computed again; cpu_offload_gb keeps their KV in host memory",
        "swap_space preemption_mode",
        0,
        "recompute",
    ),
    **_all("use cpu_offload_gb", "kv_offloading_size kv_offloading_backend hicache_size"),
    **_all("use cpu_offload_gb", "enable_hierarchical_cache", False),
    **_all("there is one kind of tokenizer: the fast one", "tokenizer_mode", "auto", "hf"),
    **_all(
        "a tokenizer beside the model's is loaded as it is: pass one loaded at that revision",
        "tokenizer_revision",
    ),
    **_all(
        "requests are served by priority, then arrival",
        "scheduling_policy schedule_policy",
        "fcfs",
        "priority",
    ),
    **_all(
        "prompts share a step's budget by arrival",
        "max_num_partial_prefills max_long_partial_prefills",
        1,
    ),
    **_all("prompts share a step's budget by arrival", "long_prefill_token_threshold", 0),
    **_all("the scheduler cannot be exchanged", "scheduler_cls schedule_conservativeness"),
    **_all("steps run ahead of the host wherever they can", "async_scheduling", True),
    **_all("steps run ahead of the host wherever they can", "disable_async_output_proc", False),
    **_all("use num_decode_steps", "num_scheduler_steps", 1),
    **_all("every step yields an output; skip those that you do not need", "stream_interval", 1),
    **_all("use generation_config, or pass SamplingParams", "override_generation_config", {}),
    **_all(
        "safetensors and GGUF files are found by themselves; a Model with params needs none",
        "load_format config_format safetensors_load_strategy",
        "auto",
        "lazy",
    ),
    **_all(
        "safetensors and GGUF files are found by themselves",
        "ignore_patterns model_loader_extra_config pt_load_map_location use_tqdm_on_load",
        True,
        {},
    ),
    **_all("JAX chooses the device: set JAX_PLATFORMS", "device", "auto"),
    **_all("use attention_impl", "attention_backend attention_config prefill_attention_backend"),
    **_all("models are implemented here, in JAX", "model_impl", "auto"),
    **_all("quantization names the whole format", "quantization_config"),
    **_all("checkpoints of old tools load as found", "allow_deprecated_quantization", False),
    **_all("each token and head has its own scale", "calculate_kv_scales", False),
    **_all(
        "kv_cache_dtype holds for all layers",
        "kv_cache_dtype_skip_layers mamba_cache_dtype",
        "auto",
    ),
    **_all("pages are known by their tokens", "prefix_caching_hash_algo", "builtin", "sha256"),
    **_all(
        "profile with jax.profiler.trace around the calls",
        "profiler_config enable_layerwise_nvtx_tracing",
        False,
    ),
    **_all(
        "use gpu_memory_utilization, kv_cache_memory_bytes or num_gpu_blocks_override",
        "max_total_tokens kv_cache_config free_gpu_memory_fraction",
    ),
    **_all("use gpu_memory_utilization", "mem_fraction_static"),
    **_all("pass it as model", "model_path model_id model_name_or_path pretrained"),
    **_all("use tokenizer", "tokenizer_path tokenizer_name hf_tokenizer"),
    **_all("use max_model_len", "context_length n_ctx max_seq_len max_seq_length max_length"),
    **_all(
        "use max_num_seqs", "max_running_requests max_batch_size batch_size max_queued_requests"
    ),
    **_all(
        "use max_num_batched_tokens",
        "chunked_prefill_size max_prefill_tokens max_num_tokens n_batch",
    ),
    **_all("use block_size", "page_size tokens_per_block"),
    **_all("use seed", "random_seed"),
    **_all("use dtype", "torch_dtype"),
    **_all("use enable_prefix_caching", "disable_radix_cache enable_block_reuse"),
    **_all("use enable_chunked_prefill", "enable_mixed_chunk"),
    **_all("use beam_search(prompts, BeamSearchParams(beam_width=...))", "max_beam_width"),
    **_all("requests without progress are named in the log", "watchdog_timeout"),
    **_all("the whole model is on the device", "n_gpu_layers device_map"),
}
"""Arguments of other engines' `LLM`."""

CALL_ARGUMENTS: dict[str, Refusal] = {
    **_all(
        "pass it in sampling_params=SamplingParams(...)",
        "temperature top_p top_k min_p max_tokens max_new_tokens do_sample n seed stop logprobs "
        "stop_token_ids repetition_penalty return_logprob top_logprobs_num",
    ),
    **_all(_LORA, "lora_request prompt_adapter_request lora_path", []),
    **_all('pass {"prompt_token_ids": ids} as the prompt', "prompt_token_ids input_ids"),
    **_all(
        "prompts are encoded with their special tokens, token ids taken as they are: encode them "
        "yourself",
        "tokenization_kwargs",
        {},
    ),
    **_all(_TEXT_ONLY, "mm_processor_kwargs image_data audio_data video_data multi_modal_data", {}),
    **_all(_STRUCTURED, "guided_options_request guided_options"),
    **_all("a trial with the template shows it", "chat_template_content_format", "auto"),
    **_all("pass it as prompts", "prompt text inputs"),
    **_all("generate returns when all is done; use stream", "stream", False),
    **_all("use use_tqdm", "progress_bar"),
    **_all("pass SamplingParams as sampling_params", "generation_config gen_config params"),
    **_all("add_request takes ids of your own", "request_id rid"),
    **_all('pass {..., "cache_salt": ...} as the prompt', "cache_salt"),
}
"""Arguments of other engines' `generate` and `chat`."""

SAMPLING_FIELDS: dict[str, Refusal] = {
    "structured_outputs": Refusal(_STRUCTURED),
    "guided_decoding": Refusal(
        "it was renamed structured_outputs, which is not built yet; describe the format in the "
        "prompt, or restrict single tokens with allowed_token_ids"
    ),
    "best_of": Refusal(
        "ask for n samples with logprobs=0 and keep the best cumulative_logprob", (1,)
    ),
    "use_beam_search": Refusal(
        "beam search is not a sampling field; use LLM.beam_search, or n with temperature > 0 for "
        "several candidates",
        (False,),
    ),
    "length_penalty": Refusal("it belongs to beam search, which sampling does not do", (1.0,)),
    "early_stopping": Refusal("it belongs to beam search, which sampling does not do", (False,)),
    "logits_processors": Refusal(
        "Python callbacks would stall every step of the batch; use logit_bias, allowed_token_ids, "
        "bad_words or the penalties, which run on the device",
        ([], ()),
    ),
    "truncate_prompt_tokens": Refusal("cut the prompt before it is sent: prompt_token_ids[-n:]"),
    "logprob_token_ids": Refusal("use logprobs=-1 and read the ids that you need", ([], ())),
    "prompt_logprob_token_ids": Refusal(
        "use prompt_logprobs=-1 and read the ids that you need", ([], ())
    ),
    "prompt_logprob_start": Refusal("use prompt_logprobs and drop the leading entries", (0,)),
    "flat_logprobs": Refusal(
        "log probabilities come as one dict of token id to Logprob per token", (False,)
    ),
    "stream_interval": Refusal(
        "every step yields an output; skip those that you do not need", (1,)
    ),
    "thinking_token_budget": Refusal(
        "there is no reasoning parser yet; bound the answer with max_tokens"
    ),
    "repetition_detection": Refusal(
        "use the penalties against loops, and max_tokens to bound them"
    ),
    "routed_experts_prompt_start": Refusal("routed experts are not returned", (0,)),
    "trace_decode_token_ids": Refusal(
        "forced decoding is not built; score given tokens with prompt_logprobs", ([], ())
    ),
    "extra_args": Refusal("nothing here reads it; pass the field itself by its name", ({},)),
    "skip_clone": Refusal("SamplingParams are frozen and never cloned; drop it", (False,)),
}
"""Fields of vLLM's `SamplingParams`, which keep their defaults in the signature of ours."""

_PENALTIES = "it is not built; use the penalties or bad_words"
_FILTERS = "it is not built; use temperature, top_p, top_k or min_p"
_CONTEXT = "a prompt that does not fit is refused, and all of it stays in the context"

SAMPLING_NAMES: dict[str, str] = {
    name: reason
    for reason, names in (
        ("use max_tokens", "max_new_tokens max_completion_tokens n_predict"),
        ("use min_tokens", "min_new_tokens"),
        ("use max_tokens, which counts output tokens alone", "max_length"),
        ("use min_tokens, which counts output tokens alone", "min_length"),
        ("use temperature=0 for greedy decoding, temperature > 0 for sampling", "do_sample"),
        ("use n", "num_return_sequences"),
        (SAMPLING_FIELDS["use_beam_search"].reason, "num_beams beam_width"),
        (
            SAMPLING_FIELDS["length_penalty"].reason,
            "num_beam_groups diversity_penalty beam_search_diversity_rate",
        ),
        ("use stop_token_ids; the model's own end token always stops", "eos_token_id end_id"),
        ("use stop", "stop_words stop_strings stop_sequences stop_regex"),
        ("use seed", "random_seed sampling_seed"),
        ("typical sampling is not built; use top_p or min_p", "typ_p typical_p"),
        (
            "mirostat is not built; use top_p or min_p",
            "mirostat mirostat_mode mirostat_tau mirostat_eta",
        ),
        (
            _FILTERS,
            "top_a tfs_z top_n_sigma xtc_probability xtc_threshold dynatemp_range "
            "dynatemp_exponent epsilon_cutoff eta_cutoff penalty_alpha guidance_scale samplers "
            "top_p_min top_p_decay top_p_reset_ids renormalize_logits watermarking_config",
        ),
        (
            _PENALTIES,
            "no_repeat_ngram_size dry_multiplier dry_base dry_allowed_length dry_penalty_last_n "
            "dry_sequence_breakers encoder_repetition_penalty encoder_no_repeat_ngram_size "
            "repeat_last_n penalize_nl prompt_ignore_length",
        ),
        ("use repetition_penalty", "repeat_penalty"),
        ("use bad_words", "bad_words_ids bad bad_token_ids force_words_ids"),
        ("use logit_bias", "sequence_bias embedding_bias suppress_tokens begin_suppress_tokens"),
        ("use logit_bias to favour an end token", "exponential_decay_length_penalty"),
        ("put them at the end of the prompt", "forced_bos_token_id forced_eos_token_id"),
        ("rows are not padded", "pad_token_id pad_id bos_token_id"),
        (
            "use logprobs",
            "top_logprobs top_logprobs_num return_logprob n_probs return_log_probs output_scores "
            "output_logits return_generation_logits",
        ),
        ("use prompt_logprobs", "logprob_start_len return_context_logits echo"),
        ("use include_stop_str_in_output", "no_stop_trim"),
        ("hidden states are not returned; see model.logits", "return_hidden_states"),
        (
            _STRUCTURED,
            "json_schema regex ebnf structural_tag response_format grammar guided_json "
            "guided_regex guided_choice guided_grammar json_object",
        ),
        (SAMPLING_FIELDS["logits_processors"].reason, "logits_processor custom_logit_processor"),
        (SAMPLING_FIELDS["extra_args"].reason, "custom_params extra_body"),
        ("pass it to the engine, not to the sampling parameters", "priority"),
        ("use LLM.stream", "stream stream_options"),
        ("pass it to LLM.chat", "tools messages chat_template chat_template_kwargs"),
        ("the template's tools are all that there is", "tool_choice parallel_tool_calls"),
        ('pass chat_template_kwargs={"reasoning_effort": ...} to LLM.chat', "reasoning_effort"),
        (
            "use skip_reading_prefix_cache, or enable_prefix_caching of LLM",
            "cache_prompt use_cache",
        ),
        (_CONTEXT, "n_keep n_discard"),
        ("bound the answer with max_tokens", "max_time t_max_predict_ms"),
        ("say it in the speculative_config of LLM", "lookahead_config prompt_lookup_num_tokens"),
        ("prompts are encoded with their special tokens", "add_special_tokens"),
        ("times are in RequestOutput.metrics", "return_perf_metrics"),
        ("outputs never hold the prompt", "exclude_input_from_output return_full_text"),
        ("it is an argument of LLM: log probabilities are the model's own", "logprobs_mode"),
    )
    for name in names.split()
}
"""Names that are no fields of `SamplingParams`, with what to write instead."""

_SAMPLES = "beam search does not sample: it keeps the most likely texts"
_MASKS = "it is not built for beam search; restrict tokens with allowed_token_ids"
BEAM_NAMES: dict[str, str] = {
    name: reason
    for reason, names in (
        ("beams end at token ids: use stop_token_ids", "stop stop_strings stop_words"),
        ("use beam_width", "num_beams max_beam_width"),
        ("use num_return_sequences", "n best_of"),
        ("use max_tokens", "max_new_tokens max_length"),
        (_SAMPLES, "top_p top_k min_p seed do_sample"),
        (
            _MASKS,
            "logit_bias bad_words presence_penalty frequency_penalty repetition_penalty "
            "no_repeat_ngram_size min_tokens min_new_tokens min_length",
        ),
        ("diverse beam search is not built", "diversity_penalty num_beam_groups"),
        ("diverse beam search is not built", "beam_search_diversity_rate"),
        ("each text comes with those of its tokens", "logprobs return_logprob"),
        ("score the prompt with SamplingParams(prompt_logprobs=...)", "prompt_logprobs"),
        ("texts come whole, at the end", "output_kind stream detokenize"),
        ("pass prefix_allowed_tokens_fn to LLM.beam_search", "logits_processors"),
        ("use allowed_token_ids", "guided_decoding constraints force_words_ids"),
        ("use stop_token_ids; the model's own end token always stops", "eos_token_id"),
    )
    for name in names.split()
}
"""Names that are no fields of `BeamSearchParams`, with what to write instead."""


def refuse(
    owner: str, given: Mapping[str, Any], table: Mapping[str, Refusal], known: Iterable[str]
) -> None:
    """Raises for arguments that `owner` does not apply, with the reason or the nearest name.

    Raises:
      ValueError: a name of the table, at a value that asks for something.
      TypeError: a name that nobody knows.
    """
    for name, value in given.items():
        refusal = table.get(name)
        if refusal is None:
            close = difflib.get_close_matches(name, [*known, *table], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{owner} has no argument {name}{hint}")
        if not refusal.allows(value):
            raise ValueError(f"{owner} does not take {name}: {refusal.reason}")

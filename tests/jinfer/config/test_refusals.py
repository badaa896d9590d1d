"""Every name of other engines' arguments is applied, or refused with a reason that says more."""

import dataclasses
import inspect
import re

import pytest

from jinfer import BeamSearchParams, SamplingParams
from jinfer.config import refusals
from jinfer.llm import LLM

LLM_NAMES = """model runner convert tokenizer tokenizer_mode skip_tokenizer_init trust_remote_code
allowed_local_media_path allowed_media_domains tensor_parallel_size dtype quantization
revision tokenizer_revision chat_template seed gpu_memory_utilization swap_space
cpu_offload_gb enforce_eager max_seq_len_to_capture disable_custom_all_reduce
disable_async_output_proc hf_token hf_overrides mm_processor_kwargs pooler_config
override_pooler_config structured_outputs_config kv_cache_memory_bytes
compilation_config attention_config quantization_config logits_processors spec_method
spec_model spec_tokens max_model_len max_num_seqs max_num_batched_tokens block_size
kv_cache_dtype enable_prefix_caching enable_chunked_prefill num_gpu_blocks_override
pipeline_parallel_size data_parallel_size speculative_config enable_lora max_loras
max_lora_rank max_logprobs logprobs_mode load_format scheduling_policy
generation_config override_generation_config disable_log_stats served_model_name
enable_sleep_mode task download_dir rope_scaling rope_theta model_impl device
distributed_executor_backend kv_transfer_config async_scheduling stream_interval
calculate_kv_scales num_scheduler_steps preemption_mode limit_mm_per_prompt
additional_config worker_cls long_prefill_token_threshold max_num_partial_prefills
profiler_config optimization_level model_path tokenizer_path context_length
mem_fraction_static max_running_requests tp_size dp_size chunked_prefill_size
max_prefill_tokens schedule_policy page_size random_seed attention_backend
disable_radix_cache disable_cuda_graph speculative_algorithm lora_paths
enable_hierarchical_cache enable_torch_compile max_batch_size max_seq_len
max_num_tokens max_beam_width kv_cache_config n_ctx n_gpu_layers torch_dtype
device_map"""
SAMPLING = """n best_of presence_penalty frequency_penalty repetition_penalty temperature top_p
top_k min_p seed stop stop_token_ids bad_words ignore_eos max_tokens min_tokens
logprobs prompt_logprobs prompt_logprob_token_ids prompt_logprob_start
logprob_token_ids flat_logprobs detokenize skip_special_tokens
spaces_between_special_tokens include_stop_str_in_output output_kind stream_interval
skip_clone structured_outputs guided_decoding logit_bias allowed_token_ids extra_args
skip_reading_prefix_cache thinking_token_budget repetition_detection
routed_experts_prompt_start trace_decode_token_ids logits_processors
truncate_prompt_tokens length_penalty early_stopping use_beam_search max_new_tokens
min_new_tokens json_schema regex ebnf structural_tag no_stop_trim custom_params
sampling_seed stop_regex return_logprob top_logprobs_num logprob_start_len
return_hidden_states beam_search_diversity_rate no_repeat_ngram_size top_p_decay
prompt_ignore_length dry_multiplier top_n_sigma typ_p xtc_probability mirostat
dynatemp_range n_probs cache_prompt t_max_predict_ms do_sample num_beams eos_token_id
response_format tools priority"""
BEAMS = """beam_width max_tokens ignore_eos temperature length_penalty include_stop_str_in_output
structured_outputs skip_special_tokens stop num_beams n best_of top_p top_k min_p seed
logprobs logit_bias bad_words min_tokens repetition_penalty diversity_penalty
num_beam_groups early_stopping num_return_sequences no_repeat_ngram_size
logits_processors max_new_tokens eos_token_id"""
CALLS = """prompts sampling_params use_tqdm lora_request priority tokenization_kwargs
mm_processor_kwargs prompt_token_ids prompt_adapter_request guided_options_request
messages chat_template chat_template_content_format add_generation_prompt
continue_final_message tools chat_template_kwargs params concurrency_limit max_tokens
temperature input_ids stream"""
REASON = r": [A-Za-z].{5,}$"


def not_answered(names: str, applied, table) -> list[str]:
    reasons = {n: r.reason if isinstance(r, refusals.Refusal) else r for n, r in table.items()}
    return [n for n in names.split() if n not in applied and len(reasons.get(n, "")) < 5]


def test_every_name_of_the_field_is_applied_or_has_a_reason():
    init = inspect.signature(LLM.__init__).parameters
    assert not_answered(LLM_NAMES, init, refusals.LLM_ARGUMENTS) == []
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    table = {**refusals.SAMPLING_FIELDS, **refusals.SAMPLING_NAMES}
    assert not_answered(SAMPLING, fields, table) == []
    assert not_answered(BEAMS, BeamSearchParams.__dataclass_fields__, refusals.BEAM_NAMES) == []
    methods = (LLM.generate, LLM.chat, LLM.beam_search)
    applied = {name for method in methods for name in inspect.signature(method).parameters}
    assert not_answered(CALLS, applied, refusals.CALL_ARGUMENTS) == []


def test_no_name_is_both_applied_and_refused():
    assert not inspect.signature(LLM.__init__).parameters.keys() & refusals.LLM_ARGUMENTS.keys()
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    refused = refusals.SAMPLING_FIELDS.keys() | refusals.SAMPLING_NAMES.keys()
    assert not fields & refused
    assert refusals.SAMPLING_FIELDS.keys() <= SamplingParams.__dataclass_fields__.keys()
    assert not refusals.SAMPLING_FIELDS.keys() & refusals.SAMPLING_NAMES.keys()
    assert not BeamSearchParams.__dataclass_fields__.keys() & refusals.BEAM_NAMES.keys()


@pytest.mark.parametrize("name", [n for n in LLM_NAMES.split() if n in refusals.LLM_ARGUMENTS])
def test_arguments_of_other_engines_are_refused_by_name_and_taken_at_their_defaults(name):
    refusal = refusals.LLM_ARGUMENTS[name]
    with pytest.raises(ValueError, match=f"^LLM does not take {name}{REASON}"):
        LLM("nowhere", **{name: object()})
    for value in (None, *refusal.neutral):
        with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
            LLM("./nowhere", **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("logprobs_mode", "processed_logits", "before temperature"),
        ("enable_sleep_mode", True, "comes free when the LLM is deleted"),
        ("swap_space", 4, "cpu_offload_gb"), ("tensor_parallel_size", 2, "one device"),
        ("tensor_parallel_size", True, "one device"), ("enforce_eager", 1, "compiled"),
        ("hf_overrides", {"a": 1}, "config.json"), ("n_ctx", 512, "use max_model_len"),
    ],
)  # fmt: skip
def test_a_reason_fits_its_name(name, value, reason):
    with pytest.raises(ValueError, match=f"^LLM does not take {name}: .*{reason}"):
        LLM("nowhere", **{name: value})


@pytest.mark.parametrize("name", refusals.BEAM_NAMES)
def test_beam_search_refuses_names_of_sampling_by_their_own(name):
    with pytest.raises(ValueError, match=f"^BeamSearchParams has no field '{name}'{REASON}"):
        BeamSearchParams(beam_width=2, max_tokens=3, **{name: 1})


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(
        TypeError, match="LLM has no argument max_model_length; did you mean max_mo"
    ):
        LLM("nowhere", max_model_length=3)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="'beam_widht'; did you mean beam_width"):
        BeamSearchParams(beam_widht=2)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="keywords only"):
        BeamSearchParams(2, 3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("method", ["generate", "chat", "beam_search", "stream"])
def test_arguments_of_other_engines_calls_are_refused_by_name(method):
    def call(**arguments):
        params = BeamSearchParams(beam_width=2, max_tokens=3) if method == "beam_search" else None
        found = getattr(LLM, method)(object(), "prompt", params, **arguments)
        return list(found) if method == "stream" else found

    for name in ("max_tokens", "lora_request", "prompt_token_ids", "tokenization_kwargs"):
        with pytest.raises(ValueError, match=rf"^LLM\.{method} does not take {name}{REASON}"):
            call(**{name: 5})
    with pytest.raises(TypeError, match=rf"^LLM\.{method} has no argument use_tqdmm"):
        call(use_tqdmm=1)
    with pytest.raises(AttributeError):  # it goes on to the engine, which is not there
        call(lora_request=None, tokenization_kwargs={})


def test_reasons_are_one_line_and_name_no_refused_way():
    tables = (refusals.LLM_ARGUMENTS, refusals.CALL_ARGUMENTS, refusals.SAMPLING_FIELDS)
    reasons = {r.reason for table in tables for r in table.values()}
    reasons |= {*refusals.SAMPLING_NAMES.values(), *refusals.BEAM_NAMES.values()}
    assert all("\n" not in r and r[-1] not in ".;:" and len(r) < 200 for r in reasons)
    init = inspect.signature(LLM.__init__).parameters
    fields = {f.name for f in dataclasses.fields(SamplingParams)}
    for name, refusal in refusals.LLM_ARGUMENTS.items():
        used = re.fullmatch(r"use (\w+)", refusal.reason)
        assert used is None or used[1] in init, name
    for name, reason in refusals.SAMPLING_NAMES.items():
        used = re.fullmatch(r"use (\w+)", reason)
        assert used is None or used[1] in fields, name

"""A stand-in for `LLM` with its interface and no model: it answers a prompt in upper case.

One token a character, one token a step for each of `max_num_seqs` running requests. Set
FAKE_LLM_STEP_S to make steps slow enough to be killed in.
"""

import os
import time
from types import SimpleNamespace

MAX_LEN = 500


class FakeTokenizer:
    """Characters as tokens; the chat template marks each turn."""

    def __init__(self, chat_template="fake"):
        self.chat_template = chat_template
        self.bos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [ord(char) for char in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize, **kwargs):
        assert not tokenize
        if self.chat_template is None:
            raise ValueError("no chat template")
        turns = [f"{message['role']}:{message['content']};" for message in messages]
        return "".join(turns) + ("assistant:" if add_generation_prompt else "")


class FakeLLM:
    """Runs requests the way the engine does: waiting, running, finished."""

    chat_template = "fake"

    def __init__(self, model, *, max_num_seqs=4, **kwargs):
        self.model, self.kwargs = model, kwargs
        self.config = SimpleNamespace(max_num_seqs=max_num_seqs)
        self.step_s = float(os.environ.get("FAKE_LLM_STEP_S", "0"))
        self.requests = {}
        self.most_requests = 0
        self.tokenizer = FakeTokenizer(self.chat_template)

    def get_tokenizer(self):
        return self.tokenizer

    def add_request(self, request_id, prompt, params):
        ids = (
            prompt["prompt_token_ids"]
            if isinstance(prompt, dict)
            else self.tokenizer.encode(prompt)
        )
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(ids) > MAX_LEN:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, more than max_model_len ({MAX_LEN})"
            )
        answer = self.tokenizer.decode(ids).upper()[: params.max_tokens]
        request = SimpleNamespace(
            request_id=request_id, ids=ids, answer=answer, num_out=0, n=params.n
        )
        self.requests[request_id] = request
        self.most_requests = max(self.most_requests, len(self.requests))

    def session(self):
        """The requests of this session are all that the engine has."""
        return SimpleNamespace(add=self.add_request, read=self.step, close=self.requests.clear)

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        time.sleep(self.step_s)
        outputs = []
        for request in list(self.requests.values())[: self.config.max_num_seqs]:
            request.num_out += 1
            outputs.append(self.make_output(request, 0))
            if outputs[-1].finished:
                del self.requests[request.request_id]
        return outputs

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        outputs = []
        for i, prompt in enumerate(prompts if isinstance(prompts, list) else [prompts]):
            self.add_request(str(i), prompt, sampling_params)
            while self.has_unfinished_requests():
                last = self.step()
            outputs += last
        return outputs

    def stream(self, prompt, sampling_params=None):
        self.add_request("stream", prompt, sampling_params)
        num_seen = 0
        while self.has_unfinished_requests():
            request = self.requests["stream"]
            self.step()
            yield self.make_output(request, num_seen)
            num_seen = request.num_out

    def make_output(self, request, start):
        text = request.answer[start : request.num_out]
        is_finished = request.num_out >= len(request.answer)
        completions = [
            SimpleNamespace(
                index=i,
                text=text,
                token_ids=[ord(char) for char in text],
                finish_reason="stop" if is_finished else None,
                stop_reason=None,
                error=None,
                logprobs=None,
                cumulative_logprob=None,
            )
            for i in range(request.n)
        ]
        return SimpleNamespace(
            request_id=request.request_id,
            prompt_token_ids=request.ids,
            prompt_logprobs=None,
            outputs=completions,
            finished=is_finished,
        )

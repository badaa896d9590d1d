"""Trains a policy on what it generates: python examples/rl_update_loop.py

REINFORCE on a tiny random model: the reward is the share of even token ids in a text. The engine
serves the trainer's own arrays. After each update, `update_weights` serves the new ones, and
nothing compiles again.
"""

import jax
import jax.numpy as jnp
import optax

from jinfer import LLM, Model, SamplingParams
from jinfer.config.model import ModelConfig

VOCAB, PROMPT, NEW = 32, [1, 2, 3], 8
config = ModelConfig(
    family="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
model = Model(config)
params = model.init(jax.random.key(0))
llm = LLM(model, params=params, skip_tokenizer_init=True, num_gpu_blocks_override=64)
optimizer = optax.adam(0.01)
state = optimizer.init(params)


@jax.jit
def update(params, state, tokens, advantages):
    """One step of REINFORCE: makes texts likelier in proportion to their advantage."""

    def loss(params):
        logp = jax.nn.log_softmax(model.logits(params, tokens[:, :-1]))
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[:, len(PROMPT) - 1 :, 0]
        return -(advantages[:, None] * logp).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


rewards = []
for step in range(10):
    sampling = [SamplingParams(max_tokens=NEW, seed=64 * step + i) for i in range(64)]
    prompts = [{"prompt_token_ids": PROMPT}] * len(sampling)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    texts = jnp.array([output.outputs[0].token_ids for output in outputs])  # [64, NEW]
    reward = (texts % 2 == 0).mean(axis=1, dtype=jnp.float32)
    rewards.append(float(reward.mean()))
    tokens = jnp.concatenate([jnp.tile(jnp.array([PROMPT]), (len(outputs), 1)), texts], axis=1)
    params, state = update(params, state, tokens, reward - reward.mean())
    llm.update_weights(params)
print("mean reward by step:", [round(reward, 2) for reward in rewards])
print("reward went up:", rewards[-1] > rewards[0])

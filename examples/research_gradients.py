"""Differentiates a loss through the model: python examples/research_gradients.py

`model.logits` is a pure function of a pytree of weights, so that jax.grad, jit and vmap work on it.
"""

import jax
import jax.numpy as jnp

import jinfer
from jinfer.checkpoints.tokenizer import load_tokenizer

model, params = jinfer.load("smollm2", dtype="float32")
tokenizer = load_tokenizer("smollm2")
tokens = jnp.array([tokenizer.encode("The capital of France is Paris.")])  # [B, T]


def loss(params, tokens):
    """Mean negative log likelihood of each token given those before it."""
    logp = jax.nn.log_softmax(model.logits(params, tokens[:, :-1]))  # [B, T - 1, V]
    return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()


before, gradients = jax.jit(jax.value_and_grad(loss))(params, tokens)
norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), gradients["layers"][0])
print("gradient norms of the first block:", norms)

# One step down the gradient makes the text more likely.
params = jax.tree.map(lambda w, g: w - 1e-4 * g, params, gradients)
after = loss(params, tokens)
print(f"loss {float(before):.3f} -> {float(after):.3f}, lower: {bool(after < before)}")

# Generation is a pure function as well, with differentiable log probabilities.
result = jinfer.generate(model, params, tokens, max_new_tokens=4)
print("continued:", tokenizer.decode(result.tokens[0]), result.logprobs)

"""Engines of a tiny model without a tokenizer, one for every way to draft."""

import dataclasses

import jax
from tiny_models import make_config

from jinfer.config.cache import CacheConfig
from jinfer.config.engine import EngineConfig
from jinfer.config.speculative import SpeculativeConfig
from jinfer.engine.device.drafter import Drafter
from jinfer.engine.device.runner import Runner
from jinfer.engine.engine import Engine
from jinfer.linear.placement import Placement
from jinfer.models.model import Model
from jinfer.speculation import medusa

VOCAB = 70
CONFIG = make_config(VOCAB)
MODEL = Model(CONFIG)
LAYERS = 1  # of the draft model: the target's first
CHAIN = {"num_speculative_tokens": 2, "adaptive": False}
SPECULATION = {
    "ngram": CHAIN,
    "self": CHAIN,
    "draft": {**CHAIN, "model": MODEL},
    "medusa": {"heads": "given", "tree": ((0,), (1,), (0, 0)), "adaptive": False},
    "lookahead": {"window": 2, "ngram_size": 3, "num_guesses": 2, "adaptive": False},
}


def make_params(seed=3):
    return MODEL.init(jax.random.key(seed))


def make_engine(params, method=None, *, num_pages=40, fields=None, **limits) -> Engine:
    """Returns an engine that drafts by `method`, or not; `fields` change its speculation."""
    placement = Placement.of(params)
    params = placement.place(params)
    speculation = heads = drafter = None
    if method is not None:
        speculation = SpeculativeConfig.of(
            {"method": method, **SPECULATION[method], **(fields or {})}
        )
    if method == "self":
        drafter = Drafter(MODEL, params, follow=lambda params: params)
    elif method == "draft":
        model = Model(
            dataclasses.replace(CONFIG, num_layers=LAYERS, layer_types=CONFIG.layer_types[:LAYERS])
        )
        drafter = Drafter(model, {**params, "layers": params["layers"][:LAYERS]})
    elif method == "medusa":
        shape = medusa.MedusaConfig(
            num_heads=2,
            hidden_size=CONFIG.hidden_size,
            vocab_size=VOCAB,
            shared_unembedding=True,
        )
        heads = placement.bind(medusa.init(shape, MODEL, params))
    limits = {"max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 16} | limits
    config = EngineConfig(block_size=8, speculation=speculation, **limits)
    cache = CacheConfig(num_pages=num_pages, page_size=8, dtype="float32")
    runner = Runner(MODEL, params, cache, config, heads, drafter)
    return Engine(runner, config, None, ())


def add(engine, request_id, prompt, params, **options):
    """Queues a request and returns it."""
    request = engine.make_request(request_id, prompt, params, **options)
    engine.queue(request)
    return request


def run(engine):
    """Steps until nothing is left."""
    while engine.has_work():
        engine.step()

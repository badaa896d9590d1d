"""Quantizes one block: statistics, folds and solvers, in the order of the forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jinfer.config.fields import require
from jinfer.linear.placement import widen_on_cpu
from jinfer.linear.qtensor import QTensor
from jinfer.linear.weight import is_weight
from jinfer.models.model import Model
from jinfer.quant import calibrate
from jinfer.quant.calibrate import InputStats
from jinfer.quant.methods.awq import search_scales
from jinfer.quant.methods.folding import (
    divide_norm,
    divide_outputs,
    head_ties,
    producer_scales,
    scale_inputs,
)
from jinfer.quant.methods.smoothquant import smooth_scales
from jinfer.quant.recipe import Method, Recipe
from jinfer.quant.solve import Row, merge_rows, solve_group, stack

Layer: TypeAlias = dict[str, Any]

FOLD_TOKENS = 128  # tokens that folds are checked on
GRAM_TOKENS = 8192  # approximate tokens of a Gram matrix that GPTQ does not use

Group: TypeAlias = tuple[str, tuple[str, ...]]
Stats: TypeAlias = InputStats | list[InputStats]  # a list: one for each expert

# Linears that read one input, in the order of the forward pass.
QKV: Group = ("attn", ("q", "k", "v"))
OUT: Group = ("attn", ("o",))
GATES: Group = ("mlp", ("gate", "up"))
DOWN: Group = ("mlp", ("down",))
GROUPS = (QKV, OUT, GATES, DOWN)


def to_float32(layer: Mapping[str, Any]) -> Layer:
    """Returns new dicts with f32 arrays, since scales are computed and folded in f32."""
    return {
        k: to_float32(v) if isinstance(v, Mapping) else v.astype(jnp.float32)
        for k, v in layer.items()
    }


def to_dtype_of(layer: Mapping[str, Any], like: Mapping[str, Any]) -> Layer:
    """Returns `layer` with its float arrays in the dtypes of `like`."""

    def cast(new: Any, old: Any) -> Any:
        if isinstance(new, Mapping):
            return to_dtype_of(new, old)
        return new if is_weight(new) else new.astype(old.dtype)

    return {k: cast(v, like[k]) for k, v in layer.items()}


@dataclasses.dataclass
class LayerQuantizer:
    """Quantizes the block of one layer; see `pipeline.quantize_model`.

    `reference` are the block's inputs in the float model, for methods that correct; `run` replaces
    them with its outputs there.
    """

    model: Model
    index: int
    recipe: Recipe
    is_sequential: bool = True
    reference: Array | None = None

    def __post_init__(self) -> None:
        self.kind = self.model.config.kind_of(self.index)
        self.is_moe = self.model.config.is_moe_layer(self.index)
        self.rows: list[Row] = []
        self.folded: dict[Group, Array] = {}
        self.found: dict[tuple[str, str], QTensor] = {}

    def run(
        self, layer: Mapping[str, Any], x: Array | None, *, needs_output: bool = True
    ) -> tuple[Layer, Array | None, list[Row]]:
        """Returns the quantized block, its outputs on calibration inputs `x`, and its rows."""
        p = to_float32(layer)
        self.original = to_float32(layer)
        out = self._run(p, x, needs_output)
        if self.folded:
            assert x is not None
            error = self._fold_error(x)
            self.rows = [dataclasses.replace(row, fold_error=error) for row in self.rows]
        for (block, part), w in self.found.items():
            p[block][part] = {**p[block][part], "w": w}
        return to_dtype_of(p, layer), out, self.rows

    def _run(self, p: Layer, x: Array | None, needs_output: bool) -> Array | None:
        """Finds the QTensors of `p`, and replaces its weights by what they multiply as."""
        if x is None:
            for group in GROUPS:
                self._solve(p, group, None, None)
            return None
        if not self.is_sequential:
            stats, out = self.float_statistics(p, x, needs_output)
            folded = self._fold(p, stats, ("awq", "smoothquant"))
            for group in GROUPS:
                self._solve(p, group, folded[group], stats[group])
            return out

        before: dict[Group, Stats] = {}
        after: dict[Group, Stats] = {}
        if any(self._fold_of(group) == "awq" for group in GROUPS):
            before, _ = self.float_statistics(p, x, False)
            after = self._fold(p, before, ("awq",))
            # Only what was folded keeps its statistics: the rest meets quantized neighbours.
            before = {g: s for g, s in before.items() if self._fold_of(g) == "awq"}

        references = self._references()

        def stage(group: Group, inputs: Array) -> None:
            reference = next(references)
            if group not in before:
                before[group] = self._measure(p, group, inputs, reference)
                after.update(self._fold(p, {group: before[group]}, ("smoothquant",)))
            self._solve(p, group, after[group], before[group])

        model, kind = self.model, self.kind
        stage(QKV, calibrate.attention_inputs(model, kind, p, x))
        mixed = calibrate.mix_values(model, kind, p, x)
        stage(OUT, mixed)
        residual, h = calibrate.mlp_inputs(model, kind, p, x, mixed)
        norm = p["mlp_norm"]["scale"]
        stage(GATES, h)
        if p["mlp_norm"]["scale"] is not norm:  # smoothed just now
            residual, h = calibrate.mlp_inputs(model, kind, p, x, mixed)
        hidden = None if self.is_moe else calibrate.hidden_inputs(model, kind, p, h)
        stage(DOWN, h if hidden is None else hidden)
        if not needs_output:
            return None
        return calibrate.block_outputs(model, kind, p, residual, h, hidden)

    def _references(self) -> Iterator[Array | None]:
        """Yields each group's inputs in the float model.

        Before the last one, `reference` becomes the block's outputs.
        """
        x, p, model, kind = self.reference, self.original, self.model, self.kind
        if x is None:
            yield from [None] * len(GROUPS)
            return
        yield calibrate.attention_inputs(model, kind, p, x)
        mixed = calibrate.mix_values(model, kind, p, x)
        yield mixed
        residual, h = calibrate.mlp_inputs(model, kind, p, x, mixed)
        yield h
        hidden = None if self.is_moe else calibrate.hidden_inputs(model, kind, p, h)
        self.reference = calibrate.block_outputs(model, kind, p, residual, h, hidden)
        yield h if hidden is None else hidden

    def fold(self, layer: Mapping[str, Any], x: Array) -> tuple[Layer, Array]:
        """Returns the block with scales folded but nothing quantized, and the float outputs."""
        p = to_float32(layer)
        stats, out = self.float_statistics(p, x, True)
        assert out is not None
        self._fold(p, stats, ("awq", "smoothquant"))
        return to_dtype_of(p, layer), out

    def forward(self, p: Mapping[str, Any], x: Array) -> Array:
        """Returns the outputs of a block as it is."""
        model, kind, p = self.model, self.kind, as_served(p)
        mixed = calibrate.mix_values(model, kind, p, x)
        residual, h = calibrate.mlp_inputs(model, kind, p, x, mixed)
        hidden = None if self.is_moe else calibrate.hidden_inputs(model, kind, p, h)
        return calibrate.block_outputs(model, kind, p, residual, h, hidden)

    # ---- statistics

    def float_statistics(
        self, p: Layer, x: Array, needs_output: bool
    ) -> tuple[dict[Group, Stats], Array | None]:
        model, kind = self.model, self.kind
        stats = {QKV: self._measure(p, QKV, calibrate.attention_inputs(model, kind, p, x))}
        mixed = calibrate.mix_values(model, kind, p, x)
        stats[OUT] = self._measure(p, OUT, mixed)
        residual, h = calibrate.mlp_inputs(model, kind, p, x, mixed)
        stats[GATES] = self._measure(p, GATES, h)
        hidden = None if self.is_moe else calibrate.hidden_inputs(model, kind, p, h)
        stats[DOWN] = self._measure(p, DOWN, h if hidden is None else hidden)
        if not needs_output:
            return stats, None
        return stats, calibrate.block_outputs(model, kind, p, residual, h, hidden)

    def _measure(
        self, p: Layer, group: Group, inputs: Array, reference: Array | None = None
    ) -> Stats:
        """Returns statistics of a group's inputs; for experts' `down` from the MLP's inputs."""
        if group == DOWN and self.is_moe:
            gate, up = (p["mlp"][part]["w"] for part in GATES[1])
            out = []
            for e in range(self.model.config.num_experts):
                one_gate, one_up = jax.tree.map(lambda a, e=e: a[e], (gate, up))
                hidden = calibrate.expert_hidden(self.model, one_gate, one_up, inputs)
                float_hidden = None
                if reference is not None:
                    floats = (self.original["mlp"][part]["w"][e] for part in GATES[1])
                    float_hidden = calibrate.expert_hidden(self.model, *floats, reference)
                out.append(self._measure_one(group, hidden, float_hidden))
            return out
        return self._measure_one(group, inputs, reference)

    def _measure_one(self, group: Group, inputs: Array, reference: Array | None) -> InputStats:
        solves = any((m := self._method(group, part)) and m.solver == "gptq" for part in group[1])
        num_tokens = inputs.size // inputs.shape[-1]
        stride = 1 if solves else max(1, num_tokens // GRAM_TOKENS)
        stats = calibrate.measure(inputs, stride)
        require(
            # A sum, since the largest of a NaN and a number may be the number on CPUs.
            bool(jnp.all(jnp.isfinite(stats.abs_sum))),
            f"inputs of layers.{self.index}.{group[0]}.{group[1][0]} hold NaN or infinity: "
            f"the model's activations overflow on the calibration text",
        )
        if any((m := self._method(group, part)) and m.correct for part in group[1]):
            assert reference is not None
            stats = dataclasses.replace(stats, drift=calibrate.measure_drift(inputs, reference))
        return stats

    # ---- folds

    def _method(self, group: Group, part: str) -> Method | None:
        return self.recipe.of(f"layers.{self.index}.{group[0]}.{part}")

    def _fold_of(self, group: Group) -> str:
        """Returns the common fold of a group's members; "none" if they differ."""
        methods = {self._method(group, part) for part in group[1]}
        method = methods.pop()
        return method.fold if method is not None and not methods else "none"

    def _fold(
        self, p: Layer, stats: Mapping[Group, Stats], folds: tuple[str, ...]
    ) -> dict[Group, Stats]:
        """Folds scales into `p`, and returns the statistics of the scaled inputs."""
        after = dict(stats)
        for group, measured in stats.items():
            fold = self._fold_of(group)
            if fold not in folds or (fold == "smoothquant" and group in (OUT, DOWN)):
                continue
            if isinstance(measured, list):
                s = self._expert_scales(p, measured)
                after[group] = [one.divided(s[e]) for e, one in enumerate(measured)]
            else:
                s = self._scales(p, group, measured, fold)
                after[group] = measured.divided(s)
            self._apply(p, group, s)
            self.folded[group] = s
        return after

    def _scales(self, p: Layer, group: Group, stats: InputStats, fold: str) -> Array:
        method = self._method(group, group[1][0])
        assert method is not None
        w = jnp.concatenate([_flat(p[group[0]][part]["w"]) for part in group[1]], axis=1)
        if fold == "smoothquant":
            if group == GATES and self.is_moe:
                w = jnp.concatenate([w, p["mlp"]["router"]["w"]], axis=1)
            return smooth_scales(stats.abs_max, w, alpha=method.alpha)
        ties = self._ties() if group == OUT else None
        return search_scales(w, stats.gram, stats.mean_abs, method.format, ties=ties)[0]

    def _ties(self) -> Array:
        config = self.model.config
        return head_ties(config.num_heads, config.num_kv_heads, config.head_dim)

    def _apply(self, p: Layer, group: Group, s: Array) -> None:
        """Divides the producer of a group's inputs by `s`, multiplies the group's weights."""
        block, parts = group
        readers = [*parts, *(["router"] if group == GATES and self.is_moe else [])]
        for part in readers:
            p[block][part]["w"] = scale_inputs(p[block][part]["w"], s)
        if group in (QKV, GATES):
            norm = p[f"{block}_norm"]
            norm["scale"] = divide_norm(norm["scale"], s, plus_one=self.model.config.norm_plus_one)
            return
        if group == OUT:
            producer = p["attn"]["v"]
            s = producer_scales(s, self._ties(), producer["w"].shape[-1])
        else:
            producer = p["mlp"]["up"]
        w, b = divide_outputs(producer["w"], producer.get("b"), s)
        producer.update({"w": w} if b is None else {"w": w, "b": b})

    def _expert_scales(self, p: Layer, stats: list[InputStats]) -> Array:
        """[E, I] for the experts' down."""
        method = self._method(DOWN, "down")
        assert method is not None
        return jnp.stack(
            [
                search_scales(w, one.gram, one.mean_abs, method.format)[0]
                for w, one in zip(p["mlp"]["down"]["w"], stats)
            ]
        )

    def _fold_error(self, x: Array) -> float:
        """Returns how much all folds, without quantization, change the block's float outputs: the
        largest difference over the block's largest change of x, on the first calibration tokens."""
        x = x[:1, :1, :FOLD_TOKENS]
        p = to_float32(self.original)
        for group, s in self.folded.items():
            self._apply(p, group, s)
        before, after = (self.forward(layer, x) - x for layer in (self.original, p))
        return float(jnp.max(jnp.abs(after - before)) / jnp.max(jnp.abs(before)))

    # ---- solvers

    def _solve(self, p: Layer, group: Group, after: Stats | None, before: Stats | None) -> None:
        """Quantizes a group's weights in place, those with one method together."""
        block, parts = group
        by_method: dict[Method, list[str]] = {}
        for part in parts:
            method = self._method(group, part)
            if method is not None:
                by_method.setdefault(method, []).append(part)
        for method, members in by_method.items():
            names = {part: f"layers.{self.index}.{block}.{part}" for part in members}
            weights = {names[part]: p[block][part]["w"] for part in members}
            originals = {names[part]: self.original[block][part]["w"] for part in members}
            if isinstance(after, list):
                found, rows = self._solve_experts(weights, originals, after, before, method)
            else:
                assert not isinstance(before, list)
                found, rows = solve_group(
                    weights, after, method, originals=originals, original_stats=before
                )
            for part in members:
                w = self.found[block, part] = found[names[part]]
                if after is not None and self.is_sequential:  # later stages meet it
                    p[block][part] = {**p[block][part], "w": as_served(w)}
            if method.fold != "none" and self._fold_of(group) == "none":
                note = f"{', '.join(parts)} read one input but differ in method: nothing folded"
                rows = [dataclasses.replace(row, notes=(*row.notes, note)) for row in rows]
            self.rows += rows

    def _solve_experts(
        self,
        weights: Mapping[str, Array],
        originals: Mapping[str, Array],
        after: list[InputStats],
        before: Stats | None,
        method: Method,
    ) -> tuple[dict[str, Any], list[Row]]:
        ((name, w),) = weights.items()
        assert isinstance(before, list)
        results = [
            solve_group(
                {name: w[e]},
                after[e],
                method,
                originals={name: originals[name][e]},
                original_stats=before[e],
            )
            for e in range(w.shape[0])
        ]
        found = stack([weights[name] for weights, _ in results])
        return {name: found}, [merge_rows([rows[0] for _, rows in results], found)]


def _flat(w: Array) -> Array:
    """Returns [I, O]; of experts [E, I, O] all side by side, [I, E * O]."""
    return w if w.ndim == 2 else jnp.moveaxis(w, 0, 1).reshape(w.shape[1], -1)


# On CPUs that is dense, so that a stage is compiled once for float and quantized blocks.
as_served = jax.jit(widen_on_cpu)

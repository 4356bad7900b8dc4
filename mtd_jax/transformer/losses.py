"""Losses over a large vocabulary, a few rows of logits at a time.

Logits of a whole batch in float32 are the largest array of a training step by far (a row of Qwen3
has 152 thousand of them). Here they exist for one chunk of positions at a time, and the gradient is
taken in the same pass: a chunk's logits are made once, turned into their loss and its gradients,
and forgotten (the idea of Liger's fused linear cross-entropy, arXiv 2410.10989). Gradients of the
weights are added up in float32.

On a mesh each device walks over the chunks of its own rows: the weights are gathered once before
and their gradient is scattered once behind. Left to the compiler, every chunk would do both.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from mtd_jax.config import ModelConfig
from mtd_jax.sharding import Shares, shares_of_batch
from mtd_jax.transformer.model import Parameters, declare, project, unembed
from mtd_jax.transformer.packed import delayed
from mtd_jax.typing import Array, Bool, Float, Int

Totals: TypeAlias = dict[str, Float[Array, ""]]
"""Sums over rows, by name; what has a "loss" is differentiated by it."""
ChunkLoss: TypeAlias = Callable[[Any, Any, Any], Totals]
"""(weights, rows [B, C, ...], data [B, C, ...]) -> sums over the chunk."""


def summed_over_chunks(
    loss: ChunkLoss,
    weights: Any,
    rows: Any,
    data: Any,
    chunk: int,
    axes: tuple[tuple[str | None, ...], ...] = (),
) -> Totals:
    """`loss(weights, rows, data)` without ever holding more than a chunk of what it computes.

    Differentiable in the floating leaves of `weights` and `rows` through the entry "loss" alone.

    Args:
      loss: sums over positions, so that chunks add up.
      weights: what every chunk needs.
      rows: arrays [B, T, ...] that gradients flow into.
      data: arrays [B, T, ...] that they do not; False and 0 must mean "does not count", because the
        last chunk is filled up with them.
      chunk: positions of T at a time.
      axes: logical axes of the leaves of `weights`, in their order; without them each is taken as
        whole on every device.
    """
    length = jax.tree.leaves(rows)[0].shape[1]
    chunk = min(chunk, length)
    return _summed(loss, chunk, axes, weights, rows, data)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _summed(loss: ChunkLoss, chunk: int, axes: Any, weights: Any, rows: Any, data: Any) -> Totals:
    shares = _shares(axes, weights, rows)

    def local(weights: Any, rows: Any, data: Any) -> Totals:
        weights = shares.gathered(weights)

        def add(totals: Totals, part: tuple[Any, Any]) -> tuple[Totals, None]:
            return _added(totals, loss(weights, *part)), None

        parts = _chunks(rows, chunk), _chunks(data, chunk)
        return shares.summed(lax.scan(add, _zeros(loss, weights, parts), parts)[0])

    return shares.mapped(local, (weights, rows, data), ("whole",))


def _forward(
    loss: ChunkLoss, chunk: int, axes: Any, weights: Any, rows: Any, data: Any
) -> tuple[Totals, tuple[Any, Any, Any, Any]]:
    # Each leaf comes with the word whether anybody wants its gradient: a frozen head is then not
    # multiplied with. (Without `symbolic_zeros` both products would be made and one thrown away.)
    wants_weights = any(leaf.perturbed for leaf in _leaves(weights))
    wants_rows = any(leaf.perturbed for leaf in _leaves(rows))
    weights, rows, data = (_values(tree) for tree in (weights, rows, data))
    length = jax.tree.leaves(rows)[0].shape[1]
    shares = _shares(axes, weights, rows)

    def scalar(weights: Any, rows: Any, data: Any) -> tuple[Float[Array, ""], Totals]:
        totals = loss(weights, rows, data)
        return totals["loss"], totals

    wanted = (*([0] if wants_weights else []), *([1] if wants_rows else []))

    def local(weights: Any, rows: Any, data: Any) -> tuple[Totals, Any, Any]:
        weights = shares.gathered(weights)

        def add(carry: tuple[Totals, Any], part: tuple[Any, Any]) -> tuple[Any, Any]:
            totals, sums = carry
            if not wanted:
                return (_added(totals, loss(weights, *part)), sums), None
            grads, new = jax.grad(scalar, argnums=wanted, has_aux=True)(weights, *part)
            if wants_weights:
                sums = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), sums, grads[0])
            return (_added(totals, new), sums), grads[-1] if wants_rows else None

        parts = _chunks(rows, chunk), _chunks(data, chunk)
        nothing = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
        start = (_zeros(loss, weights, parts), nothing if wants_weights else None)
        (totals, by_weights), by_rows = lax.scan(add, start, parts)
        by_rows = jax.tree.map(lambda g: _joined(g, length), by_rows)
        return shares.summed(totals), shares.scattered(by_weights), by_rows

    results = ("whole", "weights" if wants_weights else "whole", "rows")
    totals, by_weights, by_rows = shares.mapped(local, (weights, rows, data), results)
    if wants_weights:
        by_weights = jax.tree.map(lambda g, w: g.astype(w.dtype), by_weights, weights)
    else:
        by_weights = jax.tree.map(jnp.zeros_like, weights)
    if not wants_rows:
        by_rows = jax.tree.map(jnp.zeros_like, rows)
    return totals, (by_weights, by_rows, data, None)


def _backward(
    loss: ChunkLoss, chunk: int, axes: Any, kept: tuple[Any, Any, Any, Any], tangents: Any
) -> tuple[Any, Any, Any]:
    del loss, chunk, axes
    by_weights, by_rows, data, _ = kept
    scale = tangents["loss"]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.zeros((), jnp.float32)
    scaled = jax.tree.map(
        lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), (by_weights, by_rows)
    )
    return (*scaled, jax.tree.map(_no_gradient, data))


_summed.defvjp(_forward, _backward, symbolic_zeros=True)


def mapped_over_chunks(function: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """`function(rows)` for arrays [B, T, ...], made and joined `chunk` positions of T at a time.

    For measurements: a gradient would store what every chunk computed.
    """
    length = jax.tree.leaves(rows)[0].shape[1]
    found = lax.map(function, _chunks(rows, min(chunk, length)))
    return jax.tree.map(lambda x: _joined(x, length), found)


def cross_entropy(
    params: Parameters,
    x: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counts: Bool[Array, "B T"],
    *,
    chunk: int,
    kinds: Int[Array, "B T"] | None = None,
    names: tuple[str, ...] = (),
    normed: bool = False,
) -> Totals:
    """Sums of -log p(target) ("loss") and of right guesses ("right") over the rows that count.

    Args:
      params: final norm and output head are used.
      x: what the last layer puts out.
      chunk: positions whose logits exist at a time.
      kinds: kind of each row; the losses of kind i are also summed alone, as "loss_{names[i]}".
      normed: `x` is behind the final norm already.
    """
    config = params.config
    logits_of = project if normed else unembed
    kinds = jnp.zeros_like(targets) if kinds is None else kinds

    def loss(weights: Any, x: Array, data: tuple[Array, Array, Array]) -> Totals:
        targets, counts, kinds = data
        logits = logits_of(only_output(config, weights), x)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        right = (jnp.argmax(logits, axis=-1) == targets) & counts
        losses = jnp.where(counts, log_z - own, 0.0)
        alone = {f"loss_{n}": jnp.where(kinds == i, losses, 0.0).sum() for i, n in enumerate(names)}
        return {"loss": losses.sum(), "right": right.astype(jnp.float32).sum(), **alone}

    axes = output_axes(config)
    data = (targets, counts, kinds)
    return summed_over_chunks(loss, output_weights(params), x, data, chunk, axes)


def divergences(
    base: Parameters,
    teacher: Float[Array, "B T D"],
    students: Float[Array, "B T k D"],
    shares: Float[Array, "B T k"],
    *,
    chunk: int,
    readers: Sequence[Parameters] = (),
) -> tuple[Float[Array, ""], Float[Array, " k"]]:
    """Sum of shares * KL(teacher || student), and how many of each head's best guesses are right.

    Student i of position n guesses what the teacher says at n + i + 1. Its logits there are made
    once for the k students. All rows are behind the final norm. No gradient flows into `teacher`
    or, through it, into `base`.

    Args:
      base: whose output head reads the teacher.
      shares: what each student counts for; 0 for those that do not, among them all whose teacher
        would lie behind the end.
      chunk: positions of the logits of a teacher and one student, which is what exists at a time.
      readers: whose output heads read the students, where it is not `base` for all.
    """
    count = students.shape[2]
    read = (base, *readers)
    students, shares = (
        jnp.stack([delayed(x[:, :, i], i + 1) for i in range(count)], axis=2)
        for x in (students, shares)
    )

    def loss(weights: Any, students: Array, data: tuple[Array, Array]) -> Totals:
        teacher, shares = data
        heads = [only_output(p.config, w) for p, w in zip(read, weights, strict=True)]
        wanted = project(lax.stop_gradient(heads[0]), teacher)
        log_p = jax.nn.log_softmax(wanted)
        p, best = jnp.exp(log_p), jnp.argmax(log_p, axis=-1)
        totals = {"loss": jnp.float32(0)}
        for i in range(count):
            logits = project(heads[1 + i] if readers else heads[0], students[:, :, i])
            log_q = jax.nn.log_softmax(logits)
            kl = (p * (log_p - log_q)).sum(axis=-1)
            totals["loss"] += jnp.where(shares[..., i] > 0, shares[..., i] * kl, 0.0).sum()
            right = (jnp.argmax(log_q, axis=-1) == best) & (shares[..., i] > 0)
            totals[f"right_{i}"] = right.astype(jnp.float32).sum()
        return totals

    weights = tuple(output_weights(each) for each in read)
    axes = tuple(itertools.chain.from_iterable(output_axes(each.config) for each in read))
    chunk = max(1, 2 * chunk // (1 + count))
    totals = summed_over_chunks(loss, weights, students, (teacher, shares), chunk, axes)
    return totals["loss"], jnp.stack([totals[f"right_{i}"] for i in range(count)])


def output_weights(params: Parameters) -> Any:
    """What `unembed` reads of the parameters."""
    tied = params.config.tie_embeddings
    return params.final_norm, params.embedding if tied else params.head


def output_axes(config: ModelConfig) -> tuple[tuple[str | None, ...], ...]:
    """Logical axes of `output_weights`, as `summed_over_chunks` wants them."""
    return tuple(weight.axes for weight in output_weights(declare(config)))


def only_output(config: ModelConfig, weights: Any) -> Parameters:
    """Parameters that `unembed` can read, made of `output_weights`."""
    norm, matrix = weights
    embedding, head = (matrix, None) if config.tie_embeddings else (None, matrix)
    return Parameters(embedding=embedding, blocks=(), final_norm=norm, head=head, config=config)


def _shares(axes: Any, weights: Any, rows: Any) -> Shares:
    leaves = jax.tree.leaves(weights)
    shapes = [x.shape for x in leaves]
    return shares_of_batch(
        axes or [(None,) * len(shape) for shape in shapes],
        shapes,
        jax.tree.leaves(rows)[0].shape[0],
    )


def _chunks(tree: Any, chunk: int) -> Any:
    """[B, T, ...] -> [parts, B, chunk, ...], filled up with zeros."""

    def split(x: Array) -> Array:
        batch, length = x.shape[:2]
        parts = -(-length // chunk)
        padded = jnp.pad(x, [(0, 0), (0, parts * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, parts, chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _joined(x: Array, length: int) -> Array:
    """The inverse of `_chunks` for one array."""
    joined = jnp.moveaxis(x, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _zeros(loss: ChunkLoss, weights: Any, parts: Any) -> Totals:
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(loss, weights, *first)
    return {name: jnp.zeros(x.shape, jnp.float32) for name, x in shapes.items()}


def _added(totals: Totals, new: Totals) -> Totals:
    return {name: totals[name] + new[name] for name in totals}


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_primal)


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)


def _no_gradient(x: Array) -> Any:
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return jax.numpy.zeros(x.shape, jax.dtypes.float0)

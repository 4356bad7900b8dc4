"""The joint distribution of the next n tokens as a mixture of r products (arXiv 2410.17765).

    P(x_1 .. x_n) = sum_a w_a prod_s P_a^(s)(x_s)          a: expert, s: step (the paper's t + s)

a canonical (CP) decomposition of rank r of the table of V^n probabilities. Given x_1 .. x_s, the
experts are weighted anew by how well they foresaw them, so a step's distribution depends on the
tokens before it, which that of independent heads (r = 1) does not:

    pi_a^(s+1) = w_a prod_{u<=s} P_a^(u)(x_u) / normaliser
    q(x_{s+1} | x_1 .. x_s) = sum_a pi_a^(s+1) P_a^(s+1)(x_{s+1})

Everything is in log space and float32: products of n small probabilities are not representable.
`log_w` is normalised over experts, and tables over their vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtd_jax.typing import Array, Bool, Float, Int, UInt32


def joint(
    log_w: Float[Array, "*rows r"], found: Float[Array, "*rows r n"]
) -> Float[Array, "*rows"]:
    """log P(x_1 .. x_n), of `found[a, s]` = log P_a^(s)(x_s).

    Steps that are left out (or 0 in `found`) are summed over: each of their factors sums to one.
    """
    return jax.nn.logsumexp(log_w + found.sum(axis=-1), axis=-1)


def posteriors(
    log_w: Float[Array, "*rows r"], found: Float[Array, "*rows r n"]
) -> Float[Array, "*rows r steps"]:
    """log pi^(1) .. log pi^(n+1): the experts before each step, and behind the last one."""
    before = jnp.pad(jnp.cumsum(found, axis=-1), [(0, 0)] * (found.ndim - 1) + [(1, 0)])
    return jax.nn.log_softmax(log_w[..., None] + before, axis=-2)


def conditionals(
    log_w: Float[Array, "*rows r"], found: Float[Array, "*rows r n"]
) -> Float[Array, "*rows n"]:
    """log q(x_s | x_1 .. x_{s-1}) of every step; their sum is `joint`."""
    return jax.nn.logsumexp(posteriors(log_w, found)[..., :-1] + found, axis=-2)


def mixed(
    log_pi: Float[Array, "*rows r"], log_p: Float[Array, "*rows r V"]
) -> Float[Array, "*rows V"]:
    """log q of a whole step: its experts' tables, weighted by log pi.

    With pi = w and the tables of step 1 this is the marginal of the first token (eq. 11).
    """
    return jax.nn.logsumexp(log_pi[..., None] + log_p, axis=-2)


def seen(
    log_pi: Float[Array, "*rows r"], log_p: Float[Array, "*rows r V"], tokens: Int[Array, "*rows"]
) -> Float[Array, "*rows r"]:
    """log pi of the next step, once this step's token is known."""
    found = jnp.take_along_axis(log_p, tokens[..., None, None], axis=-1)[..., 0]
    return jax.nn.log_softmax(log_pi + found, axis=-1)


def draw(
    log_w: Float[Array, "B r"], log_p: Float[Array, "B r n V"], keys: UInt32[Array, "B n 2"]
) -> Int[Array, "B n"]:
    """x_1 .. x_n drawn one after the other, exactly from the joint (ancestral sampling).

    Args:
      keys: data of a key for each token.
    """
    log_pi, tokens = log_w, []
    for step in range(log_p.shape[2]):
        log_q = mixed(log_pi, log_p[:, :, step])
        typed = jax.random.wrap_key_data(keys[:, step], impl="threefry2x32")
        token = jax.vmap(jax.random.categorical)(typed, log_q).astype(jnp.int32)
        log_pi = seen(log_pi, log_p[:, :, step], token)
        tokens.append(token)
    return jnp.stack(tokens, axis=1)


def balance(log_w: Float[Array, "*rows r"], counts: Bool[Array, "*rows"]) -> Float[Array, ""]:
    """r sum_a f_a mean(w_a) over the rows that count: 1 where experts are used evenly, r at worst.

    f_a is the share of rows whose greatest weight is a's; no gradient flows through it, so the
    weights of experts that win often are pushed down (Switch Transformers, arXiv 2101.03961, eq.
    4). 0 where no row counts.
    """
    experts = log_w.shape[-1]
    number = jnp.maximum(counts.sum(dtype=jnp.float32), 1.0)
    wins = jax.nn.one_hot(jnp.argmax(log_w, axis=-1), experts, dtype=jnp.float32)
    share = jnp.where(counts[..., None], wins, 0.0).reshape(-1, experts).sum(axis=0) / number
    weight = jnp.where(counts[..., None], jnp.exp(log_w), 0.0).reshape(-1, experts).sum(axis=0)
    return experts * jnp.sum(jax.lax.stop_gradient(share) * weight / number)


def entropy(usage: Float[Array, " r"]) -> Float[Array, ""]:
    """Nats of how the experts share the work: log r if evenly, 0 if one does all of it."""
    share = usage / jnp.maximum(usage.sum(), jnp.finfo(jnp.float32).tiny)
    return -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))

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

from mtd_jax.transformer.linear import precision_of
from mtd_jax.typing import Array, Bool, Float, Int


def told(
    log_pi: Float[Array, "*rows r"], log_p: Float[Array, "*rows r"]
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows r"]]:
    """log q of one step's token, and log pi of the next step, of `found` for that token.

    Begun with log w, the log q of all steps add up to log P(x_1 .. x_n). A step that is left out
    (zeros) is summed over: its factor sums to one.
    """
    both = log_pi + log_p
    log_q = jax.nn.logsumexp(both, axis=-1)
    return log_q, both - log_q[..., None]


def mixed(
    log_pi: Float[Array, "*rows r"], log_p: Float[Array, "*rows r V"]
) -> Float[Array, "*rows V"]:
    """log q of a whole step: its experts' tables, weighted by log pi.

    With pi = w and the tables of step 1 this is the marginal of the first token (eq. 11).
    """
    return jax.nn.logsumexp(log_pi[..., None] + log_p, axis=-2)


def along_paths(
    log_pi: Float[Array, "B paths r"], table: Float[Array, "B r V"]
) -> Float[Array, "B paths V"]:
    """`mixed` for several paths whose experts share a step's tables, as one product.

    What underflows in it has no probability: -inf.
    """
    shares = "Bmr,BrV->BmV", jnp.exp(log_pi), jnp.exp(table)
    return jnp.log(jnp.einsum(*shares, precision=precision_of(table)))


def found(log_p: Float[Array, "*rows r V"], tokens: Int[Array, "*rows"]) -> Float[Array, "*rows r"]:
    """log P_a^(s)(x_s) of one step's tokens; 0, which leaves the step out, where they are -1."""
    at = jnp.maximum(tokens, 0)[..., None, None]
    log_p = jnp.take_along_axis(log_p, at, axis=-1)[..., 0]
    return jnp.where(tokens[..., None] >= 0, log_p, 0.0)


def seen(
    log_pi: Float[Array, "*rows r"], log_p: Float[Array, "*rows r V"], tokens: Int[Array, "*rows"]
) -> Float[Array, "*rows r"]:
    """log pi of the next step, once this step's token is known (-1: it is not)."""
    return told(log_pi, found(log_p, tokens))[1]


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

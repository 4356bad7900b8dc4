"""Cycles over whole sequences, as training and evaluation run them: see `methods.dmtd`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mtd_jax.config import Anchor
from mtd_jax.transformer.model import Parameters, embed
from mtd_jax.transformer.packed import Packed, packed_rows
from mtd_jax.transformer.stack import Remat, train_stack
from mtd_jax.typing import Array, Float, Int

PLAIN = -1
"""Place of a row outside of any cycle: a prompt's, where cycles start behind it."""


def places_in_cycle(
    batch: Packed, cycle: int, anchor: Anchor | None, shift: Int[Array, " B"] | None = None
) -> Int[Array, "B T"]:
    """Where each row of a batch stands in its cycle: 0 a head, 1..cycle-1 late only, or `PLAIN`.

    Two documents of which the second is a conversation (`a` is the answer's), cycles of three:

        positions            0 1 2 3 4   0 1 2 3 4 5 6
        answer                           . . . a a a a
        anchor "sequence"    0 1 2 0 1   0 1 2 0 1 2 0
        anchor "prompt"      0 1 2 0 1   - - - 0 1 2 0

    Args:
      anchor: None is "prompt", the published models' most likely one.
      shift: places that each row's cycles are moved by.
    """
    if anchor == "sequence":
        since = batch.positions
    else:
        order = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)[None, :]
        before = jnp.pad(batch.answer[:, :-1], ((0, 0), (1, 0))) & (batch.positions > 0)
        starts = batch.answer & ~before
        since = order - jax.lax.cummax(jnp.where(starts, order, 0), axis=1)
    if shift is not None:
        since = since + shift[:, None]
    place = since % cycle
    return place if anchor == "sequence" else jnp.where(batch.answer, place, PLAIN)


def place_names(cycle: int, anchor: Anchor | None) -> tuple[str, ...]:
    """What the kinds of `kinds_of_places` are called.

    `1` is a head, `2`, `3`, ... are the rows behind it; `plain` ones are outside of cycles: a
    prompt's last one, or all of it where it counts.
    """
    named = tuple(str(place + 1) for place in range(cycle))
    return named if anchor == "sequence" else (*named, "plain")


def kinds_of_places(places: Int[Array, "B T"], cycle: int) -> Int[Array, "B T"]:
    """A number from 0 for every row, with `PLAIN` as the last one."""
    return jnp.where(places == PLAIN, cycle, places)


def cycle_hidden(
    params: Parameters,
    batch: Packed,
    places: Int[Array, "B T"],
    *,
    early: int,
    late: int,
    remat: Remat = "none",
) -> Float[Array, "B T D"]:
    """What the last layer puts out at every position of whole sequences, in one pass.

    All positions pass the middle layers, so that later ones can look at them; `places` says whose
    result goes on to the late layers.
    """
    config = params.config
    first_late = config.num_layers - late
    x = embed(params, batch.tokens)

    def inject(layer: jax.Array, middle: jax.Array, tapped: jax.Array) -> jax.Array:
        from_early = tapped[0] if early else x
        return jnp.where(layer == first_late, late_in(from_early, middle, places), middle)

    taps = (early,) if early else ()  # of no early layers the output is known: the embedding
    rows = packed_rows(config, batch)
    hidden, _ = train_stack(
        config, params.blocks, x, rows=rows, taps=taps, inject=inject, remat=remat
    )
    return hidden


def late_in(
    early: Float[Array, "B T D"], middle: Float[Array, "B T D"], places: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Heads: the sum. Late-only rows: `early`. Plain rows: `middle`, as in any decoder."""
    place = places[:, :, None]
    return jnp.where(place == PLAIN, middle, jnp.where(place == 0, early + middle, early))

"""A training run is the same run however it is spread, cut up, packed or resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.errors import InputError, RunError
from mtd_jax.training.checkpoint import Checkpoints
from mtd_jax.training.config import CheckpointConfig
from mtd_jax.training.loop import Run, fit
from mtd_jax.training.objective import FineTuning
from mtd_jax.transformer.packed import Packed
from tests.support import tiny
from tests.support.training import (
    SIZES,
    assert_same_bits,
    log_of,
    losses,
    make_run,
    trained,
    write_model,
    write_texts,
)

MESHES: list[dict[str, Any]] = [
    {"mesh__data": 8},
    {"mesh__data": 1, "mesh__fsdp": 8},
    {"mesh__data": 1, "mesh__tensor": 4},
    {"mesh__data": 1, "mesh__tensor": 8},
    {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2},
    {"mesh__slices": 2, "mesh__data": 2, "mesh__fsdp": 2},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("training")
    write_model(directory, **SIZES)
    write_texts(directory)
    return directory


@pytest.fixture(scope="module")
def reference(place: Path) -> tuple[Any, list[dict[str, float]]]:
    outcome, log = trained(place, out=str(place / "reference"))
    return jax.device_get(outcome.state), log


def test_it_learns(reference: tuple[Any, list[dict[str, float]]]) -> None:
    state, log = reference
    held_out = [line["held_out_loss"] for line in log if "held_out_loss" in line]
    assert len(held_out) == 3  # before the first step, in the middle, at the end
    assert held_out[-1] < held_out[0] - 0.1
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert int(state.step) == 6
    assert int(state.failed) == -1


@pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda m: "-".join(f"{k[6:]}{v}" for k, v in m.items())
)
def test_every_mesh_has_the_same_losses(
    place: Path, reference: tuple[Any, list[dict[str, float]]], mesh: dict[str, Any]
) -> None:
    name = "-".join(f"{k}{v}" for k, v in mesh.items())
    _, log = trained(place, out=str(place / name), **mesh)
    np.testing.assert_allclose(losses(log), losses(reference[1]), rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_equals_the_big_batch(
    place: Path, reference: tuple[Any, list[dict[str, float]]], parts: int
) -> None:
    outcome, log = trained(place, out=str(place / f"parts{parts}"), data__accumulate=parts)
    np.testing.assert_allclose(losses(log), losses(reference[1]), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        jax.device_get(outcome.state.trainable),
        reference[0].trainable,
    )


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_what_is_recomputed_changes_nothing(
    place: Path, reference: tuple[Any, list[dict[str, float]]], remat: str
) -> None:
    _, log = trained(place, out=str(place / remat), memory__remat=remat)
    np.testing.assert_allclose(losses(log), losses(reference[1]), rtol=1e-5)


def test_a_resumed_run_is_bit_identical(
    place: Path, reference: tuple[Any, list[dict[str, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind step 4, between two regular checkpoints, as by SIGTERM."""
    out = str(place / "resumed")
    with monkeypatch.context() as patch:
        patch.setattr(
            "mtd_jax.training.preemption.StopRequest.reached", lambda self, step: step == 4
        )
        stopped = fit(make_run(place, out=out))
    assert not stopped.finished
    assert int(stopped.state.step) == 4
    outcome, log = trained(place, out=out)
    assert outcome.finished
    assert_same_bits(outcome.state, reference[0])
    assert log == reference[1]


def test_a_finished_run_stays_finished(place: Path, reference: Any) -> None:
    outcome, log = trained(place, out=str(place / "reference"))
    assert outcome.finished
    assert_same_bits(outcome.state, reference[0])
    assert log == reference[1]


def test_restored_on_fewer_devices(
    place: Path, reference: tuple[Any, list[dict[str, float]]]
) -> None:
    """8 -> 4 -> 1: the same weights to the bit, and training goes on."""
    out = str(place / "shrinking")
    meshes = [{"mesh__fsdp": 8}, {"mesh__data": 2, "mesh__fsdp": 2}, {}]
    weights, log = [], []
    for number, mesh in enumerate(meshes, start=1):
        run = make_run(place, out=out, **mesh)
        steps = 2 * number
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "mtd_jax.training.preemption.StopRequest.reached",
                lambda self, step, steps=steps: step == steps,
            )
            outcome = fit(run)
        weights.append(jax.device_get(outcome.state))
        log = log_of(run.directory)
        checkpoints = Checkpoints(run.directory / "checkpoints", CheckpointConfig())
        state, _ = checkpoints.restore(steps, run.trainer.layout(outcome.state.trainable, run.mesh))
        checkpoints.close()
        assert_same_bits(state, weights[-1])
    np.testing.assert_allclose(losses(log), losses(reference[1]), rtol=1e-5)


def test_another_run_is_refused(place: Path, reference: Any) -> None:
    out = str(place / "reference")
    with pytest.raises(InputError, match=r"learning_rate = 0\.003, the config says 0\.1"):
        fit(make_run(place, out=out, optimizer__learning_rate=0.1))
    write_texts(place, seed=1)
    with pytest.raises(InputError, match="other texts"):
        fit(make_run(place, out=out, data__train=[str(place / "texts-1.jsonl")]))
    other = place / "other"
    other.mkdir(exist_ok=True)
    write_model(other, **SIZES)
    config = (other / "model" / "config.json").read_text(encoding="utf-8")
    (other / "model" / "config.json").write_text(
        config.replace("tiny-base", "another-base"), encoding="utf-8"
    )
    with pytest.raises(InputError, match="of another model"):
        fit(make_run(place, out=out, model=str(other / "model")))


@pytest.mark.parametrize("every", [1, 2])
def test_a_step_that_is_not_finite_stops_the_run(
    place: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """The third one; nothing of it is learned, or saved, whether its step saves or not."""
    for module in ("optimizer", "step"):
        monkeypatch.setattr(
            f"mtd_jax.training.{module}.make_schedule",
            lambda config: lambda count: jnp.where(count == 2, jnp.inf, 3e-3),
        )
    run = make_run(
        place,
        out=str(place / f"diverged-{every}"),
        checkpoint__every=every,
        evaluate__every=2,
        log__every=5,
    )
    said = (
        r"step 3: .*, learning rate inf; nothing was learned from it\. "
        r"The newest checkpoint is behind step 2"
    )
    with pytest.raises(RunError, match=said):
        fit(run)
    steps = [line["step"] for line in log_of(run.directory) if "loss" in line]
    assert steps == [1, 2]
    trainable, _ = run.trainer.objective.split(run.load().params)
    checkpoints = Checkpoints(run.directory / "checkpoints", CheckpointConfig())
    assert checkpoints.latest == 2
    state, _ = checkpoints.restore(2, run.trainer.layout(trainable, run.mesh))
    checkpoints.close()
    assert int(state.step) == 2
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.trainable)))


def test_processes_compare_what_they_measure_on_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out rows that differ from host to host would be averaged, or never meet."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("mtd_jax.training.loop.check_same_everywhere", told.append)
    for seed in (2, 3):
        write_texts(place, seed=seed)
        out, texts = str(place / f"host-{seed}"), [str(place / f"texts-{seed}.jsonl")]
        own = {"data__held_out": texts, "data__held_out_fraction": 0.0}
        fit(make_run(place, out=out, optimizer__steps=1, **own))
    measured_on = [about.pop("measured_on") for about in told]
    assert measured_on[0] != measured_on[1]
    assert told[0]["rows"] == told[1]["rows"]


# --- the objective ------------------------------------------------------------------------------


def _documents(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, 97, n).astype(np.int32) for n in lengths]


def _batch(rows: list[list[np.ndarray]], length: int) -> Packed:
    """Rows of documents, all of them learned."""
    shape = (len(rows), length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    for i, documents in enumerate(rows):
        at = 0
        for number, ids in enumerate(documents, start=1):
            here = slice(at, at + len(ids))
            tokens[i, here], segments[i, here] = ids, number
            positions[i, here] = np.arange(len(ids))
            at = here.stop
    arrays = (tokens, segments, positions, segments > 0, positions > 0)
    return Packed(*(jnp.asarray(x) for x in arrays))


@pytest.mark.parametrize("changes", [{}, {"sliding_windows": (4, None, 7)}])
def test_packed_equals_one_document_a_row(changes: dict[str, Any]) -> None:
    params = tiny.params(tiny.config(**changes))
    documents = _documents([5, 9, 2, 14, 7])
    packed = _batch([[documents[0], documents[3]], [documents[1], documents[2], documents[4]]], 20)
    alone = _batch([[ids] for ids in documents], 20)
    objective = FineTuning(chunk=6)
    found = []
    for batch in (packed, alone):
        trainable, frozen = objective.split(params)
        gradient = jax.value_and_grad(objective.loss, has_aux=True)
        counts = objective.counts(batch)
        assert float(counts["loss"]) == sum(len(ids) - 1 for ids in documents)
        found.append(gradient(trainable, frozen, batch, counts, jax.random.key(0)))
    (a, b) = found
    np.testing.assert_allclose(a[0][0], b[0][0], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * abs(y).max()),
        a[1],
        b[1],
    )


def _loss_of_each_document(run: Run) -> dict[bytes, float]:
    """By its tokens, from the rows that the run learns."""
    objective = run.trainer.objective
    trainable, frozen = objective.split(run.load().params)

    @jax.jit
    def mean(batch: Packed) -> jax.Array:
        return objective.loss(trainable, frozen, batch, objective.counts(batch), None)[0]

    found: dict[bytes, float] = {}
    for row in run.train:
        for number in range(1, int(row.segments.max()) + 1):
            here = row.segments == number
            one = row.replace(learn=row.learn & here)
            found[row.tokens[here].tobytes()] = float(mean(jax.tree.map(lambda x: x[None], one)))
    return found


def test_packed_documents_have_the_losses_of_rows_of_their_own(place: Path) -> None:
    packed = make_run(place)
    alone = make_run(place, data__packing=False)
    # Two of three documents share a row, or there is nothing to see here.
    assert len(packed.train) < len(alone.train) / 1.5
    losses, expected = _loss_of_each_document(packed), _loss_of_each_document(alone)
    assert losses.keys() == expected.keys()
    assert len(expected) > 30
    for document, loss in expected.items():
        np.testing.assert_allclose(losses[document], loss, rtol=1e-5)


def test_frozen_weights_have_no_gradient_and_cost_no_memory(place: Path) -> None:
    """Of a frozen stack neither the gradient nor the activations that it would need are made."""
    from mtd_jax.training.plan import step_memory

    whole = make_run(place, out=str(place / "a"))
    trainable, frozen = whole.trainer.objective.split(whole.load().params)
    assert all(leaf is None for leaf in jax.tree.leaves(frozen, is_leaf=lambda x: x is None))
    part = make_run(place, out=str(place / "b"), freeze=["blocks", "embedding"])
    trainable, frozen = part.trainer.objective.split(part.load().params)
    assert frozen.blocks.qkv is not None
    assert trainable.blocks.qkv is None
    memory = [step_memory(r.config, r.model, r.trainer, r.mesh) for r in (whole, part)]
    # Head and norm are a small part of the weights; their gradients and moments are what is left.
    assert memory[1].state < 0.4 * memory[0].state
    assert memory[1].temporary < 0.6 * memory[0].temporary


def test_freezing_nothing_that_exists_is_refused(place: Path) -> None:
    with pytest.raises(InputError, match=r"unknown weight to freeze 'blocks\.qvk'"):
        make_run(place, freeze=["blocks.qvk"])
    names = ["embedding", "blocks", "final_norm", "head"]
    with pytest.raises(InputError, match="nothing to train"):
        make_run(place, freeze=names)

"""Which checkpoints stay, what they hold, and what a run's log looks like after a restart."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtd_jax.errors import InputError
from mtd_jax.training.checkpoint import Checkpoints
from mtd_jax.training.config import CheckpointConfig, LogConfig
from mtd_jax.training.log import RunLog, read_log
from mtd_jax.training.step import TrainState


def _state(step: int) -> TrainState:
    return TrainState(
        step=jnp.int32(step),
        trainable={"w": jnp.full((2, 3), float(step))},
        optimizer=(jnp.zeros(3),),
        key=jax.random.key_data(jax.random.key(0)),
        failed=jnp.int32(-1),
    )


def _layout() -> TrainState:
    shapes = jax.eval_shape(lambda: _state(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)


@pytest.mark.parametrize(
    ("best", "last", "kept"), [(1, 1, {2, 5}), (2, 1, {2, 3, 5}), (0, 2, {4, 5}), (1, 2, {2, 4, 5})]
)
def test_the_last_and_the_best_stay(tmp_path: Path, best: int, last: int, kept: set[int]) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None}
    config = CheckpointConfig(keep_last=last, keep_best=best)
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    for step, loss in losses.items():
        checkpoints.save(step, _state(step), {"next_index": step}, {"base": "b"}, loss)
    checkpoints.close()
    again = Checkpoints(tmp_path / "checkpoints", config)
    assert {int(p.name) for p in (tmp_path / "checkpoints").iterdir()} == kept
    assert again.latest == 5
    assert again.best == (2 if best else None if last == 1 else 4)
    state, data = again.restore(5, _layout())
    np.testing.assert_array_equal(state.trainable["w"], _state(5).trainable["w"])
    assert data == {"next_index": 5}
    assert again.about(5) == {"base": "b"}
    again.close()


def test_losses_on_other_texts_are_not_compared(tmp_path: Path) -> None:
    """With new held-out texts the search for the best begins anew, also in what is kept."""
    config = CheckpointConfig(keep_last=1, keep_best=1)
    found: list[tuple[int | None, set[int]]] = []
    for texts, losses in (("old", {1: 0.1, 2: 0.2}), ("new", {3: 5.0, 4: 6.0}), ("old", {})):
        checkpoints = Checkpoints(tmp_path / "checkpoints", config, measured_on=texts)
        for step, loss in losses.items():
            checkpoints.save(step, _state(step), {"next_index": step}, {"base": "b"}, loss)
        best = checkpoints.best
        checkpoints.close()
        found.append((best, {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}))
    assert found == [(1, {1, 2}), (3, {3, 4}), (None, {3, 4})]
    again = Checkpoints(tmp_path / "checkpoints", config, measured_on="old", read_only=True)
    with pytest.raises(InputError, match="evaluated on the held-out texts of the config"):
        again.find("best")
    again.close()


# Orbax leaves futures of what it could not read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cut_file_is_named_and_the_step_before_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep_last=2, keep_best=0))
    for step in (3, 6):
        checkpoints.save(step, _state(step), {"next_index": step}, {"base": "b"}, None)
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "6" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    again = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    with pytest.raises(InputError, match=r"checkpoints/6: .*it goes on from step 3") as refused:
        again.restore(6, _layout())
    assert "\n" not in str(refused.value)
    assert again.restore(3, _layout())[1] == {"next_index": 3}
    again.close()


def test_a_checkpoint_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Orbax puts it where a disk is full: later, and not as an OSError."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())

    def full(*_: object, **__: object) -> None:
        raise ValueError('OUT_OF_RANGE: Error writing "failed/0" in OCDBT\nFile too large')

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(InputError, match=r"^cannot write a checkpoint under .*failed/0.*OCDBT$"):
        checkpoints.save(1, _state(1), {}, {}, None)
    checkpoints.close()


@pytest.mark.parametrize(
    "line", [b"nothing", b'{"loss": 1}', b'{"step": null}', b"[1]", b'{"step": 1, "x": "\xff"}']
)
def test_a_log_that_is_none_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"log.jsonl, line 2"):
        read_log(tmp_path)


def test_a_log_that_goes_on_has_no_line_twice(tmp_path: Path) -> None:
    config = LogConfig(tensorboard=False)
    with RunLog(tmp_path, config, steps=9, first=0, writes=True) as log:
        for step in range(1, 6):
            log.record(step, {"loss": float(step)})
    with (tmp_path / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    with RunLog(tmp_path, config, steps=9, first=3, writes=True) as log:
        log.record(4, {"loss": 40.0})
    assert [(line["step"], line["loss"]) for line in read_log(tmp_path)] == [
        *((n, float(n)) for n in (1, 2, 3)),
        (4, 40.0),
    ]
    with RunLog(tmp_path, config, steps=9, first=0, writes=True):
        pass
    assert (tmp_path / "log.jsonl").read_text(encoding="utf-8") == ""


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    with RunLog(tmp_path, LogConfig(), steps=3, first=0, writes=False) as log:
        log.record(1, {"loss": 1.0})
        log.progress(1, {"loss": 1.0})
        log.flush()
    assert not list(tmp_path.iterdir())


def test_a_log_is_one_object_a_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, LogConfig(tensorboard=False), steps=3, first=0, writes=True) as log:
        log.record(1, {"loss": 1.5, "mfu": 0.25})
    text = (tmp_path / "log.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"step": 1, "loss": 1.5, "mfu": 0.25}

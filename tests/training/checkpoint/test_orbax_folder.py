"""Checkpoints: whole or not there, verified, kept by policy, and loadable onto other devices."""

import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from recollect.configuration import UserError
from recollect.configuration.disk_full import DiskFull
from recollect.training.checkpoint.integrity import damage
from recollect.training.checkpoint.load import load_params
from recollect.training.checkpoint.orbax_folder import Checkpoints, seal
from recollect.training.checkpoint.resume import delete_unfinished, load, newest_good
from recollect.training.experiment import Mesh
from recollect.training.train import train
from tests.training.tiny import tiny


def state(value=1.0):
    return {
        "params": {"a": jnp.full((8, 4), value), "b": {"c": jnp.arange(6.0)}},
        "step": jnp.int32(value),
        "seed": jnp.uint32(3),
    }


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    for step in (20, 40):
        checkpoints.save(step, state(step), tiny(tmp_path), {"note": step})
    checkpoints.close()
    return checkpoints


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_policy_keeps_the_newest_and_every_so_many(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_every=100)
    for step in (40, 80, 120, 160, 200, 240, 280, 320, 360):
        checkpoints.save(step, state(step), tiny(tmp_path), {})
    checkpoints.wait()
    assert checkpoints.steps() == [120, 200, 320, 360]
    assert all(damage(tmp_path / "checkpoints" / str(step)) is None for step in checkpoints.steps())


def test_what_is_saved_is_what_was_given_though_the_buffers_are_reused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    advance = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    now = {"w": jnp.zeros((512, 512))}
    for step in range(1, 4):
        now = advance(now)
        checkpoints.save(step, now, tiny(tmp_path), {})
        for _ in range(5):
            now = advance(now)
        checkpoints.wait()
        loaded, _ = load(checkpoints, step, now)
        np.testing.assert_array_equal(loaded["w"], step * 6 - 5)


@pytest.mark.parametrize("index", range(0, 30, 3))
@pytest.mark.parametrize("kind", ["flipped", "truncated", "missing"])
def test_every_damage_to_any_file_is_found_and_the_one_before_is_used(saved, tmp_path, index, kind):
    folder = saved.directory / "40"
    listed = files(folder)
    path = listed[index % len(listed)]
    content = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        path.write_bytes(bytes(content))
    lines = []
    assert newest_good(saved, lines.append) == 20
    assert len(lines) == 1 and "checkpoints/40 is damaged" in lines[0] and "damaged/40-1" in lines[0]
    assert path.name in lines[0] or path.name == "digests.json"
    assert saved.steps() == [20] and (saved.directory / "damaged" / "40-1").is_dir()
    loaded, extra = load(saved, 20, state())
    assert extra == {"note": 20} and float(loaded["params"]["a"][0, 0]) == 20


def test_parameters_are_read_from_the_newest_good_one(saved):
    target = next(path for path in files(saved.directory / "40") if path.parent.name == "d")
    target.write_bytes(target.read_bytes()[:-3])
    lines = []
    params, config, step = load_params(saved.directory, log=lines.append)
    assert step == 20 and params["a"][0, 0] == 20 and config.name == "tiny" and isinstance(params["a"], np.ndarray)
    assert len(lines) == 1 and target.name in lines[0] and "taking step 20" in lines[0]
    assert saved.steps() == [20, 40], "reading moves nothing: a run may be using the folder"
    shutil.rmtree(saved.directory / "20" / "state")
    with pytest.raises(UserError, match=r"40 is damaged.*20 is damaged"):
        load_params(saved.directory)


def test_a_moving_average_is_taken_when_asked_for(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {**state(1), "ema": state(7)["params"]}, tiny(tmp_path), {})
    checkpoints.wait()
    assert load_params(checkpoints.directory)[0]["a"][0, 0] == 1
    assert load_params(checkpoints.directory, ema=True)[0]["a"][0, 0] == 7


def test_it_loads_onto_another_mesh_in_place(saved):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state())
    split = NamedSharding(mesh, PartitionSpec("x", "y"))
    wanted["params"]["a"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)
    loaded, _ = load(saved, 40, wanted)
    assert loaded["params"]["a"].sharding == split
    assert {shard.data.shape for shard in loaded["params"]["a"].addressable_shards} == {(4, 2)}
    np.testing.assert_array_equal(loaded["params"]["a"], 40)
    with pytest.raises(UserError, match="cannot be read"):
        load(saved, 40, {**wanted, "more": wanted["step"]})


def test_a_full_disk_keeps_the_last_good_one(saved, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("recollect.training.checkpoint.orbax_folder.seal", full)
    saved.save(60, state(60), tiny(tmp_path), {})
    with pytest.raises(
        DiskFull, match=r"60 could not be written: no space is left on the disk; the last good one is of step 40"
    ):
        saved.wait()
    assert sorted(path.name for path in saved.directory.iterdir()) == ["20", "40"]
    monkeypatch.undo()
    saved.save(60, state(60), tiny(tmp_path), {})
    saved.wait()
    assert saved.steps() == [20, 40, 60]


def test_half_a_checkpoint_is_no_checkpoint(saved):
    for name in ("60.orbax-checkpoint-tmp", "80.writing", "20.retired"):
        shutil.copytree(saved.directory / "40", saved.directory / name)
    lines = []
    delete_unfinished(saved, lines.append)
    assert lines == [
        f"checkpoint {saved.directory}/{step} was cut off while it was written: incomplete; deleted"
        for step in (60, 80)
    ]
    assert sorted(path.name for path in saved.directory.iterdir()) == ["20", "40"]


def test_a_checkpoint_whose_deletion_was_cut_off_is_passed_over_and_deleted(saved, tmp_path):
    files(saved.directory / "20")[0].unlink()
    lines = []
    again = Checkpoints(saved.directory, keep=1)
    assert newest_good(again, lines.append) == 40 and not lines
    again.save(60, state(60), tiny(tmp_path), {})
    again.close()
    assert again.steps() == [60] and damage(saved.directory / "60") is None


class Stop(Exception):
    """Stands for what ends a process."""


def train_until(experiment, text):
    """Trains until a line with `text` is said."""

    def say(line):
        if text in line:
            raise Stop

    with pytest.raises(Stop):
        train(experiment, log=say)


def test_a_run_goes_on_from_the_one_before_a_damaged_one_and_never_starts_again_in_silence(tmp_path):
    train(tiny(tmp_path / "alone"), log=lambda text: None)
    train_until(tiny(tmp_path / "run"), "step 60")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "40" / "meta.json").unlink()
    lines = []
    train(tiny(tmp_path / "run"), log=lines.append)
    assert any("40 is damaged: meta.json is missing" in line for line in lines) and any(
        "resumed at step 20" in line for line in lines
    )
    for one, two in zip(
        *(jax.tree.leaves(load_params(tmp_path / name / "checkpoints")[0]) for name in ("alone", "run")), strict=True
    ):
        np.testing.assert_array_equal(one, two)
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("alone", "run")
    ]
    assert steps[0] == steps[1]
    (tmp_path / "run" / "result.json").unlink()
    for step in (40, 60):
        (checkpoints / str(step) / "digests.json").unlink()
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"every checkpoint of .* is damaged .*; delete .*damaged to start again from step 0"
        ):
            train(tiny(tmp_path / "run"), log=lambda text: None)


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_run_on_a_full_disk_stops_or_goes_on_as_configured(tmp_path, monkeypatch, policy):
    experiment = tiny(tmp_path / "run", on_disk_full=policy)
    calls = []

    def full_once(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        seal(folder)

    monkeypatch.setattr("recollect.training.checkpoint.orbax_folder.seal", full_once)
    lines = []
    if policy == "stop":
        with pytest.raises(
            UserError,
            match=r"checkpoints/40 could not be written: no space is left on the disk; the last good one is of",
        ):
            train(experiment, log=lines.append)
        assert not (tmp_path / "run" / "result.json").exists()
        assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [20]
        train(experiment, log=lines.append)
        assert any("resumed at step 20" in line for line in lines)
    else:
        assert train(experiment, log=lines.append)["status"] == "finished"
        assert any("could not be written" in line and "going on" in line for line in lines)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 60


def test_another_mesh_is_noted_and_goes_on(tmp_path):
    alone = train(tiny(tmp_path / "alone"), log=lambda text: None)
    train_until(tiny(tmp_path / "run"), "step 60")
    wider = tiny(tmp_path / "run", mesh=Mesh(data=4))
    lines = []
    result = train(wider, log=lines.append)
    assert any(
        "resumed at step 40; on another mesh (data 1 -> 4); not promised to be bit-exact: mesh changed" in line
        for line in lines
    )
    # Twenty steps of sums in another order.
    assert result["loss"] == pytest.approx(alone["loss"], rel=1e-3)

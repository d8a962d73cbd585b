import jax.numpy as jnp
import numpy as np

from jsparse.train.run.checkpoint import KEPT, open_checkpoints


def state_of(step):
    return {"weights": jnp.full((3, 2), step, jnp.float32), "count": jnp.array(step, jnp.int32)}


def files_in(folder):
    return {path: path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


def test_what_was_saved_comes_back_and_old_steps_go(tmp_path):
    with open_checkpoints(tmp_path / "new", writable=True) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 5):
            checkpoints.save(step, state_of(step), {"seed": step})
    with open_checkpoints(tmp_path / "new", writable=False) as checkpoints:
        assert checkpoints.latest_step() == 5 and checkpoints.read_run(5) == {"seed": 5}
        restored = checkpoints.restore(5, state_of(0))
    np.testing.assert_array_equal(restored["weights"], state_of(5)["weights"])
    assert restored["count"].dtype == jnp.int32 and int(restored["count"]) == 5
    assert len(list((tmp_path / "new").iterdir())) == KEPT == 2


def test_a_step_that_is_kept_stays_until_another_is(tmp_path):
    with open_checkpoints(tmp_path, writable=True) as checkpoints:
        for step, kept in ((1, 1), (2, 1), (3, 1), (4, 1), (5, 1)):
            checkpoints.save(step, state_of(step), {}, keep=kept)
        assert checkpoints.steps() == [1, 4, 5]
    with open_checkpoints(tmp_path, writable=True) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(1, state_of(0))["weights"], state_of(1)["weights"])
        checkpoints.save(6, state_of(6), {}, keep=4)
        assert checkpoints.steps() == [4, 5, 6]
    assert {path.name for path in tmp_path.iterdir()} == {"4", "5", "6"}


def test_a_save_that_was_cut_off_is_no_step_and_goes_with_the_next(tmp_path):
    with open_checkpoints(tmp_path, writable=True) as checkpoints:
        checkpoints.save(1, state_of(1), {})
    half_written = tmp_path / "2.orbax-checkpoint-tmp"
    half_written.mkdir()
    (half_written / "piece").write_bytes(b"half")

    before = files_in(tmp_path)
    with open_checkpoints(tmp_path, writable=False) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.restore(1, state_of(0))
    assert files_in(tmp_path) == before  # reading changed nothing

    with open_checkpoints(tmp_path, writable=True) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, state_of(2), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_reading_a_folder_that_is_not_there_makes_none(tmp_path):
    with open_checkpoints(tmp_path / "none", writable=False) as checkpoints:
        assert checkpoints.latest_step() is None
    assert not (tmp_path / "none").exists()

import json

import pytest

from cluster.validation import BestCheckpoint


def test_the_best_by_the_mean_over_the_modes_is_kept_and_the_earlier_of_equals(tmp_path):
    best = BestCheckpoint(tmp_path)
    offered = [(1, 0.2, 0.1), (2, 0.3, 0.2), (3, 0.2, 0.3), (4, 0.1, 0.1), (5, 0.5, 0.2)]
    kept = []
    for step, direct, reasoning in offered:

        def save(folder, step=step):
            folder.mkdir()
            (folder / "weights").write_text(str(step))

        kept.append(best.offer(step, {"direct": direct, "reasoning": reasoning}, save))
    assert kept == [True, True, False, False, True]
    assert (tmp_path / "best" / "weights").read_text() == "5"
    record = json.loads((tmp_path / "best.json").read_text())
    assert record == {"step": 5, "mean_reward": pytest.approx(0.35), "direct": 0.5, "reasoning": 0.2}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "other").write_text("last")
    best.use_as(tmp_path / "checkpoint")
    assert [file.name for file in (tmp_path / "checkpoint").iterdir()] == ["weights"]


def test_saving_that_fails_leaves_the_best_so_far_and_a_new_stage_begins_without(tmp_path):
    best = BestCheckpoint(tmp_path)
    best.offer(1, {"direct": 0.1}, lambda folder: folder.mkdir())

    def full_disk(folder):
        folder.mkdir()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        best.offer(2, {"direct": 0.2}, full_disk)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1
    assert (tmp_path / "best").is_dir()
    best.clear()
    assert not (tmp_path / "best").exists()
    assert not (tmp_path / "best.json").exists()

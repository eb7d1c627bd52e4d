from types import SimpleNamespace

import pytest

from cluster.alarms import Alarm, Alarms, AlarmSection
from cluster.train_stage import sound

HEALTHY = {
    "learner/sampler_ratio": 1.01, "learner/entropy_estimate": 1.5, "coverage": 0.4, "chains/think_tokens": 50.0,
    "forced_close_rate": 0.02,
}  # fmt: skip
BROKEN = [
    ("ratio_drift", "learner/sampler_ratio", 1.25), ("ratio_drift", "learner/sampler_ratio", 0.75),
    ("entropy_share", "learner/entropy_estimate", 0.2), ("coverage_share", "coverage", 0.05),
    ("chain_length_share", "chains/think_tokens", 10.0), ("chain_length_share", "chains/think_tokens", 190.0),
    ("forced_close_rate", "forced_close_rate", 0.6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "metric", "value"), BROKEN)
def test_an_alarm_sounds_when_its_bound_is_crossed_once_until_it_was_quiet(name, metric, value):
    alarms = Alarms(AlarmSection(baseline_steps=3))
    for step in range(1, 6):
        assert alarms.check(step, HEALTHY) == []
    (alarm,) = alarms.check(6, HEALTHY | {metric: value})
    assert (alarm.name, alarm.step, alarm.value, alarm.action) == (name, 6, value, "warn")
    assert f"step 6: the {alarm.message[12:]}" == alarm.message
    assert f"train.alarms.{name}" in alarm.message
    assert alarms.check(7, HEALTHY | {metric: value}) == []
    assert alarms.check(8, HEALTHY) == []
    assert [again.step for again in alarms.check(9, HEALTHY | {metric: value})] == [9]


@pytest.mark.parametrize(("name", "metric", "value"), BROKEN)
def test_null_turns_an_alarm_off_and_stop_is_told(name, metric, value):
    off, stop = (
        Alarms(AlarmSection(**{name: None}, baseline_steps=1)),
        Alarms(AlarmSection(action="stop", baseline_steps=1)),
    )
    for alarms in (off, stop):
        assert alarms.check(1, HEALTHY) == []
    assert off.check(2, HEALTHY | {metric: value}) == []
    assert [alarm.action for alarm in stop.check(2, HEALTHY | {metric: value})] == ["stop"]


def test_shares_refer_to_the_mean_of_the_first_steps_which_sound_nothing():
    alarms = Alarms(AlarmSection(baseline_steps=2, entropy_share=0.5))
    assert alarms.check(1, {"learner/entropy_estimate": 4.0}) == []
    assert alarms.check(2, {"learner/entropy_estimate": 0.1}) == []
    assert alarms.check(3, {"learner/entropy_estimate": 1.03}) == []
    (alarm,) = alarms.check(4, {"learner/entropy_estimate": 1.02})
    assert alarm.bound == pytest.approx(0.5 * (4.0 + 0.1) / 2)


def test_absent_metrics_sound_nothing_and_do_not_count_as_first_steps():
    alarms = Alarms(AlarmSection(baseline_steps=1))
    direct_only = {name: value for name, value in HEALTHY.items() if not name.startswith("chains/")}
    for step in range(1, 4):
        assert alarms.check(step, direct_only | {"learner/sampler_ratio": float("nan")}) == []
    assert alarms.check(4, HEALTHY | {"chains/think_tokens": 5.0}) == []  # the first value of chains


def test_restored_alarms_go_on_as_before():
    alarms = Alarms(AlarmSection(baseline_steps=2))
    alarms.check(1, HEALTHY)
    alarms.check(2, HEALTHY | {"forced_close_rate": 0.9})
    again = Alarms(AlarmSection(baseline_steps=2))
    again.restore(alarms.state())
    for step, metrics in ((3, HEALTHY | {"forced_close_rate": 0.9}), (4, HEALTHY | {"coverage": 0.01})):
        assert again.check(step, metrics) == alarms.check(step, metrics)


def test_an_alarm_that_stops_saves_the_policy_first(tmp_path, capsys):
    saved = []
    actors = SimpleNamespace(learner=SimpleNamespace(save=saved.append))
    sound(Alarm("coverage_share", 3, 0.0, 0.1, "warn", "step 3: few answers."), actors, tmp_path)
    assert saved == []
    assert "alarm: step 3: few answers." in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"step 3: few answers\. The policy of step 3 is in .*stopped"):
        sound(Alarm("coverage_share", 3, 0.0, 0.1, "stop", "step 3: few answers."), actors, tmp_path)
    assert saved == [tmp_path / "stopped"]

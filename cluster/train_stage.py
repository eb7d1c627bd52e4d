"""The SRPO stage: the loop from its beginning or its newest state to its end, with validation, alarms and recovery."""

from __future__ import annotations

import json
import math
from pathlib import Path

from cluster.alarms import Alarm, Alarms
from cluster.placement import WorkLost, ray_session
from cluster.probe import Scores, compare_probes, mean_rewards, probe
from cluster.progress import console, progress_bar
from cluster.prompts import PromptSource
from cluster.ray_metrics import RayMetrics
from cluster.recovery import Recovery
from cluster.rollout_samples import sampled_responses
from cluster.settings import Settings
from cluster.srpo_actors import SrpoActors, srpo_actors
from cluster.stopping import StopRequested, finishing_steps
from cluster.tracking import Tracker
from cluster.train import SrpoLoop
from cluster.validation import BestCheckpoint
from curriculum.corpus import Corpus


def run_train(
    settings: Settings, corpus: Corpus, index_folder: Path, sft_checkpoint: Path, folder: Path, tracker: Tracker, *,
    name: str,
):  # fmt: skip
    """Post-train the supervised checkpoint; the result is `folder/checkpoint`, the probes are `folder/probe.json`.

    Args:
        name: of everything that the result depends on: an interrupted stage goes on from the newest state of that name.

    An alarm whose action is `stop` ends the stage with RuntimeError; the policy of that moment is `folder/stopped`.
    A signal ends it with StopRequested after the step, whose state is written.
    """
    train = settings.train
    folder.mkdir(parents=True, exist_ok=True)
    source = PromptSource(corpus, reasoning_budget=train.reasoning_budget, exclude_seen=train.exclude_seen)
    with (
        ray_session(settings.cluster),
        srpo_actors(settings, index_folder, sft_checkpoint) as actors,
        finishing_steps(settings.cluster.stop_seconds) as stop,
        progress_bar("train", train.steps) as bar,
    ):
        loop, alarms, best = SrpoLoop(settings, source, actors), Alarms(train.alarms), BestCheckpoint(folder)
        gauges = RayMetrics("train", settings.folder.name)
        recovery = Recovery(settings, folder, name, actors, loop, alarms, best)
        step = recovery.resume()
        scores: dict[int, Scores] = {}  # of the latest validation, by step
        if step == 0:
            forget_earlier_run(settings, best)
            recovery.before = probe(settings, source, actors)
        bar.advance(step)
        while True:
            try:
                if step == train.steps:
                    loop.settle()
                    after = scores[step] if step in scores else probe(settings, source, actors)
                    actors.learner.save(folder / "checkpoint")
                    break
                step += 1
                metrics = loop.step(step)
                metrics["seconds/tracking"] = tracker.take_seconds()
                tracker.metrics({f"train/{name}": value for name, value in metrics.items()}, step)
                gauges.show(metrics)
                bar.advance(reward=metrics["reward"], direct=metrics.get("direct/reward", math.nan),
                            reasoning=metrics.get("reasoning/reward", math.nan))  # fmt: skip
                if (every := settings.tracking.sample_steps) and step % every == 0:
                    tracker.table(
                        sampled_responses(loop.groups, actors.rewards, corpus), f"samples/step-{step:06d}.json"
                    )
                for alarm in alarms.check(step, metrics):
                    sound(alarm, actors, folder)
                if train.validation_steps and (step == train.steps or step % train.validation_steps == 0):
                    scores = {step: validate(step, settings, source, actors, tracker, best)}
                if stop.number is not None or step == train.steps or step % train.checkpoint_steps == 0:
                    recovery.write(step)
            except WorkLost as loss:
                reached, step = step, recovery.go_back(loss)
                bar.advance(step - reached)
            if stop.number is not None:
                raise StopRequested(
                    stop.number, f"stopped after step {recovery.written}; give the same command again to go on"
                )
    if train.result == "best":
        best.use_as(folder / "checkpoint")
    report = compare_probes(recovery.before, after, seed=settings.seed)
    (folder / "probe.json").write_text(json.dumps(report, indent=2))
    for mode, values in report.items():
        console.print(
            f"train: mean reward on {values['prompts']} validation prompts, {mode}: {values['before']:.4f} -> "
            f"{values['after']:.4f} (difference {values['difference']:+.4f}, 95 % interval "
            f"{values['low']:+.4f} .. {values['high']:+.4f})"
        )
        tracker.metrics({f"probe/{mode}/{name}": value for name, value in values.items()}, train.steps)
    recovery.finish()
    return report


def forget_earlier_run(settings: Settings, best: BestCheckpoint) -> None:
    """Take away what another run of the stage left where this one will write."""
    best.clear()
    for outdated in (settings.folder / "rollouts").glob("step-*.parquet"):
        outdated.unlink()


def validate(
    step: int, settings: Settings, source: PromptSource, actors: SrpoActors, tracker: Tracker, best: BestCheckpoint
) -> Scores:
    """Score the validation prompts, and keep the policy where it is the best so far."""
    scores = probe(settings, source, actors)
    means = mean_rewards(scores)
    tracker.metrics({f"validation/{mode}/reward": mean for mode, mean in means.items()}, step)
    best.offer(step, means, actors.learner.save)
    return scores


def sound(alarm: Alarm, actors: SrpoActors, folder: Path) -> None:
    """Print an alarm; raise RuntimeError where it is to stop the stage, after the policy was saved."""
    console.print(f"alarm: {alarm.message}", style="red", highlight=False)
    if alarm.action == "stop":
        actors.learner.save(folder / "stopped")
        raise RuntimeError(f"{alarm.message} The policy of step {alarm.step} is in {folder / 'stopped'}.")

"""Going on with the SRPO stage where it was: after its driver was lost, or with learner ranks that were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from cluster.alarms import Alarms
from cluster.placement import DeadlineExceeded, WorkLost
from cluster.probe import ProbeScores
from cluster.progress import console
from cluster.settings import Settings
from cluster.srpo_actors import SrpoActors
from cluster.train import SrpoLoop
from cluster.training_states import TrainingStates
from cluster.validation import BestCheckpoint
from item_index.input_error import InputError


class Recovery:
    """Writes states of a run, and puts all that takes part in it back into the newest one that is whole.

    What a state holds: the ranks' weights, optimizers, schedules and random numbers; the sampler's place, what the
    engines were given, and groups kept for a later step; versions, alarms, the best validation, the probe before
    training.

    Attributes:
        before: the probe of the policy that training began with.
    """

    def __init__(
        self, settings: Settings, folder: Path, name: str, actors: SrpoActors, loop: SrpoLoop, alarms: Alarms,
        best: BestCheckpoint,
    ) -> None:  # fmt: skip
        self.settings, self.actors, self.loop, self.alarms, self.best = settings, actors, loop, alarms, best
        storage = settings.cluster.state_storage
        location = str(folder / "states") if storage is None else f"{storage.rstrip('/')}/{settings.folder.name}/train"
        self.states = TrainingStates(location, name=name, kept=settings.train.kept_states)
        self.before: dict[str, ProbeScores] = {}
        self.written = 0
        self.losses = 0
        self.beginning = self._remembered(0)

    def write(self, step: int) -> None:
        """Write the state of the moment after a step."""
        groups = [(group.batch, group.place) for group in self.loop.scheduler.surplus]
        self.states.write(step, self._remembered(step), self.actors.learner, groups)
        self.written, self.losses = step, 0

    def resume(self) -> int:
        """Go on from the newest whole state; returns its step, 0 where there is none and all is as it began.

        A damaged state is named, and the one before it is taken.
        """
        for step in self.states.steps():
            try:
                remembered = self.states.read(step, self.actors.learner)
            except InputError as error:
                console.print(f"train: the state of step {step} is damaged: {error}", style="red", highlight=False)
                continue
            self._restore(remembered)
            console.print(f"train: goes on after step {step}", highlight=False)
            return step
        return 0

    def go_back(self, loss: WorkLost) -> int:
        """Start the learner anew and go on from the newest state, or from the beginning; returns the step.

        Raises RuntimeError after `cluster.maximum_restarts` losses since a state was written, and where the learner is
        connected with the engines by vLLM's own transfer, which cannot be made again in mid-run.
        """
        cluster = self.settings.cluster
        if cluster.weight_transfer != "object_store":
            raise RuntimeError(
                f"{loss}; the learner's connection with the engines (cluster.weight_transfer "
                f"{cluster.weight_transfer}) cannot be made again in mid-run: give the command again"
            ) from loss
        while True:
            self.losses += 1
            if self.losses > cluster.maximum_restarts:
                raise RuntimeError(
                    f"{self.losses} losses since the last state, the latest: {loss}; look at the actors' logs in Ray's "
                    "session folder, or raise cluster.maximum_restarts"
                ) from loss
            console.print(f"train: the learner is started anew: {loss}", style="yellow", highlight=False, markup=False)
            try:
                self.actors.engines.forget()
                self.actors.learner.restart()
                step = self.resume()
                if step == 0:
                    self._restore(self.beginning)
                return step
            except WorkLost as again:
                loss = again
            except (DeadlineExceeded, ray.exceptions.RayError) as error:
                loss = WorkLost(f"it did not start: {error}")

    def finish(self) -> None:
        """Take the states away: they are several times as large as the model, and of use to interrupted stages only."""
        self.states.remove()

    def _remembered(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "loop": self.loop.state(),
            "alarms": self.alarms.state(),
            "best": self.best.value,
            "before": {mode: scores.state() for mode, scores in self.before.items()},
        }

    def _restore(self, remembered: dict[str, Any]) -> None:
        if not self.before:
            self.before = {mode: ProbeScores.of(state) for mode, state in remembered["before"].items()}
        self.alarms.restore(remembered["alarms"])
        self.best.value, self.written = remembered["best"], remembered["step"]
        kept = self.actors.learner.kept_groups() if remembered["loop"]["scheduler"]["surplus"] else None
        self.actors.engines.wait(self.actors.send_weights())
        self.loop.restore(remembered["loop"], kept)

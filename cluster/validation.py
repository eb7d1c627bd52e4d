"""The best policy so far, by the mean reward on the validation prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path


class BestCheckpoint:
    """Keeps `folder/best`, the checkpoint, and `folder/best.json`: its step and its mean rewards by mode.

    Attributes:
        value: mean over the modes of the policy that is kept; None where none is.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint, self.record = folder / "best", folder / "best.json"
        self.value: float | None = None

    def clear(self) -> None:
        """Take away what an earlier run of the stage left there."""
        self.record.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoint, ignore_errors=True)

    def offer(self, step: int, means: Mapping[str, float], save: Callable[[Path], None]) -> bool:
        """Save the policy where the mean over the modes is better than any before; says whether it was."""
        value = sum(means.values()) / len(means)
        if self.value is not None and value <= self.value:
            return False
        unfinished = self.checkpoint.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished)
        self.record.unlink(missing_ok=True)  # between the two folders no record says what is there
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        unfinished.rename(self.checkpoint)
        self.record.write_text(json.dumps({"step": step, "mean_reward": value, **means}, indent=2))
        self.value = value
        return True

    def use_as(self, checkpoint: Path) -> None:
        """Put a copy of the best policy in the place of another one."""
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.copytree(self.checkpoint, checkpoint)

"""States of the SRPO stage that it can go on from: written whole or not at all, checked before they are used.

A state is a folder `step-000010`: what the learner ranks wrote, what the loop remembers, and, written last, a manifest
with the hashes of both. A folder without a manifest is what an interruption left, and nobody's state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from pyarrow.fs import FileSelector, FileType

from cluster.learner_ranks import LearnerRanks
from item_index.input_error import InputError
from learner.state_storage import storage_of
from learner.training_state import manifest_name

LOOP, MANIFEST, RANKS = "loop.json", "manifest.json", "ranks"


class TrainingStates:
    """The states of one run.

    Args:
        location: folder or URI, of this stage of this run alone.
        name: of everything that the result depends on; states of another name are taken away.
        kept: how many are kept, the latest ones.
    """

    def __init__(self, location: str, *, name: str, kept: int) -> None:
        self.storage, root = storage_of(location)
        for folder in self._folders(root):
            if folder != f"{root}/{name}":
                self.storage.delete_dir(folder)
        self.path, self.location, self.kept = f"{root}/{name}", f"{location.rstrip('/')}/{name}", kept

    def write(self, step: int, loop: dict[str, Any], learner: LearnerRanks, groups: list[Any]) -> None:
        """Write a state and take away the oldest ones above `kept`.

        Args:
            loop: what the loop remembers, as JSON.
            groups: kept for a later step, as `LearnerRanks.save_state` takes them.
        """
        folder = _folder(step)
        if self._exists(f"{self.path}/{folder}"):
            self.storage.delete_dir(f"{self.path}/{folder}")
        manifests = learner.save_state(f"{self.location}/{folder}/{RANKS}", groups)
        self._put(f"{folder}/{LOOP}", json.dumps(loop).encode())
        files = [LOOP, *(f"{RANKS}/{name}" for name in manifests)]
        hashes = {name: hashlib.sha256(self._get(f"{folder}/{name}")).hexdigest() for name in files}
        self._put(f"{folder}/{MANIFEST}", json.dumps({"step": step, "sha256": hashes}, indent=2).encode())
        for outdated in self.steps()[self.kept :]:
            self.storage.delete_dir(f"{self.path}/{_folder(outdated)}")

    def steps(self) -> list[int]:
        """Steps whose states have a manifest, the latest first."""
        names = [folder.rpartition("/")[2] for folder in self._folders(self.path)]
        whole = [name for name in names if self._exists(f"{self.path}/{name}/{MANIFEST}")]
        return sorted((int(name.removeprefix("step-")) for name in whole), reverse=True)

    def read(self, step: int, learner: LearnerRanks) -> dict[str, Any]:
        """Put the learner into a state and return what the loop remembered.

        Raises InputError that names the file where one is missing or has another content than the manifests say; the
        learner is as it was then.
        """
        folder = _folder(step)
        try:
            hashes = json.loads(self._get(f"{folder}/{MANIFEST}"))["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a manifest ({type(error).__name__})", file=self._named(folder, MANIFEST)) from error
        expected = {LOOP, *(f"{RANKS}/{manifest_name(rank)}" for rank in range(len(learner.ranks)))}
        if set(hashes) != expected:
            raise InputError(
                f"the state has other files than this run, which has {len(learner.ranks)} learner ranks",
                file=self._named(folder, MANIFEST), remedy="Go on with as many ranks as before, or remove the states.",
            )  # fmt: skip
        for name, digest in hashes.items():
            if not self._exists(f"{self.path}/{folder}/{name}"):
                raise InputError("the state lacks this file", file=self._named(folder, name))
            if hashlib.sha256(self._get(f"{folder}/{name}")).hexdigest() != digest:
                raise InputError("the content does not match the manifest's SHA-256", file=self._named(folder, name))
        learner.load_state(f"{self.location}/{folder}/{RANKS}")
        return json.loads(self._get(f"{folder}/{LOOP}"))

    def remove(self) -> None:
        """Take all states away: a finished stage needs none."""
        if self._exists(self.path):
            self.storage.delete_dir(self.path)

    def _folders(self, path: str) -> Iterator[str]:
        found = self.storage.get_file_info(FileSelector(path, allow_not_found=True))
        return (info.path for info in found if info.type == FileType.Directory)

    def _exists(self, path: str) -> bool:
        return self.storage.get_file_info(path).type != FileType.NotFound

    def _put(self, name: str, content: bytes) -> None:
        with self.storage.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(content)

    def _get(self, name: str) -> bytes:
        with self.storage.open_input_stream(f"{self.path}/{name}") as stream:
            return stream.read()

    def _named(self, folder: str, name: str) -> str:
        return f"{self.location}/{folder}/{name}"


def _folder(step: int) -> str:
    return f"step-{step:06d}"

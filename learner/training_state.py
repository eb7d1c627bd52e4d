"""Everything a training run needs to go on as if it had not been interrupted, as a folder that proves what it holds.

DeepSpeed's files are pickled, and unpickling runs code. So a state is read only where every file in the folder has the
SHA-256 that the manifests, written last, say; whoever calls `load_training_state` names a folder of the run itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from item_index.input_error import InputError
from learner.engine import LearnerEngine

_REMEDY = "Remove this checkpoint, and training goes on from the one before it."


def save_training_state(engine: LearnerEngine, folder: str | Path, progress: dict[str, Any]) -> None:
    """Write this rank's part of weights, optimizer, schedule and random state, and `progress` (JSON).

    Every rank calls this, with an empty folder of its own; the files of all ranks together in one folder are a state.
    """
    target = Path(folder)
    (target / "state").mkdir(parents=True, exist_ok=True)  # DeepSpeed leaves this to one rank of each node
    engine.save_state(target)
    own = target / f"random-{engine.rank}.safetensors"
    random = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(engine.device)
    safetensors.torch.save_file(random, own)
    manifest = {
        "rank": engine.rank,
        "ranks": engine.ranks,
        "progress": progress,
        "sha256": {name: _sha256(target / name) for name in sorted(_files(target))},
    }
    unfinished = target / f"{manifest_name(engine.rank)}.unfinished"
    unfinished.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    unfinished.replace(target / manifest_name(engine.rank))


def manifest_name(rank: int) -> str:
    """File of a state that says what a rank wrote into it."""
    return f"manifest-{rank}.json"


def load_training_state(engine: LearnerEngine, folder: str | Path) -> dict[str, Any]:
    """Put the engine and the random generators where they were; returns the progress. Every rank calls this.

    Raises InputError that names the file where one is missing, has another content than its manifest says or is in no
    manifest, and where the number of ranks was another one.
    """
    source = Path(folder)
    progress = check_training_state(source, ranks=engine.ranks)
    restore_training_state(engine, source)
    return progress


def restore_training_state(engine: LearnerEngine, folder: str | Path) -> None:
    """`load_training_state` of a folder that was checked already. Every rank calls this."""
    source = Path(folder)
    engine.load_state(source)
    random = safetensors.torch.load_file(source / f"random-{engine.rank}.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and engine.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], engine.device)


def check_training_state(folder: Path, *, ranks: int) -> dict[str, Any]:
    """The progress that a state's manifests hold, after a look at every file; raises like `load_training_state`."""
    hashes: dict[str, str] = {}
    progress: dict[str, Any] = {}
    for rank in range(ranks):
        file = folder / manifest_name(rank)
        if not file.is_file():
            raise InputError("the manifest of this rank is missing", file=file, remedy=_REMEDY)
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            hashes |= manifest["sha256"]
            progress, written_by = manifest["progress"], manifest["ranks"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a manifest ({type(error).__name__})", file=file, remedy=_REMEDY) from error
        if written_by != ranks:
            raise InputError(
                f"the state is of {written_by} ranks, and this run has {ranks}", file=file, field="ranks",
                remedy=f"Go on with {written_by} learner ranks, or remove the checkpoints to start anew.",
            )  # fmt: skip
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise InputError("the state lacks this file", file=folder / name, remedy=_REMEDY)
        if _sha256(folder / name) != expected:
            raise InputError("the content does not match the manifest's SHA-256", file=folder / name, remedy=_REMEDY)
    unknown = [name for name in _files(folder) if name not in hashes and not name.startswith(("manifest-", "."))]
    if unknown:
        raise InputError("no manifest knows this file", file=folder / unknown[0], remedy=_REMEDY)
    return progress


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()

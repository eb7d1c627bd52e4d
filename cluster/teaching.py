"""Which teacher writes the reasoning traces, preferences and queries, and how a language model as teacher is reached.

Answers of an endpoint and of an engine go into the same kind of cache before the next question is asked, so a corpus
stage that was killed asks only for what is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.asking import asker_of, endpoint_of
from cluster.data_settings import TeacherSettings
from cluster.index import STAGE_FILE
from cluster.progress import console, progress_bar
from cluster.settings import ClusterSettings, Settings
from cluster.tracking import Tracker
from curriculum.teachers import INSTRUCTION, LanguageModelTeacher
from item_index.answer_cache import (
    Answer,
    AnswerWriter,
    Asker,
    AskingReport,
    CollectedAnswers,
    Failure,
    collect_answers,
    usable_text,
)
from item_index.input_error import InputError

CACHE_FOLDER = "teacher"
SECTION = "corpus.teacher"


def language_model_teacher(settings: Settings, folder: Path) -> LanguageModelTeacher | None:
    """The teacher that `corpus.teacher` names, None for the embedded one; nothing is asked or started yet.

    Args:
        settings: of the run.
        folder: of the corpus stage; answers are kept below it unless `corpus.teacher.cache` names a folder.

    Raises InputError for a key variable that is not set and a checkpoint that cannot chat.
    """
    wanted = settings.corpus.teacher
    if wanted.kind == "metadata":
        return None
    key_of: Callable[[str], str]
    if wanted.kind == "endpoint":
        endpoint = endpoint_of(wanted, section=SECTION, instruction=INSTRUCTION)
        key_of = endpoint.cache_key
        ask = asker_of(endpoint, "teacher", settings.cluster, distributed=wanted.distributed)
    else:
        key_of = engine_cache_key(wanted, settings.seed)
        ask = _engine_asker(wanted, settings.cluster)

    def answer(prompts: Sequence[str]) -> CollectedAnswers:
        cache = Path(wanted.cache or folder / CACHE_FOLDER)
        return collect_answers(len(prompts), prompts.__getitem__, key_of, cache, ask)

    return LanguageModelTeacher(wanted.kind, answer, fallback=wanted.fallback == "metadata")


def engine_cache_key(wanted: TeacherSettings, seed: int) -> Callable[[str], str]:
    """Key of a prompt: SHA-256 (hex) of all that shapes the answer, the content of the checkpoint included."""
    from transformers import AutoTokenizer  # takes seconds, and few runs have such a teacher

    folder = Path(wanted.checkpoint or "")
    if not (folder / "config.json").is_file():
        raise InputError("there is no checkpoint", file=folder, field=f"{SECTION}.checkpoint")
    if not AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).chat_template:
        raise InputError(
            "the tokenizer has no chat template", file=folder, field=f"{SECTION}.checkpoint",
            remedy="Name a checkpoint that was tuned for chat.",
        )  # fmt: skip
    content = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as opened:
            content.append([file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    shared = [content, INSTRUCTION, wanted.dtype, wanted.maximum_tokens, wanted.temperature]
    if wanted.temperature:
        shared.append(seed)
    digest = hashlib.sha256(json.dumps(shared).encode())

    def key_of(prompt: str) -> str:
        mine = digest.copy()
        mine.update(prompt.encode())
        return mine.hexdigest()

    return key_of


def _engine_asker(wanted: TeacherSettings, cluster: ClusterSettings) -> Asker:
    """Asks an engine that is started for it."""

    def ask(questions: Iterable[tuple[str, str]], count: int, cache: Path) -> AskingReport:
        from actors.rollout import ENVIRONMENT
        from actors.teacher import TeacherActor
        from cluster.bundles import ENGINE
        from cluster.placement import await_result, placed, ray_session

        report = AskingReport()
        waiting = iter(questions)
        with (
            ray_session(cluster),
            placed(cluster) as placement,
            AnswerWriter(cache) as writer,
            progress_bar("teacher", count) as bar,
        ):
            actor = TeacherActor.options(**placement.options(ENGINE, 0, ENVIRONMENT)).remote(
                str(Path(wanted.checkpoint or "").resolve()), instruction=INSTRUCTION,
                maximum_tokens=wanted.maximum_tokens, temperature=wanted.temperature,
                context_tokens=wanted.context_tokens, dtype=wanted.dtype, kv_cache_mib=cluster.kv_cache_mib,
                sequences=cluster.rollout_sequences, threads=cluster.threads,
            )  # fmt: skip
            await_result(actor.ready.remote(), "the teacher engine's start", cluster.start_seconds)
            while batch := list(itertools.islice(waiting, cluster.rollout_sequences)):
                # A seed out of the key: the same question is answered alike, whatever is asked beside it.
                seeds = [int(key[:14], 16) for key, _ in batch]
                reference = actor.answer.remote([prompt for _, prompt in batch], seeds)
                given = await_result(reference, "the teacher's answers", cluster.call_seconds)
                failures: dict[str, Failure] = {}
                answered = [said for said in given if said.ending != "prompt too long"]
                for (key, _), said in zip(batch, given, strict=True):
                    if said.ending == "prompt too long":
                        room = wanted.context_tokens - wanted.maximum_tokens
                        failures[key] = Failure(
                            said.ending,
                            f"the prompt has {said.prompt_tokens} tokens, context_tokens less maximum_tokens is {room}",
                        )
                        continue
                    text = usable_text(
                        said.text, complete=said.ending != "length", maximum_tokens=wanted.maximum_tokens
                    )
                    if isinstance(text, Failure):
                        failures[key] = text
                    else:
                        writer.write(key, Answer(text, said.prompt_tokens, said.completion_tokens))
                report += AskingReport(
                    failures,
                    calls=len(answered),
                    prompt_tokens=sum(said.prompt_tokens for said in answered),
                    completion_tokens=sum(said.completion_tokens for said in answered),
                )
                bar.advance(len(batch))
        return report

    return ask


def show_teacher(counts: dict[str, Any], folder: Path, tracker: Tracker) -> None:
    """Print and track what became of the targets of a language model as teacher, and what it cost.

    `counts` are those of `read_lessons`, with rejected, fell_back and left_out.
    """
    for message in counts["messages"]:
        console.print(f"teacher: warning: {message}", markup=False, highlight=False)
    reasons = {"failed": counts["failed"], "unusable": counts["unusable"]}
    listed = "; ".join(
        f"{name} {sum(by_reason.values())}"
        + (f" ({', '.join(f'{reason}: {count}' for reason, count in by_reason.items())})" if by_reason else "")
        for name, by_reason in reasons.items()
    )
    console.print(
        f"teacher: {counts['targets']} targets, {counts['asked']} asked, {counts['cached']} from the cache; {listed}; "
        f"rejected by the gate {counts['rejected']}; {counts['fell_back']} with the metadata teacher's text instead, "
        f"{counts['left_out']} left out",
        markup=False, highlight=False,
    )  # fmt: skip
    console.print(
        f"teacher: {counts['calls']} calls, {counts['retries']} of them retries; {counts['prompt_tokens']} prompt and "
        f"{counts['completion_tokens']} completion tokens (cached answers: {counts['cached_prompt_tokens']} and "
        f"{counts['cached_completion_tokens']})"
    )
    if counts["failed"]:
        console.print(
            f"teacher: to ask once more for the targets whose call failed, remove {folder / STAGE_FILE} and give the "
            "same command again"
        )
    flat: dict[str, float] = {f"teacher/{name}": value for name, value in counts.items() if isinstance(value, int)}
    for name, by_reason in reasons.items():
        flat[f"teacher/{name}"] = sum(by_reason.values())
    tracker.metrics(flat)

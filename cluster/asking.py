"""Asking a chat endpoint that the settings name, in this process or by the workers of a Ray Data job."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.data_settings import EndpointSettings
from cluster.progress import progress_bar
from cluster.settings import ClusterSettings
from item_index.answer_cache import Asker, AskingReport
from item_index.input_error import InputError

if TYPE_CHECKING:
    from item_index.chat_endpoint import Endpoint


def endpoint_of(settings: EndpointSettings, *, section: str, instruction: str) -> Endpoint:
    """The endpoint of a section with its key from the environment; InputError where the variable is not set."""
    from item_index.chat_endpoint import Endpoint  # the client takes seconds to import

    key = "none"  # the client wants one; an endpoint without keys does not look at it
    if settings.key_variable is not None:
        key = os.environ.get(settings.key_variable, "")
        if not key:
            raise InputError(
                f"the environment variable {settings.key_variable} is not set", field=f"{section}.key_variable",
                remedy="Put the endpoint's key into it.",
            )  # fmt: skip
    limits = settings.model_dump(include=set(EndpointSettings.model_fields) - {"url", "model", "key_variable", "cache"})
    return Endpoint(
        url=settings.url or "", model=settings.model or "", key=key, instruction=instruction, section=section, **limits
    )


def asker_of(endpoint: Endpoint, name: str, cluster: ClusterSettings, *, distributed: bool) -> Asker:
    """Asks the endpoint under a progress bar of that name; where it is `distributed`, by workers on Ray."""

    def ask(questions: Iterable[tuple[str, str]], count: int, cache: Path) -> AskingReport:
        if distributed:
            from cluster.index_jobs import ask_by_workers
            from cluster.placement import ray_session  # Ray is imported where it is used

            with ray_session(cluster):
                return ask_by_workers(endpoint, questions, cache, cluster, name=name)
        from item_index.chat_endpoint import ask_endpoint

        with progress_bar(name, count) as bar:
            return ask_endpoint(endpoint, questions, cache, bar.advance)

    return ask

"""The rollout actor: a vLLM engine that samples groups of responses under the item constraint."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import torch
from transformers import AutoTokenizer

from item_index.constraint import MODES, AnswerConstraint, Mode
from item_index.ragged import RaggedArray
from item_index.semantic_ids import SemanticIdIndex
from learner.rollouts import RolloutBatch, RolloutPrompts
from learner.weight_chunks import WeightChunk, tensors_of
from learner.weight_probe import EngineSums, WeightProbe

Sampler = Literal["constrained", "plain"]
ModelRunner = Literal["v1", "v2"]
PROCESSORS = {
    "v1": "actors.logits_processors:ItemConstraintProcessor",
    "v2": "actors.logits_processors_v2:ItemConstraintProcessorV2",
}
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
# Tokens of a key-value block on CPUs. Responses of a group share whole blocks of their prompt, so vLLM's own 128 would
# have most of a prompt of 200 tokens computed once per response.
CPU_BLOCK_TOKENS = 32
# The cache has its own size, so of this share vLLM only wants that much to be free at the start: a colocated learner
# may hold the rest of the GPU.
LEAST_GPU_SHARE = 0.05
logger = logging.getLogger(__name__)

# Read by vLLM when it is imported, so they are set for the actor's whole process.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    RUNNER_VARIABLE: "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(model_runner: ModelRunner, *, tensor_parallel: int = 1) -> dict[str, str]:
    """Variables of an actor's process, for its runtime environment."""
    # On CPUs vLLM would give every one of its processes cores of its own, whatever the actor has.
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if tensor_parallel > 1 else {}
    return {**ENVIRONMENT, RUNNER_VARIABLE: "1" if model_runner == "v2" else "0", **binding}


def prompt_seeds(seed: int, stream: int, count: int, offset: int = 0) -> list[int]:
    """One seed per prompt, far apart: vLLM gives response i the seed + i, so neighbouring seeds would share noise.

    Args:
        stream: of prompts: 0 for those that are fixed (probes, evaluation), 1 for those of training.
        offset: prompts of the stream that came before.
    """
    return [
        int.from_bytes(hashlib.sha256(f"{seed}/{stream}/{offset + number}".encode()).digest()[:7], "big")
        for number in range(count)
    ]


@dataclass(frozen=True)
class GenerationSummary:
    """What the driver wants to know of a batch of rollouts without fetching it.

    Attributes:
        weight_version: that sampled all of it.
        tokens: of all responses.
        seconds: that the engine worked on it.
    """

    weight_version: int
    tokens: int
    seconds: float


class RolloutEngine:
    """A vLLM engine under the item constraint, with weights that can be replaced in place."""

    def __init__(
        self,
        model_folder: str,
        index_folder: str,
        *,
        weight_version: int = 0,
        dtype: Literal["float32", "bfloat16"] = "float32",
        kv_cache_mib: int = 256,
        maximum_tokens: int = 2048,
        sequences: int = 256,
        threads: int | None = None,
        seed: int = 0,
        sampler: Sampler = "constrained",
        model_runner: ModelRunner = "v1",
        tensor_parallel: int = 1,
        weight_transfer: str = "object_store",
        constrained: bool = True,
    ) -> None:
        """Args:
        constrained: False leaves every response to the model, an ablation.
        weight_transfer: `object_store` (see `update_weights`), or a back end of vLLM's weight transfer (`nccl`, `ipc`).
        tensor_parallel: devices that share the model; above 1 vLLM starts a process for each.
        model_runner: of vLLM; the variable VLLM_USE_V2_MODEL_RUNNER of the actor's process must say the same, see
            `environment`. V2 needs a GPU, and has not been run on one yet.
        sampler: `constrained` samples semantic IDs without the full vocabulary where that is known to work, see
            `sampler`; `plain` is vLLM's own after the logits processor.
        """
        wanted, found = environment(model_runner)[RUNNER_VARIABLE], os.environ.get(RUNNER_VARIABLE)
        if found != wanted:
            raise ValueError(
                f"model runner {model_runner} needs {RUNNER_VARIABLE}={wanted}, but it is {found}: start the process "
                "with the variables that actors.rollout.environment gives"
            )
        from vllm import LLM  # takes seconds, and reads the environment
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        if threads:
            torch.set_num_threads(threads)
        share: dict[str, Any] = {} if current_platform.is_cpu() else {"gpu_memory_utilization": LEAST_GPU_SHARE}
        self.llm = LLM(
            model=model_folder,
            dtype=dtype,
            seed=seed,
            tensor_parallel_size=tensor_parallel,
            # vLLM's own Ray executor would lose the placement group of this actor.
            distributed_executor_backend="uni" if tensor_parallel == 1 else "mp",
            max_model_len=maximum_tokens,
            max_num_seqs=sequences,
            kv_cache_memory_bytes=kv_cache_mib * 2**20,
            **share,
            enforce_eager=True,
            enable_prefix_caching=True,
            block_size=CPU_BLOCK_TOKENS if current_platform.is_cpu() else None,
            # A prompt prefilled in parts rolls a seeded request's generator back, which torch cannot do on the CPU.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(maximum_tokens, 8192),
            # The constraint needs the tokens of one step before it can sample the next.
            async_scheduling=False,
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            logits_processors=[PROCESSORS[model_runner]],
            worker_extension_cls="actors.worker_extension.RolloutWorkerExtension",
            additional_config={"gream": {"index": index_folder, "tokenizer": model_folder, "constrained": constrained}},
            disable_log_stats=True,
            weight_transfer_config=(
                None if weight_transfer == "object_store" else WeightTransferConfig(backend=weight_transfer)
            ),
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        self.end_of_sequence = tokenizer.eos_token_id
        index = SemanticIdIndex.load(index_folder)
        self.constraint = AnswerConstraint.of(index, tokenizer, constrained=constrained)
        self.index_version = index.version
        self._weight_version = weight_version
        self._broken = ""
        self.sampler = "plain: asked for"
        if sampler == "constrained" and model_runner == "v2":
            self.sampler = "plain: the constrained sampler is for model runner v1"
        elif sampler == "constrained":
            reason = self.llm.collective_rpc("install_constrained_sampler")[0]
            self.sampler = f"plain: {reason}" if reason else "constrained"
        logger.info("sampler: %s", self.sampler)

    def sampler_in_use(self) -> str:
        """`constrained`, or `plain` and why."""
        return self.sampler

    def sampled_rows(self) -> dict[str, int]:
        """Rows sampled so far by the constrained sampler, by what was computed for them."""
        return dict(self.llm.collective_rpc("sampled_rows")[0])

    def weight_version(self) -> int:
        """Version of the weights that sample now."""
        return self._weight_version

    def generate(
        self, prompts: RolloutPrompts, *, responses: int, seeds: list[int], temperature: float = 1.0
    ) -> RolloutBatch:
        """Sample `responses` responses to every prompt, with log-probabilities after constraint and temperature.

        Raises ValueError, before anything is sampled, for a budget too small to answer and where all items are
        excluded.
        """
        from vllm import SamplingParams

        self._require_whole_weights()
        modes: list[Mode] = [MODES[int(reasoning)] for reasoning in prompts.reasoning]
        self.constraint.start(modes, prompts.budgets, list(prompts.excluded))

        parameters = [
            SamplingParams(
                n=responses,
                temperature=temperature,
                max_tokens=int(prompts.budgets[group]),
                seed=seeds[group],
                logprobs=0,
                stop_token_ids=[self.end_of_sequence],
                detokenize=False,
                extra_args={
                    "gream": {
                        "mode": modes[group],
                        "index_version": self.index_version,
                        "excluded": prompts.excluded[group].tolist(),
                    }
                },
            )
            for group in range(len(prompts))
        ]
        requests: list[Any] = [{"prompt_token_ids": tokens.tolist()} for tokens in prompts.tokens]
        outputs = self.llm.generate(requests, parameters, use_tqdm=False)
        sampled, log_probabilities = [], []
        for output in outputs:
            for completion in output.outputs:
                tokens = list(completion.token_ids)
                steps: Any = completion.logprobs
                sampled.append(tokens)
                log_probabilities.append([step[token].logprob for step, token in zip(steps, tokens, strict=True)])
        return RolloutBatch(
            prompts=prompts,
            group_sizes=np.full(len(prompts), responses, dtype=np.int64),
            responses=RaggedArray.of(sampled, np.int32),
            log_probabilities=RaggedArray.of(log_probabilities, np.float32),
            weight_versions=np.full(len(prompts), self._weight_version, dtype=np.int64),
            index_version=self.index_version,
        )

    @ray.method(num_returns=2)
    def generate_with_summary(
        self, prompts: RolloutPrompts, **arguments: Any
    ) -> tuple[RolloutBatch, GenerationSummary]:
        """`generate`, with a summary beside the batch, which can stay in the object store of the engine's node."""
        started = time.perf_counter()
        batch = self.generate(prompts, **arguments)
        seconds = time.perf_counter() - started
        return batch, GenerationSummary(self._weight_version, len(batch.responses.values), seconds)

    @ray.method(concurrency_group="health")
    def health(self) -> tuple[str, int]:
        """Node and process id; answered in a thread of its own, also while the engine generates."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def probe_weights(self, tokens: np.ndarray) -> WeightProbe[EngineSums]:
        """Sums over the weights in use, and the log-probabilities of some tokens, without a constraint."""
        from vllm import SamplingParams

        self._require_whole_weights()
        parameters = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        prompt: Any = {"prompt_token_ids": tokens.tolist()}
        (output,) = self.llm.generate([prompt], parameters, use_tqdm=False)
        places: Any = output.prompt_logprobs
        log_probabilities = [place[int(token)].logprob for place, token in zip(places[1:], tokens[1:], strict=True)]
        workers = self.llm.collective_rpc("weight_sums")
        sums = workers[0] if len(workers) == 1 else []  # of several devices each has a part, and some parts twice
        return WeightProbe(self._weight_version, np.array(log_probabilities, dtype=np.float32), sums)

    def update_weights(self, chunks: Sequence[WeightChunk | ray.ObjectRef], *, seconds: float = 600.0) -> int:
        """Replace the weights by those of another version and forget cached prefixes; returns the new version.

        Args:
            chunks: in order, or references to them.
            seconds: deadline for the arrival of each.

        Nothing is touched before all chunks are there, so a transfer that breaks off leaves the old weights. Where the
        loading itself fails, the weights are of two versions, and the engine does not sample any more.
        """
        arrived = [ray.get(one, timeout=seconds) if isinstance(one, ray.ObjectRef) else one for one in chunks]
        weights = list(tensors_of(arrived))
        self._reload(weights_iterator=iter(weights))
        self._weight_version = arrived[-1].version
        return self._weight_version

    def load_weights(self, model_folder: str, version: int) -> int:
        """Replace the weights by those of another checkpoint of the same model and tokenizer."""
        self._reload(weights_path=model_folder)
        self._weight_version = version
        return version

    def join_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Meet the learner's sender, by what vLLM's back end wants to know."""
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_transfer(self, version: int) -> None:
        """Get ready for the weights of a version; until they are whole, nothing is sampled."""
        self._require_whole_weights()
        self._broken = f"weights of version {version} have come in part over those of version {self._weight_version}"
        self.llm.start_weight_update()

    def receive_weights(self, update_info: Any) -> None:
        """Take some weights in, by what vLLM's back end sends with them. Where that fails the update is closed, and the
        engine does not sample any more."""
        received = False
        try:
            self.llm.update_weights({"update_info": update_info})
            received = True
        finally:
            if not received:
                self.llm.collective_rpc("shutdown_weight_transfer_engine")

    def finish_weight_transfer(self, version: int) -> None:
        """All weights of the version are there: make them those that sample."""
        self.llm.finish_weight_update()
        self._weights_are_whole()
        self._weight_version = version

    def _reload(self, **source: Any) -> None:
        self._require_whole_weights()
        self._broken = f"loading weights over those of version {self._weight_version} failed"
        self.llm.collective_rpc("reload_weights", kwargs=source)
        self._weights_are_whole()

    def _weights_are_whole(self) -> None:
        self.llm.collective_rpc("weights_changed")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be reset after a weight update: requests are still running")
        self._broken = ""

    def _require_whole_weights(self) -> None:
        if self._broken:
            raise RuntimeError(f"the rollout engine cannot sample: {self._broken}; start it anew")


# Ray knows concurrency groups, its type hints do not.
RolloutActor: Any = ray.remote(concurrency_groups={"health": 1})(RolloutEngine)  # type: ignore[call-overload]

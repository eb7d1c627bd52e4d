"""What a rollout engine asks of its vLLM workers; vLLM mixes this class into its own worker class."""

from __future__ import annotations

from typing import Any

import torch

from actors.constrained_sampler import TESTED_VERSIONS, ConstrainedSampler, vllm_version
from actors.logits_processors import ItemConstraintProcessor
from learner.weight_probe import EngineSum, EngineSums


class RolloutWorkerExtension:
    """Methods that `LLM.collective_rpc` calls by name."""

    model_runner: Any
    vllm_config: Any

    def install_constrained_sampler(self) -> str:
        """Put the constrained sampler in the place of the runner's where that is known to work.

        Returns why it was not put there, or nothing where it was.
        """
        runner, model = self.model_runner, self.model_runner.get_model()
        parallel = self.vllm_config.parallel_config
        logits_processor = getattr(model, "logits_processor", None)
        reasons = {
            f"vLLM {vllm_version()} is not among the tested {', '.join(TESTED_VERSIONS)}": (
                vllm_version() not in TESTED_VERSIONS
            ),
            "the model runs on several devices": parallel.world_size > 1,
            "tokens are drafted": self.vllm_config.speculative_config is not None,
            "the engine schedules asynchronously": self.vllm_config.scheduler_config.async_scheduling,
            "the model's head scales or caps its logits": (
                logits_processor is None or logits_processor.scale != 1.0 or logits_processor.soft_cap is not None
            ),
            "the model has no lm_head with weights": getattr(getattr(model, "lm_head", None), "weight", None) is None,
        }
        if any(reasons.values()):
            return next(reason for reason, holds in reasons.items() if holds)
        (processor,) = (
            processor
            for processor in runner.input_batch.logitsprocs.non_argmax_invariant
            if isinstance(processor, ItemConstraintProcessor)
        )
        runner.sampler = ConstrainedSampler(runner.sampler, processor, model.compute_logits)
        # The runner calls it and hands what it gives to the sampler, which calls the head for the rows that need it.
        model.compute_logits = lambda hidden_states: hidden_states
        self.weights_changed()
        return ""

    def weights_changed(self) -> None:
        """Bring up to date what was derived from the weights before they changed."""
        runner, model = self.model_runner, self.model_runner.get_model()
        # The CPU build packs linear weights when it loads; with tied embeddings a reload leaves the old packed head.
        if getattr(model.config, "tie_word_embeddings", False) and next(model.parameters()).device.type == "cpu":
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)
        if isinstance(runner.sampler, ConstrainedSampler):
            runner.sampler.take_weights(model.lm_head.weight, getattr(model.lm_head, "bias", None))

    @torch.no_grad()
    def weight_sums(self) -> EngineSums:
        """A sum over every parameter as it is used, with the checkpoint's names of what is fused in it."""
        model = self.model_runner.get_model()
        fused = getattr(model, "packed_modules_mapping", {})
        sums = []
        for name, weight in model.named_parameters():
            path, _, kind = name.rpartition(".")
            parent, _, module = path.rpartition(".")
            names = tuple(f"{parent}.{part}.{kind}".lstrip(".") for part in fused.get(module, [module]))
            packed = weight.numel() == 0  # the CPU build packs linear weights when it loads, and drops them
            if packed:
                layer = model.get_submodule(path)
                weight = layer.cpu_linear(torch.ones(1, layer.input_size, dtype=weight.dtype), weight, None)
            dtype = str(weight.dtype).removeprefix("torch.")
            sums.append(EngineSum(names, float(weight.sum(dtype=torch.float64)), dtype, packed))
        return sums

    def sampled_rows(self) -> dict[str, int]:
        """Rows sampled so far by what was computed for them; empty under the plain sampler."""
        sampler = self.model_runner.sampler
        return dict(sampler.rows) if isinstance(sampler, ConstrainedSampler) else {}

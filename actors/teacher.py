"""The teacher actor: a vLLM engine on a local checkpoint that answers chat prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
from transformers import AutoTokenizer


@dataclass(frozen=True)
class TeacherAnswer:
    """One answer as the engine gave it.

    Attributes:
        text: without special tokens; "" where the prompt did not fit.
        ending: "stop", "length" when the limit of tokens ended it, or "prompt too long" when nothing was generated.
        prompt_tokens, completion_tokens: their numbers.
    """

    text: str
    ending: str
    prompt_tokens: int
    completion_tokens: int


class TeacherEngine:
    """A vLLM engine with a fixed system message; temperature 0 is greedy."""

    def __init__(
        self,
        model_folder: str,
        *,
        instruction: str,
        maximum_tokens: int,
        temperature: float,
        context_tokens: int,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        kv_cache_mib: int = 256,
        sequences: int = 256,
        threads: int | None = None,
    ) -> None:
        from vllm import LLM  # takes seconds, and reads the environment

        if threads:
            torch.set_num_threads(threads)
        self._instruction = instruction
        self._maximum_tokens = maximum_tokens
        self._temperature = temperature
        self._prompt_room = context_tokens - maximum_tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        self._llm = LLM(
            model=model_folder,
            dtype=dtype,
            max_model_len=context_tokens,
            max_num_seqs=sequences,
            kv_cache_memory_bytes=kv_cache_mib * 2**20,
            enforce_eager=True,
            enable_prefix_caching=True,  # all prompts share the instruction
            # A prompt prefilled in parts rolls a seeded request's generator back, which torch cannot do on the CPU.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(context_tokens, 8192),
            generation_config="vllm",
            disable_log_stats=True,
        )

    def ready(self) -> bool:
        """Answers when the engine has started."""
        return True

    def answer(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[TeacherAnswer]:
        """Answer every prompt with the seed at its place, so an answer does not depend on its neighbours' seeds."""
        from vllm import SamplingParams

        messages = [
            [{"role": "system", "content": self._instruction}, {"role": "user", "content": prompt}]
            for prompt in prompts
        ]
        rendered = self._tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True
        )
        lengths = [len(tokens) for tokens in rendered["input_ids"]]
        fitting = [number for number, length in enumerate(lengths) if length <= self._prompt_room]
        parameters = [
            SamplingParams(temperature=self._temperature, max_tokens=self._maximum_tokens, seed=seeds[number])
            for number in fitting
        ]
        conversations: Any = [messages[number] for number in fitting]
        outputs = self._llm.chat(conversations, parameters, use_tqdm=False) if fitting else []
        answers = [TeacherAnswer("", "prompt too long", length, 0) for length in lengths]
        for number, output in zip(fitting, outputs, strict=True):
            completion = output.outputs[0]
            answers[number] = TeacherAnswer(
                completion.text, str(completion.finish_reason), lengths[number], len(completion.token_ids)
            )
        return answers


TeacherActor: Any = ray.remote(TeacherEngine)

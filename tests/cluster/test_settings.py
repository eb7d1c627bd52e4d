from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.settings import Settings, load_settings
from item_index.input_error import InputError


def sections(model: type[BaseModel]):
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from sections(field.annotation)


def test_every_field_has_a_description():
    for section in sections(Settings):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.lerning_rate=1", "'train.learning_rate'"),
        ("trian.steps=1", "'train'"),
        ("train.objective.clip_hi=1", "'train.objective.clip_high'"),
        ("sedd=1", "'seed'"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(override, nearest):
    with pytest.raises(InputError, match=f"nearest one is {nearest}"):
        load_settings(None, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "not of the form key=value"),
        ("train.responses=1", "train.responses"),
        ("seed=x", "seed"),
        ("seed.x=1", "seed"),
        ("train.reasoning_budget=12", "at least 13"),
        ("train.mini_batch_prompts=999", "must not exceed"),
        ("evaluation.beam_width=10", "evaluation.beam_width"),
    ],
)
def test_a_bad_override_is_an_error_that_names_it(override, message):
    with pytest.raises(InputError, match=message):
        load_settings(None, [override])


def test_overrides_replace_the_file_and_the_dump_loads_again(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("seed: 3\ntrain:\n  steps: 7\n")
    settings = load_settings(file, ["train.steps=9", "index.level_sizes=[4, 4]", "model.checkpoint=null"])
    assert (settings.seed, settings.train.steps, settings.index.level_sizes) == (3, 9, (4, 4))
    (tmp_path / "dump.yaml").write_text(settings.dump())
    assert load_settings(tmp_path / "dump.yaml") == settings


def test_missing_and_broken_files_are_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_settings(tmp_path / "none.yaml")
    for text in ("a: [", "- 1"):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(InputError, match=r"broken\.yaml"):
            load_settings(tmp_path / "broken.yaml")


def test_presets_load_and_defaults_are_the_papers():
    for preset in Path(__file__).parents[2].glob("configs/*.yaml"):
        load_settings(preset)
    train = Settings().train
    assert (train.responses, train.pass_k, train.learning_rate, train.steps) == (10, 4, 2e-6, 150)
    assert (train.prompts_per_step, train.mini_batch_prompts, train.objective.kl_coefficient) == (256, 64, 0.001)

"""Settings: what can be said, how it is checked, and how an error reads."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cluster.learning_settings import TaskSettings
from cluster.settings import Settings, load_settings
from curriculum.alignment import TASKS
from item_index.input_error import InputError
from learner.objective import ObjectiveSettings

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


def all_fields(model, prefix=""):
    """(dotted key, field) of every setting, sections included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_fields(field.annotation, f"{prefix}{name}.")


def test_every_setting_has_a_default_and_a_description():
    fields = dict(all_fields(Settings))
    assert "train.objective.clip_low" in fields
    for key, field in fields.items():
        assert not field.is_required(), key
        assert field.description, key
        assert field.description.endswith("."), key


def test_the_defaults_are_the_papers_and_the_objectives_own():
    settings = load_settings(None)
    assert settings.train.objective.model_dump() == vars(ObjectiveSettings())
    assert (settings.train.steps, settings.train.prompts_per_step, settings.train.mini_batch_prompts) == (150, 256, 64)
    assert (settings.train.responses, settings.train.pass_k, settings.train.learning_rate) == (10, 4, 2e-6)
    assert settings.index.level_sizes == (256,) * 4


def test_every_alignment_task_has_its_settings_and_takes_part_in_full_by_default():
    alignment = load_settings(None).sft.alignment
    tasks = {name: value for name, value in alignment if isinstance(value, TaskSettings)}
    assert list(tasks) == [task.name for task in TASKS]
    assert {(task.weight, task.cap) for task in tasks.values()} == {(1.0, None)}
    changed = load_settings(None, ["sft.alignment.next_title={weight: 0.5, cap: 100}"]).sft.alignment
    assert changed.next_title == TaskSettings(weight=0.5, cap=100)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_the_presets_load(file):
    settings = load_settings(file)
    for key, value in yaml.safe_load(file.read_text()).items():
        written = settings.model_dump(mode="json")[key]
        assert written == value or set(value) <= set(written)


def test_there_are_presets():
    assert CONFIGS


def test_overrides_replace_the_files_values_and_are_read_as_yaml(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("seed: 3\ntrain:\n  steps: 5\n  responses: 4\n")
    settings = load_settings(
        file,
        ["train.steps=7", "index.level_sizes=[4, 3]", "index.balanced=true", "evaluation.users=null",
         "train.learning_rate=1.0e-4", "train.objective.token_mean=global", "run_folder=runs/a=b"],
    )  # fmt: skip
    assert (settings.seed, settings.train.steps, settings.train.responses) == (3, 7, 4)
    assert settings.index.level_sizes == (4, 3)
    assert settings.index.balanced is True
    assert settings.evaluation.users is None
    assert settings.train.learning_rate == 1e-4
    assert settings.train.objective.token_mean == "global"
    assert settings.run_folder == "runs/a=b"


def test_what_is_dumped_loads_as_the_same_settings(tmp_path):
    settings = load_settings(None, ["train.steps=7", "index.level_sizes=[4, 3]"])
    file = tmp_path / "settings.yaml"
    file.write_text(settings.dump())
    assert load_settings(file) == settings


def test_an_empty_file_gives_the_defaults(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("# nothing\n")
    assert load_settings(file) == Settings()


@pytest.mark.parametrize(
    ("override", "wrong", "nearest"),
    [
        ("train.stepz=1", "train.stepz", "train.steps"),
        ("trian.steps=1", "trian", "train"),
        ("train.objective.clip=0.1", "train.objective.clip", "train.objective.clip_low"),
        ("index.level_size=[2]", "index.level_size", "index.level_sizes"),
        ("sead=1", "sead", "seed"),
        ("sft.alignment.next_titel={cap: 1}", "sft.alignment.next_titel", "sft.alignment.next_title"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path, override, wrong, nearest):
    with pytest.raises(InputError, match=f"there is no key '{wrong}'; the nearest one is '{nearest}"):
        load_settings(None, [override])
    # The same key in a file, which is then named.
    key, _, text = override.partition("=")
    values = yaml.safe_load(text)
    for part in reversed(key.split(".")):
        values = {part: values}
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError, match=f"settings.yaml.*'{wrong}'.*'{nearest}"):
        load_settings(file)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps=-1", "train.steps"),
        ("train.steps=many", "train.steps"),
        ("train.responses=1", "train.responses"),
        ("train.objective.dual_clip=1", "train.objective.dual_clip"),
        ("train.objective.dual_clip=1.1", r"train.objective: .*dual_clip must be above 1 \+ clip_high"),
        ("train.objective.token_mean=mean", "train.objective.token_mean"),
        ("train.objective.valid_mass_coefficient=-1", "train.objective.valid_mass_coefficient"),
        ("train={dtype: bfloat16, zero_stage: 0}", "train.dtype bfloat16 needs train.zero_stage"),
        ("train={offload_optimizer: true, zero_stage: 0}", "train.offload_optimizer needs train.zero_stage"),
        ("train={low_rank: {}, zero_stage: 3}", "train.low_rank works with train.zero_stage 0, 1 and 2"),
        ("train.low_rank.dropout=0.1", "train.low_rank.dropout must be 0"),
        ("train.rewards=[{reward: exact_match, modes: [direct]}]", "no term that counts in reasoning mode"),
        ("index.level_sizes=[]", "index.level_sizes"),
        ("index.level_sizes=[4, x]", r"index.level_sizes"),
        ("index.embedding=word2vec", "index.embedding"),
        ("index.embedding=language_model", "index: .*embedding language_model needs encoder_path"),
        ("index.encoder_path=models/x", "index: .*encoder_path is set, but embedding tf_idf reads no model"),
        ("index.collaborative_weight=-1", "index.collaborative_weight"),
        ("index.fusion.url=http://host/v1", "index.fusion: .*model has to name its model"),
        ("index.fusion={url: 'host:80', model: m}", "index.fusion: .*has to begin with http"),
        ("index.fusion={url: 'https://me:secret@host/v1', model: m}", "index.fusion: .*must hold no credentials"),
        ("index.fusion.key=abc", "no key 'index.fusion.key'; the nearest one is 'index.fusion.key_variable'"),
        ("corpus.teacher.kind=oracle", "corpus.teacher.kind"),
        ("corpus.teacher.kind=endpoint", "corpus.teacher: .*kind endpoint needs url"),
        ("corpus.teacher={kind: endpoint, url: 'http://h/v1'}", "corpus.teacher: .*model has to name its model"),
        ("corpus.teacher={url: 'http://h/v1', model: m}", "url is set, but kind metadata does not use it"),
        ("corpus.teacher.key_variable=KEY", "key_variable is set, but kind metadata does not use it"),
        ("corpus.teacher.kind=engine", "kind engine needs checkpoint"),
        ("corpus.teacher={kind: engine, checkpoint: c, model: m}", "model is set, but kind engine does not use it"),
        ("corpus.teacher={kind: engine, checkpoint: c, distributed: true}", "kind engine makes none"),
        ("corpus.teacher={kind: engine, checkpoint: c, temperature: null}", "kind engine needs a temperature"),
        ("corpus.teacher={kind: engine, checkpoint: c, context_tokens: 1024}", "leaves no room for a prompt"),
        ("corpus.teacher.fallback=metadata", "kind metadata calls no model"),
        ("corpus.teacher.distributed=true", "kind metadata makes none"),
        ("data.minimum_interactions=2", "data.minimum_interactions"),
        ("corpus.rl_holdout=1", "corpus.rl_holdout"),
        ("cluster.dtype=float16", "cluster.dtype"),
        ("sft.alignment.next_item.weight=-1", "sft.alignment.next_item.weight"),
        ("sft.alignment.next_item.weight=.inf", "sft.alignment.next_item.weight"),
        ("sft.alignment.next_item.cap=-1", "sft.alignment.next_item.cap"),
        ("sft.alignment.maximum_text_tokens=0", "sft.alignment.maximum_text_tokens"),
        ("train.reasoning_budget=5", "train.reasoning_budget of 5 tokens"),
        ("train.mini_batch_prompts=300", "train.mini_batch_prompts"),
        ("seed=-1", "seed"),
        ("seed=", "seed"),
        ("train=5", "train"),
    ],
)
def test_a_value_out_of_range_is_named(override, named):
    with pytest.raises(InputError, match=named):
        load_settings(None, [override])


@pytest.mark.parametrize(
    "teacher",
    ["{kind: metadata}", "{kind: endpoint, url: 'http://h/v1', model: m, key_variable: K, distributed: true}",
     "{kind: endpoint, url: 'http://h/v1', model: m, temperature: null, fallback: metadata}",
     "{kind: engine, checkpoint: c, fallback: metadata, temperature: 0.7}"],
)  # fmt: skip
def test_every_kind_of_teacher_can_be_set(teacher):
    assert load_settings(None, [f"corpus.teacher={teacher}"]).corpus.teacher.kind in teacher


def test_several_problems_are_told_at_once():
    with pytest.raises(InputError) as caught:
        load_settings(None, ["train.stepz=1", "sft.passes=0"])
    assert "train.stepz" in str(caught.value)
    assert "sft.passes" in str(caught.value)


@pytest.mark.parametrize("override", ["train.steps", "seed.x=1", "index.level_sizes.0=4", "train.steps=[1"])
def test_an_override_that_cannot_be_read_is_an_input_error(tmp_path, override):
    file = tmp_path / "settings.yaml"
    file.write_text("seed: 1\nindex:\n  level_sizes: [4, 3]\n")
    with pytest.raises(InputError, match=r"override|seed|level_sizes|steps"):
        load_settings(file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [("train: [", "not YAML"), ("- 1\n- 2\n", "mapping"), ("train: 5\n", "train"), ("train:\n", "train")],
)
def test_a_broken_file_is_named(tmp_path, text, message):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_settings(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.yaml.*does not exist"):
        load_settings(tmp_path / "nowhere.yaml")


def test_settings_cannot_be_changed_after_they_were_checked():
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 5


def test_optimizer_steps_count_mini_batches_that_are_not_full():
    settings = load_settings(
        None, ["train.steps=3", "train.prompts_per_step=5", "train.mini_batch_prompts=2", "train.epochs=2"]
    )
    assert settings.train.optimizer_steps == 3 * 3 * 2

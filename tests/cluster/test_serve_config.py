"""The Serve config file: Serve's schema takes it, its arguments fit, and from them the application is made."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from cluster.serving import ServeArguments, application, serve_run, served_settings
from cluster.serving_settings import ServingSettings
from item_index.input_error import InputError

FILE = Path(__file__).resolve().parents[2] / "ray_serve.yaml"


def arguments(run, *overrides):
    return ServeArguments(run=str(run), overrides=overrides)


@pytest.fixture
def run(supervised):
    return supervised[0]


def test_serve_takes_the_file_and_the_run_its_arguments(run, monkeypatch):
    schema = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    (app,) = schema.applications
    assert app.import_path == "cluster.serving:application"
    assert schema.http_options.host == "127.0.0.1"
    asked = ServeArguments.model_validate(app.args)
    serving = served_settings(str(run), asked.overrides).serving
    assert (serving.reasoning.maximum, serving.reasoning.gpus) == (8, 1)
    monkeypatch.setenv("GREAM_KEYS", "one,two")
    application(arguments(run, "serving.checkpoint=sft", *asked.overrides))


def test_a_named_variable_without_keys_is_an_error(run, monkeypatch):
    monkeypatch.setenv("GREAM_KEYS", " , ")
    with pytest.raises(InputError, match="GREAM_KEYS holds no key"):
        application(arguments(run, "serving.checkpoint=sft", "serving.key_variable=GREAM_KEYS"))


def test_a_service_that_is_not_waited_for_needs_a_cluster(run, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="would end with this command"):
        serve_run(str(run), ["serving.checkpoint=sft"], wait=False)


def test_a_run_without_the_checkpoint_is_an_error(run):
    with pytest.raises(InputError, match="no weights"):
        application(arguments(run))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "name the keys by key_variable"),
        ({"direct": {"minimum": 2, "maximum": 1}}, "maximum must be at least minimum"),
        ({"default_chains": 20}, "must not exceed maximum_chains"),
        ({"keys": ["secret"]}, "Extra inputs"),
    ],
)
def test_settings_that_do_not_fit_are_errors(settings, message):
    with pytest.raises(ValidationError, match=message):
        ServingSettings.model_validate(settings)

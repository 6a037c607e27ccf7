"""The reference of the settings: every one has help, each default stands once."""

import inspect
import json

import pytest

from dist_contrastive.config import RunConfig
from dist_contrastive.config.reference import REQUIRED, as_json, help_of, reference
from dist_contrastive.data.stream.shard_stream import ShardStream
from dist_contrastive.errors import ConfigError
from dist_contrastive.losses import LOSSES
from dist_contrastive.models import GENERATORS, PAIR_ENCODERS
from dist_contrastive.settings import Settings, settings_in
from dist_contrastive.tasks import TASKS
from dist_contrastive.tasks.feature_spaces import FEATURE_SPACES

COMPONENTS = {**LOSSES, **GENERATORS, **PAIR_ENCODERS, **TASKS, **FEATURE_SPACES}


def settings_of(cls: type[Settings], seen: dict[type[Settings], None]) -> dict:
    """The class and all that its fields may hold."""
    if cls not in seen:
        seen[cls] = None
        for field in cls.model_fields.values():
            for inner in settings_in(field.annotation, field.metadata):
                settings_of(inner, seen)
    return seen


ALL = list(settings_of(RunConfig, {}))


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__qualname__)
def test_every_setting_has_help(cls):
    assert [name for name in cls.model_fields if not help_of(cls, name)] == []


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__qualname__)
def test_no_default_is_stated_twice(cls):
    """Neither by a class and the one that it inherits from, nor by the component's constructor."""
    for name, field in cls.model_fields.items():
        if name in cls.__annotations__ and not field.is_required():
            for base in cls.__mro__[1:]:
                inherited = getattr(base, "model_fields", {}).get(name)
                if inherited is not None and name in base.__annotations__:
                    assert field.get_default(call_default_factory=True) != inherited.get_default(
                        call_default_factory=True
                    ), f"{name} is that of {base.__qualname__}"


@pytest.mark.parametrize("cls", [*COMPONENTS.values(), ShardStream], ids=lambda cls: cls.__name__)
def test_constructors_state_no_default_of_a_setting(cls):
    config = getattr(cls, "Config", None)
    if config is not None:
        parameters = inspect.signature(cls.__init__).parameters.values()
        stated = {p.name for p in parameters if p.default is not p.empty}
        assert not stated & config.model_fields.keys() - {"loss", "encoder"}


def row(key: str, when: str = ""):
    (found,) = [x for x in reference() if x.key == key and when in x.when]
    return found


def test_rows_state_type_default_limits_and_unit():
    lr = row("optim.lr")
    assert (lr.type, lr.default, lr.limits) == ("float", "0.001", "more than 0")
    assert "learning rate" in lr.help
    assert row("train.steps").default == REQUIRED
    assert row("backend.timeout_s").unit == "seconds"
    assert row("data.cache.limit_mb").unit == "MiB"
    assert row("train.profile_steps").type == "[int, int] | null"
    assert row("train.keep_best.mode").type == "min | max"
    temperature = row("task.loss.temperature", "=ntxent")
    assert temperature.when.startswith("task.loss.name=")
    assert temperature.limits == "more than 0"


def test_settings_of_several_tasks_stand_once():
    heads = [x for x in reference() if x.key == "task.head.hidden"]
    assert len(heads) == 1
    assert {"two_view", "moco", "hybrid"} <= set(heads[0].when.partition("=")[2].split("|"))


def test_a_section_is_any_name_in_the_key():
    assert {x.key.split(".")[0] for x in reference("optim")} == {"optim"}
    assert all("loss" in x.key.split(".") for x in reference("loss"))
    assert {x.key for x in reference("loss")} < {x.key for x in reference("task")}
    with pytest.raises(ConfigError, match=r"optm.*optim"):
        reference("optm")


def test_json_holds_values():
    rows = {x["key"]: x for x in json.loads(as_json(reference("optim")))}
    assert rows["optim.lr"]["default"] == 1e-3
    steps = json.loads(as_json([row("train.steps")]))[0]
    assert steps["required"]
    assert steps["default"] is None

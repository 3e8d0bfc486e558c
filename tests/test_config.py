"""The settings' schema: typed overrides, the nearest key, budgets, one line per mistake."""

import subprocess
import sys
from typing import get_args

import pytest

from sfumato import config
from sfumato.config import (
    RENAMED,
    Settings,
    apply_overrides,
    nearest_key,
    parse_budget,
    read_settings,
    setting,
    setting_keys,
)
from sfumato.errors import UserError


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.denoiser.lr=3e-4", 3e-4),
        ("train.codec.steps=1200", 1200),
        ("codec.bottleneck=none", "none"),
        ("codec.levels=8,5,5", (8, 5, 5)),
        ("codec.levels=[8, 5]", (8, 5)),
        ("sample.interval=0.1,0.9", (0.1, 0.9)),
        ("data.skip_bad=true", True),
        ("denoiser.schedule_settings.tau=0.1", {"tau": 0.1}),
        ("data.label_from=(.)=x", "(.)=x"),
        ("denoiser.width=null", None),
    ],
)
def test_overrides_are_typed(override: str, expected: object):
    value: object = apply_overrides(Settings(), [override])
    for name in override.split("=")[0].removesuffix(".tau").split("."):
        value = getattr(value, name)
    assert value == expected
    assert type(value) is type(expected)


def test_overrides_leave_the_rest_and_the_original_alone():
    before = Settings(seed=3)
    after = apply_overrides(before, ["codec.width=48", "codec.depth=2", "codec.width=64"])
    assert (after.seed, after.codec.width, after.codec.depth) == (3, 64, 2)
    assert before == Settings(seed=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.denoisr.lr=1", "did you mean 'train.denoiser.lr'?"),
        ("codec.widht=64", "did you mean 'codec.width'?"),
        ("guidence=2", "did you mean 'sample.guidance'?"),
        ("skip-bad=true", "did you mean 'data.skip_bad'?"),
        ("codec=3", "unknown setting 'codec'"),
        ("codec.width", "write key=value"),
        ("=3", "write key=value"),
        ("codec.width=wide", "codec.width=wide"),
        ("codec.width=-1", "greater than or equal to 1"),
        ("codec.bottleneck=klx", "'kl', 'vq', 'fsq', 'none' or 'identity'"),
        ("denoiser.schedule_settings.tau=x", "denoiser.schedule_settings.tau=x"),
        ("seed=null", "seed=None"),
    ],
)
def test_a_bad_override_is_one_clear_line(override: str, message: str):
    with pytest.raises(UserError) as caught:
        apply_overrides(Settings(), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == 2


def test_settings_survive_json():
    settings = apply_overrides(Settings(), ["codec.levels=8,5", "sample.interval=0.2,1", "train.codec.batch=64"])
    assert read_settings(settings.model_dump(mode="json")) == settings


def test_unknown_keys_of_a_file_are_named():
    with pytest.raises(UserError, match=r"unknown setting 'codec.widht': did you mean 'codec.width'"):
        read_settings({"codec": {"widht": 3}})


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(old: str, new: str):
    message = f"^setting '{old}' is now '{new}'$"
    with pytest.raises(UserError, match=message):
        apply_overrides(Settings(), [f"{old}=1"])
    values: object = 1
    for name in reversed(old.split(".")):
        values = {name: values}
    with pytest.raises(UserError, match=message):
        read_settings(values)
    assert old not in setting_keys() and setting(Settings(), new) is None


def test_an_old_name_of_a_table_of_numbers_is_refused_with_the_new_one():
    message = r"^setting 'denoiser\.times_settings\.std' is now 'denoiser\.time_sampling_settings\.std'$"
    with pytest.raises(UserError, match=message):
        apply_overrides(Settings(), ["denoiser.times_settings.std=1"])


@pytest.mark.parametrize(("old", "new"), [("ends", "both_ends"), ("early", "noise"), ("late", "data")])
def test_an_old_time_grid_is_refused_with_its_new_name(old: str, new: str):
    message = f"^sample.grid={old} is now {new}$"
    with pytest.raises(UserError, match=message):
        apply_overrides(Settings(), [f"sample.grid={old}"])
    with pytest.raises(UserError, match=message):
        read_settings({"sample": {"grid": old}})
    assert apply_overrides(Settings(), [f"sample.grid={new}"]).sample.grid == new


def test_assigned_values_are_checked():
    settings = Settings()
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        settings.codec.width = 0


def test_every_setting_is_described():
    def fields(section: type[config.Section]):
        for name, field in section.model_fields.items():
            yield section.__name__, name, field.description
            if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
                yield from fields(field.annotation)

    assert [(section, name) for section, name, text in fields(Settings) if not text] == []


def test_every_key_can_be_set_back_to_itself():
    """`setting_keys` names nothing that `apply_overrides` refuses."""
    for key in setting_keys():
        value: object = Settings()
        for name in key.split("."):
            value = getattr(value, name)
        assert apply_overrides(Settings(), [f"{key}={'null' if value is None else value}"]) == Settings()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10m", 600),
        ("90s", 90),
        ("1h30m", 5400),
        ("300", 300),
        ("1.5h", 5400),
        ("2m30s", 150),
        ("2m30", 150),
        ("10 min", 600),
        ("20", 20),
    ],
)
def test_budgets(text: str, seconds: float):
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "soon", "-3m", "1d", "30m1h", "19s", "0", "nan", "1e3"])
def test_bad_budgets(text: str):
    with pytest.raises(UserError) as caught:
        parse_budget(text)
    assert "\n" not in str(caught.value)


def test_nearest_weighs_the_last_part():
    assert nearest_key("lr", list(setting_keys())).endswith(".lr")


def test_names_are_those_of_the_tables():
    """What the schema allows exists: its choices are keys of the tables that resolve them."""
    from sfumato.core.sampler import SAMPLERS
    from sfumato.core.schedule import SCHEDULES
    from sfumato.nn import NETS

    for choices, table in [(config.SamplerName, SAMPLERS), (config.ScheduleName, SCHEDULES), (config.Net, NETS)]:
        assert set(get_args(choices)) <= set(table)


def test_no_torch_is_loaded():
    code = "import sys, sfumato.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

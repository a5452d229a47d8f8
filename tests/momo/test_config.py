from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from momo.config import config_from_dict, describe_options, load_config, option, to_dict, to_yaml
from momo.errors import ConfigError
from momo.sensors import SENSORS, sensor_from_instrument, sensor_named


@dataclass
class Inner:
    samples: int = option(10, "how many")


@dataclass
class Outer:
    out: str = option(help="where to")
    rate: float = option(0.5, "how fast")
    names: list[str] = option([], "who")
    train: Inner = option(Inner)
    parts: list[Inner] = option([], "pieces")


def test_file_then_overrides(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("out: a\ntrain: {samples: 3}\nnames: [x]\n")
    config = load_config(Outer, path, ["train.samples=7", "rate=1"])
    assert config == Outer(out="a", rate=1.0, names=["x"], train=Inner(samples=7))
    assert isinstance(config.train, Inner)
    path.write_text(to_yaml(config))
    assert load_config(Outer, path) == config == config_from_dict(Outer, to_dict(config))


def test_help_lists_every_field():
    assert list(describe_options(Outer)) == [
        ("out", "(required)", "where to"),
        ("rate", "0.5", "how fast"),
        ("names", "[]", "who"),
        ("train.samples", "10", "how many"),
        ("parts", "[]", "pieces"),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=a", "trian.samples=1"], r"unknown configuration key: trian .*did you mean 'train'\?$"),
        (["out=a", "train.sample=1"], r"train.sample in override.*did you mean 'train.samples'"),
        (["out=a", "parts=[{sample: 1}]"], "did you mean 'parts.samples'"),
        ([], "a required key has no value: out"),
        (["out=a", "rate=fast"], r"does not fit: rate in override 'rate=fast'"),
        (["out=a", "train=3"], "does not fit"),
        (["out"], "an override cannot be read: out"),
    ],
)
def test_bad_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, overrides)


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="the configuration file does not exist"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="the configuration file cannot be read"):
        load_config(Outer, tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="a configuration is not a mapping"):
        load_config(Outer, tmp_path / "list.yaml")


def test_sensors_by_name_and_by_label():
    assert sensor_named("hirise") is SENSORS["HiRISE"]
    assert sensor_from_instrument(' "CTX" ').name == "CTX" and sensor_from_instrument("HRSC") is None
    with pytest.raises(ConfigError, match=r"sensor has an unknown value: 'THEMS'.*did you mean 'THEMIS'"):
        sensor_named("THEMS")


@dataclass
class Kinds:
    name: str = "n"
    places: list[str] = option([])
    maybe: list[str] | None = option(None)
    factors: dict[str, float] = option({})
    either: Any = None


@pytest.mark.parametrize("item", ["name=[a,b", "name={a: 1", "name='a", "name=[a] b"])
def test_an_override_that_is_no_yaml(item):
    with pytest.raises(ConfigError, match="the value of an override cannot be read: name=.*close every bracket"):
        load_config(Kinds, None, [item])


@pytest.mark.parametrize(
    ("item", "rule"),
    [
        ("places=a", r"places is a list, in brackets. Next: write places=\[a\]"),
        ("maybe=a", r"maybe is a list, in brackets. Next: write maybe=\[a\]"),
        ("places={a: b}", r"places is a list, in brackets. Next: write places=\[...\]"),
        ("factors=0.5", r"factors is a mapping, in braces. Next: write factors={name: 0.5}"),
        ("factors=[1]", r"factors is a mapping, in braces. Next: write factors={name: ...}"),
    ],
)
def test_one_value_is_not_taken_for_several(item, rule):
    with pytest.raises(ConfigError, match=rule):
        load_config(Kinds, None, [item])


def test_values_of_the_right_kind_pass():
    config = load_config(Kinds, None, ["places=[a]", "maybe=null", "factors={a: 1}", "either=[x]"])
    assert (config.places, config.maybe, config.factors, config.either) == (["a"], None, {"a": 1.0}, ["x"])
    assert load_config(Kinds, None, ["places=[a]", "maybe=${places}"]).maybe == ["a"]
    assert load_config(Kinds, None, ["places=???"]).places == []


def test_words_that_are_not_alike_are_not_suggested():
    with pytest.raises(ConfigError) as caught:
        load_config(Kinds, None, ["xyz=1"])
    assert "did you mean" not in str(caught.value)

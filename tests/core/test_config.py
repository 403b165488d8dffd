"""adapter_config.json: defaults, lossless round trips, and every way to be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_core.config import MAX_CONFIG_BYTES, MAX_RANK, AdapterConfig, FineTuneType, LoRAParameters
from adapters_core.errors import InvalidAdapterError

_KNOWN = {"fine_tune_type", "num_layers", "lora_parameters", "peft_type"}
_PARAMETERS = {"rank", "scale", "dropout", "keys", "alpha"}

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
_parameters = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(1, MAX_RANK),
        "scale": st.floats(-1e6, 1e6) | st.integers(-1000, 1000),
        "dropout": st.floats(0, 1, exclude_max=True),
        "keys": st.none() | st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=5),
    },
)
_configs = st.fixed_dictionaries(
    {},
    optional={
        "fine_tune_type": st.sampled_from(["lora", "dora"]),
        "num_layers": st.integers(-1, 200),
        "lora_parameters": st.tuples(
            st.dictionaries(st.text().filter(lambda name: name not in _PARAMETERS), _json, max_size=3),
            _parameters,
        ).map(lambda pair: {**pair[0], **pair[1]}),
    },
)
_extras = st.dictionaries(st.text().filter(lambda name: name not in _KNOWN), _json, max_size=4)


def _write(directory: Path, content: object) -> Path:
    directory.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "adapter_config.json").write_text(text)
    return directory


def _problems(directory: Path) -> tuple[str, ...]:
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterConfig.from_directory(directory)
    assert caught.value.source == directory.name
    assert caught.value.problems
    assert str(directory) not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    return caught.value.problems


def test_defaults_are_the_ones_of_the_format() -> None:
    config = AdapterConfig()
    assert config.fine_tune_type is FineTuneType.LORA
    assert config.num_layers == 16
    assert config.lora_parameters == LoRAParameters(rank=8, scale=10.0, dropout=0.0, keys=None)
    assert config.to_values() == {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "lora_parameters": {"rank": 8, "scale": 10.0, "dropout": 0.0},
    }


@given(extras=_extras, known=_configs)
def test_everything_that_was_read_is_written_and_read_again(
    tmp_path_factory: pytest.TempPathFactory, extras: dict[str, Any], known: dict[str, Any]
) -> None:
    values = {**extras, **known}
    directory = _write(tmp_path_factory.mktemp("config"), values)
    config = AdapterConfig.from_directory(directory)
    config.write(directory / "written.json")
    written = json.loads((directory / "written.json").read_text())

    for name, value in values.items():
        if name != "lora_parameters":
            assert written[name] == value
    for name, value in values.get("lora_parameters", {}).items():
        assert written["lora_parameters"][name] == value
    assert written.keys() - values.keys() <= _KNOWN
    assert AdapterConfig.from_file(directory / "written.json").to_values() == config.to_values()
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []


def test_the_config_that_mlx_lm_writes_is_kept_whole(tmp_path: Path) -> None:
    values = {
        "adapter_path": "adapters",
        "batch_size": 4,
        "config": None,
        "data": "data",
        "fine_tune_type": "lora",
        "grad_checkpoint": False,
        "iters": 1000,
        "learning_rate": 1e-5,
        "lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 20.0},
        "lr_schedule": None,
        "model": "some/model",
        "num_layers": 16,
        "optimizer_config": {"adam": {}, "adamw": {"betas": [0.9, 0.98]}},
        "seed": 0,
    }
    assert AdapterConfig.from_directory(_write(tmp_path, values)).to_values() == values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", -4),
        ("rank", MAX_RANK + 1),
        ("rank", True),
        ("rank", 8.0),
        ("rank", "8"),
        ("rank", None),
        ("scale", True),
        ("scale", "10"),
        ("scale", None),
        ("scale", 1e300),
        ("scale", -1e7),
        ("dropout", -0.1),
        ("dropout", 1.0),
        ("dropout", True),
        ("dropout", "0"),
        ("keys", []),
        ("keys", "q_proj"),
        ("keys", [""]),
        ("keys", [1]),
        ("keys", [None]),
        ("keys", {"q_proj": 1}),
        ("keys", ["x" * 600]),
    ],
)
def test_impossible_parameters_are_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    problems = _problems(_write(tmp_path, {"num_layers": 4, "lora_parameters": {field: value}}))
    assert len(problems) == 1
    assert f"lora_parameters.{field}" in problems[0]
    assert "expected" in problems[0]
    assert "got" in problems[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", "16"),
        ("num_layers", 1.5),
        ("num_layers", True),
        ("num_layers", None),
        ("num_layers", 10**400),
        ("fine_tune_type", "prefix"),
        ("fine_tune_type", None),
        ("fine_tune_type", 3),
        ("fine_tune_type", ["lora"]),
        ("lora_parameters", None),
        ("lora_parameters", [8]),
        ("lora_parameters", "rank 8"),
    ],
)
def test_impossible_fields_are_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    problems = _problems(_write(tmp_path, {field: value}))
    assert len(problems) == 1
    assert f": {field}: expected" in problems[0]
    assert len(problems[0]) < 400


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    values = {
        "fine_tune_type": "full",
        "num_layers": "all",
        "lora_parameters": {"rank": 0, "alpha": 16, "dropout": 1, "keys": ["q", 7]},
    }
    text = "\n".join(_problems(_write(tmp_path, values)))
    for expected in ("Serve the folder as a model", "num_layers", "rank", "alpha", "dropout", "keys.1"):
        assert expected in text
    assert text.count("fine_tune_type") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "JSON"),
        ("{", "JSON"),
        ("not json", "JSON"),
        ("{} {}", "JSON"),
        ("[]", "object"),
        ("null", "object"),
        ('"lora"', "object"),
        ('{"lora_parameters": {"scale": NaN}}', "NaN"),
        ('{"lora_parameters": {"scale": -Infinity}}', "Infinity"),
        ('{"lora_parameters": {"scale": 1e999}}', "out of range"),
        ('{"seed": 1e999}', "out of range"),
        (f'{{"seed": {"9" * 6000}}}', "JSON"),
        ("[" * 5000 + "]" * 5000, "nesting"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nesting"),
        ('{"a":' * 100 + "1" + "}" * 100, "nesting"),
        ("[" * 900_000, "nesting"),
        ('{"peft_type": "LORA", "r": 8}', "PEFT"),
        (
            '{"fine_tune_type": "full", "num_layers": 4, "lora_parameters": null}',
            "Serve the folder as a model",
        ),
        ('{"pad": "' + "x" * MAX_CONFIG_BYTES + '"}', f"at most {MAX_CONFIG_BYTES} bytes"),
    ],
)
def test_files_that_are_no_config_are_refused(tmp_path: Path, content: str, expected: str) -> None:
    problems = _problems(_write(tmp_path, content))
    assert expected in "\n".join(problems)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00\x9c\x80")
    assert "JSON" in _problems(tmp_path)[0]


def test_missing_files_and_folders_in_their_place_are_refused(tmp_path: Path) -> None:
    assert "there is none" in _problems(tmp_path)[0]
    (tmp_path / "adapter_config.json").mkdir()
    assert "there is none" in _problems(tmp_path)[0]


def test_a_config_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    directory = _write(tmp_path, {"num_layers": 4})
    before = (directory / "adapter_config.json").read_bytes()
    wrong = AdapterConfig().model_copy(update={"seed": math.nan})
    with pytest.raises(ValueError, match="JSON"):
        wrong.write(directory / "adapter_config.json")
    assert [path.read_bytes() for path in directory.iterdir()] == [before]

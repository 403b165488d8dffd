"""Settings: which source wins, what is refused, and the sentences that say so."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import server
from server.cli.configuration import InvalidSettingsError, flag_of, load_settings
from server.settings import GROUPS, Settings

DOCUMENTED = Path(server.__file__).parent.parent / "config" / "server.toml"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith("GRAFT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "settings.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(**flags: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidSettingsError) as caught:
        load_settings({"model": "m", **flags})
    return caught.value.problems


PRECEDENCE = [
    # field, flag, variable, line of the file, and what each comes to (flag, variable, file, default)
    ("port", "1", "2", "port = 3", (1, 2, 3, 8000)),
    ("dtype", "float16", "float32", 'dtype = "bfloat16"', ("float16", "float32", "bfloat16", "auto")),
    ("load_on_demand", False, "no", "load_on_demand = false", (False, False, False, True)),
    ("prompt_cache_bytes", "1KB", "1KiB", 'prompt_cache_bytes = "2 MiB"', (1000, 1024, 2**21, 2**30)),
    ("adapter_memory_bytes", "3", "2", "adapter_memory_bytes = 1", (3, 2, 1, None)),
    ("unload_timeout_seconds", "0.5", "1.5", "unload_timeout_seconds = 2.5", (0.5, 1.5, 2.5, 30)),
    ("cors_origins", ["a"], "b, c", 'cors_origins = ["d"]', (["a"], ["b", "c"], ["d"], [])),
    (
        "allowed_hosts",
        ["a"],
        "b",
        'allowed_hosts = ["c"]',
        (["a"], ["b"], ["c"], ["localhost", "127.0.0.1", "[::1]"]),
    ),
    ("served_model_name", "a", "b", 'served_model_name = "c"', ("a", "b", "c", None)),
    ("log_level", "debug", "warning", 'log_level = "error"', ("debug", "warning", "error", "info")),
]


@pytest.mark.parametrize(("field", "flag", "variable", "line", "expected"), PRECEDENCE)
def test_flag_then_variable_then_file_then_default(
    field: str,
    flag: Any,
    variable: str,
    line: str,
    expected: tuple[Any, ...],
    toml: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = str(toml(line))
    values = []
    monkeypatch.setenv(f"GRAFT_{field.upper()}", variable)
    values.append(getattr(load_settings({"model": "m", "config": config, field: flag}), field))
    values.append(getattr(load_settings({"model": "m", "config": config}), field))
    monkeypatch.delenv(f"GRAFT_{field.upper()}")
    values.append(getattr(load_settings({"model": "m", "config": config}), field))
    values.append(getattr(load_settings({"model": "m"}), field))
    assert tuple(values) == expected


def test_adapters_of_a_stronger_source_replace_those_of_a_weaker(
    tmp_path: Path, toml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(toml(f'[adapters]\nfile = "{tmp_path}"\n'))
    assert load_settings({"model": "m", "config": config}).adapters == {"file": str(tmp_path)}
    monkeypatch.setenv("GRAFT_ADAPTERS", f"a={tmp_path}, b={tmp_path}")
    assert set(load_settings({"model": "m", "config": config}).adapters) == {"a", "b"}
    flags = {"model": "m", "config": config, "adapters": [f"c={tmp_path}"]}
    assert set(load_settings(flags).adapters) == {"c"}


def test_an_adapter_s_folder_may_be_named_from_the_root(tmp_path: Path) -> None:
    (tmp_path / "pirate").mkdir()
    flags = {"model": "m", "adapters": ["p=pirate"]}
    assert load_settings({**flags, "adapters_dir": tmp_path}).adapters == {"p": "pirate"}
    assert "'pirate'" in problems(**flags)[0]


def test_the_variable_names_the_file(toml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CONFIG", str(toml('model = "of the file"\nmax_n = 3\n')))
    settings = load_settings({})
    assert (settings.model, settings.max_n) == ("of the file", 3)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"port": "abc"}, ("--port", "integer", "'abc'")),
        ({"port": "65536"}, ("--port", "65535", "'65536'")),
        ({"max_n": "0"}, ("--max-n", "1", "'0'")),
        ({"dtype": "int4"}, ("--dtype", "bfloat16", "'int4'")),
        ({"prompt_cache_bytes": "5QB"}, ("--prompt-cache-bytes", "QB")),
        ({"prompt_cache_bytes": "-1"}, ("--prompt-cache-bytes", "'-1'")),
        ({"max_body_bytes": "1"}, ("--max-body-bytes", "1024")),
        ({"health_timeout_seconds": "nan"}, ("--health-timeout-seconds", "'nan'")),
        ({"unload_timeout_seconds": "inf"}, ("--unload-timeout-seconds", "'inf'")),
        ({"log_level": "loud"}, ("--log-level", "warning", "'loud'")),
        ({"adapters_dir": "/there/is/none"}, ("--adapters-dir", "existing folder", "/there/is/none")),
        ({"adapters": ["pirate"]}, ("--adapter", "ID=PATH", "'pirate'")),
        ({"adapters": ["a=/", "a=/"]}, ("--adapter", "'a'", "twice")),
        ({"adapters": ["a=/there/is/none"]}, ("--adapter", "'a'", "/there/is/none")),
        ({"model": " "}, ("MODEL", "1 character")),
        ({"host": "0.0.0.0"}, ("API key", "0.0.0.0", "GRAFT_API_KEY", "--api-key-file")),
        ({"host": "example.org"}, ("API key", "example.org")),
        ({"api_key_file": "/there/is/none"}, ("api_key_file", "/there/is/none")),
        ({"config": "/there/is/none.toml"}, ("/there/is/none.toml", "No such file")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_one_sentence_that_names_it(flags: dict[str, Any], parts: tuple[str, ...]) -> None:
    (sentence,) = problems(**flags)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert [part for part in parts if part not in sentence] == []


def test_every_problem_is_told_and_each_with_its_source(
    toml: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toml('max_waitng = 1\nmax_n = "many"\n')
    monkeypatch.setenv("GRAFT_MAX_BATCH_SIZE", "0")
    monkeypatch.setenv("GRAFT_PROT", "8001")
    found = problems(config=str(config), port="x")
    starts = ["--port: ", "GRAFT_MAX_BATCH_SIZE: ", "GRAFT_PROT: "]
    starts += [f"max_n in {config}: ", f"max_waitng in {config}: "]
    assert sorted(start for start in starts for line in found if line.startswith(start)) == sorted(starts)
    assert len(found) == len(starts)
    assert any("Did you mean GRAFT_PORT?" in line for line in found)
    assert any("Did you mean max_waiting?" in line for line in found)


def test_a_missing_model_is_told_how_to_name_it() -> None:
    with pytest.raises(InvalidSettingsError, match=r"model is not set.*GRAFT_MODEL"):
        load_settings({})


@pytest.mark.parametrize("text", ["port = ", "\x00", "[port]\nx = 1\n"])
def test_a_broken_file_is_a_sentence(text: str, toml: Callable[[str], Path]) -> None:
    config = toml(text)
    (sentence,) = problems(config=str(config))
    assert str(config) in sentence


def test_a_file_that_is_not_text_is_a_sentence(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_bytes(b"\xff\xfe")
    assert str(config) in problems(config=str(config))[0]


def test_variables_of_other_parts_of_the_project_are_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_BACKEND", "cpu")
    monkeypatch.setenv("GRAFT_URL", "http://127.0.0.1:8000")
    assert load_settings({"model": "m"}).model == "m"


def test_an_empty_variable_is_not_set_but_an_empty_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_PORT", "")
    assert load_settings({"model": "m"}).port == 8000
    monkeypatch.setenv("GRAFT_API_KEY", "")
    assert "GRAFT_API_KEY" in problems()[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert load_settings({"model": "m", "host": host}).api_key is None


def test_another_address_is_served_with_a_key_and_to_any_name(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    settings = load_settings({"model": "m", "host": "0.0.0.0", "api_key_file": str(file)})
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "s3cret"
    assert settings.allowed_hosts == ["*"]
    both = problems(host="0.0.0.0", api_key_file=str(file), api_key="other")
    assert "both are set" in both[0]


@pytest.mark.parametrize("key", ["two words", "ключ", "line\nbreak"])
def test_a_key_is_never_shown(key: str) -> None:
    (sentence,) = problems(api_key=key)
    assert "--api-key" in sentence
    assert key not in sentence
    assert "s3cret" not in repr(load_settings({"model": "m", "api_key": "s3cret"}))


def test_home_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    flags = {"adapters_dir": "~/a", "models_dir": "~", "cache_dir": "~/c", "adapters": ["a=~/a"]}
    settings = load_settings({"model": "m", **flags})
    assert (settings.adapters_dir, settings.models_dir) == (tmp_path / "a", tmp_path)
    assert (settings.cache_dir, settings.adapters) == (tmp_path / "c", {"a": str(tmp_path / "a")})


def test_settings_cannot_change() -> None:
    settings = load_settings({"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_every_field_has_help_a_group_and_a_flag_of_its_own() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        assert isinstance(field.json_schema_extra, dict), name
        assert field.json_schema_extra["group"] in GROUPS, name
    flags = [flag_of(name) for name in Settings.model_fields]
    assert len(set(flags)) == len(flags)


def test_the_documented_file_has_every_setting_with_its_default(tmp_path: Path) -> None:
    text = DOCUMENTED.read_text(encoding="utf-8")
    assert tomllib.loads(text) == {}, "as it is, the file changes nothing"
    values = tomllib.loads(re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE))
    assert set(values) == set(Settings.model_fields) - {"config"}
    defaults = load_settings({"model": "m"})
    fields = Settings.model_fields.items()
    examples = {name for name, field in fields if field.default is None and field.default_factory is None}
    for name in set(values) - examples - {"model", "adapters", "cache_dir"}:
        documented = load_settings({"model": "m", name: values[name]})
        assert getattr(documented, name) == getattr(defaults, name), name

"""The server's settings: what can be set, within which limits, and where a value comes from.

The sources, strongest first: flags (arguments of `Settings`), GRAFT_* environment variables, the TOML file
that `config` names, the defaults below. A stronger source replaces a weaker one's value whole. This module
knows no command line and no model; it reads the environment and files once, on the main thread.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    DirectoryPath,
    Field,
    SecretStr,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.cache_dir import default_cache_dir

__all__ = ["ENV_PREFIX", "GROUPS", "Dtype", "LogFormat", "LogLevel", "Settings", "is_loopback"]

ENV_PREFIX = "GRAFT_"
GROUPS = ("Model", "Adapters", "Network", "Limits", "Memory", "Timeouts", "Logs")
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def _group(name: str) -> dict[str, Any]:
    return {"group": name}


def _split_list(value: object) -> object:
    """A string, as in the environment, is a list separated by commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_pairs(value: object) -> object:
    """A string or a list of strings is pairs ID=PATH; a table stays as it is."""
    parts = _split_list(value)
    if not isinstance(parts, list | tuple):
        return parts
    pairs: dict[str, str] = {}
    for part in parts:
        name, equals, path = str(part).partition("=")
        if not (name and equals and path):
            raise ValueError(f"expected ID=PATH, such as pirate=adapters/pirate, but got {part!r}")
        if name in pairs:
            raise ValueError(f"expected each adapter id once, but {name!r} is given twice")
        pairs[name] = path
    return pairs


def _split_scales(value: object) -> object:
    """A string or a list of strings is pairs ID=NUMBER; a table stays as it is."""
    parts = _split_list(value)
    if not isinstance(parts, list | tuple):
        return parts
    pairs: dict[str, str] = {}
    for part in parts:
        name, _, number = str(part).partition("=")
        if not (name and number):
            raise ValueError(f"expected ID=NUMBER, such as pirate=20, but got {part!r}")
        if name in pairs:
            raise ValueError(f"expected each adapter id once, but {name!r} is given twice")
        pairs[name] = number
    return pairs


def _check_folders(folders: dict[str, str], info: ValidationInfo) -> dict[str, str]:
    expanded = {name: os.path.expanduser(path) for name, path in folders.items()}
    root = info.data.get("adapters_dir")
    for name, path in expanded.items():
        if not os.path.isdir(path) and (root is None or not os.path.isdir(root / path)):
            raise ValueError(f"expected adapter {name!r} to have an existing folder, but got {path!r}")
    return expanded


def _expand_home(value: object) -> object:
    return os.path.expanduser(value) if isinstance(value, str) else value


def _check_key(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("expected at least one character, all of them printable ASCII, and no spaces")
    return key


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _default_allowed_hosts(validated: dict[str, Any]) -> list[str]:
    """Loopback names for a loopback address; else any, for then a key is required, which a web page lacks."""
    host = validated.get("host", "127.0.0.1")
    return ["localhost", "127.0.0.1", "[::1]"] if is_loopback(host) else ["*"]


AdapterScale = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Words = Annotated[list[str], NoDecode, BeforeValidator(_split_list)]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Folder = Annotated[DirectoryPath, BeforeValidator(_expand_home)]
PlainPath = Annotated[Path, BeforeValidator(_expand_home)]


class Settings(BaseSettings):
    """Everything that can be set. The environment variable of a field is GRAFT_ and its name in capitals."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    config: PlainPath | None = Field(default=None, json_schema_extra=_group("Model"))
    """TOML file with settings; flags and GRAFT_* variables are stronger."""

    model: Text = Field(json_schema_extra=_group("Model"))
    """Base model: a folder in MLX's format, or a model hub id such as mlx-community/Qwen3-4B-4bit."""

    revision: Text | None = Field(default=None, json_schema_extra=_group("Model"))
    """Branch, tag or commit of the hub id; the hub's default branch when unset."""

    served_model_name: Text | None = Field(default=None, max_length=128, json_schema_extra=_group("Model"))
    """Name of the base in requests and answers; the last part of the model's path or id when unset."""

    dtype: Dtype = Field(default="auto", json_schema_extra=_group("Model"))
    """Type that weights are computed in; auto is float32 on a CPU and the model's own on a GPU."""

    cache_dir: PlainPath = Field(default_factory=default_cache_dir, json_schema_extra=_group("Model"))
    """Folder for the converted demo model, what was measured, and copies of adapters' versions."""

    calibration: bool = Field(default=True, json_schema_extra=_group("Model"))
    """Whether a model's first start on a device measures which forms of adapters are the fastest there."""

    adapters_dir: Folder | None = Field(default=None, json_schema_extra=_group("Adapters"))
    """Adapters root: the folder whose sub-folders may be loaded as adapters by a call or a request."""

    adapters: Annotated[
        dict[str, str], NoDecode, BeforeValidator(_split_pairs), AfterValidator(_check_folders)
    ] = Field(
        default_factory=dict,
        json_schema_extra=_group("Adapters") | {"flag": "--adapter", "metavar": "ID=PATH"},
    )
    """Adapter to load at the start, as ID=PATH: a folder anywhere, or under the adapters root. Repeatable."""

    adapter_scales: Annotated[dict[str, AdapterScale], NoDecode, BeforeValidator(_split_scales)] = Field(
        default_factory=dict,
        json_schema_extra=_group("Adapters") | {"flag": "--adapter-scale", "metavar": "ID=NUMBER"},
    )
    """Scale of an adapter, as ID=NUMBER, in place of the one in its config in mlx-lm's format. Repeatable."""

    models_dir: Folder | None = Field(default=None, json_schema_extra=_group("Adapters"))
    """Models root: the folder in which a fused model may be saved; saving is refused when unset."""

    fuse_threshold: float = Field(default=0.05, ge=0, le=1, json_schema_extra=_group("Adapters"))
    """Relative error of a layer's change up to which fusing with precision auto takes a smaller form."""

    watch: bool = Field(default=False, json_schema_extra=_group("Adapters"))
    """Whether adapters that are written under the adapters root are loaded, and changed ones loaded anew."""

    watch_settle_seconds: float = Field(default=1, gt=0, le=3600, json_schema_extra=_group("Adapters"))
    """Seconds for which a watched folder must have stayed the same before it is read."""

    kept_versions_bytes: ByteSize = Field(
        default=ByteSize(4 * 2**30), ge=0, json_schema_extra=_group("Adapters")
    )
    """Disk, under the cache folder, for copies of what was loaded, to roll back to; 0 keeps none."""

    load_on_demand: bool = Field(default=True, json_schema_extra=_group("Adapters"))
    """Whether a request may load an adapter by naming a folder under the adapters root."""

    host: Text = Field(default="127.0.0.1", json_schema_extra=_group("Network"))
    """Address or name to listen on; any but a loopback one requires an API key."""

    port: int = Field(default=8000, ge=0, le=65535, json_schema_extra=_group("Network"))
    """TCP port to listen on; 0 takes a free one."""

    api_key: Annotated[SecretStr, AfterValidator(_check_key)] | None = Field(
        default=None, json_schema_extra=_group("Network")
    )
    """Key that every request must bear. Other users see flags in the process list: prefer --api-key-file."""

    api_key_file: PlainPath | None = Field(default=None, json_schema_extra=_group("Network"))
    """File that holds the API key and nothing else."""

    allowed_hosts: Words = Field(default_factory=_default_allowed_hosts, json_schema_extra=_group("Network"))
    """Host headers that are answered; loopback names when listening on loopback, else any (*)."""

    cors_origins: Words = Field(default_factory=list, json_schema_extra=_group("Network"))
    """Origins of web pages that may call the server, such as https://chat.example; none when unset."""

    max_batch_size: int = Field(default=32, ge=1, le=4096, json_schema_extra=_group("Limits"))
    """Rows that are decoded together; one choice of one request is a row."""

    prefill_batch_size: int = Field(default=32, ge=1, le=4096, json_schema_extra=_group("Limits"))
    """Prompts that are read together, at most; beyond eight only short ones."""

    prefill_step_tokens: int = Field(default=2048, ge=1, le=65536, json_schema_extra=_group("Limits"))
    """Tokens of a prompt that are read in one step, at most."""

    max_batch_adapters: int | None = Field(default=None, ge=1, json_schema_extra=_group("Limits"))
    """Different adapters that decode together, a blend counting each of its own; no limit when unset."""

    max_waiting: int = Field(default=256, ge=0, json_schema_extra=_group("Limits"))
    """Requests that may wait for a free row; one more is answered with 503 and Retry-After."""

    default_max_tokens: int = Field(default=1024, ge=1, json_schema_extra=_group("Limits"))
    """Tokens that are generated at most for a request that sets no limit."""

    max_n: int = Field(default=16, ge=1, le=128, json_schema_extra=_group("Limits"))
    """Choices that one request may ask for."""

    max_connections: int = Field(default=1024, ge=16, le=65536, json_schema_extra=_group("Limits"))
    """Connections at once, fewer where few files may be open; one more takes the place of an idle one."""

    max_body_bytes: ByteSize = Field(default=ByteSize(8 * 2**20), ge=1024, json_schema_extra=_group("Limits"))
    """Size of a request's body, in bytes or with a unit such as 8MiB."""

    body_memory_bytes: ByteSize = Field(
        default=ByteSize(128 * 2**20), ge=1024, json_schema_extra=_group("Limits")
    )
    """Memory for all bodies that are held at once; what does not fit is answered with 503 and Retry-After."""

    prompt_cache_bytes: ByteSize = Field(default=ByteSize(2**30), ge=0, json_schema_extra=_group("Memory"))
    """Memory for the caches of earlier prompts, in bytes or with a unit such as 1GiB; 0 keeps none."""

    kv_memory_bytes: ByteSize | None = Field(
        default=None, ge=1, json_schema_extra=_group("Memory") | {"flag": "--kv-memory"}
    )
    """Memory for running requests and kept prompts together; what the base and adapters leave when unset."""

    adapter_memory_bytes: ByteSize | None = Field(
        default=None, ge=1, json_schema_extra=_group("Memory") | {"flag": "--adapter-memory"}
    )
    """Memory for adapters, such as 512MB: beyond it idle ones leave; an eighth of the device's when unset."""

    adapter_wait_seconds: float = Field(default=30, ge=0, le=86400, json_schema_extra=_group("Timeouts"))
    """Seconds that a request waits for memory that others' adapters use; then it is answered with 503."""

    unload_timeout_seconds: float = Field(default=30, ge=0, le=86400, json_schema_extra=_group("Timeouts"))
    """Seconds that unloading an adapter waits for requests that use it, unless the call says otherwise."""

    head_timeout_seconds: float = Field(default=10, gt=0, le=86400, json_schema_extra=_group("Timeouts"))
    """Seconds that a request's line and headers may take to come; then the connection is closed."""

    body_timeout_seconds: float = Field(default=60, gt=0, le=86400, json_schema_extra=_group("Timeouts"))
    """Seconds that a request's body may take to come; then it is answered with 408."""

    idle_timeout_seconds: int = Field(default=75, ge=1, le=86400, json_schema_extra=_group("Timeouts"))
    """Whole seconds that a connection is kept for the next request; more than clients keep it themselves."""

    health_timeout_seconds: float = Field(default=60, gt=0, le=86400, json_schema_extra=_group("Timeouts"))
    """Seconds without a sign of life of the generation thread after which requests are answered with 503."""

    shutdown_timeout_seconds: int = Field(default=10, ge=0, le=86400, json_schema_extra=_group("Timeouts"))
    """Whole seconds that requests in flight have to finish when the server is asked to stop."""

    log_level: LogLevel = Field(default="info", json_schema_extra=_group("Logs"))
    """Least important kind of log line that is written."""

    log_format: LogFormat = Field(default="auto", json_schema_extra=_group("Logs"))
    """Log lines for people (console) or programs (json); auto chooses console on a terminal."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, environment, then the file that either of them names. Raises OSError, TOMLDecodeError."""
        config = init_settings().get("config") or env_settings().get("config")
        if config is None:
            return init_settings, env_settings
        path = Path(config).expanduser()
        with path.open("rb"):  # pydantic-settings passes over a file that it cannot find
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=path)

    @model_validator(mode="before")
    @classmethod
    def _read_key_file(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("api_key_file") is None:
            return values
        if values.get("api_key") is not None:
            raise ValueError("expected one of api_key and api_key_file, but both are set: unset one of them")
        path = Path(cast("str | Path", values["api_key_file"])).expanduser()
        try:
            key = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"expected api_key_file to name a file with the key, but: {error}") from error
        return {**values, "api_key": key}

    @model_validator(mode="after")
    def _require_root_to_watch(self) -> Settings:
        if self.watch and self.adapters_dir is None:
            raise ValueError("expected adapters_dir to be set where watch is: it is the folder to watch")
        return self

    @model_validator(mode="after")
    def _require_key(self) -> Settings:
        if not is_loopback(self.host) and self.api_key is None:
            raise ValueError(
                f"expected an API key, because host {self.host} can be reached from other machines: put a "
                f"key into {ENV_PREFIX}API_KEY or into a file named by --api-key-file, or listen on 127.0.0.1"
            )
        return self

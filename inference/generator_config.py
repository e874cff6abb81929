"""The [generator] table: where the black box answers, how its requests look, how patiently and how fast it is asked."""

import re
import urllib.parse
from dataclasses import dataclass, replace
from typing import Any, Literal

from matryoshka.core.json_input import parse_json, shown
from matryoshka.core.records import content_key

_SAMPLING = {"max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "seed"}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class EndpointConfig:
    """One more place that serves the same model. What is left at "" or 0 is as in [generator]."""

    base_url: str = ""
    """The server's address, as in [generator]."""
    api_key_env: str = ""
    """The environment variable that holds this endpoint's key."""
    model: str = ""
    """The model's name there; on Azure the name of the deployment."""
    api: str = ""
    """The kind of server, "openai" or "azure"."""
    api_version: str = ""
    """The version of Azure's interface."""
    concurrency: int = 0
    """Requests at a time to this endpoint alone."""
    requests_per_minute: int = 0
    """Requests a minute to this endpoint alone: two endpoints with 500 each make 1,000."""
    tokens_per_minute: int = 0
    """Tokens a minute to this endpoint alone."""
    token_command: str = ""
    """A command that prints a token for this endpoint, as in [generator]."""

    def __post_init__(self) -> None:
        check_address(self.base_url, self.api_key_env)
        if min(self.concurrency, self.requests_per_minute, self.tokens_per_minute) < 0:
            raise ValueError(
                f"generator: concurrency {self.concurrency}, requests_per_minute {self.requests_per_minute} and "
                f"tokens_per_minute {self.tokens_per_minute} must not be negative; 0 is no limit, or as in [generator]"
            )


@dataclass(frozen=True)
class GeneratorConfig:
    """Where the black box answers and how patiently it is asked."""

    base_url: str
    """The server's address, such as https://api.openai.com/v1; on Azure https://NAME.openai.azure.com."""
    model: str
    """The model's name there; on Azure the name of the deployment."""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, "" for a server that wants none. It is read once and removed."""
    api: Literal["openai", "azure"] = "openai"
    """The kind of server: anything that speaks OpenAI's chat format, or Azure OpenAI."""
    api_version: str = ""
    """The version of Azure's interface, such as 2024-10-21."""
    served_model: str = ""
    """The name that answers may carry and that prices are looked up by, where it is not `model`. Answers from any other
    model are refused."""
    max_retries: int = 5
    """How often a request is sent again after a failure that may pass."""
    timeout_s: float = 120.0
    """Seconds that one attempt may take, from connecting to the last byte of the answer."""
    total_timeout_s: float = 900.0
    """Seconds that one call may take, from its first attempt through all retries."""
    concurrency: int = 64
    """Requests at a time, including those that wait for a retry."""
    requests_per_minute: int = 0
    """Requests in any 60 seconds; 0 is no limit."""
    tokens_per_minute: int = 0
    """Tokens read and written in any 60 seconds; 0 is no limit."""
    backoff_s: float = 0.5
    """Seconds before the first retry; each later wait is twice as long, up to a minute."""
    length_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name of the length limit in a request; OpenAI's models that think want max_completion_tokens."""
    omit: tuple[str, ...] = ()
    """Fields to leave out of a request because the server refuses them, such as seed or top_p."""
    extra_body: str = ""
    """A JSON object of fields to add to every request."""
    identity: str = ""
    """The name that answers are kept under instead of base_url, for a server whose port is another one each time."""
    prices: str = ""
    """A TOML file of your own prices, in the form of inference/prices.toml."""
    token_command: str = ""
    """A command that prints a token to send instead of a key, for instance one of Azure's Entra ID: "az account
    get-access-token --resource https://cognitiveservices.azure.com --query accessToken -o tsv". It is run again every
    five minutes."""
    endpoints: tuple[EndpointConfig, ...] = ()
    """More places (keys, regions, servers) for the same model; each takes from [generator] what it leaves out."""

    def __post_init__(self) -> None:
        check_address(self.base_url, self.api_key_env)
        if not self.base_url:
            raise ValueError("generator: base_url is empty; it must start with http:// or https://")
        if not self.model:
            raise ValueError("generator: model is empty; give the name that the endpoint serves")
        for endpoint in (self.first_endpoint, *self.other_endpoints):
            if endpoint.api not in ("openai", "azure"):
                raise ValueError(f"generator: api {endpoint.api!r} is unknown; choose 'openai' or 'azure'")
            if (endpoint.api == "azure") != bool(endpoint.api_version):
                raise ValueError(
                    f"generator: api {endpoint.api!r} with api_version {endpoint.api_version!r}; 'azure' needs one, "
                    "such as '2024-10-21', and 'openai' has none"
                )
        if self.max_retries < 0 or self.concurrency < 1 or min(self.timeout_s, self.total_timeout_s) <= 0:
            raise ValueError(
                f"generator: max_retries {self.max_retries} must not be negative, concurrency {self.concurrency}, "
                f"timeout_s {self.timeout_s} and total_timeout_s {self.total_timeout_s} must be positive"
            )
        if self.backoff_s < 0 or self.requests_per_minute < 0 or self.tokens_per_minute < 0:
            raise ValueError(
                f"generator: backoff_s {self.backoff_s}, requests_per_minute {self.requests_per_minute} and "
                f"tokens_per_minute {self.tokens_per_minute} must not be negative"
            )
        if set(self.omit) & {"model", "messages"}:
            raise ValueError("generator: omit cannot leave out model or messages")
        _ = self.extra

    def part(self, index: int, count: int) -> "GeneratorConfig":
        """Return what process `index` of `count` may do: its part of every limit, so that together they keep it.

        Raises ValueError for a limit that is smaller than the number of processes.
        """
        endpoints = tuple(replace(endpoint, **_parts(endpoint, index, count)) for endpoint in self.endpoints)
        return replace(self, **_parts(self, index, count), endpoints=endpoints)

    @property
    def extra(self) -> dict[str, Any]:
        """The fields of extra_body. Raises ValueError when it is no JSON object, or sets what the run itself sets."""
        extra = parse_json(self.extra_body or "{}", "generator: extra_body")
        if not isinstance(extra, dict):
            raise ValueError(f"generator: extra_body is {shown(extra)}; expected a JSON object")
        if both := sorted(set(extra) & ({"model", "messages", "stream", "n"} | _SAMPLING - set(self.omit))):
            raise ValueError(
                f"generator: extra_body holds {both[0]!r}, which the run sets itself; remove it, or name a sampling "
                "parameter in omit as well"
            )
        return extra

    @property
    def name(self) -> str:
        """The name of the generator in every record."""
        return f"{self.model}@{self.where}"

    @property
    def where(self) -> str:
        """The name that answers are kept under: requests with other fields have other answers."""
        place = self.identity or self.base_url
        changed = [list(self.omit), self.extra] if self.omit or self.extra else []
        return f"{place}#{content_key(*changed)[:8]}" if changed else place

    @property
    def first_endpoint(self) -> EndpointConfig:
        """The endpoint that the table itself describes."""
        names = EndpointConfig.__dataclass_fields__
        return EndpointConfig(**{name: getattr(self, name) for name in names})

    @property
    def other_endpoints(self) -> list[EndpointConfig]:
        """The further endpoints with what they leave out filled in."""
        first, filled = self.first_endpoint, []
        for more in self.endpoints:
            values = {name: getattr(more, name) or getattr(first, name) for name in EndpointConfig.__dataclass_fields__}
            if more.api == "openai" and not more.api_version:
                values["api_version"] = ""
            if more.api_key_env and not more.token_command:
                values["token_command"] = ""
            filled.append(EndpointConfig(**values))
        return filled


def check_address(base_url: str, api_key_env: str) -> None:
    """Raise ValueError for a URL that is none or carries a secret, and for a key in place of its variable's name.

    The message never repeats what may be a secret: it goes to logs.
    """
    parts = urllib.parse.urlsplit(base_url)
    if base_url and (parts.username or parts.password or parts.query or parts.fragment):
        raise ValueError(
            f"generator: base_url of host {parts.hostname} holds a user, a password or a query (not shown: it may be "
            "secret); give scheme, host and path only, and the key by its environment variable (api_key_env)"
        )
    if base_url and not (parts.scheme in ("http", "https") and parts.hostname):
        raise ValueError(f"generator: base_url {base_url!r} must start with http:// or https:// and name a host")
    try:
        _ = parts.port
    except ValueError as err:
        raise ValueError(f"generator: base_url {base_url!r}: {err}") from err
    has_digits = any(char.isdigit() for char in api_key_env)
    is_like_a_key = len(api_key_env) >= 24 and has_digits and "_" not in api_key_env
    if api_key_env and (is_like_a_key or not _VARIABLE.fullmatch(api_key_env)):
        raise ValueError(
            f"generator: api_key_env has {len(api_key_env)} characters that are no name of an environment variable "
            "(not shown: it may be the key itself); give the variable's name, such as OPENAI_API_KEY"
        )


def _parts(limits: GeneratorConfig | EndpointConfig, index: int, count: int) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
        whole = getattr(limits, name)
        if 0 < whole < count:
            raise ValueError(
                f"generator: {name} {whole} cannot be shared by {count} processes; raise it or start fewer of them"
            )
        parts[name] = whole // count + (index < whole % count)
    return parts

"""The [generator] table: where the black box answers, how its requests look, how patiently and how fast it is asked."""

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from matryoshka.core.records import content_key
from matryoshka.inference.pool import EndpointConfig, check_address


@dataclass(frozen=True)
class GeneratorConfig:
    """Where the black box answers and how patiently it is asked.

    model: its name there; on Azure the name of the deployment. served_model: what its answers may call themselves, and
    what it is priced as, where that is another name; answers from any other model are refused. api_key_env: the
    environment variable that holds the key, "" for a server that wants none. endpoints: more places (keys, regions,
    servers) for the same model; each takes from here what it leaves out, limits included.
    concurrency: requests at a time, those that wait for a retry included; requests_per_minute, tokens_per_minute: 0 for
    no limit. timeout_s: one attempt, from request to whole answer; total_timeout_s: one call, from its first attempt
    through all retries. backoff_s: the first wait, doubled each time.
    length_key, omit, extra_body: how the request's JSON differs from OpenAI's chat format: the name of the length
    limit, the fields to leave out, and a JSON object of fields to add.
    identity: what the answers are kept under instead of base_url, for a server whose port is another one each time.
    prices: a TOML file of your own prices, in the form of inference/prices.toml.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    api: Literal["openai", "azure"] = "openai"
    api_version: str = ""
    served_model: str = ""
    max_retries: int = 5
    timeout_s: float = 120.0
    total_timeout_s: float = 900.0
    concurrency: int = 64
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    backoff_s: float = 0.5
    length_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    omit: tuple[str, ...] = ()
    extra_body: str = ""
    identity: str = ""
    prices: str = ""
    endpoints: tuple[EndpointConfig, ...] = ()

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
        """The fields of extra_body. Raises ValueError when it is no JSON object."""
        try:
            extra = json.loads(self.extra_body or "{}")
        except ValueError as err:
            raise ValueError(f"generator: extra_body is not valid JSON: {err}") from err
        if not isinstance(extra, dict) or set(extra) & {"model", "messages", "stream", "n"}:
            raise ValueError("generator: extra_body must be a JSON object without model, messages, stream and n")
        return extra

    @property
    def where(self) -> str:
        """What answers are kept under: other fields in the request are other answers."""
        place = self.identity or self.base_url
        changed = [list(self.omit), self.extra] if self.omit or self.extra else []
        return f"{place}#{content_key(*changed)[:8]}" if changed else place

    @property
    def first_endpoint(self) -> EndpointConfig:
        return EndpointConfig(
            self.base_url,
            self.api_key_env,
            self.model,
            self.api,
            self.api_version,
            self.concurrency,
            self.requests_per_minute,
            self.tokens_per_minute,
        )

    @property
    def other_endpoints(self) -> list[EndpointConfig]:
        """The further endpoints with what they leave out filled in."""
        first = self.first_endpoint
        return [
            EndpointConfig(
                more.base_url or first.base_url,
                more.api_key_env or first.api_key_env,
                more.model or first.model,
                more.api or first.api,
                more.api_version or ("" if more.api == "openai" else first.api_version),
                more.concurrency or first.concurrency,
                more.requests_per_minute or first.requests_per_minute,
                more.tokens_per_minute or first.tokens_per_minute,
            )
            for more in self.endpoints
        ]


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

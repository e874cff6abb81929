"""Prompts as files: a TOML file says, for each request of a task, which messages it consists of.

A request is an array of tables, `[[guidance]]` for one, whose `role` is a chat role and whose `content` is a jinja2
template. Templates see the values of the request and every other key of the file, such as worked examples. A value is
put in as it is and is never read as a template itself.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from matryoshka.core.records import Message, Messages, content_key

_ENVIRONMENT = SandboxedEnvironment(
    autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)


class PromptFile:
    """The requests of one file. name: the file's; for a file that is not shipped it carries a hash of the text.

    values: the keys of the file that are no requests.
    """

    def __init__(self, prompts: str, shipped: Path, requests: Sequence[str]) -> None:
        """prompts: the path of a .toml file, or the name of one in the folder `shipped`. requests: all that it needs.

        Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
        """
        path = Path(prompts) if prompts.endswith(".toml") else shipped / f"{prompts}.toml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in shipped.glob("*.toml")))
            raise FileNotFoundError(f"prompts {prompts!r}: no such file; expected {known} or the path of a .toml file")
        text = path.read_text(encoding="utf-8")
        self.name = path.stem if path.parent == shipped else f"{path.stem}-{content_key(text)[:8]}"
        try:
            data = tomllib.loads(text)
            self._requests = {name: _messages(name, data.pop(name, None)) for name in requests}
        except (ValueError, TemplateError) as err:
            raise ValueError(f"{path}: {err}") from err
        self.values: Mapping[str, Any] = data
        self._path = path

    def render(self, request: str, **values: str) -> Messages:
        """Return the messages of `request`. Raises ValueError if a template uses a value that there is not."""
        try:
            return tuple(
                Message(role, template.render({**self.values, **values})) for role, template in self._requests[request]
            )
        except TemplateError as err:
            raise ValueError(f"{self._path}: [[{request}]]: {err}") from err


def _messages(request: str, rows: Any) -> list[tuple[str, Template]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"[[{request}]] is missing; expected one table for each message, with role and content")
    for row in rows:
        if set(row) != {"role", "content"} or row["role"] not in ("system", "user", "assistant"):
            expected = "expected the keys role (system, user or assistant) and content"
            raise ValueError(f"[[{request}]]: got {row!r:.80}; {expected}")
    return [(row["role"], _ENVIRONMENT.from_string(row["content"])) for row in rows]

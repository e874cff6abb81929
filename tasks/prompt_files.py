"""Prompts as files: a TOML file says, for each request of a task, which messages it consists of.

A request is an array of tables, `[[guidance]]` for one, whose `role` is a chat role and whose `content` is a jinja2
template. A table `insert = "NAME"` stands for messages that the task makes, such as the turns of a worked conversation.
Templates see the values of the request and every other key of the file, such as worked examples. A key that no template
uses is refused, since it is misspelt. The text of a value is never read as a template.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import SandboxedEnvironment

from matryoshka.core.config import nearest
from matryoshka.core.records import Message, Messages, content_key
from matryoshka.core.text.bounded_template import FAILURES

_ENVIRONMENT = SandboxedEnvironment(
    autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
)
_Row = tuple[str, Template] | str  # role and content, or the name of the messages to insert


class PromptFile:
    """The requests of one file, whose path is `path`. name: the file's; for one that is not shipped it carries a hash
    of the text. values: the keys of the file that are neither requests nor texts. attributes: the names that its
    templates may look up in a table.
    """

    def __init__(
        self,
        prompts: str,
        shipped: Path,
        requests: Sequence[str],
        texts: Mapping[str, str] | None = None,
        known: Sequence[str] = (),
    ) -> None:
        """prompts: the path of a .toml file, or the name of one in the folder `shipped`. requests: all that it needs.

        texts: keys that are single templates, with the template of a file that leaves the key out. known: further keys
        that the task itself reads.
        Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
        """
        path = self.path = Path(prompts) if prompts.endswith(".toml") else shipped / f"{prompts}.toml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in shipped.glob("*.toml")))
            raise FileNotFoundError(f"prompts {prompts!r}: no such file; expected {known} or the path of a .toml file")
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors put a BOM first
            data = tomllib.loads(text)
            used = {*known}
            self.attributes: set[str] = set()
            self._requests = {name: self._rows(name, data.pop(name, None), used) for name in requests}
            self._texts = {
                name: self._template(name, data.pop(name, default), used) for name, default in (texts or {}).items()
            }
            if unused := sorted(set(data) - used):
                keys = [*requests, *(texts or {}), *sorted(used)]
                raise ValueError(f"no template uses the key {unused[0]!r}; {nearest(unused[0], keys)}")
        except (ValueError, RecursionError, TemplateError) as err:
            raise ValueError(f"{path}: {err}") from err
        self.name = path.stem if path.parent == shipped else f"{path.stem}-{content_key(text)[:8]}"
        self.values: Mapping[str, Any] = data

    def render(self, request: str, **values: Any) -> Messages:
        """Return the messages of `request`. Raises ValueError if a template fails, on a missing value for one."""
        found: list[Message] = []
        for row in self._requests[request]:
            if isinstance(row, str):
                inserted = values.get(row)
                if not isinstance(inserted, tuple) or not all(isinstance(message, Message) for message in inserted):
                    raise ValueError(f"{self.path}: [[{request}]]: there are no messages {row!r} to insert here")
                found += inserted
            else:
                found.append(Message(row[0], self._rendered(row[1], f"[[{request}]]", values)))
        return tuple(found)

    def text(self, name: str, **values: Any) -> str:
        """Return the single text `name`. Raises as `render`."""
        return self._rendered(self._texts[name], name, values)

    def _rendered(self, template: Template, where: str, values: Mapping[str, Any]) -> str:
        try:
            return template.render({**self.values, **values})
        except (TemplateError, *FAILURES) as err:
            raise ValueError(f"{self.path}: {where}: {err}") from err

    def _rows(self, request: str, rows: Any, used: set[str]) -> list[_Row]:
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"[[{request}]] is missing; expected one table for each message, with role and content")
        found: list[_Row] = []
        for row in rows:
            if set(row) == {"insert"}:
                found.append(_text(f"[[{request}]] insert", row["insert"]))
                continue
            if set(row) != {"role", "content"} or row["role"] not in ("system", "user", "assistant"):
                expected = "expected the keys role (system, user or assistant) and content"
                raise ValueError(f"[[{request}]]: got {row!r:.80}; {expected}")
            found.append((row["role"], self._template(f"[[{request}]] content", row["content"], used)))
        return found

    def _template(self, name: str, value: Any, used: set[str]) -> Template:
        """Return the template of a text. Add the names that it uses to `used`, those of attributes to `attributes`."""
        text = _text(name, value)
        tree = _ENVIRONMENT.parse(text)
        used |= find_undeclared_variables(tree)
        self.attributes |= {node.attr for node in tree.find_all(nodes.Getattr)}
        self.attributes |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return _ENVIRONMENT.from_string(text)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.80}; expected a text")
    return value

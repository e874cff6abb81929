"""LaMP's own files, as its site has them, made of items."""

from collections.abc import Sequence
from pathlib import Path

from matryoshka.core.files import write_json
from matryoshka.tasks.lamp.data import Item
from matryoshka.tasks.lamp.task_specs import Kind


def write_items(items: Sequence[Item], kind: Kind, folder: Path, split: str) -> None:
    """Write `items` as `{split}_questions.json` and `{split}_outputs.json` into `folder`."""
    questions = [{"id": item.id, "input": item.question, "profile": list(item.profile)} for item in items]
    golds = [{"id": item.id, "output": item.gold} for item in items]
    write_json(folder / f"{split}_questions.json", questions)
    write_json(folder / f"{split}_outputs.json", {"task": f"LaMP_{kind.number}", "golds": golds})

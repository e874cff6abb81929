"""`matryoshka init`: a configuration to start from."""

from pathlib import Path
from typing import Annotated

import tyro

from matryoshka.core.files import write_text
from matryoshka.pilot.recipes import commented_recipe


def init(recipe: Annotated[str, tyro.conf.Positional], out: Path | None = None) -> None:
    """Write a recipe of this package as a commented configuration, to be changed and given to the pilot.

    Args:
        recipe: The recipe's name, such as demo; an unknown one lists them.
        out: The file to write, which must not exist; default: RECIPE.toml in the current folder.
    """
    path = out or Path(f"{recipe}.toml")
    text = commented_recipe(recipe)
    if path.exists():
        raise ValueError(f"{path}: exists, and nothing is overwritten; give another file as --out")
    write_text(path, text)
    print(f"{path}; matryoshka pilot --config {path}")

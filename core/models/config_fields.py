"""`config.json` as one architecture reads it: every field by name, with errors that say which one is wrong.

A field that shapes the computation is read, or it is `fixed`: any other value than the one that the file computes is
refused by name. Fields that shape nothing (token ids, initialisation, versions) are not looked at.
"""

from typing import Any

from matryoshka.core.json_input import shown

REQUIRED = object()
LARGEST = 2**26  # of any size: ten times the largest vocabulary there is
LARGEST_OF = {"num_hidden_layers": 1000, "max_position_embeddings": 2**31}  # layers are built before weights are read


class Fields:
    """The fields of a `config.json`; `family` is the architecture's name in messages."""

    def __init__(self, data: dict[str, Any], family: str) -> None:
        self.data = data
        self.family = family

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """Return a field, or `default` where it is missing or null.

        Raises ValueError where it is missing and there is no default.
        """
        value = self.data.get(name)
        if value is None and default is REQUIRED:
            raise ValueError(f"config.json: field {name!r} is missing; a {self.family} config has it")
        return default if value is None else value

    def integer(self, name: str, default: Any = REQUIRED, least: int = 1) -> int:
        """Return a field that is a whole number of at least `least`. Raises ValueError for anything else."""
        value = self.get(name, default)
        largest = LARGEST_OF.get(name, LARGEST)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= largest:
            what = f"config.json: {name} is {shown(value)}, expected a whole number"
            raise ValueError(f"{what} from {least} to {largest}")
        return value

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """Return a field that is a number above 0. Raises ValueError for anything else."""
        return positive(name, self.get(name, default))

    def window(self, default: Any = None) -> int | None:
        """Return the sliding window, a whole number above 0; one that is left out is the default, null is none."""
        value = self.data.get("sliding_window", default)
        return None if value is None else self.integer("sliding_window", default)

    def softcap(self, name: str, default: float | None = None) -> float | None:
        """Return a soft-cap, a number above 0; one that is left out is the default, one that is null is none."""
        value = self.data.get(name, default)
        return None if value is None else positive(name, value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a field that is true or false. Raises ValueError for anything else."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} is {shown(value)}, expected true or false")
        return value

    def fixed(self, **values: Any) -> None:
        """Raise ValueError, naming the field, where one of `values` is present with another value (null is absent)."""
        for name, expected in values.items():
            if self.data.get(name) not in (None, expected):
                raise ValueError(
                    f"config.json: {name} {shown(self.data[name])} is not supported; {self.family} is computed with "
                    f"{expected!r}. Choose another model, or add it to the architecture's file (docs/controllers.md)"
                )


def positive(name: str, value: Any) -> float:
    """Return a number above 0 as float. Raises ValueError, naming it, for anything else.

    Numbers beyond 1e30 and below 1e-30 would overflow, or become 0, in fp32.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-30 < value < 1e30:
        raise ValueError(f"config.json: {name} is {shown(value)}, expected a finite number above 0")
    return float(value)

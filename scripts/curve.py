"""`matryoshka curve`: a pilot over several seeds."""

import json
from pathlib import Path

from matryoshka.core.config import apply_overrides, load_toml
from matryoshka.core.files import write_json
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.curve import run_seeds, table
from matryoshka.pilot.folder import RUNS


def curve(config: Path, seeds: tuple[int, ...] = (0, 1, 2), set: tuple[str, ...] = ()) -> None:
    """Run or continue a pilot for each seed as runs/NAME-SEED, and write runs/NAME-curve.json.

    Args:
        config: The pilot's TOML file.
        seeds: One run each.
        set: Changes of the configuration, as key.path=value.
    """
    if not seeds or len(seeds) > len(dict.fromkeys(seeds)):
        raise ValueError(f"curve: seeds {list(seeds)}: give at least one, and each once")
    shared = apply_overrides(load_toml(RunConfig, config), list(set))
    result = run_seeds(shared, seeds, RUNS, lambda row: print(json.dumps(row), flush=True))
    write_json(RUNS / f"{shared.name}-curve.json", result)
    print(table(result))
    print(json.dumps({"name": shared.name, "seeds": list(seeds), **result}))

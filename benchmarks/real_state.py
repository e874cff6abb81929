"""The state of a real experiment, learnt and paid for, in a folder of a few megabytes that goes into the repository.

`pack` writes it after a run, `unpack` puts it back where a run looks for it: a later run on another machine asks for no
answer again and trains no stage again.
"""

import json
import lzma
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from matryoshka.core.files import write_json
from matryoshka.core.records import Sample, from_json, to_json
from matryoshka.inference.cache import ResponseCache
from matryoshka.lora.files import WEIGHTS, adapter_hash

ANSWERS, OUTCOMES = "answers.jsonl.xz", ("outcomes*.json", "transfer*.json")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SECOND_STAR = "-star"  # ends the name of the run that is a seed's second round of STaR
NEW_GAMES = "-new"  # ends the name of the run that is a seed's second round on new games
COPIED = {SECOND_STAR: ("warmup",), NEW_GAMES: ("warmup", "round-1")}  # stages that such a run has from the seed's own
KEPT = ("environment.json", "seconds.json", "preferences.jsonl", "trajectories.jsonl")


def pack(root: Path, folder: Path) -> None:
    """Write the state of the runs under `root` to `folder`: answers, adapters in fp16, trajectories, outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    cache = ResponseCache(root / "answers.sqlite")
    try:
        rows = sorted((key, name, to_json(sample)) for key, name, _, sample in cache.rows())
    finally:
        cache.close()
    _write_lines(folder / ANSWERS, rows)
    for outcomes in _outcomes(root):
        shutil.copyfile(outcomes, folder / outcomes.name)
    hashes: dict[str, str] = {}
    for run in sorted(path.parent for path in root.glob("*/config.toml")):
        for adapter in sorted(run.glob("*/adapter")):
            stage = adapter.relative_to(run).parts[0]
            if any(run.name.endswith(name) and stage in stages for name, stages in COPIED.items()):
                continue
            target = folder / run.name / stage / "adapter"
            target.mkdir(parents=True, exist_ok=True)
            for file in adapter.iterdir():
                if file.name == WEIGHTS:
                    half = {key: value.to(torch.float16) for key, value in load_file(file).items()}
                    save_file(half, target / WEIGHTS)
                    (target / WEIGHTS).chmod(0o644)
                else:  # the base is named as anybody finds it, not by a folder of this machine
                    saved = json.loads(file.read_text())
                    write_json(target / file.name, saved | {"base_model_name_or_path": BASE})
            hashes[f"{run.name}/{stage}"] = adapter_hash(target)
            for metrics in sorted((run / stage).rglob("metrics.jsonl")):
                shutil.copyfile(metrics, folder / run.name / stage / metrics.name)
        for name in KEPT:
            if (run / name).exists():
                _compress(run / name, folder / run.name / f"{name}.xz")
    write_json(folder / "adapters.json", hashes)


def unpack(folder: Path, root: Path, with_answers: bool = True) -> int:
    """Put the state in `folder` where runs under `root` look for it and return how many answers were new.

    What is there already stays. with_answers: whether the generator's answers are put back, too.
    """
    root.mkdir(parents=True, exist_ok=True)
    for adapter in sorted(folder.glob("*/*/adapter")):
        target = root / adapter.relative_to(folder)
        if not target.exists():
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            shutil.copytree(adapter, temporary)
            os.rename(temporary, target)
    for outcomes in _outcomes(folder) if with_answers else ():
        if not (root / outcomes.name).exists():
            shutil.copyfile(outcomes, root / outcomes.name)
    added = 0
    if with_answers and (folder / ANSWERS).exists():
        cache = ResponseCache(root / "answers.sqlite")
        try:
            with lzma.open(folder / ANSWERS, "rt", encoding="utf-8") as lines:
                for line in lines:
                    key, name, sample = json.loads(line)
                    if cache.get(key) is None:
                        cache.put(key, from_json(Sample, sample), name)
                        added += 1
        finally:
            cache.close()
    return added


def _outcomes(folder: Path) -> list[Path]:
    return sorted(path for pattern in OUTCOMES for path in folder.glob(pattern))


def _write_lines(path: Path, rows: list[tuple[str, str, object]]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with lzma.open(temporary, "wt", encoding="utf-8", preset=9) as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.rename(temporary, path)


def _compress(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(temporary, "wb", preset=9) as out:
        out.write(source.read_bytes())
    os.rename(temporary, target)

"""`matryoshka export`: the policy of a run's stage."""

from pathlib import Path

from matryoshka.pilot.export import export_policy


def export(run: Path, out: Path, stage: str = "") -> None:
    """Copy the policy of a run's stage and print the folder and its content hash.

    It is an adapter in PEFT layout or, where all weights were trained, a Hugging Face folder.

    Args:
        run: The run's folder, e.g. runs/demo-0.
        out: Folder to write; it must not exist.
        stage: warmup, star, round-1, ...; by default the last round that is trained.
    """
    print(out, export_policy(run, out, stage))

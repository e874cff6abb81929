"""Where LaMP's files are."""

from matryoshka.core.records import RemoteFile

BENCHMARKS = ("lamp",)
FOLDER = "lamp"
SITE = "https://ciir.cs.umass.edu/downloads/LaMP"
FOLDERS = {"1": "LaMP_1", "2N": "LaMP_2", "2M": "LaMP_2/new", "3": "LaMP_3", "4": "LaMP_4"}


def sources(benchmark: str, part: str) -> list[RemoteFile]:
    """Return the questions and gold answers of the train and dev splits of the LaMP task `part`.

    Raises ValueError for a part that LaMP does not have.
    """
    if part not in FOLDERS:
        raise ValueError(f"LaMP has no task {part!r}; choose from {', '.join(FOLDERS)} (2N: news, 2M: movies)")
    splits = [(split, f"{split}_{kind}.json") for split in ("train", "dev") for kind in ("questions", "outputs")]
    return [RemoteFile(f"LaMP_{part}/{name}", f"{FOLDERS[part]}/{split}/{name}", SITE) for split, name in splits]

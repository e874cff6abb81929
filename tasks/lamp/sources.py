"""Where LaMP's files are."""

from matryoshka.core.records import RemoteFile

BENCHMARKS = ("lamp",)
FOLDER = "lamp"
SITE = "https://ciir.cs.umass.edu/downloads/LaMP"
# The site publishes no checksums, and none are to be found elsewhere; these sizes are somebody's report of 2026.
REPORTED_BYTES = {
    "LaMP_1/dev/dev_questions.json": 273_443_200,
    "LaMP_1/dev/dev_outputs.json": 86_416,
    "LaMP_2/new/dev/dev_questions.json": 9_493_217,
    "LaMP_2/new/dev/dev_outputs.json": 27_502,
    "LaMP_3/dev/dev_questions.json": 401_034_862,
    "LaMP_3/dev/dev_outputs.json": 81_416,
}
FOLDERS = {"1": "LaMP_1", "2N": "LaMP_2", "2M": "LaMP_2/new", "3": "LaMP_3", "4": "LaMP_4"}


def sources(benchmark: str, part: str) -> list[RemoteFile]:
    """Return the questions and gold answers of the train and dev splits of the LaMP task `part`.

    Raises ValueError for a part that LaMP does not have.
    """
    if part not in FOLDERS:
        raise ValueError(f"LaMP has no task {part!r}; choose from {', '.join(FOLDERS)} (2N: news, 2M: movies)")
    splits = [(split, f"{split}_{kind}.json") for split in ("train", "dev") for kind in ("questions", "outputs")]
    places = {f"LaMP_{part}/{name}": f"{FOLDERS[part]}/{split}/{name}" for split, name in splits}
    return [
        RemoteFile(path, place, SITE, reported_bytes=REPORTED_BYTES.get(place, 0)) for path, place in places.items()
    ]

"""Where the files of GSM8K and GSM-Hard are."""

from matryoshka.core.records import RemoteFile

BENCHMARKS = ("gsm8k", "gsm-hard")
FOLDER = "gsm8k"  # of both: the configurations look for them there
RAW = "https://raw.githubusercontent.com"
GSM8K = f"{RAW}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
GSM_HARD = f"{RAW}/reasoning-machines/pal/f81ca2a9777f002f98a6b4d0f10b61bd5c8feb02/datasets"
SHA256 = {
    "train.jsonl": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test.jsonl": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    "test_socratic.jsonl": "c96673362fa7a699f4836a9b6474a067448f95fe58064727501ee63ba4c3fdb6",
    "gsmhardv2.jsonl": "2032b0188a49ac0ec38cbe1e695e7d62d6dddc44bbb64f920728aca710e9ddef",
}
GIT_BLOBS = {"train_socratic.jsonl": "8d038499db0e40f3fb7d1f3bbef090cb932c3e2d"}  # where no SHA-256 is known


def sources(benchmark: str, part: str) -> list[RemoteFile]:
    """Return the files of `benchmark`; the part "socratic" of GSM8K has its steps as questions.

    Raises ValueError for another part.
    """
    if benchmark == "gsm-hard" and not part:
        site, names = GSM_HARD, ["gsmhardv2.jsonl"]
    elif benchmark == "gsm8k" and part in ("", "socratic"):
        site, names = GSM8K, [f"{split}{'_socratic' * bool(part)}.jsonl" for split in ("train", "test")]
    else:
        raise ValueError(f"{benchmark} has no part {part!r}; leave --task out, or take 'socratic' of gsm8k")
    return [RemoteFile(name, name, site, SHA256.get(name, ""), GIT_BLOBS.get(name, "")) for name in names]

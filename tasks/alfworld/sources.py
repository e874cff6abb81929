"""Where ALFWorld's files are: the games, their descriptions, and the logic that all games share."""

from matryoshka.core.records import RemoteFile

BENCHMARKS = ("alfworld",)
FOLDER = "alfworld"
SITE = "https://github.com/alfworld/alfworld/releases/download"
ARCHIVES = ("0.2.2/json_2.1.1_json.zip", "0.4.2/json_2.1.3_tw-pddl.zip")
LOGIC_SITE = "https://raw.githubusercontent.com/alfworld/alfworld/0.4.2/alfworld/data"
LOGIC = {
    "alfred.pddl": "f1473041ed01da514de1f87adfd7ef0804862361f83ccf63c75e43633b0eb280",
    "alfred.twl2": "c5b22f0f73309a7fd7c8e5b71de42ad4803b60766ab4a51cc2feb34162be036b",
}


def sources(benchmark: str, part: str) -> list[RemoteFile]:
    """Return the archives and the logic, which make the folder that ALFWORLD_DATA names. Raises ValueError for a part.
    """
    if part:
        raise ValueError(f"{benchmark} has no parts; leave --task {part!r} out")
    archives = [RemoteFile(place.rpartition("/")[2], place, SITE, unpack=True) for place in ARCHIVES]
    return [*archives, *(RemoteFile(f"logic/{name}", name, LOGIC_SITE, digest) for name, digest in LOGIC.items())]

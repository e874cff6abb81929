"""Where ALFWorld's files are: the games, their descriptions, and the logic that all games share."""

from matryoshka.core.records import RemoteFile

BENCHMARKS = ("alfworld",)
FOLDER = "alfworld"
SITE = "https://github.com/alfworld/alfworld/releases/download"
# The site publishes no checksums; these are what several downloads found (72,018,818 and 36,507,267 bytes).
ARCHIVES = {
    "0.2.2/json_2.1.1_json.zip": "25171f16e20ad7b048c47275c45b0babf3aa1cbab29cec97387922350a9844bc",
    "0.4.2/json_2.1.3_tw-pddl.zip": "5df77ea759f2211a4106082839ddbbb790f1ba4e7d097ed732cf453f72aa36cf",
}
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
    archives = [
        RemoteFile(place.rpartition("/")[2], place, SITE, digest, unpack=True) for place, digest in ARCHIVES.items()
    ]
    return [*archives, *(RemoteFile(f"logic/{name}", name, LOGIC_SITE, digest) for name, digest in LOGIC.items())]

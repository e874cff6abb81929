"""`matryoshka parity`: whether trainer, sampler and vLLM compute the same log-probs."""

import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from matryoshka.dpo.parity import BOUNDS
from matryoshka.pilot.environment import environment
from matryoshka.pilot.parity import ParityConfig, measure


def parity(config: ParityConfig) -> None:
    """Print the table, then its rows as JSON. Raises ValueError where the bound does not hold."""
    rows = measure(config)
    bound = BOUNDS[config.dtype]
    title = f"nats a token, {config.dtype}, bound {bound:g}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("adapter", "drawn at", "log-probs", "against", "tokens", "rms", "largest"):
        table.add_column(heading)
    for row in rows:
        found = row.difference
        numbers = (str(found.num_tokens), f"{found.rms:.2g}", f"{found.largest:.2g}")
        table.add_row(row.adapter, row.sampling, row.source, row.against, *numbers)
    Console().print(table)
    holds = all(row.difference.rms <= bound for row in rows)
    result = {"dtype": config.dtype, "bound": bound, "rows": [asdict(row) for row in rows], "holds": holds}
    print(json.dumps({**result, "machine": environment()}))
    if not holds:
        raise ValueError("parity: log-probs differ by more than rounding (the table above); a pilot would not train")

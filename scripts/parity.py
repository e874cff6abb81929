"""`matryoshka parity`: whether trainer, sampler and vLLM compute the same log-probs."""

import json

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
    for heading in ("adapter", "log-probs", "against", "tokens", "rms", "largest"):
        table.add_column(heading)
    for row in rows:
        numbers = (str(row["num_tokens"]), f"{row['rms']:.2g}", f"{row['largest']:.2g}")
        table.add_row(row["adapter"], row["log-probs"], row["against"], *numbers)
    Console().print(table)
    holds = all(row["rms"] <= bound for row in rows)
    print(json.dumps({"dtype": config.dtype, "bound": bound, "rows": rows, "holds": holds, "machine": environment()}))
    if not holds:
        raise ValueError("parity: log-probs differ by more than rounding (the table above); a pilot would not train")

"""Options of the tasks that run generated programs: what one may use, and the boundary that it runs behind."""

from dataclasses import dataclass

from matryoshka.core.config import check_least
from matryoshka.tasks.sandbox_backends import MIN_MEMORY_BYTES, Isolation, Sandbox, local_sandbox
from matryoshka.tasks.sandbox_command import CommandSandbox

LONGEST_S = 1_000_000
MOST_MB = 2**24  # the kernel's limits are 64-bit integers of bytes


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of one generated program, and the kernel's boundary around it (SECURITY.md)."""

    timeout_s: float = 5.0
    """Seconds that one program may run, without the time that its questions take."""
    memory_mb: int = 512
    """Memory that one program may take."""
    isolation: Isolation = "auto"
    """"auto" takes what this machine has and says what is missing, "required" refuses to start without Landlock and
    seccomp, "none" keeps the limits alone."""
    command: tuple[str, ...] = ()
    """Command that programs run through instead, such as docker run --rm -i --network=none python:3.12-slim."""

    def __post_init__(self) -> None:
        check_least(self, "", memory_mb=MIN_MEMORY_BYTES // 2**20)
        if not 0 < self.timeout_s <= LONGEST_S:
            raise ValueError(f"timeout_s {self.timeout_s} must be above 0 and at most {LONGEST_S:,}")
        if self.memory_mb > MOST_MB:
            raise ValueError(f"memory_mb {self.memory_mb} must be at most {MOST_MB:,}")

    @property
    def memory_bytes(self) -> int:
        return self.memory_mb * 2**20

    def sandbox(self) -> Sandbox:
        """Return where the programs run."""
        return CommandSandbox(self.command) if self.command else local_sandbox(self.isolation)

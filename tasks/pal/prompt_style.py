"""How the controller and the generator of word problems are asked; the texts are in `prompts/*.toml`."""

from collections.abc import Sequence
from pathlib import Path

from matryoshka.core.records import Messages
from matryoshka.tasks.prompt_files import PromptFile

SHIPPED = Path(__file__).with_name("prompts")
ONE_A_LINE = "{{ steps | join('\n') }}"


class PromptStyle:
    """One family of prompts: a shipped style or a user's own file. guidance "" means that there is none.

    A retry and a new plan of the shipped styles insert the conversation so far, so that the model sees what it wrote
    and what really happened. A file that inserts none begins a new one.
    """

    def __init__(self, prompts: str) -> None:
        self.file = PromptFile(prompts, SHIPPED, ("guidance", "code", "retry", "replan"), {"written": ONE_A_LINE})
        self.name = self.file.name

    def guidance(self, question: str) -> Messages:
        """Return the request for sub-questions."""
        return self.file.render("guidance", question=question)

    def written(self, steps: Sequence[str]) -> str:
        """Return sub-questions as the guidance that this style asks for."""
        return self.file.text("written", steps=steps)

    def code(self, question: str, guidance: str) -> Messages:
        """Return the request for a program."""
        return self.file.render("code", question=question, guidance=guidance)

    def retry(self, question: str, guidance: str, code: str, error: str) -> Messages:
        """Return the request for a corrected program, with the previous one and the real error."""
        before = self.code(question, guidance)
        values = {"question": question, "guidance": guidance, "code": code, "error": error}
        return self.file.render("retry", conversation=before, **values)

    def replan(self, question: str, guidance: str, feedback: str) -> Messages:
        """Return the request for new sub-questions, with the previous ones and what came of them."""
        before, values = self.guidance(question), {"question": question, "guidance": guidance, "feedback": feedback}
        return self.file.render("replan", conversation=before, **values)

"""How the controller and the generator of word problems are asked; the texts are in `prompts/*.toml`."""

from pathlib import Path

from matryoshka.core.records import Messages
from matryoshka.tasks.prompt_files import PromptFile

SHIPPED = Path(__file__).with_name("prompts")


class PromptStyle:
    """One family of prompts: a shipped style or a user's own file. guidance "" means that there is none.

    A retry and a new plan continue the conversation, so the model sees what it wrote and what really happened.
    """

    def __init__(self, prompts: str) -> None:
        self.file = PromptFile(prompts, SHIPPED, ("guidance", "code", "retry", "replan"))
        self.name = self.file.name

    def guidance(self, question: str) -> Messages:
        """Return the request for sub-questions."""
        return self.file.render("guidance", question=question)

    def code(self, question: str, guidance: str) -> Messages:
        """Return the request for a program."""
        return self.file.render("code", question=question, guidance=guidance)

    def retry(self, question: str, guidance: str, code: str, error: str) -> Messages:
        """Return the request for a corrected program, with the previous one and the real error."""
        return *self.code(question, guidance), *self.file.render("retry", code=code, error=error)

    def replan(self, question: str, guidance: str, feedback: str) -> Messages:
        """Return the request for new sub-questions, with the previous ones and what came of them."""
        return *self.guidance(question), *self.file.render("replan", guidance=guidance, feedback=feedback)

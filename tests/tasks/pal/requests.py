"""Requests to the generator and for new guidance, as an episode makes them."""

from matryoshka.core.records import Messages
from matryoshka.tasks.prompt_files import PromptFile


def code(style: PromptFile, question: str, guidance: str) -> Messages:
    """Return the request for a program."""
    return style.render("code", question=question, guidance=guidance)


def retry(style: PromptFile, question: str, guidance: str, program: str, error: str) -> Messages:
    """Return the request for a corrected program."""
    values = {"question": question, "guidance": guidance, "code": program, "error": error}
    return style.render("retry", conversation=code(style, question, guidance), **values)


def replan(style: PromptFile, question: str, guidance: str, feedback: str) -> Messages:
    """Return the request for new guidance."""
    before = style.render("guidance", question=question)
    return style.render("replan", conversation=before, question=question, guidance=guidance, feedback=feedback)

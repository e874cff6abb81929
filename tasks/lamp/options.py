"""The options of the task "lamp"."""

from dataclasses import dataclass
from typing import Literal

from matryoshka.core.config import check_least


@dataclass(frozen=True)
class LampOptions:
    """Which LaMP task it is, where its questions come from, and how much of a user's history is shown."""

    task: Literal["1", "2N", "2M", "3", "4"] = "2N"
    """LaMP's task: 1 citations, 2N news categories, 2M movie tags, 3 ratings, 4 headlines."""
    prompts: str = "plain"
    """Prompts: "plain", "published" in the form of the original's, or a .toml file of your own (tasks/lamp/prompts/
    holds the shipped ones)."""
    train_file: str = ""
    """LaMP's questions file for warm-up, training and validation; "" makes users from the seed."""
    test_file: str = ""
    """LaMP's questions file of the test problems; "" cuts all splits from train_file, no user being in two of them."""
    retrieval: Literal["bm25", "recency", "dense"] = "bm25"
    """How profile entries are ranked; "recency" needs dated entries, "dense" an embeddings endpoint."""
    entries: int = 0
    """Profile entries that are retrieved; 0 is the published number."""
    prompt_tokens: int = 4000
    """Length limit of the controller's whole prompt, in its own tokens."""
    entry_characters: int = 2000
    """Length limit of one profile entry."""
    show_question: bool = False
    """Put the question into the controller's prompt, which the published prompt leaves out."""
    retrieved: int = 0
    """Profile entries that the generator sees besides the summary."""
    meteor: bool = False
    """Score headlines by METEOR too; it needs WordNet."""
    embeddings_url: str = ""
    """OpenAI-compatible endpoint of the embeddings for "dense"."""
    embeddings_model: str = ""
    """Model of the embeddings."""
    embeddings_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; "" sends none."""
    embeddings_cache: str = "data/embeddings.sqlite"
    """SQLite file that keeps the embeddings; "" keeps none."""

    def __post_init__(self) -> None:
        check_least(self, "", entries=0, prompt_tokens=1, entry_characters=1, retrieved=0)

"""`matryoshka serve`: a model and its adapters behind an OpenAI-compatible HTTP server."""

from matryoshka.pilot.serving import serve as serve

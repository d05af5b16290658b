"""Talk to ATLUS: `helper` is written by hand, everything in `generated` comes from the server's OpenAPI document."""

from .generated import models
from .generated.models import ErrorCode
from .helper import AtlusError, Connection, Event, apages, aresume, astream, connect, ok, pages, resume, stream

__all__ = [
    "AtlusError",
    "Connection",
    "ErrorCode",
    "Event",
    "apages",
    "aresume",
    "astream",
    "connect",
    "models",
    "ok",
    "pages",
    "resume",
    "stream",
]

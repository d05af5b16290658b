"""Writes the copy of the document that openapi-python-client reads: prepare.py FROM TO.

Left out is what `atlus_client/helper.py` does: failures (each is raised as an `AtlusError`), keys (the connection shows
its own), and what an event stream holds. Archives are bytes, and what may be null is marked in the one way that the
generator understands.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

FAILURE = {"$ref": "#/components/schemas/Failure"}
SCHEMAS = {
    "text/event-stream": {"type": "string"},
    "application/x-ndjson": {"type": "string", "format": "binary"},
}


def is_failure(document: dict[str, Any], response: dict[str, Any]) -> bool:
    if "$ref" in response:
        response = document["components"]["responses"][response["$ref"].rsplit("/", 1)[1]]
    return any(content.get("schema") == FAILURE for content in response.get("content", {}).values())


def mark_nullable(part: Any) -> None:
    """Beside `type` the generator does not see that `nullable` is about what `allOf` refers to."""
    if isinstance(part, dict):
        if part.get("nullable") is True and "allOf" in part:
            part.pop("type", None)
        for inner in part.values():
            mark_nullable(inner)
    elif isinstance(part, list):
        for inner in part:
            mark_nullable(inner)


def prepare(document: dict[str, Any]) -> None:
    mark_nullable(document["components"])
    for path in document["paths"].values():
        for operation in (part for part in path.values() if "operationId" in part):
            operation.pop("security", None)
            responses = operation["responses"]
            for status in [status for status in responses if is_failure(document, responses[status])]:
                del responses[status]
            for part in [operation.get("requestBody", {}), *responses.values()]:
                for media_type, content in part.get("content", {}).items():
                    if media_type in SCHEMAS:
                        content["schema"] = SCHEMAS[media_type]


source, target = map(Path, sys.argv[1:])
document = YAML(typ="safe", pure=True).load(source)
prepare(document)
# As JSON, since times in a YAML document are not always text.
target.write_text(json.dumps(document, default=str))

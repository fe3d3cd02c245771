"""The pages in a browser: one to try the server, one that describes its API. They load nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from qtuning_fast.serving.options import ServingOptions
from qtuning_fast.version import __version__

_TEMPLATES = Environment(
    loader=PackageLoader("qtuning_fast.serving", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


def trial_page(options: ServingOptions) -> HTMLResponse:
    """Return the page to try the server."""
    return _page("trial.html.j2", options=options, version=__version__)


def api_page(schema: dict[str, Any]) -> HTMLResponse:
    """Return the page that describes the API, given its OpenAPI description."""
    return _page("api.html.j2", schema=schema, operations=_operations(schema), version=__version__)


def _page(template: str, **values: Any) -> HTMLResponse:
    """Render a page that a browser lets run its own script alone, and ask this server alone."""
    text = _TEMPLATES.get_template(template).render(**values)
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in _SCRIPT.findall(text)
    ]
    policy = {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "script-src": " ".join(hashes) or "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
    }
    return HTMLResponse(text, headers=headers)


def _operations(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The operations of an API in the order of its description, with the fields of their bodies and responses."""
    found = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            contents = operation.get("requestBody", {}).get("content", {})
            found.append(
                {
                    "method": method.upper(),
                    "path": path,
                    "summary": operation.get("description", operation.get("summary", "")),
                    "parameters": operation.get("parameters", []),
                    "bodies": {kind: _fields(schema, each.get("schema", {})) for kind, each in contents.items()},
                    "responses": {
                        status: (each.get("description", ""), _fields(schema, _of_json(each)))
                        for status, each in operation["responses"].items()
                    },
                }
            )
    return found


def _of_json(response: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = response.get("content", {}).get("application/json", {}).get("schema", {})
    return content


def _fields(schema: dict[str, Any], of: dict[str, Any]) -> list[tuple[str, str, bool, str]]:
    """Name, type, whether it is required, and description of each field of an object."""
    resolved = _resolved(schema, of)
    required = set(resolved.get("required", ()))
    return [
        (name, _kind(schema, each), name in required, each.get("description", ""))
        for name, each in resolved.get("properties", {}).items()
    ]


def _kind(schema: dict[str, Any], of: dict[str, Any]) -> str:
    """The type of a field in words."""
    if "anyOf" in of:
        return " or ".join(_kind(schema, each) for each in of["anyOf"])
    if "$ref" in of:
        return str(of["$ref"]).rpartition("/")[2]
    kind = str(of.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(schema, of.get('items', {}))}"
    if kind == "string" and (of.get("format") == "binary" or "contentMediaType" in of):
        return "file"
    return kind


def _resolved(schema: dict[str, Any], of: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in of:
        return of
    found: dict[str, Any] = schema["components"]["schemas"][str(of["$ref"]).rpartition("/")[2]]
    return found

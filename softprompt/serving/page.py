"""The page at `/`, on which two prompts answer side by side."""

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse


def page_router() -> APIRouter:
    """Return the route of the page. It needs no API key, because the page contains no data."""
    html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": _content_security_policy(html),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return router


def _content_security_policy(html: str) -> str:
    """Allow the style and the script of the page, and requests to this server; nothing else."""
    return "; ".join(
        [
            "default-src 'none'",
            f"style-src {_source(html, 'style')}",
            f"script-src {_source(html, 'script')}",
            "connect-src 'self'",
            "img-src data:",  # the empty icon
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def _source(html: str, tag: str) -> str:
    """The source expression for the content of the only element with a tag."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

"""The page on a port: on this machine alone, or behind a password."""

import hmac
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sheepfold.chat import page
from sheepfold.chat.looks import CSS, SCRIPT, theme
from sheepfold.listening import bind, called, check_open, hosts_of, read_token

if TYPE_CHECKING:
    from sheepfold.answering.model import Answering

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
    "frame-ancestors 'self'"
)
"""What a browser may fetch for the page: what the page's own server has, whatever a model answers or a library asks."""


class OwnOnly:
    """ASGI middleware that sends POLICY with every answer, and gives none under a name that is not this server's.

    hosts: the names that it goes by; None: any. A page elsewhere that has its own name resolve to this machine would
    otherwise be let in by the browser.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        host = called(dict(scope["headers"]).get(b"host", b"")) if scope["type"] == "http" else ""
        if scope["type"] == "http" and self.hosts is not None and host not in self.hosts:
            await send({"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page is served to its own machine alone\n"})
            return
        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


def place(host: str, port: int, token_file: Path | None) -> tuple[int, str | None]:
    """Return the port that the page will have, 0 made a free one, and what visitors must know, None where nothing.

    Raises ConfigError for an address that cannot be had, and where others could visit without a password.
    """
    token = read_token(token_file)
    with bind(host, port) as taken:
        check_open(host, taken, token)
        return int(taken.getsockname()[1]), token


def launch(answering: "Answering", host: str, port: int, token: str | None, browser: bool) -> str:
    """Start the page in threads of its own; return its address."""
    from starlette.middleware import Middleware

    blocks = page.build(answering)
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        auth=None if token is None else lambda _, password: hmac.compare_digest(password.encode(), token.encode()),
        auth_message="Any name, and the password that this page was started with",
        max_file_size="1kb",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css=CSS,
        js=SCRIPT,
        app_kwargs={"middleware": [Middleware(OwnOnly, hosts=hosts_of(host, token))]},
    )
    return str(url)

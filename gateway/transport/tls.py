"""TLS to an upstream: verified, and resumed where the upstream offers it."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class Tls:
    """One upstream's context, and the session that its next connection begins with.

    asyncio and uvloop have no parameter for a session; the object that the context makes for them takes it.
    """

    def __init__(self, ca_file: Path | None) -> None:
        """Loads the certificates: a tenth of a second. Raises OSError."""
        self.context = ssl.create_default_context(cafile=ca_file)
        self.context.set_alpn_protocols(["http/1.1"])
        self.session: ssl.SSLSession | None = None
        known = self

        class Resuming(ssl.SSLObject):
            offered = False

            def do_handshake(self) -> None:
                if not self.offered:
                    self.offered = True
                    if known.session is not None:
                        self.session = known.session
                super().do_handshake()

        self.context.sslobject_class = Resuming

    def remember(self, made: ssl.SSLObject) -> None:
        """TLS 1.3 sends a session's ticket after the handshake: known once a reply has come."""
        session = made.session
        if session is not None and session.has_ticket:
            self.session = session

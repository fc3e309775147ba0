"""SelfJudgePlugin: the routes of `self-judge serve` inside `vllm serve`, below `/self_judge`.

vLLM loads the plugin if `VLLM_PLUGINS` names it. The plugin asks vLLM over the loopback, as
`self-judge serve` in front of one replica does. This module does not answer requests itself.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from self_judge.config.arguments import command_parser, filled
from self_judge.errors import ConfigError
from self_judge.judging.choice import JudgeChoice
from self_judge.serving.command import ServeJob, application

VARIABLE = "SELF_JUDGE_SERVE"  # the options of `self-judge serve`
_OF_VLLM = ("host", "port", "api_key", "server")
_EVERYWHERE = ("", "0.0.0.0", "::", "[::]")


class SelfJudgePlugin:
    """An endpoint plugin of vLLM (`vllm.plugins.endpoint_plugins`).

    Attributes:
        name: the name for `VLLM_PLUGINS`.
        required_tasks: what the served model must be able to do.
    """

    name = "self_judge"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: ASGIApp | None = None
        self._starting = asyncio.Lock()

    def attach_router(self, app: Any) -> None:
        """Adds the routes; called by vLLM once."""
        app.mount("/self_judge", self._answer)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Reads the options, before vLLM answers requests.

        Raises:
            ConfigError: an option cannot be used, or vLLM cannot be asked over the loopback.
        """
        if args.uds or args.ssl_keyfile:
            raise ConfigError("self_judge asks vLLM over HTTP: leave out --uds and --ssl-keyfile, "
                              "and let a proxy encrypt")  # fmt: skip
        parser, options = command_parser(), shlex.split(os.environ.get(VARIABLE, ""))
        given = parser.parse(["serve", args.model, *options])
        usual = parser.parse(["serve", args.model])
        for name in _OF_VLLM:
            if vars(given)[name] != vars(usual)[name]:
                option = "vllm-server" if name == "server" else name.replace("_", "-")
                raise ConfigError(f"{VARIABLE}: leave out --{option}, which is vLLM's own")
        # As vLLM reads its keys
        keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
        host = "127.0.0.1" if (args.host or "") in _EVERYWHERE else args.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{args.port}{args.root_path or ''}"
        self._keys = keys
        self._choice = filled(JudgeChoice, given, server=[url])
        self._job = filled(ServeJob, given, server_key=keys[0] if keys else None)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._starting:
            # vLLM answers the questions about its model only after its start.
            self._app = self._app or await self._started()
        await self._app(scope, receive, send)

    async def _started(self) -> ASGIApp:
        app = await asyncio.to_thread(application, self._choice, self._job, self._keys)
        await app.engine.backend.start()
        return app.starlette()

"""The SDK's own client, with what it lacks: a bound on what an answer may bring, and a sight of how it went.

Defects of the SDK that are met here (e2b-code-interpreter 2.11, e2b 2.63; read in their source):

- an answer is read line by line into memory, whatever its size: `_Watched` ends it at `MOST_BYTES`
- an answer that was cut short between two lines passes for a whole one: `Exchange.finished` knows better
- `AuthenticationException` and `ServiceBusyException` are no `SandboxException`, and a refused or broken
  connection is an `httpx` error: `execute` and `translated` sort them all
- `timeout=T` ends a call at twice T: the session keeps the time itself, and cancels

Imports the SDK; only `E2BSandbox` imports this, when one is made.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
from e2b import (
    AuthenticationException,
    NotFoundException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    TimeoutException,
)
from e2b_code_interpreter.code_interpreter_async import AsyncSandbox

from metis_agent.errors import InfrastructureError, SandboxGoneError, SandboxUnavailableError
from metis_agent.tools.sandboxes.e2b.call import Call, Exchange

__all__ = [
    "MOST_BYTES",
    "BrokenAnswerError",
    "FloodError",
    "NotRunningError",
    "RemoteSandbox",
    "SandboxDiedError",
    "UnreachableError",
    "translated",
]

MOST_BYTES = 16 << 20
"""Of one answer; one message of the code's output, base64 images included, may be all of it."""

_SPARE_SECONDS = 5.0
_BAD_GATEWAY = 502
# What a message can raise that is not as the protocol has it: the code may have written it.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class FloodError(Exception):
    """The answer went on beyond `MOST_BYTES`."""


class BrokenAnswerError(Exception):
    """The answer is not one of the protocol's."""


class NotRunningError(Exception):
    """The remote sandbox is not running, so the code was not run: it ended, or is paused."""


class SandboxDiedError(Exception):
    """The remote sandbox ended under the call."""


class UnreachableError(Exception):
    """No connection was made, so nothing was sent."""


class RemoteSandbox(AsyncSandbox):
    """One remote sandbox; its calls come one after another."""

    _exchange: Exchange | None = None

    @property
    def _client(self) -> httpx.AsyncClient:
        client = super()._client
        if self._exchange is not None:
            client._transport = _Watched(client._transport, self._exchange)
        return client

    async def execute(self, code: str, call: Call, seconds: float) -> None:
        """Run code, and put what comes back into `call`.

        Raises:
            FloodError, BrokenAnswerError, NotRunningError, SandboxDiedError, UnreachableError: see there.
            InfrastructureError: anything else that the service or the network did.
        """
        exchange = self._exchange = call.exchange = Exchange()
        try:
            await self.run_code(
                code,
                on_stdout=call.on_stdout,
                on_stderr=call.on_stderr,
                on_result=call.on_result,
                on_error=call.on_error,
                timeout=seconds + _SPARE_SECONDS,
                request_timeout=seconds + _SPARE_SECONDS,
            )
        except FloodError:
            raise
        except _MALFORMED as error:
            raise BrokenAnswerError(f"{type(error).__name__}: {error}"[:200]) from error
        except SandboxNotRunningException as error:
            raise NotRunningError(str(error)) from error
        except (TimeoutException, NotFoundException) as error:
            if exchange.status == _BAD_GATEWAY or isinstance(error, NotFoundException):
                raise NotRunningError(str(error)) from error
            raise SandboxDiedError(str(error)) from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(str(error)) from error
        except Exception as error:
            raise translated(error) from error
        finally:
            self._exchange = None
        if not exchange.finished:
            raise SandboxGoneError("E2B's answer ended before the code did; what it had computed is lost.")

    async def upload(self, path: str, content: bytes) -> str:
        """Write a file, relative to the home folder; gives its full path.

        Raises:
            NotRunningError, UnreachableError, InfrastructureError: as for `execute`.
        """
        try:
            return (await self.files.write(path, content)).path
        except (SandboxNotRunningException, SandboxNotFoundException) as error:
            raise NotRunningError(str(error)) from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise UnreachableError(str(error)) from error
        except Exception as error:
            raise translated(error) from error


def translated(error: Exception) -> InfrastructureError:
    """What an error of the SDK means to a caller; the key is in none of the messages."""
    said = f"{type(error).__name__}: {error}"[:300]
    if isinstance(error, InfrastructureError):
        return error
    if isinstance(error, AuthenticationException):
        return SandboxUnavailableError(
            f"E2B refused the key ({said}). Set E2B_API_KEY to a valid one; keys are at https://e2b.dev/dashboard."
        )
    if isinstance(error, SandboxNotFoundException):
        return SandboxGoneError(f"the E2B sandbox has ended ({said}).")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return SandboxGoneError(f"E2B can't be reached ({said}). Check the network, its proxy and E2B_DOMAIN.")
    return SandboxGoneError(f"E2B failed just now ({said}).")


class _Watched(httpx.AsyncBaseTransport):
    """Notes the head of an answer, and counts its body."""

    def __init__(self, inner: httpx.AsyncBaseTransport, exchange: Exchange) -> None:
        self._inner, self._exchange = inner, exchange

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        self._exchange.status = response.status_code
        if isinstance(response.stream, httpx.AsyncByteStream):
            response.stream = _Counted(response.stream, self._exchange)
        return response

    # The SDK's clients share the transport below, so it is never closed with one of them.


@dataclass
class _Counted(httpx.AsyncByteStream):
    inner: httpx.AsyncByteStream
    exchange: Exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self.inner:
            self.exchange.see(chunk)
            if self.exchange.received > MOST_BYTES:
                raise FloodError
            yield chunk

    async def aclose(self) -> None:
        await self.inner.aclose()

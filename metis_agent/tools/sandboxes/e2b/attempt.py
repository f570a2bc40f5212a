"""One attempt at a call: images in, the code, images out; once more where the remote sandbox was paused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from metis_agent.deadline import arun_in_thread
from metis_agent.tools.sandboxes.e2b.call import Call
from metis_agent.tools.sandboxes.e2b.client import NotRunningError
from metis_agent.tools.sandboxes.e2b.pictures import binding, image_file, shown_images
from metis_agent.tools.sandboxes.e2b.service import Remote, Service
from metis_agent.tools.sandboxes.limits import SandboxLimits
from metis_agent.tools.sandboxes.pictures import InputImage

__all__ = ["Attempt", "ProcessEndedError"]


class ProcessEndedError(Exception):
    """The process that runs the code ended, and its server said so."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """See the module's docstring. Keeps no time; whoever does cancels it."""

    service: Service
    remote: Remote
    call: Call
    """Takes what comes back."""
    limits: SandboxLimits

    async def run(self, code: str, seconds: float, images: Mapping[str, InputImage]) -> None:
        """Run code.

        Raises:
            ProcessEndedError: see there.
            Exception: what `RemoteSandbox.execute` and `Service` raise.
        """
        new = {name: image for name, image in images.items() if self.remote.images.get(name) != image}
        files = await self._load(new)
        try:
            await self.service.extend(self.remote)
            placed = await self._send(code, seconds, files)
        except NotRunningError:
            # Paused, perhaps. It did not run, so it may be sent again.
            await self.service.resume(self.remote)
            placed = await self._send(code, seconds, files)
        _check(self.call)
        if placed:
            self.remote.images.update({name: new[name] for name in files})
        if self.call.encoded:
            self.call.images, notes = await arun_in_thread(shown_images, self.call.encoded, self.limits)
            self.call.notes += notes

    async def _load(self, images: Mapping[str, InputImage]) -> dict[str, bytes]:
        files = {}
        for name, image in images.items():
            self.call.loading = name
            content, note = await arun_in_thread(image_file, name, image)
            if content is None:
                self.call.notes.append(note)
            else:
                files[name] = content
        self.call.loading = ""
        return files

    async def _send(self, code: str, seconds: float, files: Mapping[str, bytes]) -> bool:
        """Send images, then code; gives whether the images arrived."""
        problem = ""
        if files:
            paths = {name: await self.remote.sandbox.upload(f".metis/{name}.png", files[name]) for name in files}
            placing = Call(self.limits)
            lines = [binding(name, path) for name, path in paths.items()]
            await self.remote.sandbox.execute("\n".join(lines), placing, seconds)
            _check(placing)
            problem = placing.execution().traceback
            if problem:
                self.call.notes.append(f"{', '.join(files)}: not there. {problem.splitlines()[-1]}")
        await self.remote.sandbox.execute(code, self.call, seconds)
        return not problem


def _check(call: Call) -> None:
    if call.kernel_ended:
        raise ProcessEndedError

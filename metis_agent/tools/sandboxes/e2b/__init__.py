"""The python tool's sandbox in E2B's cloud, or in one that speaks its protocol.

- `sandbox`: `E2BSandbox`, which imports the SDK only when one is made, and `E2BSession`, which keeps the deadlines
- `service`: makes, extends and kills remote sandboxes, and one attempt at a call; on an event loop of its own
- `client`: the SDK's client, with its answers bounded and its errors sorted; what a call sent back, as an `Execution`

What was tested, and what not: the tests run the real SDK (e2b-code-interpreter 2.11, e2b 2.63) against a small
server on the same machine that speaks E2B's HTTP protocol and runs the code for real. E2B's own service was not
reached, so nothing here is a statement about its speed or its faults beyond what the SDK's source shows.
"""

from metis_agent.tools.sandboxes.e2b.sandbox import E2BSandbox, E2BSession

__all__ = ["E2BSandbox", "E2BSession"]

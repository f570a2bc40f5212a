"""The gate in front of an agent that people keep: middleware for `langchain.agents.create_agent`.

Needs the extra `langchain`. The rest of Metis does without it, so nothing else imports this package.
"""

from metis_agent.errors import MissingDependencyError

try:
    import langchain.agents.middleware  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        f"MetisGateMiddleware needs LangChain's create_agent, which can't be imported: {error}. "
        "Install it with `pip install 'langgraph-metis[langchain]'`, or use metis_agent.create_metis_agent."
    ) from error

from metis_agent.middleware.gate import MetisGateMiddleware

__all__ = ["MetisGateMiddleware"]

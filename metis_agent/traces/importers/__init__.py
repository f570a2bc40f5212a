"""One importer a format, each in a file; `metis_agent.traces.registry` names them."""

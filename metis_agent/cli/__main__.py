"""`python -m metis_agent.cli`, which is also how `accelerate launch --module` starts the command line."""

from metis_agent.cli import main

if __name__ == "__main__":
    main()

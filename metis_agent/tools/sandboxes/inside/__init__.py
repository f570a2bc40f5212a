"""What runs inside a sandbox: standard library only, never imported by the agent's own process at run time.

The host starts an interpreter with nothing but this package on its path. `template` waits, warm, and
forks a session for each request; `contain` closes the doors on that fork, with `linux` and `seccomp`; `session` runs
the code; `pictures` takes images in and out. `wire` and `paths` are also used by the host, so that both ends share one
definition.
"""

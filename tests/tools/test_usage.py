import pytest

from metis_agent.tools.instrumented import ToolUsage, UsageMeter


def test_the_meter_adds_up():
    meter = UsageMeter()
    assert meter.read() == ToolUsage()
    for number in range(100):
        meter.add("ok", seconds=number / 100, cost=0.5)
    meter.add("timeout", seconds=9.0, retries=2)
    meter.add("cached", seconds=99.0, cost=99.0)
    usage = meter.read()
    assert (usage.calls, usage.ok, usage.timeouts, usage.cached, usage.retries) == (102, 100, 1, 1, 2)
    assert (usage.seconds, usage.cost) == (pytest.approx(58.5), 50.0)
    assert (usage.seconds_p50, usage.seconds_p95) == (0.5, 0.95)
    meter.reset()
    assert meter.read() == ToolUsage()

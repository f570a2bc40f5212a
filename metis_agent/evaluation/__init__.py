"""How good are an agent and its gate: figures with intervals, thresholds with guarantees, drift, benchmarks."""

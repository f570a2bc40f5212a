"""Chat models that keep exact token ids and log-probabilities, so that training sees what was sampled."""

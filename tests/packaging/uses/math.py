"""Mathematical answers in another form."""

from metis_agent.judging.mathematics import MathVerifier
from metis_agent.types import Question

if __name__ == "__main__":  # the verifier has a process of its own
    verifier = MathVerifier(seconds=30)
    question = Question(id="q", text="?", answer=r"\frac{1}{2}", verifier="math")
    assert verifier(question, "0.5") is True
    assert verifier(question, "0.6") is False
    verifier.close()

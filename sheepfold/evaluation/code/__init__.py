"""Running generated programs, and HumanEval and HumanEval-X on top of it (docs/code-evaluation.md)."""

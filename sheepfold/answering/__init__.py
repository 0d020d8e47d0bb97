"""What a run made, ready to answer: one base in memory, many adapters by name."""
